"""AdamW (arXiv:1711.05101, algorithm 2) with the state and the weights in few bits.

    w ← (1 - η λ) w
    m ← β1 m + (1 - β1) g,   v ← β2 v + (1 - β2) g²
    w ← w - η · m / (1 - β1^t) / (√(v / (1 - β2^t)) + ε)

With `bias_free_eps`, ε is added to √v before its correction, as GaLore's and APOLLO's packages do for the
tensors that they do not project.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from .moments import BLOCK, State, computing_dtype, moment_bytes, new_moment, read, write
from .weights import add_step, prepare, weight_bytes

_FUSED = frozenset({"cpu", "cuda", "mps", "xpu"})
# Elements at a time: what the update touches then stays in a core's cache.
_CPU_ELEMENTS = 1 << 17
_CUDA_ELEMENTS = 1 << 26

Noise = Callable[[int, int, int], Tensor]


def state_bytes(shape: tuple[int, ...], config: Any, dtype: torch.dtype) -> int:
    """Bytes of state for a tensor of `shape`; config has `state_bits` and `weights`."""
    elements = torch.Size(shape).numel()
    moments = 2 * moment_bytes(elements, config.state_bits, dtype)
    return moments + weight_bytes(elements, config.weights, dtype) + 8


def new_state(state: State, weight: Tensor, group: dict[str, Any]) -> None:
    """Two zero moments, the step counter, and what the mode of writing keeps."""
    bits, shape = group["state_bits"], tuple(weight.shape)
    state["step"] = torch.zeros((), dtype=torch.int64)
    new_moment(state, "exp_avg", shape, bits=bits, like=weight)
    new_moment(state, "exp_avg_sq", shape, bits=bits, like=weight, signed=False)
    prepare(state, weight, group["weights"])


def adamw_update(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, betas: tuple[float, float], eps: float, step: int
) -> Tensor:
    """The direction m̂ / (√v̂ + ε), of grad's shape; both moments are changed in place."""
    exp_avg.lerp_(grad, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    denominator = exp_avg_sq.sqrt().mul_((1 - betas[1] ** step) ** -0.5).add_(eps)
    return torch.div(exp_avg, denominator, out=denominator).mul_(1 / (1 - betas[0] ** step))


def step_tensors(
    weights: list[Tensor],
    grads: list[Tensor],
    states: list[State],
    group: dict[str, Any],
    noise: Callable[[int], Noise],
) -> None:
    """One step of every tensor. noise(i): random integers for tensor i. Groups keep bias_free_eps."""
    by_step: dict[int, list[int]] = {}
    for i, state in enumerate(states):
        state["step"] += 1
        by_step.setdefault(int(state["step"]), []).append(i)
    for step, members in by_step.items():
        eps = group["eps"]
        if group.get("bias_free_eps"):
            eps /= sqrt(1 - group["betas"][1] ** step)
        quick = [i for i in members if _is_quick(weights[i], grads[i], states[i])]
        if quick:
            _fused(
                [weights[i] for i in quick],
                [grads[i] for i in quick],
                [states[i] for i in quick],
                group,
                step,
                eps,
            )
        for i in members:
            if i in quick:
                continue
            if _has_quick_master(weights[i], states[i]):
                _through_master(weights[i], grads[i], states[i], group, step, eps)
            else:
                _chunked(weights[i], grads[i], states[i], group, step, eps, noise(i))


def _is_quick(weight: Tensor, grad: Tensor, state: State) -> bool:
    return (
        weight.dtype == grad.dtype == state["exp_avg"].dtype
        and weight.dtype in (torch.float32, torch.float64)
        and weight.device.type in _FUSED
    )


def _has_quick_master(weight: Tensor, state: State) -> bool:
    """Whether the fused kernel can step the float32 copy of a narrow weight."""
    return "master" in state and state["exp_avg"].dtype == torch.float32 and weight.device.type in _FUSED


def _through_master(
    weight: Tensor, grad: Tensor, state: State, group: dict[str, Any], step: int, eps: float
) -> None:
    whole = weight if weight.is_contiguous() else weight.contiguous()
    flat, flat_grad, master = whole.view(-1), grad.reshape(-1), state["master"].view(-1)
    moments = {key: state[key].view(-1) for key in ("exp_avg", "exp_avg_sq")}
    size = _CPU_ELEMENTS if weight.device.type == "cpu" else _CUDA_ELEMENTS
    for first in range(0, flat.numel(), size):
        part = slice(first, min(first + size, flat.numel()))
        parts = {key: value[part] for key, value in moments.items()}
        _fused([master[part]], [flat_grad[part].float()], [parts], group, step, eps)
        flat[part].copy_(master[part])
    if whole is not weight:
        weight.copy_(whole)


def _fused(
    weights: list[Tensor],
    grads: list[Tensor],
    states: list[State],
    group: dict[str, Any],
    step: int,
    eps: float,
) -> None:
    count = torch.full((), float(step), device=weights[0].device)
    torch._fused_adamw_(
        weights,
        grads,
        [s["exp_avg"] for s in states],
        [s["exp_avg_sq"] for s in states],
        [],
        [count] * len(weights),
        lr=float(group["lr"]),
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=eps,
        amsgrad=False,
        maximize=False,
    )


def _chunked(
    weight: Tensor, grad: Tensor, state: State, group: dict[str, Any], step: int, eps: float, noise: Noise
) -> None:
    rate = float(group["lr"])
    keep = 1 - rate * group["weight_decay"]
    whole = weight if weight.is_contiguous() else weight.contiguous()
    flat, flat_grad = whole.view(-1), grad.reshape(-1)
    size = _CPU_ELEMENTS if weight.device.type == "cpu" else _CUDA_ELEMENTS
    assert size % BLOCK == 0
    kept = {key: state[key].view(-1) for key in ("master", "compensation") if key in state}
    for first in range(0, flat.numel(), size):
        part = slice(first, min(first + size, flat.numel()))
        g = flat_grad[part].to(computing_dtype(weight.dtype))
        m, v = read(state, "exp_avg", part), read(state, "exp_avg_sq", part)
        direction = adamw_update(g, m, v, betas=group["betas"], eps=eps, step=step)
        write(state, "exp_avg", m, step, part)
        write(state, "exp_avg_sq", v, step, part)

        def add(target: Tensor, rows: slice, direction: Tensor = direction) -> None:
            target.add_(direction[rows].view(target.shape), alpha=-rate)

        add_step(
            [flat[part].view(1, -1, 1)],
            [{key: value[part].view(1, -1, 1) for key, value in kept.items()}],
            add,
            keep=keep,
            mode=group["weights"],
            noise=lambda which, at, count, first=first: noise(which, first + at, count),  # type: ignore[misc]
        )
    if whole is not weight:
        weight.copy_(whole)
