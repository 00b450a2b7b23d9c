"""A scaling study: what was measured, and what the model of communication makes of it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rtp_wrap
from harness import chart, communication, link, pulling, report
from harness.communication import Compute, Fabric, Network
from harness.pulling import Peers
from harness.report import Table
from harness.strategies import STRATEGIES, Setting, rtp_options
from harness.trial import Trial
from rtp_wrap import Plan

#: The strategies whose steps have a formula; that of "rtp" is of peers, in one node.
FORMULAS = ("rtp", "rtp-ring", "fsdp")


@dataclass
class Study:
    """One model's measurements; all of them are JSON's.

    ``runs`` have a "strategy", its "ranks", a "round", and either the "seconds" of its steps (each
    the slowest rank's) or a "failure". ``calibration`` is empty until it is complete: the "ranks"
    of "hops" and "gathers" (bytes and seconds), the seconds "beside" (see ``link``), and those of
    the "optimizer" and of the "floor" of a product; where ranks are peers also "pulls", the seconds
    "beside a pull", and what is "copied" in how many. ``source`` is the header of the file that
    they were read from.
    """

    trial: Trial
    runs: list[dict[str, Any]] = field(default_factory=list)
    calibration: dict[str, Any] = field(default_factory=dict)
    source: dict[str, str] | None = None
    _plans: dict[int, Plan] = field(default_factory=dict, init=False)

    @classmethod
    def read(cls, file: Path) -> Study:
        """What ``publish`` wrote. Raises ``ValueError`` for a file that nothing follows from."""
        try:
            written = json.loads(file.read_text(encoding="utf-8"))
            results = written.pop("results")
            trial = results["trial"]
            trial["setting"] = Setting(**trial["setting"])
            study = cls(Trial(**trial), results["runs"], results["calibration"], written)
        except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{file} is no scaling.json of this benchmark: {error!r}") from error
        if not study.complete:
            raise ValueError(f"{file} is of a run without both steps on one rank: run it again")
        return study

    @property
    def complete(self) -> bool:
        """Whether anything can be predicted."""
        alone = [self.step(strategy, 1) for strategy in ("single", "rtp")]
        return bool(self.calibration) and None not in alone

    def step(self, strategy: str, ranks: int) -> float | None:
        """Median seconds of all steps of all rounds; ``None`` if there are none."""
        taken = [t for run in self._runs(strategy, ranks) for t in run.get("seconds", ())]
        return statistics.median(taken) if taken else None

    def fabric(self) -> Fabric:
        """This machine's."""
        gathers, step = self.calibration["gathers"], communication.RING_STEP
        collective = communication.fit(gathers)
        steps = (self.calibration["ranks"] - 1) * step
        return Fabric(
            hop=communication.fit(self.calibration["hops"]),
            collective=communication.Link(
                max(0.0, collective.latency - steps), collective.per_byte
            ),
            ring_step=step,
            kept=link.kept(*self.calibration["beside"]),
        )

    def peers(self) -> Peers | None:
        """This machine's, if its ranks can be."""
        if "pulls" not in self.calibration:
            return None
        nbytes, taken = self.calibration["copied"]
        return Peers(
            pull=communication.fit(self.calibration["pulls"]),
            kept=link.kept(*self.calibration["beside a pull"]),
            per_copied_byte=taken / (2 * nbytes),
        )

    def compute(self, strategy: str) -> Compute:
        """One rank's step: of ``rtp_wrap`` its own, with what it does on the host; else plain."""
        step = self.step("single" if strategy == "fsdp" else "rtp", 1)
        assert step is not None
        spec, trial = self.trial.spec(), self.trial
        return Compute(
            step=step,
            optimizer=self.calibration["optimizer"],
            floor=self.calibration["floor"],
            tokens=trial.tokens,
            attention_flops=6.0 * spec.layers * trial.tokens * trial.seq_len * spec.dim,
        )

    def plan(self, ranks: int) -> Plan:
        """What ``rtp_wrap`` makes of the model on so many ranks."""
        if ranks in self._plans:
            return self._plans[ranks]
        setting = self.trial.setting
        model = self.trial.spec().build().to(setting.dtype)
        plan = rtp_wrap.plan(model, world_size=ranks, **rtp_options(setting, "ring"))
        return self._plans.setdefault(ranks, plan)

    def formula(self, strategy: str, ranks: int, fabric: Fabric) -> float | None:
        """Seconds of a step; ``strategy`` is one of ``FORMULAS``.

        Of peers within one node, whatever ``ranks`` are; ``None`` where there are none.
        """
        plan, compute = self.plan(ranks), self.compute(strategy)
        if strategy == "rtp":
            host = self.peers()
            return None if host is None else pulling.peers(plan, compute, fabric, host)
        return (communication.fsdp if strategy == "fsdp" else communication.ring)(
            plan, compute, fabric
        )

    def predict(self, network: Network, counts: Sequence[int]) -> list[dict[str, Any]]:
        """Per number of ranks: "nodes", and seconds of a step of each of ``FORMULAS`` and "hybrid".

        Peers are in one node, and ``None`` elsewhere. "hybrid" is ``None`` within one node, and
        where nodes would not be full. "hops" and "bytes" are what a rank of the ring sends.
        """
        within, size = self.fabric(), network.gpus_per_node
        rows = []
        for ranks in counts:
            nodes = -(-ranks // size)
            fabric = within if nodes == 1 else within.between(network, ports=size)
            seconds = {name: self.formula(name, ranks, fabric) for name in FORMULAS}
            hybrid = None
            if nodes > 1:
                seconds["rtp"] = None
            if nodes > 1 and ranks % size == 0:
                node = self.formula("rtp", size, within) or self.formula("rtp-ring", size, within)
                assert node is not None
                hybrid = communication.hybrid(node, self.plan(size), within, network, nodes)
            sent = communication.traffic(self.plan(ranks))
            row = {"ranks": ranks, "nodes": nodes, "hops": sent.hops, "bytes": sent.nbytes}
            rows.append({**row, **seconds, "hybrid": hybrid})
        return rows

    def publish(self, out: Path, network: Network, counts: Sequence[int]) -> list[Table]:
        """Write JSON, Markdown and, if it can predict, SVG into ``out``; returns the tables.

        They are called ``scaling``, or ``prediction`` if all measurements are another run's.
        """
        name = "scaling" if self.source is None else "prediction"
        data = {
            "trial": self.trial.as_json(),
            "runs": self.runs,
            "calibration": self.calibration,
            "measured by": self.source,
        }
        tables = [self._measured()]
        text = ""
        if self.source is not None:
            text = "Measured by another run:\n\n"
            text += "".join(f"- {key}: `{value}`\n" for key, value in self.source.items()) + "\n"
        if self.complete:
            rows = self.predict(network, counts)
            data.update({"network": vars(network), "predicted": rows})
            tables += [self._calibrated(), self._predicted(rows)]
            self._draw(out / f"{name}.svg", rows)
        text += "\n".join(table.markdown() for table in tables)
        if self.complete:
            text += "\n" + _assumptions(network)
        report.write(out, name, data=data, markdown=text)
        return tables

    def _runs(self, strategy: str, ranks: int) -> list[dict[str, Any]]:
        return [r for r in self.runs if (r["strategy"], r["ranks"]) == (strategy, ranks)]

    def _measured(self) -> Table:
        trial = self.trial
        sizes = ", ".join(f"{key} {value}" for key, value in trial.changes.items())
        title = f"Measured: {trial.model}{f' ({sizes})' if sizes else ''}, "
        title += f"{trial.setting.precision}, {trial.batch_size} × {trial.seq_len} tokens per rank"
        columns = ("strategy", "ranks", "ms/step", "of rounds", "tokens/s per rank", "efficiency")
        table = Table(title, (*columns, "formula, ms", "its error"))
        alone = self.step("single", 1)
        for strategy, ranks in dict.fromkeys((r["strategy"], r["ranks"]) for r in self.runs):
            label, step = STRATEGIES[strategy].label, self.step(strategy, ranks)
            if step is None:
                failure = self._runs(strategy, ranks)[-1]["failure"]
                table.add(label, str(ranks), failure, *[None] * 5)
                continue
            rounds = [
                statistics.median(run["seconds"])
                for run in self._runs(strategy, ranks)
                if "seconds" in run
            ]
            predicted = None
            if self.complete and strategy in FORMULAS and ranks > 1:
                predicted = self.formula(strategy, ranks, self.fabric())
            table.add(
                label,
                str(ranks),
                _ms(step),
                f"{_ms(min(rounds))} – {_ms(max(rounds))}",
                f"{trial.tokens / step:.0f}",
                None if alone is None else f"{alone / step:.3f}",
                None if predicted is None else _ms(predicted),
                None if predicted is None else f"{predicted / step - 1:+.1%}",
            )
        return table

    def _calibrated(self) -> Table:
        """The formula's numbers."""
        fabric, given = self.fabric(), self.calibration
        table = Table(
            f"What the formula goes by, measured on {given['ranks']} ranks and on one",
            ("what", "time", "rate", "largest misfit"),
        )
        host = self.peers()
        links = [
            ("hop of the ring", fabric.hop, given["hops"]),
            ("all-gather", communication.fit(given["gathers"]), given["gathers"]),
        ]
        if host is not None:
            links.insert(0, ("pull from peers", host.pull, given["pulls"]))
        for what, each, samples in links:
            rate = f"{1e-9 / each.per_byte:.3g} GB/s" if each.per_byte else None
            table.add(what, _us(each.latency), rate, f"{each.misfit(samples):.0%}")
        hop, products, both = given["beside"]
        table.add("products beside a hop", _us(both), f"{fabric.kept:.0%} of theirs alone", None)
        table.add("the same products alone", _us(products), None, None)
        table.add("that hop alone", _us(hop), None, None)
        if host is not None:
            pull, products, both = given["beside a pull"]
            table.add("products beside a pull", _us(both), f"{host.kept:.0%} of theirs alone", None)
            table.add("the same products alone", _us(products), None, None)
            table.add("that pull alone", _us(pull), None, None)
            copied, taken = given["copied"]
            rate = f"{2e-9 * copied / taken:.3g} GB/s read and written"
            table.add("copy in own memory", _us(taken), rate, None)
        table.add("optimizer, one rank", _us(given["optimizer"]), None, None)
        table.add("product of the narrowest tile", _us(given["floor"]), None, None)
        return table

    def _predicted(self, rows: Sequence[dict[str, Any]]) -> Table:
        table = Table(
            "Predicted",
            (
                "ranks",
                *("nodes", "GB sent per rank", "hops"),
                *("rtp by peers, ms", "efficiency"),
                *("rtp by hops, ms", "efficiency"),
                *("FSDP2 per block, ms", "efficiency"),
                *("rtp in nodes × data parallel, ms", "efficiency"),
            ),
        )
        alone = self.step("single", 1)
        assert alone is not None
        for row in rows:
            cells: list[str | None] = [
                f"{row['nodes']}",
                f"{row['bytes'] / 1e9:.3g}",
                f"{row['hops']}",
            ]
            for name in (*FORMULAS, "hybrid"):
                seconds = row[name]
                known = seconds is not None
                cells += [_ms(seconds), f"{alone / seconds:.3f}"] if known else [None, None]
            table.add(str(row["ranks"]), *cells)
        return table

    def _draw(self, file: Path, rows: Sequence[dict[str, Any]]) -> None:
        alone = self.step("single", 1)
        assert alone is not None
        labels = {
            "rtp": "rtp_wrap by peers, formula",
            "rtp-ring": "rtp_wrap by hops, formula",
            "fsdp": "FSDP2 per block, formula",
            "hybrid": "rtp_wrap in nodes × data parallel, formula",
        }
        curves = {
            label: [(row["ranks"], alone / row[name]) for row in rows if row[name] is not None]
            for name, label in labels.items()
        }
        curves = {label: curve for label, curve in curves.items() if curve}
        points: dict[str, list[tuple[int, float]]] = {}
        for strategy, ranks in dict.fromkeys((r["strategy"], r["ranks"]) for r in self.runs):
            if (step := self.step(strategy, ranks)) is not None:
                label = f"{STRATEGIES[strategy].label}, measured"
                points.setdefault(label, []).append((ranks, alone / step))
        chart.lines(file, curves, points, ylabel="tokens/s per rank, of one rank's")


def _assumptions(network: Network) -> str:
    step, latency = communication.RING_STEP * 1e6, network.latency * 1e6
    return (
        f"The formulas are in `benchmarks/harness/communication.py` and `pulling.py`. They have "
        f"not seen the measured steps on more than one rank. Assumed, not measured: nodes of "
        f"{network.gpus_per_node} with the measured link between all pairs; between nodes "
        f"{network.gbps:g} Gbit/s per GPU and {latency:g} µs more latency; a step of a "
        f"collective's ring takes {step:g} µs in a node and that latency between nodes. FSDP2's "
        f"formula hides its collectives as well as can be, without slowing down products. Data "
        f"parallel between nodes needs an outer mesh of replicas around rtp_wrap; its average "
        f"hides behind nothing.\n"
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs"
