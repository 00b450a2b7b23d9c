"""The examples run as a reader would run them, on two CPU ranks, and do what they promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rtp_wrap import Plan

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SECONDS = 30

pytestmark = pytest.mark.skipif("RANK" in os.environ, reason="starts ranks of its own")


def on_two_ranks(script: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run an example under torchrun without GPUs; its output lines come back as text."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    return run(*torchrun, str(EXAMPLES / script), *options)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def losses(output: str) -> list[float]:
    return [float(number) for number in re.findall(r" loss (\d+\.\d+)", output)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text"
    file.write_bytes(b"for every rank in the ring: pass the tile on\n" * 400)
    return file


def test_quickstart_learns() -> None:
    done = on_two_ranks("quickstart.py")
    assert done.returncode == 0, done.stderr
    seen = losses(done.stdout)
    assert len(seen) == 2 * 20
    assert seen[-1] < 0.5 * seen[0]


def test_readme_shows_the_quickstart() -> None:
    code = (EXAMPLES / "quickstart.py").read_text().split('"""', 2)[2].strip()
    assert code in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("flags", [(), ("--inplace",)])
def test_train_learns_saves_and_writes(flags: tuple[str, ...], text: Path, tmp_path: Path) -> None:
    out = tmp_path / "checkpoint"
    options = ("--data", str(text), "--out", str(out), "--sample-bytes", "20", *flags)
    done = on_two_ranks("train.py", "--preset", "tiny", *options)
    assert done.returncode == 0, done.stderr
    seen = losses(done.stdout)
    assert seen[-1] < 2.0 < 5.0 < seen[0]  # 5.545 is guessing; the text is one line over and over
    assert "all equal bit for bit" in done.stdout
    assert (out / ".metadata").exists()
    assert len(list(out.glob("*.distcp"))) == 2  # both ranks wrote
    assert re.search(r"--- sample.*---\ndef ", done.stdout)
    ratio = re.search(r"together .* (\d\.\d+)$", done.stdout, re.MULTILINE)
    assert ratio is not None
    assert 0.5 <= float(ratio[1]) < 0.6  # half, and what is too small to shard


def test_train_starts_its_own_ranks(text: Path, tmp_path: Path) -> None:
    options = ("--steps", "2", "--sample-bytes", "1", "--out", str(tmp_path / "checkpoint"))
    done = run(str(EXAMPLES / "train.py"), "--preset", "tiny", "--data", str(text), *options)
    assert done.returncode == 0, done.stderr
    assert "2 cpu ranks" in done.stdout


def test_train_names_what_a_short_text_lacks(tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_bytes(b"too short")
    done = run(str(EXAMPLES / "train.py"), "--preset", "tiny", "--data", str(short))
    assert done.returncode == 2
    assert "the text has 9 bytes" in done.stderr
    assert "--seq-len" in done.stderr
    assert "Traceback" not in done.stderr


def test_plan_shows_an_8b_model_and_saves_it(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    done = run(str(EXAMPLES / "plan.py"), "--ranks", "8", "--tokens", "512", "--json", str(file))
    assert done.returncode == 0, done.stderr
    assert "rank 0 of 8" in done.stdout
    assert re.search(r"blocks\.\*\.gate\.weight +32 +Linear +Rotate", done.stdout)
    assert Plan.from_json(file.read_text()).world_size == 8
