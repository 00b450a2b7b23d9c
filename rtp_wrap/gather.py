"""Gathered parameters: whole for the forward of their module, whole again for its backward.

What autograd would save of a gathered weight (the weight, a view of it, autocast's copy of it) is
replaced by a note of how to make it again. Otherwise all gathered weights would be alive
together after the forward, which is what sharding is to avoid.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Partial

from rtp_wrap.collective import collective
from rtp_wrap.double_backward import refuse_double_backward
from rtp_wrap.engine import PackHooks, at_its_end, running_backward
from rtp_wrap.gradient import deliver
from rtp_wrap.over_rings import dtype_in_ring, over_rings
from rtp_wrap.ring import Ring
from rtp_wrap.shard import extent, sharded_dim
from rtp_wrap.versions import Stamp, version_of
from rtp_wrap.written import WriteCheck


def gather(parameter: DTensor, ring: Ring, fqn: str, dtype: torch.dtype) -> torch.Tensor:
    """The whole parameter as a plain tensor; its gradient is averaged and sharded again.

    Gathered in ``dtype``, reduced in that of the accumulators of the ring's precision policy.

    All ranks of the ring must call it together, and run its backward together.
    """
    if torch.is_grad_enabled() and parameter.requires_grad:
        whole: torch.Tensor = _Gather.apply(parameter, ring, fqn, dtype)
        return whole
    return _whole(parameter, ring, "gather", fqn, dtype)


def _whole(
    parameter: DTensor, ring: Ring, operation: str, fqn: str, dtype: torch.dtype
) -> torch.Tensor:
    ring.begin(f"{fqn} {operation}")
    # Not in inference mode, under which torch 2.11 cannot redistribute a DTensor.
    with collective(operation, fqn, ring), torch.inference_mode(False), torch.no_grad():
        if ring.world_size == 1:  # what DTensor would say, in a fraction of the host's time
            return parameter._local_tensor.detach().to(dtype)
        source: Any = parameter if dtype == parameter.dtype else parameter.to(dtype)
        if ring.device.type == "cpu":
            return _all_gathered(source, ring)
        whole: torch.Tensor = DTensor.full_tensor(source)
        return whole


def _all_gathered(source: DTensor, ring: Ring) -> torch.Tensor:
    """What ``full_tensor`` returns, by another collective: a row of those corrupts Gloo's heap.

    The two threads of a Gloo group put down the name of the collective that they finished in one
    ``std::string``, without a lock (torch 2.11 and 2.13). They do so after whoever waits for it has
    gone on, so the other thread may be there with the next one. "ALLGATHER_COALESCED" is more than
    the 15 characters that need no memory of their own, and that memory is then freed twice.
    """
    dim, shape = sharded_dim(source), source.shape
    rows = extent(shape[dim], ring.world_size, 0)[1]  # of rank 0, which has the most
    local = source._local_tensor
    padded = local.new_empty((*shape[:dim], rows * ring.world_size, *shape[dim + 1 :]))
    parts = padded.tensor_split(ring.world_size, dim)
    own = local
    if local.shape[dim] < rows:
        own = torch.empty_like(parts[0])
        own.narrow(dim, 0, local.shape[dim]).copy_(local)
    dist.all_gather(list(parts), own.contiguous(), group=ring.group)
    return padded.narrow(dim, 0, shape[dim]).contiguous()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, parameter: DTensor, ring: Ring, fqn: str, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.ring, ctx.fqn, ctx.parameter, ctx.dtype = ring, fqn, parameter, dtype
        ctx.written = WriteCheck(parameter, fqn, ctx.ring)
        # It is a view, of the home shard or of memory with padding, which autograd would not let
        # anybody change in place.
        return _whole(parameter, ring, "gather", fqn, dtype).detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[DTensor | None, None, None, None]:
        refuse_double_backward(ctx.fqn)
        ctx.written.check()
        ring: Ring = ctx.ring
        regathered = ring.regathered
        ring.begin(f"{ctx.fqn} reduce-scatter")
        if regathered and regathered[1].pop((id(ctx.parameter), ctx.dtype), None) is not None:
            ring.regathered = regathered  # its module may still need the others
        with collective("reduce-scatter", ctx.fqn, ring):
            mean = _reduce_scattered(grad, ctx.parameter, ring)
        gradient = over_rings(mean, None, ctx.parameter, ring, ctx.fqn)
        return deliver(ctx.parameter, ctx.next_functions[0][0], gradient), None, None, None


def _reduce_scattered(grad: torch.Tensor, parameter: DTensor, ring: Ring) -> torch.Tensor:
    """This rank's shard of the mean over the ring."""
    dense = grad.to_dense() if grad.is_sparse else grad.contiguous()
    dense = dense.to(ring.precision.accumulator_dtype(parameter.dtype))
    if ring.world_size == 1:
        # Copied, as autograd may give others the same tensor.
        return dense.to(dtype_in_ring(parameter, ring), copy=dense is grad)
    # Before the sum where that could overflow; else after it, which needs no whole copy.
    before = ring.world_size if dense.itemsize < 4 else 1
    if before > 1:
        dense = dense / before
    total = DTensor.from_local(dense, ring.rings.own_mesh, [Partial()], run_check=False)
    summed: Any = total.redistribute(placements=parameter.placements[-1:])
    mean: DTensor = (summed / (ring.world_size // before)).to(dtype_in_ring(parameter, ring))
    return mean._local_tensor


class RegatherHooks:
    """Saved-tensor hooks that put a note in the place of what is saved of the ``gathered`` weights.

    Composed with the hooks ``around`` them (activation checkpointing and offloading are such),
    which see every tensor but the gathered weights.
    """

    def __init__(self, ring: Ring, gathered: list[Gathered], around: PackHooks | None) -> None:
        self._gathered, self._around = gathered, around
        self._regathered = Regathered(ring)

    def pack(self, tensor: torch.Tensor) -> Any:
        for gathered in self._gathered:
            note = gathered.note(tensor, self._regathered)
            if note is not None:
                return note
        if self._around is not None:
            return self._around[0](tensor)
        # Detached: a node that kept its own output would keep itself alive. The version is
        # compared when it is unpacked, as torch does where there are no hooks.
        return _Kept(tensor.detach(), tensor._version)

    def unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, _Note | _Kept):
            return packed.unpack()
        assert self._around is not None
        return self._around[1](packed)


@dataclass(frozen=True, slots=True)
class _Kept:
    """A tensor that is saved as it is."""

    tensor: torch.Tensor
    version: int

    def unpack(self) -> torch.Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.tensor.shape)} that the gradient needs was "
                f"modified by an in-place operation (version {self.tensor._version}, saved at "
                f"{self.version})"
            )
        return self.tensor


