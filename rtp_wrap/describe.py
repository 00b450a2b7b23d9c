"""A plan as text: one line for every kind of parameter, then what a rank needs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rtp_wrap.policy import shard_dim

if TYPE_CHECKING:
    from rtp_wrap.planned import Plan, PlannedParameter


def describe(plan: Plan) -> str:
    """Layers that differ by a number alone are one line, with their count and their sums."""
    groups: dict[object, list[PlannedParameter]] = {}
    for each in plan.parameters:
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", each.fqn)
        groups.setdefault((pattern, each.shape, each.dtype, each.home, each.rule), []).append(each)
    rows = []
    for (pattern, *_), members in groups.items():  # type: ignore[misc]
        one = members[0]
        traffic = [plan.traffic(each) for each in members]
        rows.append(
            (
                pattern if len(members) > 1 else one.fqn,
                len(members),
                one.uses[0].kind,
                type(one.home).__name__,
                shard_dim(one.home),
                _shape(one.shape),
                _shape(one.shard_shape(plan.world_size)),
                str(one.dtype).removeprefix("torch."),
                size(sum(each.shard_bytes(plan.world_size) for each in members)),
                sum(each.hops for each in traffic) or None,
                size(sum(each.nbytes for each in traffic)),
                one.rule + "".join(f", tied to {use.fqn}" for use in one.uses[1:]),
            )
        )
    header = [
        *("parameter", "×", "kind", "strategy", "dim", "shape", "shard"),
        *("dtype", "bytes", "hops", "sent", "chosen by"),
    ]
    parts = [table(header, rows, right=("×", "dim", "bytes", "hops", "sent")), _totals(plan)]
    if plan.activation_bytes is not None and plan.sites is not None:
        shared = _shared_inputs(plan)
        parts.append(
            f"{len(plan.sites)} sites; {sum(map(len, shared))} of them share an input with another "
            f"({len(shared)} inputs); {len(plan.pairs)} pairs of layers with only pointwise "
            f"operations between them"
        )
        if plan.opaque:
            parts.append(
                f"not traced inside, so their activations are not counted: {', '.join(plan.opaque)}"
            )
        if plan.outside:
            parts.append(f"used outside of their modules: {', '.join(plan.outside)}")
    return "\n\n".join(parts)


def _totals(plan: Plan) -> str:
    whole = sum(each.nbytes for each in plan.parameters)
    trained = sum(each.nbytes for each in plan.parameters if each.requires_grad)
    rows: list[tuple[object, ...]] = [
        ("parameters", size(plan.parameter_bytes()), size(whole)),
        ("gradients", size(plan.gradient_bytes()), size(trained)),
        ("Adam's moments", size(plan.adam_bytes()), size(2 * trained)),
        (f"staging ({plan.transport})", size(plan.staging_bytes), None),
        ("gathered at a time, at most", size(plan.gathered_bytes), None),
    ]
    if plan.activation_bytes is not None:
        activations = size(plan.activation_bytes)
        rows.append(("activations of the example inputs", activations, activations))
    total = plan.total_traffic()
    rows.append(("sent in a forward and backward", size(total.nbytes), None))
    rows.append(("in hops", total.hops, None))
    rings = "" if plan.replicas == 1 else f"{plan.replicas} rings of "
    header = ("bytes", f"rank 0 of {rings}{plan.world_size}", "unsharded")
    return table(header, rows, right=header[1:])


def _shared_inputs(plan: Plan) -> list[list[str]]:
    """Sites that take the same tensor, in groups of two or more."""
    readers: dict[str, list[str]] = {}
    for site in plan.sites or ():
        readers.setdefault(site.reads, []).append(site.fqn)
    return [each for each in readers.values() if len(each) > 1]


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def table(
    header: Sequence[str], rows: Sequence[Sequence[object]], right: Sequence[str] = ()
) -> str:
    """Columns of even width under ``header``; those named in ``right`` are flush right."""
    cells = [list(header), *[["" if cell is None else str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for row in cells:
        parts = [
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(header, row, widths, strict=True)
        ]
        lines.append("  ".join(parts).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def size(nbytes: float) -> str:
    """Bytes for people, in binary units with three digits: ``1.50 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1000 or unit == "GiB":
            break
        nbytes /= 1024
    digits = 0 if unit == "B" else 2 if nbytes < 10 else 1 if nbytes < 100 else 0
    return f"{nbytes:.{digits}f} {unit}"
