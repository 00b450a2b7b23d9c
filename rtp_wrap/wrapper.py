"""The one line: ``RotatedTensorParallel(model)``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy as FSDP2MixedPrecisionPolicy

from rtp_wrap.assign import Assignment, assign
from rtp_wrap.home import settle_model
from rtp_wrap.lockstep import Lockstep
from rtp_wrap.materialise import BUILD_ANEW, ParamInitFn, check_initialisable
from rtp_wrap.mesh import mesh_of
from rtp_wrap.modules import Adoption, adopt, form_of, has_own_statistics, precision_of
from rtp_wrap.names import own_names
from rtp_wrap.planned import Plan
from rtp_wrap.planner import check_given, follow, plan_of
from rtp_wrap.policy import Ignore, MixedPrecisionPolicy, Rules, ShardingPolicy, Strategy
from rtp_wrap.ring import Ring
from rtp_wrap.rings import Rings
from rtp_wrap.sites import Site
from rtp_wrap.transport import candidates, wanted
from rtp_wrap.verify import (
    SAME_MODEL,
    check_init_fn,
    check_module,
    check_parameters,
    check_same_everywhere,
    check_uses,
    device_of,
)

#: What the wrapper has in common with the wrapped model: the same dictionaries.
_SHARED = (
    "_parameters",
    "_buffers",
    "_non_persistent_buffers_set",
    "_modules",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def _models_own(name: str) -> Callable[..., Any]:
    """A method of every ``nn.Module`` that models override: the wrapped model's own is called."""

    @functools.wraps(getattr(nn.Module, name))
    def method(self: RotatedTensorParallel, *args: Any, **kwargs: Any) -> Any:
        result = getattr(self.module, name)(*args, **kwargs)
        return self if result is self.module else result

    return method


