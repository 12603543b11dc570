"""Steps in two passes over the gradient (`ops/low_rank.py`): APOLLO, GaLore and FRUGAL.

Clipping makes it no third. What it multiplies the gradient by enters between the passes. The global norm that
it needs is a read of its own for GaLore and FRUGAL, which in their step read the gradient once; for APOLLO it
comes out of the first pass, which then is made of all matrices before the second of any (`first_pass`). What
was found is kept in between, and therefore only where it is thin beside the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops import low_rank
from ..ops.rounding import Noise, noise_key, noise_start
from .matrix import Group, MatrixOptimizer, resolve_rank
from .moments import State
from .weights import Step

# Elements from which on a matrix is stepped alone: stacked with others its gradient would be copied first,
# which is more traffic than the step. Smaller ones are stacked, since a launch costs more than they do.
_ALONE = 1 << 22
# What the first passes of all matrices may keep, as a share of their gradients' bytes.
_KEPT = 1 / 8


class _Looked(NamedTuple):
    """What a first pass found, and the gradients as they were then."""

    found: low_rank.FirstPass
    grads: list[tuple[int, int]]


class TwoPassOptimizer(MatrixOptimizer):
    """A `MatrixOptimizer` that may make its first pass early, and whose kernels may write the weights."""

    scales_gradients = True

    def __init__(self, *args: Any, **options: Any) -> None:
        self._looked: dict[tuple[int, ...], _Looked] = {}
        super().__init__(*args, **options)

    # --- what an algorithm gives

    def may_look(self, grad: Tensor, group: Group) -> bool:
        """Whether the first pass can be made early, and gives the squares at no cost.

        Not where pass 2 has no use for the gradient: a norm of its own then makes two reads too.
        """
        return False

    def look(self, grad: Tensor, group: Group, step: int, indices: list[int]) -> low_rank.FirstPass:
        """The first pass over gradients [B, m, n] for `step`, with squares; it changes nothing."""
        raise NotImplementedError

    def write(
        self,
        weights: list[Tensor],
        grad: Tensor,
        states: list[State],
        group: Group,
        step: int,
        indices: list[int],
        keep: float,
    ) -> None:
        """All of the step, by the kernels: weights, each [E, m, n], shrink by `keep` and move."""
        raise NotImplementedError

    def written_by_kernels(self, weights: list[Tensor], grad: Tensor, group: Group) -> bool:
        """Whether `write` is to write these weights: not where something is kept beside each of them."""
        narrow = weights[0].dtype in (torch.bfloat16, torch.float16)
        if narrow and group["weights"] not in ("sr", "plain"):
            return False
        return low_rank.provider(grad, *weights) == "triton"

    # --- the machinery

    @torch.no_grad()
    def first_pass(self, states: Mapping[Tensor, State] | None = None) -> tuple[list[Tensor], Tensor | None]:
        """Make the first pass for the next step: (whose gradients were read, the sum of their squares).

        The sum is None where none was, and not finite where a gradient is not, or its squares overflow (from
        1e19 on, as in `global_norm`). Until the step, gradients must stay as they are; one that does not is
        read again. states: where they live if not here; matrices are then taken one by one, as in their step.
        """
        self.forget_first_pass()
        read: list[Tensor] = []
        sums = []
        known = self.state if states is None else states
        for group in self.param_groups:
            params = [p for p in group["params"] if self._looks_at(p, group)]
            steps = {p: int(known[p]["step"]) if known.get(p) else 0 for p in params}
            together = self._split(params, list(steps.values()))
            for batch in together if states is None else ([p] for p in params):
                grad, indices = self._stacked(batch)
                found = self.look(grad, group, steps[batch[0]] + 1, indices).summed()
                self._looked[tuple(indices)] = _Looked(found, _versions(batch))
                read += batch
                sums.append(found.squares.sum())
        total = torch.stack([s.to(sums[0].device) for s in sums]).sum() if sums else None
        return read, total

    def _looks_at(self, p: Tensor, group: Group) -> bool:
        """Whether the first pass over it is worth being early: its sketch is thin beside its gradient."""
        if group["kind"] != "matrix" or p.grad is None or not self.may_look(p.grad, group):
            return False
        if type(p) not in (Tensor, nn.Parameter) or type(p.grad) is not Tensor:
            return False
        rank = resolve_rank(group["rank"], tuple(p.shape))
        return 4 * (rank + 1) <= _KEPT * p.grad.element_size() * min(p.shape[-2:])

    def forget_first_pass(self) -> None:
        """Free what `first_pass` has found."""
        self._looked = {}

    def looked(self, indices: list[int]) -> low_rank.FirstPass | None:
        """What the first pass over these tensors found, if it was made; it is handed out once."""
        entry = self._looked.pop(tuple(indices), None)
        return None if entry is None else entry.found

    def scale_on(self, grad: Tensor) -> Tensor | None:
        """What the step multiplies gradients by, where this one is."""
        return None if self.grad_scale is None else self.grad_scale.to(grad.device)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As `MatrixOptimizer`'s."""
        loss = super().step(closure)
        self.forget_first_pass()
        return loss

    def update_weights(
        self,
        weights: list[Tensor],
        grad: Tensor,
        states: list[State],
        group: Group,
        step: int,
        indices: list[int],
    ) -> tuple[Step | None, float]:
        """`update`, or all of the step where the kernels write the weights."""
        if not self.written_by_kernels(weights, grad, group):
            return super().update_weights(weights, grad, states, group, step, indices)
        keep = 1 - float(group["lr"]) * group["weight_decay"]
        self.write(weights, grad, states, group, step, indices, keep)
        return None, keep

    def _split(self, params: list[Tensor], steps: list[int]) -> Iterator[list[Tensor]]:
        for batch in super()._split(params, steps):
            grad = batch[0].grad
            apart = len(batch) > 1 and batch[0].numel() >= _ALONE
            if apart and grad is not None and low_rank.provider(grad) == "triton":
                yield from ([p] for p in batch)
            else:
                yield batch

    def _advance_batch(self, group: Group, params: list[Tensor]) -> None:
        key = tuple(self._place(p)[0] for p in params)
        if key in self._looked and self._looked[key].grads != _versions(params):
            del self._looked[key]
        super()._advance_batch(group, params)


def _versions(params: list[Tensor]) -> list[tuple[int, int]]:
    return [(p.grad.data_ptr(), p.grad._version) for p in params if p.grad is not None]


def noise_for(weight: Tensor, group: Group, step: int, index: int) -> Noise | None:
    """Where the random bits of tensor `index` at `step` are, as `noise_window` has them; None to nearest."""
    if weight.dtype != torch.bfloat16 or group["weights"] != "sr":
        return None
    return noise_key(group["seed"], step), noise_start(index)
