"""Bar charts as SVG; without matplotlib there are none, and a line says so."""

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
    if matplotlib is None:
        print(f"matplotlib is not installed: no {out.name}", flush=True)
        return
    # Equal numbers make equal files: text as text, no random ids, no date.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": out.name}):
        figure = Figure(figsize=(max(5.0, 1.3 * len(groups)), 3.6))
        axes = figure.subplots()
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
        axes.set_ylabel(ylabel)
        axes.spines[["top", "right"]].set_visible(False)
        if len(series) > 1 or line is not None:
            axes.legend(frameon=False)
        drawing = io.StringIO()
        figure.savefig(drawing, format="svg", bbox_inches="tight", metadata={"Date": None})
    replace(out, drawing.getvalue())
