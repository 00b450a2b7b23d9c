"""Start a script again, once per rank; and how such a rank ends."""

from __future__ import annotations

import os
import sys
import time

import torch
import torch.distributed as dist

#: Seconds that Gloo's threads have to let go of what they hold.
GOODBYE = 0.2


def launch(script: str, ranks: int | None = None) -> None:
    """Run ``script`` with this process' arguments on every GPU, or on two CPU ranks; then exit.

    Returns at once in a process that is already a rank, whoever started it.
    """
    if "RANK" in os.environ:
        return
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    ranks = ranks or torch.cuda.device_count() or 2
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    try:
        torchrun(["--standalone", f"--nproc-per-node={ranks}", script, *sys.argv[1:]])
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
    except ChildFailedError as failed:  # the rank itself has printed why
        sys.exit(failed.get_first_failure()[1].exitcode)
    sys.exit()


def leave() -> None:
    """Leave the process group, as the last thing a rank does; all ranks do."""
    on_gloo = dist.get_backend() == "gloo"
    dist.barrier()  # nobody hangs up while another still reads
    dist.destroy_process_group()
    if on_gloo:
        # Gloo's threads free the tensors of a collective a moment after it is over. They need the
        # interpreter for that; if it has ended by then, the process aborts.
        time.sleep(GOODBYE)