@dataclass(frozen=True, slots=True)
class _Note:
    """How to make a saved tensor again: gather, cast, take a view."""

    regathered: Regathered
    parameter: DTensor
    gathered: torch.dtype
    written: WriteCheck
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def unpack(self) -> torch.Tensor:
        self.written.check()
        whole = self.regathered.whole(self.parameter, self.gathered)
        return whole.to(self.dtype).as_strided(self.size, self.stride, self.offset)


class Regathered:
    """The weights that autograd saved in one forward of a module, whole again in its backward.

    How often a backward asks for which of them may depend on a rank's data: on the experts that its
    tokens go to, for one. What ranks gather must not. So the first time that one is asked for all
    of them are gathered, and stay until their gradients are reduced or the ring goes on to others.
    """

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._saved: dict[tuple[int, torch.dtype], tuple[DTensor, str]] = {}

    def save(self, parameter: DTensor, dtype: torch.dtype, fqn: str) -> None:
        """Autograd has saved it, gathered in ``dtype``."""
        self._saved[id(parameter), dtype] = parameter, fqn

    def whole(self, parameter: DTensor, dtype: torch.dtype) -> torch.Tensor:
        """It, whole: an all-gather of everything that was saved, or what that has left here."""
        ring, key = self._ring, (id(parameter), dtype)
        whose, wholes = ring.regathered or (None, {})
        if whose is not self or key not in wholes:
            wholes, ring.regathered = {}, None  # before there are others
            wholes = {
                (number, its_dtype): _whole(each, ring, "gather for backward", fqn, its_dtype)
                for (number, its_dtype), (each, fqn) in self._saved.items()
            }
            ring.regathered = self, wholes
            if running_backward() != -1:
                # Those of the last module of a backward must not outlive it.
                at_its_end(functools.partial(setattr, ring, "regathered", None))
        return wholes[key]


