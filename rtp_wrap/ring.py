"""A ring: the ranks that share a model, their staging and their transport.

Copies of a model share it. It has a key, a string, by which pickles and parameters know it.
"""

from __future__ import annotations

import functools
import threading
import uuid
from collections.abc import Iterator
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from rtp_wrap import assigned
from rtp_wrap.anomaly import let_anomalies_be_detected
from rtp_wrap.engine import running_backward
from rtp_wrap.lockstep import Lockstep, OutOfStepError
from rtp_wrap.policy import MixedPrecisionPolicy
from rtp_wrap.replicas import Replicas
from rtp_wrap.rings import Rings
from rtp_wrap.streams import current_stream
from rtp_wrap.transport import PeerTransport, PointToPoint, Staging, open_memory

_rings: WeakValueDictionary[str, Ring] = WeakValueDictionary()
_EVALUATION = (
    "Every rank must run the same layers in the same order, in evaluation and generation as well; "
    "what this forward returned is wrong"
)
#: Everything in the parameters' own dtypes.
_AS_GIVEN = MixedPrecisionPolicy()


class Frames(threading.local):
    """The stack of wrapped modules whose forward runs now, in this thread, outermost first."""

    def __init__(self) -> None:
        self.stack: list[Any] = []


def resolve(key: str) -> Ring:
    """The living ring with this key."""
    if key not in _rings:
        raise RuntimeError(
            f"the ring {key} of a wrapped model is not in this process (any more): a pickled "
            f"wrapped model is of no use elsewhere; save its state_dict() instead"
        )
    return _rings[key]


class Ring:
    """The ring that this rank is in, of ``rings``.

    ``overlap=False`` makes hops take turns with the computation: less staging, no concurrency.
    ``precision`` holds for every site of the wrapped model. ``lockstep`` is that of the same ranks,
    if they have one already. Tiles can move once the ring was ``open``ed.
    """

    #: How tiles move: as hops from rank to rank through ``staging``, or pulled by ``peers``.
    staging: Staging
    transport: PointToPoint
    peers: PeerTransport | None = None
    #: Who has the same shards in other rings; ``None`` where there is one ring.
    replicas: Replicas | None = None
    #: The memory for tiles in flight, by either.
    staging_bytes: int = 0

    def __init__(
        self,
        rings: Rings,
        device: torch.device,
        *,
        overlap: bool,
        precision: MixedPrecisionPolicy = _AS_GIVEN,
        lockstep: Lockstep | None = None,
    ) -> None:
        self.rings = rings
        self.precision = precision
        self.group = rings.own
        self.rank = self.group.rank()
        self.world_size = rings.length
        self.device = device
        self.overlap = overlap
        self.lockstep = Lockstep(rings) if lockstep is None else lockstep
        if rings.across is not None:
            self.replicas = Replicas(rings.across, device, overlap=overlap)
        self.frames = Frames()
        #: Weights that were gathered for the backward of a module, by what asked for them.
        self.regathered: tuple[object, dict[tuple[int, torch.dtype], torch.Tensor]] | None = None
        # While the first forward runs: the fqns of modules with managed parameters, as called.
        self.sites: list[str] | None = None
        # Unlike that of any other process, of which a pickle may have come here.
        self.key = f"{self.group.group_name}/{uuid.uuid4().hex}"
        self._interrupted = False
        self._grad_enabled = True
        self._forward = threading.Lock()  # held while a forward runs
        self._stream: torch.cuda.Stream | None = None
        _rings[self.key] = self
        _watch_optimizers()
        let_anomalies_be_detected(rings.own_mesh)

    def open(self, transport: str, staging_bytes: int) -> None:
        """Get memory for tiles, ``staging_bytes`` of it; all ranks call this together."""
        self.staging_bytes = staging_bytes
        if transport == "peer" and staging_bytes:
            memory = open_memory(self.rings, self.device, staging_bytes)
            self.peers = PeerTransport(
                memory, staging_bytes, self.device, self.lockstep.verify, overlap=self.overlap
            )
        else:
            self.staging = Staging(staging_bytes, self.device)
            self.transport = PointToPoint(self.group)

    @property
    def transport_name(self) -> str:
        """As a policy names it."""
        return "ring" if self.peers is None else "peer"

    def begin(self, event: str) -> None:
        """Every communicating operation starts here, with a line of its own for the lockstep.

        After an exception inside a rotation, or one that left a forward, the ranks first make sure
        that all of them had it.
        """
        if self._interrupted:
            self.lockstep.verify("the first communication after an exception")
            self._interrupted = False
        self.lockstep.record(event, 0 if self.peers is None else self.peers.barriers)
        self.regathered = None
        if self.device.type == "cuda":
            self._follow_stream()

    def interrupt(self, hops: int) -> None:
        """An exception left a rotation after ``hops`` hops."""
        self._interrupted = True
        self.lockstep.record(f"an exception after {hops} hops")
        if self.peers is not None:
            self.peers.settle()

    def not_answered(self, event: str, why: str = "") -> RuntimeError:
        """The error of a rank that others did not meet in a hop or a collective."""
        failed = f"{event} failed on rank {self.rings.place}"
        difference = self.lockstep.difference_after(failed)
        if difference is not None:
            return OutOfStepError(f"{failed}: {difference}")
        others = "rank has raised, died, or runs another layer; see its own error first"
        if not why:
            return RuntimeError(f"{failed}. Another {others}")
        return RuntimeError(f"{failed}: {why}\nUnless that says why, another {others}")

    def begin_forward(self, fqn: str) -> None:
        """An outermost forward begins, that of ``fqn``; another one must not be under way."""
        if torch.jit.is_tracing():
            raise RuntimeError(
                f"{fqn or 'the model'} is wrapped, and its shards cannot be traced: trace a dense "
                f"model, into which a full state_dict() of the wrapped one was loaded"
            )
        if not self._forward.acquire(blocking=False):
            raise RuntimeError(
                f"{fqn or 'the model'} was called while another thread is in a forward of the same "
                f"wrapped model: the {self.rings.size} ranks could not tell whose tiles are "
                f"whose. Use the model in one thread at a time, from forward to backward"
            )
        if self.peers is not None:
            self.peers.begin_forward()

    def note_grad_mode(self) -> None:
        """A module is called.

        If gradients were switched off or on since the one before, weights may have been written in
        between by what torch does not count, a momentum encoder's say: what is fetched ahead is
        fetched again.
        """
        enabled = torch.is_grad_enabled()
        if enabled != self._grad_enabled:
            self._grad_enabled = enabled
            if self.peers is not None and running_backward() == -1:
                self.peers.begin_forward()

    def end_forward(self, *, raised: bool) -> None:
        """An outermost forward is over.

        Ranks of which one has ``raised``, between layers maybe, are out of step.
        """
        if raised:
            self._interrupted = True
            self.lockstep.record("an exception in a forward")
        try:
            if self.peers is not None:
                self.peers.end_pass()
        finally:
            self._forward.release()

    def check_in_step(self) -> None:
        """After an outermost forward: if no optimizer step will, compare what ranks did."""
        if not torch.is_grad_enabled() and self.lockstep.has_news:
            self.lockstep.verify("the end of a forward", _EVALUATION)

    def _follow_stream(self) -> None:
        """The staging is shared by all streams, so work that uses it must not overlap."""
        stream = current_stream(self.device)
        capturing = torch.cuda.is_current_stream_capturing()
        if not capturing:  # a graph cannot wait for what is outside of it
            if self._stream is not None and self._stream is not stream:
                stream.wait_stream(self._stream)
            self._stream = stream
        if self.peers is not None:
            self.peers.begin(stream, capturing)

    def __deepcopy__(self, memo: dict[int, Any]) -> Ring:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return resolve, (self.key,)


