"""What the optimizers for matrices share: groups, state, batches, rounding, checkpoints.

An algorithm is a pure function on a stack of matrices [B, m, n] and a class of a few lines that says which
state it keeps. Everything else is here, once: tensors that are no matrices of linear layers go to AdamW;
matrices of one shape go through the function together on a GPU (one launch for many) and one after the other
on a CPU (what a matrix touches stays in cache); state is kept in 32, 16 or 8 bits and bfloat16 weights are
rounded as `weights` says; one tensor can be stepped alone, inside the backward pass.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..ops.rounding import Noise, noise_key, noise_start
from . import adamw
from .moments import State, computing_dtype, moment_bytes, read, write
from .roles import role_of
from .weights import Step, add_step, prepare, weight_bytes

_log = logging.getLogger(__name__)
# Elements of weights of one shape that go through an update together: on a CPU each matrix alone, whose bits
# then do not depend on which others are stepped with it.
_CPU_BATCH = 1
_CUDA_BATCH = 1 << 26

Group = dict[str, Any]


class MatrixOptimizer(torch.optim.Optimizer):
    """`torch.optim.Optimizer` whose update of a matrix is `update`, and AdamW for all other tensors.

    params: tensors, (name, tensor) pairs or groups of these. A group is `kind: matrix` or `kind: adamw`.
    Where no group says so, groups that give `rank` or another key of `matrix_keys` are for matrices and the
    others for AdamW, as in the published packages; where none gives one, all are for matrices. In a group for
    matrices, tensors that are none (one dimension, embeddings and output heads known by name) move to a new
    group for AdamW, and one line in the log says which. Names come from `model.named_parameters()`.

    Raises ValueError for an option out of range, naming the parameter where one is to blame, and for sparse
    gradients RuntimeError.
    """

    matrix_keys: tuple[str, ...] = ("rank",)
    every_tensor = False
    """Whether the rule is for tensors of all kinds, so that AdamW takes none."""
    steps_alone = True
    """Whether a step is no more than the steps of its tensors, in any order, each with its own state."""
    allowed_bits: tuple[int, ...] = (32, 16, 8)
    """What `state_bits` may be."""
    scales_gradients = False
    """Whether a step multiplies gradients by `grad_scale`, so that clipping need not do it before."""
    grad_scale: Tensor | None = None
    """Of the next step: a float32 scalar on the gradients' device."""

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        state_bits: int,
        weights: str,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if isinstance(lr, float | int) and lr < 0:
            raise ValueError(f"lr is {lr}; it must not be negative")
        for beta in betas:
            if not 0 <= beta < 1:
                raise ValueError(f"betas are {betas}; each must be in [0, 1)")
        if state_bits not in self.allowed_bits:
            allowed = ", ".join(map(str, self.allowed_bits))
            raise ValueError(f"state_bits is {state_bits}; allowed: {allowed}")
        if weights not in ("sr", "kahan", "master", "plain"):
            raise ValueError(f"weights is {weights!r}; allowed: 'sr', 'kahan', 'master', 'plain'")
        defaults: Group = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "state_bits": state_bits,
            "weights": weights,
            "seed": seed,
            **options,
        }
        groups, moved = split_groups(params, self.matrix_keys, every_tensor=self.every_tensor)
        self._places: dict[Tensor, tuple[int, Group]] = {}
        super().__init__(groups, defaults)
        if moved:
            _log.warning("%s: AdamW takes %s", type(self).__name__, moved)

    # --- what an algorithm gives

    def check(self, name: str, shape: tuple[int, ...], group: Group) -> None:
        """Raise ValueError where a matrix [E, m, n] called `name` and the options of its group disagree."""

    def new_state(self, state: State, weight: Tensor, group: Group) -> None:
        """Put the state of `weight` [E, m, n] into `state`, with `new_moment` where bits matter."""
        raise TypeError(f"{type(self).__name__} has no rule for matrices alone; give the group kind='adamw'")

    def update(
        self, grad: Tensor, states: list[State], group: Group, step: int, indices: list[int]
    ) -> Step | None:
        """Advance the states of a stack of matrices; returns what adds the update to their weights.

        grad [B, m, n] in its own type; step counts from 1; indices: place of each matrix among all. None
        leaves the weights as they are, without decay.
        """
        raise TypeError(f"{type(self).__name__} has no rule for matrices alone; give the group kind='adamw'")

    def update_weights(
        self,
        weights: list[Tensor],
        grad: Tensor,
        states: list[State],
        group: Group,
        step: int,
        indices: list[int],
    ) -> tuple[Step | None, float]:
        """`update`, and the factor by which decay shrinks the weights before it.

        For a rule that reads the weights, each [E, m, n] and as it is before the step, in place of `update`.
        """
        return self.update(grad, states, group, step, indices), 1 - float(group["lr"]) * group["weight_decay"]

    # --- torch.optim.Optimizer

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; a group without `kind` is for matrices if all its tensors are."""
        params = param_group["params"]
        tensors = [params] if isinstance(params, Tensor) else list(params)
        param_group["params"] = tensors
        pairs = [p if isinstance(p, tuple) else ("", p) for p in tensors]
        fits = self.every_tensor or all(role_of(name, tuple(p.shape)) == "matrix" for name, p in pairs)
        param_group.setdefault("kind", "matrix" if fits else "adamw")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        names = group.get("param_names", [""] * len(group["params"]))
        for name, p in zip(names, group["params"], strict=True):
            if group["kind"] == "matrix":
                if p.ndim not in (2, 3) and not self.every_tensor:
                    raise ValueError(
                        f"{type(self).__name__}: {label(name, p)} is no matrix; give it kind='adamw'"
                    )
                self.check(label(name, p), tuple(_stack(p).shape), group)
        self._places = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._advance(group, [p for p in group["params"] if p.grad is not None])
        self.grad_scale = None
        return loss

    @torch.no_grad()
    def step_parameter(self, parameter: Tensor) -> None:
        """The step of one parameter alone: what a hook in the backward pass calls."""
        self._advance(self._place(parameter)[1], [parameter])

    def fresh_state(self, weight: Tensor, group: Group) -> State:
        """What a tensor of `group` starts with; of one on the meta device, shapes and types alone."""
        state: State = {}
        if group["kind"] == "adamw":
            adamw.new_state(state, weight, group)
            return state
        state["step"] = torch.zeros((), dtype=torch.int64, device="cpu")
        self.new_state(state, _stack(weight), group)
        prepare(state, weight, group["weights"])
        return state

    @torch.no_grad()
    def step_part(self, parameter: Tensor, first: int, weight: Tensor, grad: Tensor, state: State) -> None:
        """AdamW's step of a range of a parameter's elements (flat), from `first` on, with their own `state`.

        Bit for bit what the step of the whole tensor gives them where `first` is a multiple of 2^17.
        """
        index, group = self._place(parameter)
        assert group["kind"] == "adamw"
        starts, scale = [noise_start(index, first)], self.grad_scale
        adamw.step_tensors([weight], [grad], [state], group, starts, grad_scale=scale)

    def __getstate__(self) -> dict[str, Any]:
        """All of it, for copies: torch's own forgets what a subclass has added."""
        # A torch schedule puts a wrapper bound to this optimizer in the place of the method.
        return {key: value for key, value in self.__dict__.items() if key != "step"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but each state keeps the type that it was saved in: torch casts to the weight's."""
        super().load_state_dict(state_dict)
        saved = state_dict["state"]
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(numbers, own, strict=True):
            for key, value in saved.get(number, {}).items():
                if isinstance(value, Tensor):
                    device = value.device if key == "step" else p.device
                    self.state[p][key] = value.detach().to(device).clone()
        self._places = {}

    # --- the machinery

    def _advance(self, group: Group, params: list[Tensor]) -> None:
        for p in params:
            assert p.grad is not None
            if p.grad.is_sparse:
                raise RuntimeError(f"{type(self).__name__}: a gradient of shape {tuple(p.shape)} is sparse")
            if not self.state[p]:
                self.state[p] = self.fresh_state(p, group)
        if group["kind"] == "adamw":
            grads = [p.grad for p in params if p.grad is not None]
            starts = [noise_start(self._place(p)[0]) for p in params]
            states = [self.state[p] for p in params]
            adamw.step_tensors(
                params, grads, states, group, starts,
                noise_step=self._noise_step(group), grad_scale=self.grad_scale,
            )  # fmt: skip
            return
        for batch in self._split(params, [int(self.state[p]["step"]) for p in params]):
            self._advance_batch(group, batch)

    def _split(self, params: list[Tensor], steps: list[int]) -> Iterator[list[Tensor]]:
        """The matrices that go through an update together."""
        return _batches(params, steps)

    def _stacked(self, params: list[Tensor]) -> tuple[Tensor, list[int]]:
        """The gradients of matrices as one stack, and the place of each among all."""
        grads = [_stack(p.grad) for p in params if p.grad is not None]
        grad = grads[0] if len(grads) == 1 else torch.cat(grads)
        return grad, [self._place(p)[0] for p in params]

    def _advance_batch(self, group: Group, params: list[Tensor]) -> None:
        states = [self.state[p] for p in params]
        for state in states:
            state["step"] += 1
        grad, indices = self._stacked(params)
        weights = [_stack(p) for p in params]
        step, keep = self.update_weights(weights, grad, states, group, int(states[0]["step"]), indices)
        if step is None:
            return
        noise = [self._noise_of(p, group) for p in params]
        add_step(weights, states, step, keep=keep, mode=group["weights"], noise=noise)

    def _place(self, p: Tensor) -> tuple[int, Group]:
        if not self._places:
            count = 0
            for group in self.param_groups:
                for q in group["params"]:
                    self._places[q] = (count, group)
                    count += 1
        return self._places[p]

    def _noise_step(self, group: Group) -> int | None:
        """What draws the random bits of rounding in place of each tensor's own step."""
        return None

    def _noise_of(self, p: Tensor, group: Group) -> Noise:
        own = self._noise_step(group)
        step = int(self.state[p]["step"]) if own is None else own
        return noise_key(group["seed"], step), noise_start(self._place(p)[0])


def gather(states: list[State], key: str) -> Tensor:
    """A moment of a stack: that of its one matrix itself, or copies one after the other."""
    return read(states[0], key) if len(states) == 1 else torch.cat([read(s, key) for s in states])


def scatter(states: list[State], key: str, value: Tensor, step: int) -> None:
    """Put back what `gather` gave and the update changed."""
    for state, part in zip(states, value.chunk(len(states)), strict=True):
        write(state, key, part, step)


def matrix_bytes(
    shape: tuple[int, ...],
    config: Any,
    dtype: torch.dtype,
    *,
    moments: Iterable[int] = (),
    full: int = 0,
) -> int:
    """Bytes of a matrix's state: moments of so many elements in state_bits, `full` in 32, the step."""
    kept = sum(moment_bytes(elements, config.state_bits, dtype) for elements in moments)
    weights = weight_bytes(torch.Size(shape).numel(), config.weights, dtype)
    return kept + full * computing_dtype(dtype).itemsize + weights + 8


def resolve_rank(rank: int | None, shape: tuple[int, ...]) -> int:
    """The rank for a matrix of `shape`; None is a quarter of the smaller side."""
    return rank if rank is not None else max(1, min(shape[-2:]) // 4)


def check_rank(optimizer: str, rank: int | None, name: str, shape: tuple[int, ...]) -> None:
    """ValueError where `rank` does not fit a matrix of `shape` called `name`."""
    resolved = resolve_rank(rank, shape)
    if not 1 <= resolved <= min(shape[-2:]):
        raise ValueError(
            f"{optimizer}: rank {resolved} does not fit {name}, whose smaller side is {min(shape[-2:])}; "
            "give its group a smaller one, or rank=None for a quarter of each"
        )


def as_groups(params: Iterable[Any]) -> list[Group]:
    """Groups as torch takes them, of groups, tensors or (name, tensor) pairs. ValueError: nothing."""
    given = list(params)
    if not given:
        raise ValueError("optimizer got an empty parameter list")
    return [dict(group) for group in given] if isinstance(given[0], dict) else [{"params": given}]


def split_groups(
    params: Iterable[Any], matrix_keys: tuple[str, ...], *, every_tensor: bool = False
) -> tuple[list[Group], str]:
    """Groups with `kind`, those that are no matrices moved out of groups for matrices, and which they are."""
    groups = as_groups(params)
    some = any(key in group for group in groups for key in matrix_keys)
    result: list[Group] = []
    moved: list[str] = []
    for group in groups:
        params = group["params"]
        tensors = [params] if isinstance(params, Tensor) else list(params)
        if "kind" in group:
            result.append({**group, "params": tensors})
            continue
        if some and not any(key in group for key in matrix_keys):
            result.append({**group, "params": tensors, "kind": "adamw"})
            continue
        if every_tensor:
            result.append({**group, "params": tensors, "kind": "matrix"})
            continue
        fitting: list[Any] = []
        rest: list[Any] = []
        for entry in tensors:
            name, p = entry if isinstance(entry, tuple) else ("", entry)
            fits = role_of(name, tuple(p.shape)) == "matrix"
            (fitting if fits else rest).append(entry)
            if not fits:
                moved.append(label(name, p))
        if fitting:
            result.append({**group, "params": fitting, "kind": "matrix"})
        if rest:
            kept = {key: value for key, value in group.items() if key not in matrix_keys}
            result.append({**kept, "params": rest, "kind": "adamw"})
    shown = ", ".join(moved[:4]) + (f" and {len(moved) - 4} more" if len(moved) > 4 else "")
    return result, shown


def label(name: str, p: Tensor) -> str:
    """A parameter in a message: its name and shape."""
    return f"{name or 'a parameter'} {tuple(p.shape)}"


def _stack(tensor: Tensor) -> Tensor:
    """As a stack of matrices [E, m, n]; other dimensions than 2 and 3 as one, a vector as its only row."""
    if tensor.ndim == 3:
        return tensor
    return tensor.view(1, -1, tensor.shape[-1]) if tensor.ndim else tensor.view(1, 1, 1)


def _batches(params: list[Tensor], steps: list[int]) -> Iterator[list[Tensor]]:
    """Matrices of one shape, type, device and step, as many as are worth stacking."""
    alike: dict[Any, list[Tensor]] = {}
    for p, step in zip(params, steps, strict=True):
        assert p.grad is not None
        alike.setdefault((p.shape, p.dtype, p.grad.dtype, p.device, step), []).append(p)
    for (shape, _, _, device, _), members in alike.items():
        most = _CPU_BATCH if device.type == "cpu" else _CUDA_BATCH
        size = max(1, most // shape.numel()) if len(shape) == 2 else 1
        for first in range(0, len(members), size):
            yield members[first : first + size]
