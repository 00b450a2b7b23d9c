"""Run the repository's scripts as a user would, but in processes that have imported torch already.

They are forked from the server that the pool of ranks has, too: most of a short script's time would
be the imports of its ranks.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.multiprocessing
from torch.distributed import TCPStore

from tests.ranks.worker import HOST, forkserver

ROOT = Path(__file__).parents[1]
SECONDS = 60.0


class Done(NamedTuple):
    """Of all its processes: the first exit code that is not 0, what they printed, and errors."""

    code: int
    output: str
    errors: str


class Script:
    """A script that runs: on ``ranks`` CPU ranks as torchrun starts them, or (0) as one process.

    Ranks that a benchmark forks from a server are forked from the script itself, if it is not to
    have a ``server``: starting one and importing everything there takes longer than most scripts.
    """

    def __init__(
        self,
        script: str,
        *arguments: object,
        ranks: int = 0,
        cwd: Path | None = None,
        server: bool = False,
    ) -> None:
        self._files = [tempfile.NamedTemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
        environment = {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
        paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
        environment["PYTHONPATH"] = os.pathsep.join(paths)  # for what it starts and does not fork
        if ranks:
            # As torchrun does: the store is the parent's, all ranks are its clients.
            self._store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
            environment |= {"MASTER_ADDR": HOST, "MASTER_PORT": str(self._store.port)}
            environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": str(ranks)}
            environment |= {"LOCAL_WORLD_SIZE": str(ranks)}
        context = forkserver()
        self._processes = []
        for rank in range(max(1, ranks)):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks else {}
            names = [file.name for file in self._files]
            command = [str(ROOT / script), *map(str, arguments)]
            target = (command, os.environ | environment | own, cwd or Path.cwd(), names, server)
            process: Any = context.Process(target=_main, args=target)
            process.start()
            self._processes.append(process)

    def __enter__(self) -> Script:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for process in self._processes:
            if process.is_alive():
                with contextlib.suppress(ProcessLookupError):  # has hardly begun
                    os.killpg(process.pid, signal.SIGKILL)  # also what it has forked
            process.kill()
            process.join()
        for file in self._files:
            file.close()

    def interrupt(self) -> None:
        """What Ctrl-C does: every process gets the signal."""
        for process in self._processes:
            os.kill(process.pid, signal.SIGINT)

    def output(self) -> str:
        """What has been printed so far."""
        return Path(self._files[0].name).read_text()

    def wait_for(self, text: str) -> None:
        """Until this has been printed. Raises ``TimeoutError`` if that takes too long."""
        deadline = time.monotonic() + SECONDS
        while text not in self.output():
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {text!r}: {self._errors()}\n{self.output()}")
            time.sleep(0.05)

    def wait(self, seconds: float = SECONDS) -> Done:
        """Raises ``TimeoutError`` if it takes longer."""
        deadline = time.monotonic() + seconds
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                raise TimeoutError(f"no end in {seconds:g} s: {self._errors()}\n{self.output()}")
        codes = [process.exitcode for process in self._processes]
        return Done(next((code for code in codes if code), 0), self.output(), self._errors())

    def _errors(self) -> str:
        return Path(self._files[1].name).read_text()


def run(script: str, *arguments: object, **options: Any) -> Done:
    """Run ``script``, a path from the root of the repository, to its end; options of ``Script``."""
    with Script(script, *arguments, **options) as running:
        return running.wait()


def _main(
    command: list[str], environ: Mapping[str, str], cwd: Path, files: list[str], server: bool
) -> None:
    os.setpgid(0, 0)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(cwd)
    for file, descriptor in zip(files, (1, 2), strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    if not server:
        fork = multiprocessing.get_context("fork")
        torch.multiprocessing.get_context = lambda method: fork  # type: ignore[assignment]
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", 1) for descriptor in (1, 2))
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")