class Gathered:
    """A gathered parameter while its module computes."""

    __slots__ = ("_stamp", "fqn", "is_copy", "parameter", "ring", "whole")

    def __init__(self, parameter: DTensor, whole: torch.Tensor, ring: Ring, fqn: str) -> None:
        self.parameter, self.whole, self.ring, self.fqn = parameter, whole, ring, fqn
        #: With one rank it is the home shard itself.
        self.is_copy = ring.world_size > 1 or whole.dtype != parameter.dtype
        self._stamp = Stamp.of(whole)

    def check_unwritten(self) -> None:
        """Raise if the module wrote to its weight: the write could not reach the home shards."""
        if self.is_copy and self._stamp.was_written(self.whole):
            raise RuntimeError(
                f"{self.fqn} was written to by its module's forward (max_norm of an embedding does "
                f"that), where it is a gathered copy: write to the parameter outside of forward, "
                f"or Ignore() it in the policy"
            )

    def note(self, tensor: torch.Tensor, regathered: Regathered) -> _Note | None:
        """A note for ``tensor`` if it is this weight, a view of it, or a (view of a) cast of it."""
        if type(tensor) is not torch.Tensor or tensor.layout != torch.strided or tensor.is_nested:
            return None  # has no address
        base = tensor._base if tensor._is_view() else tensor
        if tensor.dtype == self.whole.dtype:
            offset = _offset(tensor, self.whole)
        elif base is not None and tensor.dtype == base.dtype and self._is_cast(base):
            offset = _offset(tensor, base)
        else:
            offset = None
        if offset is None or tensor.is_conj() or tensor.is_neg():
            return None
        regathered.save(self.parameter, self.whole.dtype, self.fqn)
        return _Note(
            regathered,
            self.parameter,
            self.whole.dtype,
            WriteCheck(self.parameter, self.fqn, self.ring),
            tensor.dtype,
            tuple(tensor.shape),
            tensor.stride(),
            offset,
        )

    def _is_cast(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is ``whole.to(another dtype)``: autocast makes such copies."""
        if tensor.shape != self.whole.shape or tensor.stride() != self.whole.stride():
            return False
        if version_of(tensor):  # written since, maybe under no_grad, where its node does not tell
            return False
        node = tensor.grad_fn
        if node is not None:
            made_by_cast = node.name() == "ToCopyBackward0"
            return made_by_cast and node.next_functions[0][0] is self.whole.grad_fn
        # Nothing tells where a copy of a frozen weight came from but what is in it.
        return (
            not self.whole.requires_grad
            and tensor.dtype.is_floating_point
            and torch.equal(tensor, self.whole.to(tensor.dtype))
        )


def _offset(tensor: torch.Tensor, whole: torch.Tensor) -> int | None:
    """Where in ``whole`` (elements) ``tensor`` begins, if all of it lies in there.

    Addresses, not storages, are compared: cuDNN puts all weights of an LSTM into one storage.
    """
    if not tensor.numel() or tensor.device != whole.device or not whole.is_contiguous():
        return None
    start = tensor.data_ptr() - whole.data_ptr()
    reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    if start < 0 or start + (reach + 1) * tensor.itemsize > whole.nbytes:
        return None
    return start // tensor.itemsize
