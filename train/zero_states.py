"""The optimizer's state between DeepSpeed's flat shards and whole tensors by name.

Stages 1 and 2 have one flat shard a group of parameters, which DeepSpeed gives by name. Stage 3 has one a
sub-group, and a part of every parameter in it; with NVMe they lie on the disk and come one after the other,
which asking for them by name would do once for each tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..checkpoint import Piece
from .sharded import MASTER, MOMENTS, OwnPieces

States = Mapping[str, Mapping[str, Tensor]]


class ZeroStates:
    """State of `adamw`, which DeepSpeed's `zero` steps its shards with.

    zero: DeepSpeed's optimizer of stage 1, 2 or 3 (version 0.19). names: of the trained parameters.
    by_columns: its shards have matrices column by column, as ZenFlow's do.
    """

    def __init__(
        self,
        zero: Any,
        adamw: torch.optim.AdamW,
        names: Mapping[str, nn.Parameter],
        *,
        stage: int,
        by_columns: bool = False,
    ) -> None:
        self._by_columns = by_columns
        self._zero, self._adamw, self._names, self._stage3 = zero, adamw, names, stage == 3
        self._name_of = {id(p): name for name, p in names.items()}
        self._shards: list[Tensor] = (
            zero.fp32_partitioned_groups_flat if self._stage3 else zero.single_partition_of_fp32_groups
        )
        # Now, since DeepSpeed links names to states once, after the step of the first group, when the others
        # have none.
        for index, shard in enumerate(self._shards):
            with self._present(index):
                moments = {key: torch.zeros_like(shard) for key in MOMENTS}
                adamw.state[shard] = {"step": torch.zeros((), device=shard.device), **moments}
        if not self._stage3:
            zero._lazy_init_hp_params_optimizer_state()

    def gather(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Each parameter's state, whole, on all processes; nothing before the first step."""
        step = self._adamw.state[self._shards[0]]["step"]
        if step == 0:
            return
        if self._stage3:
            for index in range(len(self._shards)):
                with self._present(index):
                    for p in self._zero.fp16_groups[index]:
                        state = {key: _joined(self._part(p, key), p) for key in self._keys(p)}
                        yield self._name_of[id(p)], {"step": step, **state}
            return
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for name, p in self._names.items():
            state = {key: self._by_rows(safe_get_full_optimizer_state(p, key)) for key in MOMENTS}
            if p.dtype != torch.float32:
                state[MASTER] = safe_get_full_fp32_param(p)
            yield name, {"step": step, **state}

    def own(self) -> OwnPieces:
        """What this process holds of each parameter, as it lies there. Not of state on the disk."""
        if self._stage3:
            yield from self._own_of_stage_3()
            return
        for name, p in self._names.items():
            fragment = p._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed's
            if fragment is None:
                continue
            place = fragment.lp_fragment_address
            shape = tuple(p.shape)
            state = {
                key: Piece(fragment.get_optim_state_fragment(key), place.start, shape) for key in MOMENTS
            }
            if p.dtype != torch.float32:
                state[MASTER] = Piece(fragment.hp_fragment.detach(), place.start, shape)
            weight = p.detach().reshape(-1)[place.start : place.start + place.numel]
            yield name, Piece(weight, place.start, shape), state

    def _own_of_stage_3(self) -> OwnPieces:
        rank = dist.get_rank()
        for index in range(len(self._shards)):
            for p in self._zero.fp16_groups[index]:
                shape = tuple(p.ds_shape)

                def piece(part: Tensor, p: Any = p, shape: tuple[int, ...] = shape) -> Piece:
                    first = rank * part.numel()
                    return Piece(part[: max(0, p.ds_numel - first)], min(first, p.ds_numel), shape)

                weight = piece(p.ds_tensor.detach())
                if weight.data.numel():
                    state = {key: piece(self._part(p, key)) for key in self._keys(p)}
                    yield self._name_of[id(p)], weight, state

    @property
    def steps(self) -> Tensor:
        """The count of steps."""
        count: Tensor = self._adamw.state[self._shards[0]]["step"]
        return count

    def scatter(self, states: States) -> None:
        """Keep this process's part of each whole state; every process is given all of them."""
        step = next(iter(states.values()))["step"]
        for shard in self._shards:
            self._adamw.state[shard]["step"].copy_(step)
        if self._stage3:
            for index in range(len(self._shards)):
                with self._present(index):
                    for p in self._zero.fp16_groups[index]:
                        state = states.get(self._name_of[id(p)], {})
                        for key in state.keys() - {"step"}:
                            part = self._part(p, key)
                            part.copy_(shard_of(state[key], part.numel()))
            return
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for name, state in states.items():
            for key in MOMENTS:
                value = self._by_shard(state[key])
                safe_set_full_optimizer_state(self._names[name], value, key)
            if MASTER in state:
                safe_set_full_fp32_param(self._names[name], state[MASTER])

    def _by_rows(self, value: Tensor) -> Tensor:
        """What a shard's run of elements is, read as a tensor of the parameter's shape."""
        if not self._by_columns or value.dim() != 2:
            return value
        rows, columns = value.shape
        return value.reshape(columns, rows).t().contiguous()

    def _by_shard(self, value: Tensor) -> Tensor:
        """The inverse of `_by_rows`."""
        if not self._by_columns or value.dim() != 2:
            return value
        return value.t().contiguous().view(value.shape)

    def _keys(self, parameter: nn.Parameter) -> tuple[str, ...]:
        return MOMENTS if parameter.dtype == torch.float32 else (*MOMENTS, MASTER)

    def _part(self, parameter: nn.Parameter, key: str) -> Tensor:
        """This process's part of a parameter in its sub-group, which must be present."""
        index, offset, count = self._zero.grad_position[self._zero.get_param_id(parameter)]
        shard = self._shards[index]
        whole = shard.detach() if key == MASTER else self._adamw.state[shard][key]
        part: Tensor = whole.narrow(0, offset, count)
        return part

    @contextmanager
    def _present(self, index: int) -> Iterator[None]:
        """A sub-group that lies on the disk, in memory and written back: always all in order, since DeepSpeed
        reads the next one ahead.
        """
        if not self._stage3 or not self._zero._swappable_optimizer_subgroup(index):
            yield
            return
        self._zero._optimizer_states_and_gradient_swap_in(index)
        yield
        self._zero._optimizer_states_and_gradient_swap_out(index)


def shard_of(value: Tensor, elements: int) -> Tensor:
    """This process's run of `elements`, with zeros after the last one."""
    flat = value.flatten()
    start = elements * dist.get_rank()
    mine = flat[start : start + elements]
    return nn.functional.pad(mine, (0, elements - mine.numel()))


def _joined(part: Tensor, parameter: Any) -> Tensor:
    """The parts of all processes, in the parameter's shape (DeepSpeed keeps it beside the empty weight)."""
    mine = part.to(parameter.device)
    joined = torch.empty(dist.get_world_size() * mine.numel(), dtype=mine.dtype, device=mine.device)
    dist.all_gather_into_tensor(joined, mine.contiguous())
    return joined[: parameter.ds_numel].view(parameter.ds_shape)