class RotatedTensorParallel(nn.Module):
    """Train ``module`` with 1/N of every weight on each of N ranks, and DDP's results.

    ``module`` is changed in place: its parameters become DTensors that hold this rank's home shard
    of rank 0's values, on the ring's device, and its layers compute on rotating or gathered
    weights. Every rank calls this with the same module and policy, then feeds its own batch;
    gradients are averaged over the ranks. Build the optimizer afterwards, from ``parameters()``.

    ``group``
        the process group to shard over; default: all ranks.
    ``inplace``
        least staging: transfers do not overlap with the computation.
    ``mesh``
        a ``DeviceMesh``, or a slice of a larger one, instead of ``group``. A 1-D one is a ring. The
        rows of a 2-D one, whose dimensions have names, are rings with the same shards each, and
        average gradients with each other (FSDP2's hybrid sharding): N is their length then.
    ``policy``
        a ``ShardingPolicy``, or just its rules.
    ``mixed_precision``
        a ``MixedPrecisionPolicy``, of this library or FSDP2's.
    ``param_init_fn``
        initialises a module that has parameters or buffers of its own on the meta device: it is
        called with each of them, one after the other, parents before children, on every rank.
        Default: ``module.reset_parameters()``; modules without it (``nn.MultiheadAttention`` is
        one) are an error.
    ``plan``
        what ``rtp_wrap.plan`` made for this model and these numbers of ranks, instead of
        ``policy``, ``mixed_precision`` and ``inplace``, which are part of it.

    A model on the meta device gets its values here, one module at a time: no device ever has the
    whole weights of two modules. While a module is initialised its own parameters and buffers have
    memory on the ring's device, floating-point ones full of NaN; ``param_init_fn`` writes to them
    in place, or puts others of their shape and dtype there. Everything else keeps the values it
    has: modules below are on the meta device meanwhile, and what already had values is stood in for
    by a scratch tensor. A tied parameter is initialised with the first module that registers it.

    Attributes and methods of ``module`` are reachable, and what is set on the wrapper is set on
    ``module``; fqns in ``named_parameters()`` and ``state_dict()`` are the module's own. Hooks
    registered on the wrapper run around calls of the wrapper.

    Raises ``RuntimeError`` without a process group, and ``ValueError`` or ``TypeError`` for
    arguments, policies and models that cannot be used; nothing is changed then. An initialisation
    that raises, or leaves something without a value of its shape and dtype, is a ``RuntimeError``
    or a ``ValueError`` too; modules before it are sharded by then, so build the model anew. Where
    only some ranks have such an error, the others get an ``OutOfStepError`` that quotes it.
    """

    module: nn.Module
    _ring: Ring
    _plan: Plan

    @torch.inference_mode(False)  # outside of it nothing could write to what is made in it
    def __init__(
        self,
        module: nn.Module,
        group: dist.ProcessGroup | None = None,
        inplace: bool = False,
        *,
        mesh: DeviceMesh | None = None,
        policy: ShardingPolicy | Rules | None = None,
        mixed_precision: MixedPrecisionPolicy | FSDP2MixedPrecisionPolicy | None = None,
        param_init_fn: ParamInitFn | None = None,
        plan: Plan | None = None,
    ) -> None:
        rings = Rings(mesh_of(group, mesh))
        # Before anything that may raise on one rank alone, whose error the others are to get.
        lockstep = Lockstep(rings)
        with lockstep.together("wrapping", SAME_MODEL):
            check_module(module)
            check_init_fn(param_init_fn)
            rules, precision = ShardingPolicy.of(policy), MixedPrecisionPolicy.of(mixed_precision)
            if plan is None:
                assignments, transport = assign(module, rules), wanted(rules.transport)
            else:
                check_given(plan, rings, policy, mixed_precision, inplace)
                assignments, transport = follow(module, plan), plan.transport
                inplace, precision = plan.inplace, plan.mixed_precision
            check_uses(assignments, rings.size)
            check_parameters(module, assignments)
            device = device_of(rings.mesh, assignments)
            ring = Ring(rings, device, overlap=not inplace, precision=precision, lockstep=lockstep)
            staging = f"staging of {(plan or rules).staging_bytes} bytes, transport={transport}"
            check_same_everywhere(module, assignments, ring, staging, param_init_fn)
            transports = candidates(transport, rings, device)
            if plan is None:
                plan = plan_of(
                    assignments,
                    rules,
                    precision,
                    inplace,
                    transports,
                    world_size=rings.length,
                    replicas=rings.count,
                )
            check_initialisable(module, assignments, param_init_fn)
        # Peers meet over the group itself there, where nobody hears of a mistake made before.
        with lockstep.together("allocation of the staging", SAME_MODEL):
            ring.open(plan.transport, plan.staging_bytes)
        settle_model(module, assignments, ring, param_init_fn)
        with lockstep.together("adoption", BUILD_ANEW):
            _adopt(module, assignments, ring)
        super().__init__()
        vars(self).update({name: vars(module)[name] for name in _SHARED})
        vars(self).update(module=module, _ring=ring, _plan=plan)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        ring, plan = self._ring, self._plan
        if plan.sites is not None or ring.sites is not None:
            return self.module(*args, **kwargs)
        ring.sites = []  # the first forward shows the order of execution
        try:
            output = self.module(*args, **kwargs)
            sites = tuple(Site(fqn, reads="", trains_input=True) for fqn in ring.sites)
            vars(self)["_plan"] = replace(plan, sites=sites)
        finally:
            ring.sites = None
        return output

    def no_sync(self) -> AbstractContextManager[None]:
        """What DDP has for accumulation; changes nothing here, where gradients are always 1/N.

        Those of several rings are averaged in every backward.
        """
        return nullcontext()

    @property
    def plan(self) -> Plan:
        """What wrapping made of the model; its sites are known after the first forward."""
        return self._plan

    @property
    def staging_bytes(self) -> int:
        """Memory for tiles in flight, in bytes on this rank: all layers' together, and constant."""
        return self._ring.staging_bytes

    @property
    def transport(self) -> str:
        """``"peer"`` or ``"ring"``: how tiles move. The staging of peers on GPUs is memory that
        ``torch.cuda.memory_allocated()`` does not count.
        """
        return self._ring.transport_name

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "module" not in vars(self):  # a copy in the making
                raise
            return getattr(self.module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if "module" not in vars(self) or name in vars(self) or hasattr(type(self), name):
            super().__setattr__(name, value)
        else:  # set where the model's own code reads it
            setattr(self.module, name, value)

    def __delattr__(self, name: str) -> None:
        if name in vars(self):
            super().__delattr__(name)
        else:
            delattr(self.module, name)

    def __getitem__(self, key: Any) -> Any:
        return self.module[key]  # type: ignore[index]

    @property
    def training(self) -> bool:
        return self.module.training

    @training.setter
    def training(self, mode: bool) -> None:
        if "module" in vars(self):  # nn.Module's constructor sets it first
            self.module.training = mode

    train = _models_own("train")
    eval = _models_own("eval")
    apply = _models_own("apply")
    zero_grad = _models_own("zero_grad")
    requires_grad_ = _models_own("requires_grad_")
    get_submodule = _models_own("get_submodule")
    add_module = _models_own("add_module")
    register_module = _models_own("register_module")
    register_parameter = _models_own("register_parameter")
    register_buffer = _models_own("register_buffer")
    state_dict = _models_own("state_dict")
    load_state_dict = _models_own("load_state_dict")
    # What `to`, `half` and the like do, and what loading into a larger module does.
    _apply = _models_own("_apply")
    _load_from_state_dict = _models_own("_load_from_state_dict")

    def extra_repr(self) -> str:
        return f"wrapping {type(self.module).__name__}"


def _adopt(module: nn.Module, assignments: list[Assignment], ring: Ring) -> None:
    """Adopt every module that has managed parameters or running statistics at or below it."""
    strategies: dict[nn.Module, dict[str, Strategy]] = {}
    for each in assignments:
        for use in each.uses:
            if not isinstance(use.strategy, Ignore):
                strategies.setdefault(use.module, {})[use.name] = use.strategy
    for fqn, inner in own_names(module):
        if any(each in strategies or has_own_statistics(each) for each in inner.modules()):
            precision = precision_of(inner, ring.precision)
            adoption = Adoption(ring, fqn, strategies.get(inner, {}), precision)
            adopt(inner, adoption, form_of(inner, adoption, strategies))
