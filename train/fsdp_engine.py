"""PyTorch's fully_shard (FSDP2) behind the same loop.

Each decoder layer is a unit whose weights are gathered while it runs; embeddings, head and norms are the unit
of the whole. Trained weights are float32 in their shards, and gathered in bfloat16 where the model is: an
update smaller than a bfloat16's last digit is not lost.

Called directly, not through Accelerate: its FSDP plugin knows no CPU processes, and it wraps the model, not
the model with its loss, whose forward pass reads the head's weight outside of the head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..checkpoint import Piece
from ..data import Batch
from ..ops.grad_pack import global_norm
from ..recipes import Fsdp2Config
from .engine import Interrupted, loss_and_sums
from .objectives import base_model
from .sharded import MASTER, MOMENTS, OwnPieces, ShardedEngine, process_group


@dataclass
class _Place:
    """Where a parameter is in the model (tied ones more than once), and what stands there in each case."""

    owners: list[tuple[nn.Module, str]]
    whole: nn.Parameter
    """The model's own object, which engine and optimizer know; empty while the model is in shards."""
    shard: DTensor
    dtype: torch.dtype
    """Of the model; shards of trained weights are float32."""

    def show(self, parameter: Any) -> None:
        for module, name in self.owners:
            module._parameters[name] = parameter


