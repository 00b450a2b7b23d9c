"""How far a benchmark is: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

try:
    from rich import progress as bar
except ImportError:  # lines will do
    bar = None  # type: ignore[assignment]


@contextmanager
def steps(total: int, title: str) -> Iterator[Callable[[str], None]]:
    """Yield what is called with a message as often as one of ``total`` steps is done."""
    if bar is None or not sys.stdout.isatty():
        done = iter(range(1, sys.maxsize))
        yield lambda message: print(f"{title} {next(done)}/{total}  {message}", flush=True)
        return
    columns = (
        bar.TextColumn("{task.fields[title]} {task.completed}/{task.total}"),
        bar.BarColumn(),
        bar.TimeElapsedColumn(),
        bar.TimeRemainingColumn(),
        bar.TextColumn("{task.description}"),
    )
    with bar.Progress(*columns) as live:
        task = live.add_task("", total=total, title=title)
        yield lambda message: live.update(task, advance=1, description=message)
