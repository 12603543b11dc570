"""ZenFlow (arXiv:2505.12242) behind the loop: what DeepSpeed 0.19 leaves out of it is done here.

Each step, the columns of a matrix with the largest gradients (and all of a vector) take an AdamW step of
their own on the device; the gradients of all columns add up in host memory and are stepped there at an
update. At a selection the columns are chosen anew and their moments begin at zero.

What DeepSpeed 0.19.8 gets wrong, and is put right here:

- It flattens matrices column by column and shows the model that memory row by row
  (`_update_model_bit16_weights` of stage_1_and_2.py), so that every trained matrix is scrambled at the start.
- Looking for the largest columns it does not count the vectors that lie before a matrix in the bucket
  (`update_selected_channels`), so that it chooses by gradients of other columns.
- It zeroes the moments of the chosen columns and lets their count of steps go on, so that nothing corrects
  the bias, and the steps that follow are up to six times too long.
- It steps chosen columns whose gradient is not finite.
- It gives the chosen columns one weight decay for all groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..recipes.errors import UserError

ByGroup = Mapping[int, Sequence[nn.Parameter]]


class HostAdamW(torch.optim.AdamW):
    """PyTorch's, called as ZenFlow does. Its own count of steps is that of the updates, not of the steps."""

    def step(self, closure: Any = None, step_id: int | None = None) -> Any:
        """One update; `step_id`, DeepSpeed's count of micro-batches, would correct the bias wrongly."""
        return super().step(closure)


class ZenFlow:
    """The chosen columns' optimizer in `engine` (DeepSpeed's, stage 2), watched and corrected."""

    def __init__(self, engine: Any) -> None:
        self._engine, self._zero = engine, engine.optimizer
        self._selective = self._zero.selective_optimizer
        self._squares: list[Tensor] = []
        self._since = 0
        self._step_chosen: Callable[[ByGroup], None] = self._selective.group_step
        self._keep_chosen: Callable[[ByGroup], None] = self._selective.temp_copy_param
        self._selective.group_step = self._measure_and_step
        self._selective.temp_copy_param = self._measure_and_keep
        self._selective.clear_selected_mv = self._begin_anew
        engine._zenflow_step = self._after_update
        self._choose: Callable[[Tensor, int, torch.dtype], None] = self._zero.update_selected_channels
        self._zero.update_selected_channels = self._choose_of_matrices
        self._zero._update_model_bit16_weights = self._show_weights
        for group in range(len(self._zero.bit16_groups)):
            self._show_weights(group)

    def before_backward(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Rate and all else of `groups` for the coming step, a part of which is in the backward pass."""
        self._squares.clear()
        self._since += 1
        for given, theirs in zip(groups, self._selective.param_groups, strict=True):
            theirs.update({key: given[key] for key in ("lr", "betas", "eps", "weight_decay")})

    def finite(self) -> bool:
        """Whether what this step applies is, on this process: chosen columns, and at an update all others."""
        if not bool(torch.isfinite(self._chosen_norm())):
            return False
        if not self._engine.is_gradient_accumulation_boundary():
            return True
        shards = self._zero.single_partition_of_fp32_groups
        return all(bool(torch.isfinite(shard.grad).all()) for shard in shards)

    def step(self) -> Tensor:
        """Step what is due. Returns the norm of what was applied: at an update that of the gradient of all
        columns, averaged over the steps since the last; else that of the chosen ones.
        """
        update = self._engine.is_gradient_accumulation_boundary()
        norm = self._chosen_norm()
        self._engine.step()
        if update:
            norm = torch.as_tensor(self._engine.get_global_grad_norm()).cpu() / self._since
            self._since = 0
        return norm

    def go_on(self) -> None:
        """After state was put in: this is no start, so that nothing warms up; columns are chosen anew."""
        self._zero.full_warm_up_rounds = self._engine.full_warm_up_rounds = 0

    @contextmanager
    def by_rows(self) -> Iterator[None]:
        """Inside, the weights are copies that lie row by row."""
        kept = [(p, p.data) for group in self._zero.bit16_groups for p in group]
        for p, data in kept:
            p.data = data.contiguous()
        try:
            yield
        finally:
            for p, data in kept:
                p.data = data

    def _chosen_norm(self) -> Tensor:
        return torch.stack(self._squares).sum().sqrt().cpu() if self._squares else torch.zeros(())

    def _measure(self, chosen: ByGroup) -> bool:
        grads = [p.selected_grad for group in chosen.values() for p in group]  # type: ignore[attr-defined]
        self._squares += [grad.float().square().sum() for grad in grads]
        return bool(torch.isfinite(self._chosen_norm()))

    def _measure_and_step(self, chosen: ByGroup) -> None:
        if self._measure(chosen):
            self._step_chosen(chosen)

    def _measure_and_keep(self, chosen: ByGroup) -> None:
        self._measure(chosen)
        self._keep_chosen(chosen)

    def _show_weights(self, group: int) -> None:
        """Let the parameters of a group see their part of its flat memory, matrices column by column."""
        zero = self._zero
        flat = zero.bit16_groups_flat[group]
        order, metas = zero.round_robin_bit16_groups[group], zero.round_robin_bit16_meta[group]
        for p, meta, offset in zip(order, metas, zero.round_robin_bit16_offsets[group], strict=True):
            part = flat.narrow(0, offset, meta.numel())
            p.data = part.view(meta.shape[::-1]).t() if meta.dim() == 2 else part.view(meta.shape)

    def _choose_of_matrices(self, grads: Tensor, count: int, dtype: torch.dtype) -> None:
        """DeepSpeed's choice, given the bucket `grads` without its vectors."""
        matrices, start = [], 0
        for group, index, _ in self._zero.ipg_buckets[dtype].params:
            p = self._zero.bit16_groups[group][index]
            if p.dim() == 2:
                matrices.append(grads.narrow(0, start, p.numel()))
            start += p.numel()
        self._choose(torch.cat(matrices) if matrices else grads.narrow(0, 0, 0), count, dtype)

    def _begin_anew(self) -> None:
        for state in self._selective.state.values():
            for value in state.values():
                value.zero_()

    def _after_update(self, _: Any) -> None:
        """DeepSpeed's, without what it prints."""
        engine = self._engine
        started = engine.micro_steps + 1 >= engine.full_warm_up_rounds
        if started and engine.is_gradient_accumulation_boundary():
            self._selective.step()


def check_shapes(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise UserError for a trained tensor that has no columns."""
    for name, p in parameters.items():
        if p.dim() > 2:
            raise UserError(
                f"engine.zenflow chooses columns of matrices, and {name} has {p.dim()} dimensions.   "
                "Set engine.zenflow=null, or train an adapter of the linear layers: adapter=lora"
            )
