"""Charts as SVG; without matplotlib there are none, and a line says so."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.report import replace

try:
    import matplotlib
    from matplotlib.figure import Figure
except ImportError:
    matplotlib = None  # type: ignore[assignment]

Points = Sequence[tuple[int, float]]


def bars(
    out: Path,
    groups: Sequence[str],
    series: Mapping[str, Sequence[float | str | None]],
    *,
    ylabel: str,
    line: tuple[str, float] | None = None,
) -> None:
    """Write ``out``, an SVG: for each of ``groups`` one bar per series, all of them in ``ylabel``.

    A series has one number per group, or a text that stands in its place: "OOM" for ``None``.
    ``line`` is the label and the height of a horizontal line.
    """
    if not _can_draw(out):
        return
    with _drawing(out, (max(5.0, 1.3 * len(groups)), 3.6), ylabel) as axes:
        width = 0.8 / len(series)
        for index, (label, values) in enumerate(series.items()):
            places = [group + (index + 0.5) * width - 0.4 for group in range(len(groups))]
            heights = [value if isinstance(value, int | float) else 0.0 for value in values]
            axes.bar(places, heights, width, label=label)
            for place, height, value in zip(places, heights, values, strict=True):
                text = f"{value:.3g}" if isinstance(value, int | float) else value or "OOM"
                axes.annotate(
                    text, (place, height), (0, 2), textcoords="offset points", ha="center"
                )
        if line is not None:
            axes.axhline(line[1], color="black", linestyle="--", linewidth=1, label=line[0])
        axes.set_xticks(range(len(groups)), groups)
        if len(series) > 1 or line is not None:
            axes.legend(frameon=False)


def lines(
    out: Path, curves: Mapping[str, Points], points: Mapping[str, Points], *, ylabel: str
) -> None:
    """Write ``out``: ``curves`` as lines and ``points`` as marks over ranks in powers of two."""
    if not _can_draw(out):
        return
    with _drawing(out, (7, 4), ylabel) as axes:
        for label, line in curves.items():
            axes.plot(*zip(*line, strict=True), label=label, linewidth=1.5)
        for label, marks in points.items():
            axes.plot(*zip(*marks, strict=True), "o", label=label, markersize=5)
        ranks = sorted({x for line in (*curves.values(), *points.values()) for x, _ in line})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, map(str, ranks))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("ranks")
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def _can_draw(out: Path) -> bool:
    if matplotlib is None:
        print(f"matplotlib is not installed: no {out.name}", flush=True)
    return matplotlib is not None


@contextmanager
def _drawing(out: Path, size: tuple[float, float], ylabel: str) -> Iterator[Any]:
    """Axes of ``size`` (inches); what has been drawn on them at the end is written to ``out``."""
    # Equal numbers make equal files: text as text, no random ids, no date.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": out.name}):
        figure = Figure(figsize=size)
        axes = figure.subplots()
        axes.set_ylabel(ylabel)
        axes.spines[["top", "right"]].set_visible(False)
        yield axes
        drawing = io.StringIO()
        figure.savefig(drawing, format="svg", bbox_inches="tight", metadata={"Date": None})
    replace(out, drawing.getvalue())
