"""Each weight takes its step inside the backward pass, and its gradient is freed at once.

A gradient is whole as soon as the backward pass has left the last place that uses its weight. Stepping then
leaves the largest gradient in memory in place of all of them (arXiv:2306.09782). Hooks live only inside the
`with` block of one pass: a backward pass outside accumulates gradients as ever.

Clipping by the global norm cannot be had in the same pass, for the norm is known when the last gradient is:

    previous   scale by max_norm / max(max_norm, norm of the step before, norm of this tensor). Free. The last
               term is what exact clipping promises too: no tensor's gradient is longer than max_norm. It is
               all there is in the first step, and what holds a sudden spike.
    exact      a first pass that only measures, then one that steps: the time of a second forward and
               backward.

A gradient that is not finite is never applied, nor is any after it in that pass. With `previous` the weights
before it have changed already (`BackwardPass.stepped`); with `exact`, none has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..ops.grad_pack import global_norm
from .matrix import MatrixOptimizer

_LAST_NORM = "norm_of_last_backward"


@runtime_checkable
class StepsAlone(Protocol):
    """An optimizer that can step one parameter without the others."""

    param_groups: list[dict[str, Any]]

    def step(self) -> Any:
        """All that have a gradient."""

    def step_parameter(self, parameter: Tensor) -> None:
        """One alone."""


@dataclass
class BackwardPass:
    """What a backward pass has met: read it after the `with` block."""

    norms: dict[Tensor, float] = field(default_factory=dict)
    """Norm of each gradient before clipping, in the order of their arrival."""
    stepped: int = 0
    """Weights that have taken their step."""
    broken: Tensor | None = None
    """The weight whose gradient was the first that is not finite."""
    finite_loss: bool = True

    @property
    def norm(self) -> float:
        """Global norm of all gradients before clipping; not finite when one of them or the loss is not."""
        return math.hypot(*self.norms.values()) if self.finite_loss else math.nan


class BackwardStepper:
    """Steps `optimizer` inside backward passes, for a loop that calls `step` once a step.

    Raises TypeError for an optimizer that steps all tensors at once, ValueError for an option out of range,
    and RuntimeError in a group of several processes, whose gradients are not reduced yet when the hooks run.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float | None = None,
        clipping: Literal["exact", "previous"] = "previous",
    ) -> None:
        if clipping not in ("exact", "previous"):
            raise ValueError(f"clipping is {clipping!r}; allowed: 'exact', 'previous'")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm is {max_grad_norm}; it must be positive, or None")
        self.optimizer = _checked(optimizer)
        self.max_grad_norm = max_grad_norm
        self.clipping = clipping

    def step(self, loss: Callable[[], Tensor]) -> BackwardPass:
        """One step on the gradient of `loss()`, a forward pass; with `exact` it is called twice.

        Random numbers of torch are the same both times, so that dropout is. Nothing is applied where the loss
        is not finite.
        """
        if self.max_grad_norm is None or self.clipping == "previous":
            value = loss()
            if not bool(torch.isfinite(value)):
                return BackwardPass(finite_loss=False)
            with step_in_backward(self.optimizer, self.max_grad_norm) as done:
                _backward(value)
            return done
        with torch.random.fork_rng(devices=_cuda_devices(self.optimizer)):
            measured = self.measure(loss)
        if not math.isfinite(measured.norm):
            return measured
        scale = min(1.0, self.max_grad_norm / measured.norm) if measured.norm else 1.0
        with _stepping(self.optimizer, lambda _: scale) as done:
            _backward(loss())
        if done.broken is None:
            done.norms = (
                measured.norms
            )  # those of the second pass are the same, up to what a GPU adds at random
        return done

    def measure(self, loss: Callable[[], Tensor]) -> BackwardPass:
        """Norms of the gradient of `loss()`; each gradient is freed as it has been measured."""
        value = loss()
        if not bool(torch.isfinite(value)):
            return BackwardPass(finite_loss=False)
        with measure_in_backward(_parameters(self.optimizer)) as seen:
            _backward(value)
        return seen

    def remember(self, norm: float) -> None:
        """Tell `previous` the norm of a step that was taken outside a backward pass."""
        if self.max_grad_norm is not None and self.clipping == "previous":
            self.optimizer.param_groups[0][_LAST_NORM] = norm


