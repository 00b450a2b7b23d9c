"""Tables for the screen and for Markdown, and results that are on disk after every trial."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import hardware

try:
    import rich
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable
except ImportError:  # the Markdown is readable, too
    rich = None  # type: ignore[assignment]


class Table:
    """Rows of text under ``columns``; the first column is the rows' names."""

    def __init__(self, title: str, columns: Sequence[str]) -> None:
        self.title = title
        self.columns = tuple(columns)
        self.rows: list[tuple[str, ...]] = []

    def add(self, *cells: str | None) -> None:
        """A row of one cell per column; ``None`` is what there is no number for.

        Raises ``ValueError`` for any other number of cells.
        """
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells for the {len(self.columns)} {self.columns}")
        self.rows.append(tuple("–" if cell is None else cell for cell in cells))

    def rich(self) -> RichTable:
        """For a terminal: a narrow one gets numbers in two lines, not parts of numbers."""
        table = RichTable(title=self.title, box=SIMPLE_HEAD, pad_edge=False)
        name, *numbers = self.columns
        table.add_column(name, no_wrap=True)
        for column in numbers:
            table.add_column(column, justify="right", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """With the title as a heading; ends in a line break."""
        align = ["---", *["---:"] * (len(self.columns) - 1)]
        lines = [_line(row) for row in (self.columns, align, *self.rows)]
        return f"## {self.title}\n\n" + "\n".join(lines) + "\n"


def show(table: Table) -> None:
    """On the screen: with rich on a terminal, as Markdown elsewhere or without rich."""
    if rich is not None and sys.stdout.isatty():
        rich.print(table.rich())
    else:
        print(table.markdown(), flush=True)


def write(out: Path, name: str, *, data: Any, markdown: str) -> None:
    """Replace ``name.json`` and ``name.md`` in the directory ``out``, which is made if need be.

    Both begin with ``hardware.describe()``; the rest is ``data`` (what JSON has) under the key
    "results", and ``markdown``.
    """
    run = hardware.describe()
    header = "".join(f"- {key}: `{value}`\n" for key, value in run.items())
    replace(out / f"{name}.json", json.dumps({**run, "results": data}, indent=2) + "\n")
    replace(out / f"{name}.md", f"{header}\n{markdown}")


def replace(file: Path, text: str) -> None:
    """Write all of ``file``, or leave it as it was."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(file)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
