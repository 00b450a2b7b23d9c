"""Command-line options that scripts share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

from harness.strategies import PRECISIONS, Setting

Number = TypeVar("Number", int, float)


def positive(kind: Callable[[str], Number]) -> Callable[[str], Number]:
    """An option's ``type``: a number above 0."""

    def parse(text: str) -> Number:
        number = kind(text)
        if not 0 < number < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return number

    parse.__name__ = kind.__name__  # argparse names it where the text is no number at all
    return parse


def add_trial(parser: argparse.ArgumentParser) -> None:
    """What every trial of a script has in common; ``setting`` makes sense of some of it."""
    add = parser.add_argument
    add(
        "--batch-size",
        type=positive(int),
        default=1,
        help="sequences per rank; default: %(default)s",
    )
    add("--seq-len", type=positive(int), default=1024, help="default: %(default)s")
    add("--precision", choices=PRECISIONS, default="fp32", help="default: %(default)s")
    add("--checkpointing", action="store_true", help="compute blocks again in backward")
    add("--staging-mib", type=positive(int), help="for tiles in flight; default: rtp_wrap's")
    add(
        "--timeout", type=positive(float), default=600.0, help="of a trial, s; default: %(default)s"
    )


def setting(arguments: argparse.Namespace) -> Setting:
    """How models are trained, by ``add_trial``'s options."""
    return Setting(
        precision=arguments.precision,
        checkpointing=arguments.checkpointing,
        staging_mib=arguments.staging_mib,
    )


def describe(arguments: argparse.Namespace) -> str:
    """``add_trial``'s options as a line of a report."""
    recomputed = "with" if arguments.checkpointing else "without"
    return (
        f"{arguments.precision}, batches of {arguments.batch_size} × {arguments.seq_len} tokens "
        f"per rank, {recomputed} activation checkpointing, AdamW"
    )