@contextmanager
def step_in_backward(
    optimizer: torch.optim.Optimizer | StepsAlone, max_grad_norm: float | None = None
) -> Iterator[BackwardPass]:
    """Inside, one `loss.backward()` steps every weight of `optimizer` and frees its gradient.

    Gradients that earlier backward passes have accumulated are part of the step. max_grad_norm: clips as
    `previous` does (see the module); the norm is kept in the optimizer, hence in its state_dict. Raises as
    `BackwardStepper`, and RuntimeError for a second backward pass inside the block.

        optimizer = GaLore(model.named_parameters(), lr=1e-3)
        for batch in batches:
            loss = loss_of(model, batch)
            with step_in_backward(optimizer, max_grad_norm=1.0) as done:
                loss.backward()
            print(done.norm)
    """
    own = _checked(optimizer)
    if max_grad_norm is None:
        with _stepping(own, lambda _: 1.0) as done:
            yield done
        return
    limit, last = max_grad_norm, float(own.param_groups[0].get(_LAST_NORM, 0.0))
    with _stepping(own, lambda norm: limit / max(limit, last, norm)) as done:
        yield done
    if math.isfinite(done.norm):
        own.param_groups[0][_LAST_NORM] = done.norm


@contextmanager
def measure_in_backward(parameters: Iterable[Tensor]) -> Iterator[BackwardPass]:
    """Inside, one `loss.backward()` measures every gradient and frees it; no weight changes."""
    with _each_gradient(list(parameters), BackwardPass(), lambda p, norm: None) as seen:
        yield seen


@contextmanager
def _stepping(optimizer: StepsAlone, scale: Callable[[float], float]) -> Iterator[BackwardPass]:
    """scale(norm of a gradient): the factor that it is clipped by."""
    done = BackwardPass()

    def take(p: Tensor, norm: float) -> None:
        assert p.grad is not None
        factor = scale(norm)
        if factor < 1:
            p.grad.mul_(factor)
        done.stepped += 1  # before the step: one that is cut short may have changed something
        optimizer.step_parameter(p)

    with _each_gradient(_parameters(optimizer), done, take):
        yield done
    if done.broken is None:
        optimizer.step()  # no gradient is left; some end their step with more (BAdam goes to the next block)


@contextmanager
def _each_gradient(
    parameters: list[Tensor], seen: BackwardPass, take: Callable[[Tensor, float], None]
) -> Iterator[BackwardPass]:
    """Inside, each gradient goes to `take` with its norm once it is whole, and is freed."""

    @torch.no_grad()
    def hook(p: Tensor) -> None:
        grad = p.grad
        if grad is None:
            return
        if p in seen.norms:
            raise RuntimeError(
                "a second backward pass inside the block would be a second step: run those of the earlier "
                "micro-batches outside of it (or checkpoint with use_reentrant=False)"
            )
        if grad.is_sparse:
            raise RuntimeError(f"a gradient of shape {tuple(grad.shape)} is sparse")
        # Read here and not at the end: what is not finite must not reach a weight. The one number that a GPU
        # sends over for each tensor costs microseconds beside that tensor's own product.
        norm = seen.norms[p] = float(global_norm([grad]))
        if not math.isfinite(norm) and seen.broken is None:
            seen.broken = p
        if seen.broken is None:
            take(p, norm)
        p.grad = None

    handles = [
        p.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]  # torch has no types here
        for p in parameters
        if p.requires_grad
    ]
    try:
        yield seen
        # What earlier passes accumulated for weights that this one did not reach (an expert without tokens).
        for p in parameters:
            hook(p)
    finally:
        for handle in handles:
            handle.remove()


def _checked(optimizer: torch.optim.Optimizer | StepsAlone) -> StepsAlone:
    inner = getattr(optimizer, "inner", optimizer)  # of one whose state lives elsewhere
    if not (isinstance(inner, MatrixOptimizer) and isinstance(optimizer, StepsAlone)):
        kind = type(inner)
        raise TypeError(
            f"{kind.__module__}.{kind.__qualname__} steps all its tensors at once and cannot step inside the "
            "backward pass; the optimizers of shoestring.optimizers can (for AdamW: elementwise.AdamW)"
        )
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise RuntimeError(
            "stepping inside the backward pass needs a single process: gradients of several are averaged "
            "only after the hooks have run"
        )
    return optimizer


def _parameters(optimizer: StepsAlone) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _cuda_devices(optimizer: StepsAlone) -> list[int]:
    return sorted({p.device.index for p in _parameters(optimizer) if p.device.type == "cuda"})


def _backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]  # torch has no types here