@dataclass
class Fsdp2Engine(ShardedEngine):
    """`NativeEngine`'s calls over shards, between `begin` and `end`."""

    weights_in_shards = True
    config: Fsdp2Config = field(default_factory=Fsdp2Config)
    flat: torch.optim.AdamW = field(init=False)
    """Steps this process's shards."""
    _places: dict[str, _Place] = field(default_factory=dict, init=False)
    """By name in the model, trained and frozen."""
    _units: list[tuple[nn.Module, type[nn.Module], frozenset[int]]] = field(default_factory=list, init=False)
    """What fully_shard has wrapped: its class and hooks before."""
    _state_hooks: dict[int, list[set[int]]] = field(default_factory=dict, init=False)
    """By module: hooks of its state dict before."""
    _finite_loss: bool = field(default=True, init=False)

    # --- the calls of the loop

    def forward_backward(
        self, batches: Sequence[Batch], count: int, interrupted: Callable[[], bool]
    ) -> Tensor:
        """As NativeEngine's; gradients are reduced after each micro-batch: only shards of them add up."""
        device = self.accelerator.device
        total = torch.zeros((), device=device)
        scale = self.accelerator.num_processes / count
        for batch in batches:
            if interrupted():
                self.flat.zero_grad(set_to_none=True)
                raise Interrupted
            with self.precision():
                loss, _ = loss_and_sums(self.loss_module(batch.to(device)))
            (loss * scale).backward()
            total += loss.detach()
        reduced: Tensor = self.accelerator.reduce(total, reduction="sum")
        self._finite_loss = bool(torch.isfinite(reduced))
        return reduced

    def step(self, max_grad_norm: float | None) -> Tensor:
        """Clip and apply; returns the norm before clipping. On one that is not finite nothing is applied, and
        the shards are dissolved: the run is over, and what is left of it works with whole tensors.
        """
        norm = self._clip(max_grad_norm)
        if not (self._finite_loss and bool(torch.isfinite(norm))):
            self.end()
            return norm
        for ours, theirs in zip(self.optimizer.param_groups, self.flat.param_groups, strict=True):
            theirs.update({key: value for key, value in ours.items() if key != "params"})
        self.flat.step()
        self.flat.zero_grad(set_to_none=True)
        self.freed.after_step()
        return norm

    @torch.no_grad()
    def _clip(self, max_grad_norm: float | None) -> Tensor:
        grads = [
            p.grad.to_local()
            for group in self.flat.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        total = global_norm(grads).square().float().to(self.accelerator.device)
        norm: Tensor = self.accelerator.reduce(total, reduction="sum").sqrt()
        if max_grad_norm is not None and bool(norm > max_grad_norm):
            torch._foreach_mul_(grads, float(max_grad_norm / norm))
        return norm

    # --- shards

    def shard(self) -> None:
        """Cut the model up and make an optimizer of the shards."""
        process_group(self.accelerator)
        device = self.accelerator.device
        self._state_hooks = {
            id(module): [set(hooks) for hooks in _hooks_of_state(module)]
            for module in self.loss_module.modules()
        }
        mesh = init_device_mesh(device.type, (self.accelerator.num_processes,))
        owners: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in self.loss_module.modules():
            for key, p in module._parameters.items():
                if p is not None:
                    owners.setdefault(id(p), []).append((module, key))
        named = dict(self.loss_module.model.named_parameters())
        dtypes = {name: p.dtype for name, p in named.items()}
        narrow = [p for p in self.parameters.values() if p.dtype == torch.bfloat16]
        for p in narrow:
            p.data = p.data.float()
        options: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=torch.bfloat16 if narrow else None,
                reduce_dtype=torch.float32,
                cast_forward_inputs=False,
            ),
            "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda")
            if self.config.cpu_offload
            else OffloadPolicy(),
        }
        for unit in _layers(self.loss_module):
            self._wrap(unit, reshard_after_forward=self.config.reshard_after_forward, **options)
        self._wrap(self.loss_module, **options)
        for name, p in self.loss_module.model.named_parameters():
            whole = named[name]
            self._places[name] = _Place(owners[id(whole)], whole, p, dtypes[name])  # type: ignore[arg-type]
            whole.data = torch.empty(0, dtype=dtypes[name])
        name_of = {id(place.whole): name for name, place in self._places.items()}
        self.flat = torch.optim.AdamW(
            [
                {**group, "params": [self._places[name_of[id(p)]].shard for p in group["params"]]}
                for group in self.optimizer.param_groups
            ]
        )

    def _wrap(self, module: nn.Module, **options: Any) -> None:
        before = frozenset([*module._forward_pre_hooks, *module._forward_hooks])
        self._units.append((module, type(module), before))
        fully_shard(module, **options)

    def _show_whole(self) -> None:
        """Put the model's own parameters in their places, gathered. On all processes."""
        for unit, _, _ in self._units:
            unit.reshard()  # type: ignore[operator]  # an evaluation leaves units gathered; fully_shard's method
        for place in self._places.values():
            place.whole.data = _whole(place.shard, self.accelerator.device, place.dtype)
            place.show(place.whole)

    def unshard(self) -> None:
        """The model's own parameters in their places, whole; no hooks, the classes as they were."""
        self._show_whole()
        for module, kind, before in self._units:
            _without_hooks(module, before)
            module.__class__ = kind
        for module in self.loss_module.modules():
            for hooks, known in zip(_hooks_of_state(module), self._state_hooks[id(module)], strict=True):
                for key in hooks.keys() - known:
                    del hooks[key]
        self._places.clear()
        self._units.clear()
        self.flat = torch.optim.AdamW([torch.zeros(0)])

    @contextlib.contextmanager
    def gather_weights(self) -> Iterator[None]:
        """The model without FSDP: its own parameters, whole, and no hooks of shards."""
        taken = []
        self._show_whole()
        for module, _, before in self._units:
            taken.append((module, _without_hooks(module, before)))
        try:
            yield
        finally:
            for module, hooks in taken:
                module._forward_pre_hooks.update(hooks[0])
                module._forward_hooks.update(hooks[1])
            for place in self._places.values():
                place.show(place.shard)
                place.whole.data = torch.empty(0, dtype=place.dtype)

    # --- state

    def whole_states(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Moments, the count of steps, and the float32 weight where the model's is narrower."""
        device = self.accelerator.device
        for name in self.parameters:
            place = self._places[name]
            state = {
                key: _whole(value, device, value.dtype) if isinstance(value, DTensor) else value
                for key, value in self.flat.state.get(place.shard, {}).items()
            }
            if state and place.dtype != torch.float32:
                state[MASTER] = _whole(place.shard, device, torch.float32)
            yield name, state

    def own_pieces(self) -> OwnPieces:
        """Rows of each parameter, one after the other."""
        for name, parameter in self.parameters.items():
            place = self._places[name]
            state = {
                key: _own(value)
                for key, value in self.flat.state.get(place.shard, {}).items()
                if isinstance(value, DTensor)
            }
            weight = _own(place.shard)
            if parameter.dtype != torch.float32:
                state[MASTER] = weight
                weight = replace(weight, data=weight.data.to(place.dtype))
            if weight.data.numel():
                yield name, weight, state

    def shapes(self) -> dict[str, torch.Size]:
        """See ShardedEngine."""
        return {name: self._places[name].shard.shape for name in self.parameters}

    def steps(self) -> Tensor:
        """See ShardedEngine."""
        count: Tensor = next(state["step"] for state in self.flat.state.values())
        return count

    @torch.no_grad()
    def put_states(self, states: dict[str, dict[str, Tensor]]) -> None:
        """Cut up whole states; every process has read them, so nothing is sent."""
        for name, state in states.items():
            shard = self._places[name].shard
            own = {key: _like(state[key], shard) for key in MOMENTS}
            self.flat.state[shard] = {
                "step": state["step"].to(torch.float32, copy=True),
                **own,
            }
            if MASTER in state:
                shard.to_local().copy_(_like(state[MASTER], shard).to_local())


def _hooks_of_state(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    """Those of `state_dict` and `load_state_dict`: fully_shard leaves some, which hold the shards."""
    return module._state_dict_pre_hooks, module._load_state_dict_pre_hooks


@torch.no_grad()
def _whole(shard: DTensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Gathered into memory of its own; on all processes. A copy, since what PyTorch gathers is a tensor that
    waits for its data when it is used, and has no address until then.
    """
    return shard.full_tensor().to(device, dtype, copy=True)


def _own(shard: DTensor) -> Piece:
    """This process's rows: FSDP cuts the first dimension as torch.chunk does."""
    local = shard.to_local().detach()
    rows = -(-shard.shape[0] // shard.device_mesh.size())
    first = min(shard.shape[0], rows * shard.device_mesh.get_local_rank())
    return Piece(local.reshape(-1), first * (shard.numel() // max(1, shard.shape[0])), tuple(shard.shape))


def _like(value: Tensor, shard: DTensor) -> DTensor:
    """`value`, cut up as `shard` is."""
    value = value.to(shard.to_local().device, shard.dtype)
    return distribute_tensor(value, shard.device_mesh, shard.placements, src_data_rank=None)


def _layers(module: nn.Module) -> list[nn.Module]:
    """The decoder layers of the model in a LossModule, or nothing where its class hides them."""
    decoder = base_model(module.model).get_decoder()  # type: ignore[arg-type]  # LossModule has one
    return next((list(child) for child in decoder.children() if isinstance(child, nn.ModuleList)), [])


def _without_hooks(module: nn.Module, before: frozenset[int]) -> tuple[dict[int, Any], dict[int, Any]]:
    """Take out the forward hooks that are not of `before`; returns them."""
    taken: tuple[dict[int, Any], dict[int, Any]] = ({}, {})
    for hooks, kept in zip((module._forward_pre_hooks, module._forward_hooks), taken, strict=True):
        for key in [key for key in hooks if key not in before]:
            kept[key] = hooks.pop(key)
    return taken