def register(parameter: torch.Tensor, ring: Ring) -> None:
    """Mark a parameter as one of the ring's, for the optimizers' hooks."""
    parameter._ring = ring.key  # type: ignore[attr-defined]


def retire(parameter: torch.nn.Parameter, fqn: str) -> None:
    """Mark a parameter that no longer belongs to a model: an optimizer must not have it."""
    parameter._retired = fqn  # type: ignore[attr-defined]


def was_retired(parameter: torch.Tensor) -> bool:
    return hasattr(parameter, "_retired")


@functools.cache
def _watch_optimizers() -> None:
    """Ranks must be in step before weights are written, and a write must be seen.

    Fused and foreach optimizers do not bump the version of a DTensor, so a weight changed
    between a forward and its backward would go unnoticed: the version is bumped for them.
    """
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


@torch.compiler.disable
def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for parameter in _parameters(optimizer):
        if was_retired(parameter):
            raise RuntimeError(
                f"this {type(optimizer).__name__} was built before the model was wrapped, and "
                f"wrapping replaced its parameters ({parameter._retired} is one): build it "
                f"afterwards, from the wrapped model's parameters()"
            )
    rings: dict[str, Ring] = {}
    for parameter in _our_parameters(optimizer):
        ring = _rings.get(parameter._ring)
        if ring is not None:
            assigned.check(parameter)
            rings[ring.key] = ring
    for ring in rings.values():
        ring.lockstep.verify("an optimizer step")


@torch.compiler.disable
def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    written = [p for p in _our_parameters(optimizer) if p.grad is not None]
    if written:
        torch.autograd.graph.increment_version(written)
        # What autograd saved of a replicated parameter shares the version of its local tensor.
        torch.autograd.graph.increment_version([p._local_tensor for p in written])


def _our_parameters(optimizer: Optimizer) -> Iterator[Any]:
    for parameter in _parameters(optimizer):
        if type(parameter) is DTensor and hasattr(parameter, "_ring"):
            yield parameter


def _parameters(optimizer: Optimizer) -> Iterator[Any]:
    for group in optimizer.param_groups:
        yield from group["params"]
