"""What an optimizer tells so that its state can live elsewhere: layout, start, and the step of a piece."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Protocol

import torch
from torch import Tensor

from ..optimizers.matrix import MatrixOptimizer
from .segments import Layout, Piece

Group = dict[str, Any]
State = dict[str, Any]


class Stepper(Protocol):
    """An optimizer, piece by piece."""

    def layout(self, parameter: Tensor, group: Group) -> Layout:
        """The state before the first step, on the meta device, in the order of its keys."""

    def can_cut(self, parameter: Tensor, group: Group) -> bool:
        """Whether a range of elements can be stepped without the others."""

    def start(self, piece: Piece, views: dict[str, Tensor]) -> State:
        """The state of `piece` before its first step: `views`, filled, and what stays in memory."""

    def step(self, piece: Piece, state: State) -> None:
        """Step the weights of `piece` by its gradient and advance `state` in place."""

    def can_step_on_host(self, piece: Piece) -> bool:
        """Whether the CPU can update state and weights of an accelerator without having the weights."""

    def step_on_host(self, piece: Piece, state: State) -> None:
        """As `step`, where `state` is in host memory and the weights may be on an accelerator."""


def stepper_for(optimizer: torch.optim.Optimizer) -> Stepper:
    """Raises TypeError for an optimizer that cannot be stepped piece by piece."""
    if isinstance(optimizer, MatrixOptimizer) and optimizer.steps_alone:
        return MatrixStepper(optimizer)
    if type(optimizer) is torch.optim.AdamW and not any(g["amsgrad"] for g in optimizer.param_groups):
        return TorchAdamWStepper()
    kind = type(optimizer)
    raise TypeError(
        f"{kind.__module__}.{kind.__qualname__} cannot keep its state on another tier: it does not step one "
        "tensor without the others, or keeps next to nothing; torch.optim.AdamW and most optimizers of "
        "shoestring.optimizers can"
    )


class MatrixStepper:
    """The optimizers of shoestring.optimizers; tensors that AdamW takes can be cut."""

    def __init__(self, optimizer: MatrixOptimizer) -> None:
        self._optimizer = optimizer

    def layout(self, parameter: Tensor, group: Group) -> Layout:
        """See Stepper."""
        state = self._optimizer.fresh_state(torch.empty_like(parameter, device="meta"), group)
        return {key: value for key, value in state.items() if isinstance(value, Tensor)}

    def can_cut(self, parameter: Tensor, group: Group) -> bool:
        """See Stepper."""
        # codes of 4 bits lie two in a byte: what belongs to a range of elements is no range of the tensor
        whole_bytes = group["state_bits"] != 4
        return bool(group["kind"] == "adamw") and parameter.is_contiguous() and whole_bytes

    @torch.no_grad()
    def start(self, piece: Piece, views: dict[str, Tensor]) -> State:
        """See Stepper."""
        weight = _range(piece.parameter.detach(), piece.part)
        if piece.group["kind"] == "adamw":
            state = _zeros(piece, views)
            if "master" in state:
                state["master"].copy_(weight)
            return state
        fresh = self._optimizer.fresh_state(weight, piece.group)
        for key, view in views.items():
            view.copy_(fresh[key])
        return {**fresh, **views}

    @torch.no_grad()
    def step(self, piece: Piece, state: State) -> None:
        """See Stepper."""
        parameter = piece.parameter
        if piece.part is not None:
            assert parameter.grad is not None
            weight, grad = _range(parameter.detach(), piece.part), _range(parameter.grad, piece.part)
            self._optimizer.step_part(parameter, piece.part.start, weight, grad, state)
            return
        self._optimizer.state[parameter] = state
        try:
            self._optimizer.step_parameter(parameter)
        finally:
            del self._optimizer.state[parameter]

    def can_step_on_host(self, piece: Piece) -> bool:
        """See Stepper: with master weights the state has all that the update needs."""
        return self.can_cut(piece.parameter, piece.group) and any(f.key == "master" for f in piece.fields)

    @torch.no_grad()
    def step_on_host(self, piece: Piece, state: State) -> None:
        """See Stepper."""
        parameter, part = piece.parameter, piece.part or slice(0, piece.parameter.numel())
        assert parameter.grad is not None
        grad = _range(parameter.grad, part).cpu()
        weight = torch.empty(grad.shape, dtype=parameter.dtype)  # what comes out of the master weights
        self._optimizer.step_part(parameter, part.start, weight, grad, state)
        _range(parameter.detach(), part).copy_(weight, non_blocking=True)


class TorchAdamWStepper:
    """torch.optim.AdamW, called with the pieces as its parameters: the same kernel on the same numbers."""

    def __init__(self) -> None:
        self._worker = torch.optim.AdamW([torch.zeros(1)])  # its groups are those of each call

    def layout(self, parameter: Tensor, group: Group) -> Layout:
        """See Stepper."""
        weight = torch.empty_like(parameter, device="meta")
        count = torch.empty((), dtype=torch.float32, device="meta")
        return {"step": count, "exp_avg": weight, "exp_avg_sq": weight}

    def can_cut(self, parameter: Tensor, group: Group) -> bool:
        """See Stepper. The other kernels of torch round the last elements of a range in another way."""
        return bool(group.get("fused")) and parameter.is_contiguous()

    def start(self, piece: Piece, views: dict[str, Tensor]) -> State:
        """See Stepper."""
        state = _zeros(piece, views)
        if piece.group.get("fused") or piece.group.get("capturable"):
            state["step"] = state["step"].to(piece.parameter.device)
        return state

    def step(self, piece: Piece, state: State) -> None:
        """See Stepper."""
        grad = piece.parameter.grad
        assert grad is not None
        weight = _range(piece.parameter.detach(), piece.part)
        weight.grad = _range(grad, piece.part)
        self._worker.param_groups = [{**piece.group, "params": [weight]}]
        self._worker.state = defaultdict(dict, {weight: state})
        self._worker.step()

    def can_step_on_host(self, piece: Piece) -> bool:
        """See Stepper: float32 weights would have to come down too."""
        return False

    def step_on_host(self, piece: Piece, state: State) -> None:
        """See Stepper."""
        raise TypeError("torch's AdamW has its weights on the device alone")


def _zeros(piece: Piece, views: dict[str, Tensor]) -> State:
    """All of a piece's tensors, zero: made where they will lie, since a second copy would leave holes in the
    heap that cost as much memory as the buffers.
    """
    return {
        field.key: views[field.key].zero_()
        if field.key in views
        else torch.zeros(field.shape, dtype=field.dtype)
        for field in piece.fields
    }


def _range(tensor: Tensor, part: slice | None) -> Tensor:
    return tensor if part is None else tensor.reshape(-1)[part]
