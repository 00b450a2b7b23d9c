"""A process whose streams wait for ever for another rank is ended, with a message; no other one."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.scripts import run

#: Each case is a process. Prints how each one ended: 0, or minus the signal that ended it.
CASES = """
import os, time
from datetime import timedelta
from unittest.mock import patch
import torch
from rtp_wrap.transport.watchdog import Watchdog

TIMEOUT = 1.0
zeros = torch.zeros

def watchdog():
    # Pinned memory needs a GPU. What a stream writes there, a case writes itself.
    with patch.object(torch, "zeros", lambda *a, pin_memory, **k: zeros(*a, **k)):
        return Watchdog(2, timedelta(seconds=TIMEOUT), rank=3)

def waits(done, enqueued):
    dog = watchdog()
    dog.done[1], dog.enqueued[1] = done, enqueued
    time.sleep(2 * TIMEOUT if done % 2**32 == enqueued % 2**32 else 20 * TIMEOUT)

def gets_on(lanes):
    "Always behind, but never at the same place for long."
    dog = watchdog()
    dog.enqueued[:] = [99, 99]
    for count in range(10):
        dog.done[count % lanes] = count + 1
        time.sleep(TIMEOUT / 5)

def is_gone():
    "Nobody is left to wait once the memory is freed."
    dog = watchdog()
    dog.enqueued[0] = 1
    thread = dog._thread
    del dog
    thread.join(TIMEOUT)
    assert not thread.is_alive()

cases = {
    "behind": lambda: waits(4, 5),
    "behind from the start": lambda: waits(0, 1),
    "behind over the wrap-around": lambda: waits(-1, 2**32),
    "behind beyond it": lambda: waits(6, 2**32 + 7),
    "idle": lambda: waits(5, 5),
    "idle where the sign turns": lambda: waits(-(2**31), 2**31),
    "idle at the wrap-around": lambda: waits(-1, 2**32 - 1),
    "idle beyond it": lambda: waits(7, 2**32 + 7),
    "gets on in one lane": lambda: gets_on(1),
    "gets on in turn": lambda: gets_on(2),
    "gone": is_gone,
}
processes = {}
for name, case in cases.items():
    processes[name] = os.fork()
    if not processes[name]:
        case()
        os._exit(0)
for name, process in processes.items():
    print(f"{name}: {os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])}")
"""


@pytest.mark.skipif("RANK" in os.environ, reason="one process is enough")
def test_only_a_process_that_gets_no_further_is_ended(tmp_path: Path) -> None:
    script = tmp_path / "cases.py"
    script.write_text(CASES)
    done = run(str(script))
    assert done.code == 0, done.errors
    codes = dict(line.split(": ") for line in done.output.splitlines())
    assert len(codes) == 11
    for name, code in codes.items():
        assert int(code) == (-signal.SIGABRT if name.startswith("behind") else 0), done
    assert done.errors.count("[rtp_wrap] rank 3 has waited 1 s for a tile of another rank") == 4
