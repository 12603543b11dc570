"""An optimizer whose state lives in host memory or on disk; every bit is what it would be on the device."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ..optimizers.two_pass import TwoPassOptimizer
from .holder import Holder
from .lift import Lift
from .segments import Field, Piece, Segment
from .shadow import Part, Shadow
from .steppers import Stepper
from .stored import Stored, whole


class OffloadedOptimizer(torch.optim.Optimizer):
    """`inner`, with its state in `segments` that `holder` gives for use.

    Made by `offload_optimizer`. lift: where the weights are on an accelerator. shadow: of state on disk that
    is to have snapshots. The groups are those of `inner`, the very same objects. `state` has tensors where
    they are small and `Stored` ones otherwise; `state_dict` brings all into memory, as torch's users expect,
    and checkpoints read and write ranges instead (`put_state`).
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        stepper: Stepper,
        segments: Sequence[Segment],
        holder: Holder,
        close: Callable[[], None],
        lift: Lift | None = None,
        shadow: Shadow | None = None,
    ) -> None:
        super().__init__(inner.param_groups, inner.defaults)
        self.inner, self.shadow = inner, shadow
        self._stepper, self._segments, self._holder, self._close = stepper, segments, holder, close
        self._lift = lift
        self._pieces: dict[Tensor, list[tuple[int, Piece]]] = defaultdict(list)
        for segment in segments:
            for piece in segment.pieces:
                self._pieces[piece.parameter].append((segment.index, piece))
        self._alone: list[int] = []  # segments of step_parameter since the last step, in order
        self._reverse = False
        self.state = defaultdict(dict)

    @property
    def scales_gradients(self) -> bool:
        """As `MatrixOptimizer`'s, of `inner`."""
        return getattr(self.inner, "scales_gradients", False)

    @property
    def grad_scale(self) -> Tensor | None:
        """What `inner` multiplies the gradients of the next step by."""
        return getattr(self.inner, "grad_scale", None)

    @grad_scale.setter
    def grad_scale(self, scale: Tensor | None) -> None:
        self.inner.grad_scale = scale  # type: ignore[attr-defined]  # where `scales_gradients` says so

    def first_pass(self) -> tuple[list[Tensor], Tensor | None]:
        """As `TwoPassOptimizer`'s, whose norm has then the same bits; nothing for other kinds."""
        return self.inner.first_pass(self.state) if isinstance(self.inner, TwoPassOptimizer) else ([], None)

    def forget_first_pass(self) -> None:
        """As `TwoPassOptimizer`'s."""
        if isinstance(self.inner, TwoPassOptimizer):
            self.inner.forget_first_pass()

    # --- torch.optim.Optimizer

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient; returns the closure's loss.

        Returns when the last is updated, while the disk may still write what left the buffers. Raises
        OffloadError where it failed: then weights and state disagree, and only a checkpoint helps.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        order = [segment.index for segment in self._segments if self._with_gradient(segment.index)]
        if self._alone and not order:  # all were stepped alone; the next pass will go the same way
            self._holder.expect(self._alone, self._alone, same_way=True)
            self._alone = []
            self.inner.step()  # some end their step with more
            return loss
        if self._reverse:
            order.reverse()
        self._holder.expect(order, order[::-1])
        if self._lift is None:
            for index in order:
                self._advance(index, self._with_gradient(index))
        else:
            self._advance_lifted(self._lift, order)
        self._reverse = not self._reverse
        if self.scales_gradients:
            self.grad_scale = None
        self.forget_first_pass()
        return loss

    @torch.no_grad()
    def step_parameter(self, parameter: Tensor) -> None:
        """The step of one parameter alone: what a hook in the backward pass calls."""
        for index, piece in self._pieces[parameter]:
            self._alone.append(index)
            if self._lift is None:
                self._advance(index, [piece])
            else:
                self._advance_lifted(self._lift, [index], [piece])

    def state_dict(self) -> dict[str, Any]:
        """As that of `inner`, with all state in memory."""
        numbers: dict[Tensor, int] = {}
        groups = []
        for group in self.param_groups:
            for p in group["params"]:
                numbers.setdefault(p, len(numbers))
            options = {key: value for key, value in group.items() if key != "params"}
            groups.append({**options, "params": [numbers[p] for p in group["params"]]})
        state = {
            numbers[p]: {key: whole(v) if isinstance(v, Stored) else v for key, v in entry.items()}
            for p, entry in self.state.items()
        }
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From that of `inner` or of this one."""
        saved = state_dict["param_groups"]
        if [len(g["params"]) for g in saved] != [len(g["params"]) for g in self.param_groups]:
            raise ValueError("loaded state dict has other parameter groups than the optimizer")
        for group, values in zip(self.param_groups, saved, strict=True):
            group.update({key: value for key, value in values.items() if key != "params"})
            for number, p in zip(values["params"], group["params"], strict=True):
                self.put_state(p, state_dict["state"].get(number, {}))

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes read from the disk and written to it so far."""
        return self._holder.traffic

    def wait(self) -> None:
        """Until the disk has finished all it was given. OffloadError where it failed."""
        self._holder.wait()

    def pass_through(self) -> None:
        """Move all state as a step does, and change nothing: what the tier alone takes, for measuring."""
        order = [segment.index for segment in self._segments][:: -1 if self._reverse else 1]
        self._holder.expect(order, order[::-1])
        for index in order:
            with self._holder.using(index, changes=True):
                pass
        self._reverse = not self._reverse

    # --- for checkpoints

    @torch.no_grad()
    def put_state(self, parameter: Tensor, state: Mapping[str, Any]) -> None:
        """Take over the state of one parameter, whose large values may be `Stored`: they are read by ranges.

        An empty one is that before the first step.
        """
        for index, piece in self._pieces[parameter]:
            piece.started = bool(state)
            piece.resident = {}
            if not state:
                continue
            with self._holder.using(index, changes=True, expected=False) as buffer:
                for field in piece.moving:
                    field.view(buffer).copy_(_range(state[field.key], field))
            fields = {field.key: field for field in piece.fields}
            for key, value in state.items():
                if key not in fields:
                    piece.resident[key] = value
                elif fields[key].offset is None:
                    piece.resident[key] = _range(value, fields[key])
        self._show(parameter)

    def close(self) -> None:
        """Free the buffers and remove what lies on the disk; what the state was is lost."""
        self._holder.close()
        self._close()

    # --- the machinery

    def _with_gradient(self, index: int) -> list[Piece]:
        return [piece for piece in self._segments[index].pieces if piece.parameter.grad is not None]

    def _advance(self, index: int, pieces: Sequence[Piece]) -> None:
        with self._holder.using(index, changes=True) as buffer:
            for piece in pieces:
                state, _ = self._state_of(piece, buffer)
                self._stepper.step(piece, state)
                self._keep(piece, state)

    def _advance_lifted(self, lift: Lift, order: Sequence[int], only: Sequence[Piece] | None = None) -> None:
        """As `_advance`, for weights on an accelerator: while it updates one segment, the CPU goes on."""
        with ExitStack() as pending:
            began: float | None = None
            for index in order:
                pieces = self._with_gradient(index) if only is None else only
                if not lift.goes_to_device(pieces):
                    with self._holder.using(index, changes=True) as buffer:
                        for piece in pieces:
                            state, _ = self._state_of(piece, buffer)
                            lift.on_host(piece, state)
                            self._keep(piece, state)
                    continue
                if began is not None:
                    lift.finish(began)
                    pending.pop_all().close()
                began = time.perf_counter()
                buffer = pending.enter_context(self._holder.using(index, changes=True))
                for piece in pieces:
                    state, views = self._state_of(piece, buffer)
                    lift.on_device(piece, state, views)
                    self._keep(piece, state)
            if began is not None:
                lift.finish(began)

    def _state_of(self, piece: Piece, buffer: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The state of a piece, made where it is the first step, and the part of it that lies in `buffer`."""
        views = {field.key: field.view(buffer) for field in piece.moving}
        if not piece.started:
            return self._stepper.start(piece, views), views
        return {**piece.resident, **views}, views

    def _keep(self, piece: Piece, state: Mapping[str, Any]) -> None:
        moving = {field.key for field in piece.moving}
        piece.resident = {key: value for key, value in state.items() if key not in moving}
        if not piece.started:
            piece.started = True
            self._show(piece.parameter)
        elif piece.part is None:
            self.state[piece.parameter].update(piece.resident)

    def _show(self, parameter: Tensor) -> None:
        """What `state` says of a parameter, once all of its pieces have state."""
        pieces = self._pieces[parameter]
        if not all(piece.started for _, piece in pieces):
            self.state.pop(parameter, None)
            return
        first = pieces[0][1]
        shown: dict[str, Any] = {}
        for number, field in enumerate(first.fields):
            if field.offset is None and (first.part is None or field.first is None):
                shown[field.key] = first.resident[field.key]
                continue
            parts = [(index, piece, piece.fields[number]) for index, piece in pieces]
            numel = sum(part.numel for _, _, part in parts)
            shape = torch.Size(field.shape)
            if first.part is not None:
                shape = parameter.shape if numel == parameter.numel() else torch.Size([numel])
            shown[field.key] = _Parts(self._holder, field.dtype, shape, parts)
        self.state[parameter] = {**shown, **{k: v for k, v in first.resident.items() if k not in shown}}


class _Parts:
    """`Stored`: a state tensor whose parts lie in segments."""

    def __init__(
        self,
        holder: Holder,
        dtype: torch.dtype,
        shape: torch.Size,
        parts: Sequence[tuple[int, Piece, Field]],
    ) -> None:
        self.dtype, self.shape = dtype, shape
        self._holder, self._parts = holder, parts

    @property
    def nbytes(self) -> int:
        """See Stored."""
        return self.shape.numel() * self.dtype.itemsize

    def read(self, first: int, count: int) -> Tensor:
        """See Stored."""
        result = torch.empty(count, dtype=self.dtype)
        for index, piece, field in self._parts:
            start = field.first or 0
            low, high = max(first, start), min(first + count, start + field.numel)
            if low >= high:
                continue
            target, part = result[low - first : high - first], slice(low - start, high - start)
            if field.offset is None:
                target.copy_(piece.resident[field.key].view(-1)[part])
                continue
            with self._holder.using(index, changes=False, expected=False) as buffer:
                target.copy_(field.view(buffer).view(-1)[part])
        return result

    def places(self) -> list[Part] | None:
        """See `shadow.Cut`."""
        parts = [(index, field.offset, field.first or 0, field.numel) for index, _, field in self._parts]
        found = [(i, offset, first, numel) for i, offset, first, numel in parts if offset is not None]
        return found if len(found) == len(parts) else None


def _range(value: Tensor | Stored, field: Field) -> Tensor:
    """The elements of a whole state tensor that belong to `field`, in memory of their own."""
    if isinstance(value, Tensor):
        if field.first is None:
            return value.detach().clone()
        flat = value.detach().reshape(-1)[field.first : field.first + field.numel].clone()
    else:
        flat = value.read(field.first or 0, field.numel)
    return flat.view(field.shape)
