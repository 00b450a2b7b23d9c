"""Curves over the number of ranks as SVG, with measured points; see ``chart`` for bars."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.report import replace

try:
    import matplotlib
    from matplotlib.figure import Figure
except ImportError:
    matplotlib = None  # type: ignore[assignment]

Points = Sequence[tuple[int, float]]


def lines(
    out: Path, curves: Mapping[str, Points], points: Mapping[str, Points], *, ylabel: str
) -> None:
    """Write ``out``: ``curves`` as lines and ``points`` as marks over ranks in powers of two."""
    if matplotlib is None:
        print(f"matplotlib is not installed: no {out.name}", flush=True)
        return
    # Equal numbers make equal files: text as text, no random ids, no date.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": out.name}):
        figure = Figure(figsize=(7, 4))
        axes = figure.subplots()
        for label, line in curves.items():
            axes.plot(*zip(*line, strict=True), label=label, linewidth=1.5)
        for label, marks in points.items():
            axes.plot(*zip(*marks, strict=True), "o", label=label, markersize=5)
        ranks = sorted({x for line in (*curves.values(), *points.values()) for x, _ in line})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, map(str, ranks))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("ranks")
        axes.set_ylabel(ylabel)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        drawing = io.StringIO()
        figure.savefig(drawing, format="svg", bbox_inches="tight", metadata={"Date": None})
    replace(out, drawing.getvalue())
