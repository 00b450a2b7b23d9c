"""The original's language-model flags, a few more, and the job that they describe."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from harness import corpus, models, transformer_lm
from harness.options import positive
from harness.strategies import PRECISIONS, STRATEGIES, Setting, Strategy

#: Flags that are a model's sizes, and what the shapes call them; a Llama's come second.
SIZES = {
    "vocab_size": ("vocab",),
    "ninp": ("ninp", "dim"),
    "nhid": ("nhid", "ffn"),
    "nhead": ("nhead", "heads"),
    "dropout": ("dropout",),
    "initrange": ("initrange",),
    "num_decoder_layers": ("layers",),
}


@dataclass(frozen=True)
class Job:
    """What a command line asks for. ``options`` has every size, whoever chose it.

    ``epoch()`` starts an epoch: its batches of all ``ranks`` together, [N B, T + 1].
    """

    strategy: Strategy
    spec: models.ModelSpec
    setting: Setting
    options: argparse.Namespace
    ranks: int
    epoch: Callable[[], Iterator[Tensor]]

    @property
    def words(self) -> int:
        """Of one rank in a batch."""
        return int(self.options.batch_size * self.options.seq_len)


def parse(name: str, epilog: str) -> Job:
    """The job of this command line for the strategy ``name``; ends the process on a mistake."""
    parser = _parser(name, epilog)
    options = parser.parse_args()
    if options.dry_run:
        options.epochs = options.max_batch = 1
    ranks = int(os.environ.get("WORLD_SIZE", torch.cuda.device_count() or 2))
    try:
        strategy = _strategy(name, options)
        spec = _spec(options)
        _check(strategy, spec, options, ranks)
        epoch = _epoch(options, ranks)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    setting = Setting(
        precision=options.precision,
        compile=options.compile,
        checkpointing=options.checkpoint,
        staging_mib=getattr(options, "staging_mib", None),
    )
    return Job(strategy, spec, setting, options, ranks, epoch)


def _parser(name: str, epilog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=f"Train a transformer language model with {STRATEGIES[name].label}: words per "
        f"second and memory, on every GPU or on two CPU ranks.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    known = ("lm", *transformer_lm.SHAPES)
    names = f"{', '.join(models.NAMES)}; default: lm"
    text = "words between white space, as WikiText's; default: the standard library's sources"
    add("--max_batch", type=positive(int), default=4, help="batches per epoch, at most; default: 4")
    add("--use_synthetic_data", action="store_true", help="tokens at random instead of a text")
    add("--data", type=Path, metavar="FILE", help=text)
    add("--dry_run", action="store_true", help="one batch, to see whether it runs")
    add("--debug", action="store_true", help="tell the loss and the seconds of every rank, too")
    add("--benchmark_eval", action="store_true", help="evaluate without gradients, do not train")
    add("--model_name", choices=models.NAMES, default="lm", metavar="NAME", help=names)
    add("--model_config", choices=known, default="lm", help="the sizes of that transformer")
    for flag, fields in SIZES.items():
        default = getattr(models.find("lm").shape, fields[0])
        kind = positive(int) if isinstance(default, int) else float
        add(f"--{flag}", type=kind, help=f"default: the model's, which is {default} for lm")
    add("--clip_value", type=positive(float), default=0.05, help="of every gradient; default: 0.05")
    add("--seq_len", type=positive(int), default=128, help="default: 128")
    add("--epochs", type=positive(int), default=1, help="default: 1")
    add("--lr", type=positive(float), default=0.001, help="Adam's; default: 0.001")
    add("--batch_size", type=positive(int), default=1, help="sequences per rank; default: 1")
    add("--checkpoint", action="store_true", help="compute blocks again in backward")
    add("--compile", action="store_true", help="compile every block")
    precision = parser.add_mutually_exclusive_group().add_argument
    precision("--precision", choices=PRECISIONS, default="fp32", help="default: fp32")
    precision("--full_fp16", action="store_const", const="fp16", dest="precision")
    add("--json", type=Path, metavar="FILE", help="write all numbers to FILE, too")
    wrap = "fsdp_benchmark.py only: a unit per block, which is the default, or the root alone"
    add("--enable_auto_wrap", action=argparse.BooleanOptionalAction, help=wrap)
    if name.startswith("rtp"):
        add("--staging_mib", type=positive(int), help="for tiles that travel; default: rtp_wrap's")
    if name in ("fsdp", "tp"):
        add("--fairscale", action="store_true", help="the package fairscale's instead")
    return parser


def _strategy(name: str, options: argparse.Namespace) -> Strategy:
    if name != "fsdp" and options.enable_auto_wrap is not None:
        raise ValueError("--enable_auto_wrap is about FSDP's units: only fsdp_benchmark.py has any")
    name = "fsdp-root" if options.enable_auto_wrap is False else name
    if not getattr(options, "fairscale", False):
        return STRATEGIES[name]
    try:
        from harness.fairscale_peers import PEERS
    except ImportError as error:
        raise ValueError(
            f"--fairscale needs that package: pip install fairscale==0.4.13 ({error})"
        ) from error
    if name != "tp" and not torch.cuda.is_available():
        raise ValueError("--fairscale: its FSDP runs on CUDA only, and here is none")
    return PEERS[name]


def _spec(options: argparse.Namespace) -> models.ModelSpec:
    """The model of these ``options``, which get its sizes where they had none."""
    name, config = options.model_name, options.model_config
    if "lm" not in (name, config):
        raise ValueError(
            f"--model_name {name} has sizes of its own: leave out --model_config {config}"
        )
    known = models.find(config if name == "lm" else name)
    changes = {}
    for flag, fields in SIZES.items():
        field = next((each for each in fields if hasattr(known.shape, each)), None)
        if getattr(options, flag) is None:
            setattr(options, flag, field and getattr(known.shape, field))
        elif field is None:
            raise ValueError(f"--{flag} means nothing to {known.name}: leave it out")
        else:
            changes[field] = getattr(options, flag)
    return models.find(known.name, **changes)


def _check(
    strategy: Strategy, spec: models.ModelSpec, options: argparse.Namespace, ranks: int
) -> None:
    """Raise ``ValueError`` for sizes that fit neither each other nor the ranks."""
    if not 0 <= (options.dropout or 0.0) <= 1:
        raise ValueError(f"--dropout {options.dropout} is no probability")
    heads = {"--nhead": options.nhead}
    if (kv_heads := getattr(spec.shape, "kv_heads", None)) is not None:
        heads["key heads"] = kv_heads
    if options.ninp % (2 * options.nhead) or options.nhead % min(heads.values()):
        raise ValueError(
            f"--nhead {options.nhead} does not cut --ninp {options.ninp} into heads of an even "
            f"size, or is no multiple of the model's {min(heads.values())} key heads"
        )
    if not strategy.shares_batch:
        return
    flags = {f"--{flag}": getattr(options, flag) for flag in ("nhid", "vocab_size", "seq_len")}
    for what, size in {**heads, **flags}.items():
        if size % ranks:
            raise ValueError(
                f"tensor parallelism gives each of {ranks} ranks the same part of {what}: {size} "
                f"is no multiple of {ranks}"
            )


def _epoch(options: argparse.Namespace, ranks: int) -> Callable[[], Iterator[Tensor]]:
    size, length, vocab = ranks * options.batch_size, options.seq_len, options.vocab_size
    if options.use_synthetic_data and options.data is not None:
        raise ValueError(f"--use_synthetic_data leaves no use for --data {options.data}")
    if options.use_synthetic_data:
        return lambda: islice(corpus.synthetic(size, length, vocab), options.max_batch)
    text = corpus.Corpus(corpus.read_words(options.data), vocab)
    text.batches(size, length)  # a text that is too short is known before there are ranks
    return lambda: islice(text.batches(size, length), options.max_batch)
