"""AdamW (arXiv:1711.05101, algorithm 2) and Lion (arXiv:2302.06675, algorithm 2), tensor by tensor.

    w ← (1 - η λ) w
    adamw    m ← β1 m + (1 - β1) g,   v ← β2 v + (1 - β2) g²
             w ← w - η · m / (1 - β1^t) / (√(v / (1 - β2^t)) + ε)
    lion     w ← w - η · sign(β1 m + (1 - β1) g),   m ← β2 m + (1 - β2) g

With `bias_free_eps`, ε is added to √v before its correction, as GaLore's and APOLLO's packages do for the
tensors that they do not project. The arithmetic is `ops/quantised_step.py`'s, and PyTorch's own fused one
where weights, gradients and state are float32.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from torch import Tensor

from ..ops.adamw import adamw_update
from ..ops.quantised_step import quantised_step
from ..ops.rounding import noise_key
from ..ops.step_call import StepSettings, StepTensors
from .moments import State, law_of, moment_bytes, new_moment, scales_of
from .weights import prepare, weight_bytes

__all__ = ["adamw_update", "new_state", "state_bytes", "step_tensors"]

_FUSED = frozenset({"cpu", "cuda", "mps", "xpu"})


def state_bytes(shape: tuple[int, ...], config: Any, dtype: torch.dtype, *, rule: str = "adamw") -> int:
    """Bytes of state for a tensor of `shape`; config has `state_bits` and `weights`."""
    elements = torch.Size(shape).numel()
    moments = (1 if rule == "lion" else 2) * moment_bytes(elements, config.state_bits, dtype)
    return moments + weight_bytes(elements, config.weights, dtype) + 8


def new_state(state: State, weight: Tensor, group: dict[str, Any]) -> None:
    """Zero moments (lion's is one), the step counter, and what the mode of writing keeps."""
    bits, shape, code = group["state_bits"], tuple(weight.shape), group.get("state_code", "companded")
    state["step"] = torch.zeros((), dtype=torch.int64, device="cpu")
    new_moment(state, "exp_avg", shape, bits=bits, like=weight, code=code)
    if group.get("rule") != "lion":
        new_moment(state, "exp_avg_sq", shape, bits=bits, like=weight, signed=False, code=code)
    prepare(state, weight, group["weights"])


def step_tensors(
    weights: list[Tensor],
    grads: list[Tensor],
    states: list[State],
    group: dict[str, Any],
    starts: list[int],
    *,
    noise_step: int | None = None,
    grad_scale: Tensor | None = None,
) -> None:
    """One step of every tensor. Groups keep `rule` and `bias_free_eps` where they are not the defaults.

    starts: place of each tensor among the random bits; noise_step: what draws them in place of the step.
    grad_scale: a float32 scalar that gradients are multiplied by, on their device.
    """
    alike: dict[Any, list[int]] = {}
    for i, (weight, grad, state) in enumerate(zip(weights, grads, states, strict=True)):
        state["step"] += 1
        quick = _is_quick(weight, grad, state, group) and grad_scale is None
        kind = (weight.device, weight.dtype, grad.dtype, state["exp_avg"].dtype, law_of(state, "exp_avg"))
        alike.setdefault((int(state["step"]), quick, kind), []).append(i)
    for (step, quick, (*_, law)), members in alike.items():
        eps = group["eps"]
        if group.get("bias_free_eps"):
            eps /= sqrt(1 - group["betas"][1] ** step)
        few = [weights[i] for i in members], [grads[i] for i in members], [states[i] for i in members]
        if quick:
            _fused(*few, group, step, eps)
        else:
            settings = StepSettings(
                rule="lion" if group.get("rule") == "lion" else "adamw",
                law=law,
                mode=group["weights"],
                lr=float(group["lr"]),
                betas=group["betas"],
                eps=eps,
                weight_decay=group["weight_decay"],
                step=step,
                key=noise_key(group["seed"], step if noise_step is None else noise_step),
            )
            _quantised(*few, [starts[i] for i in members], settings, grad_scale)


def _is_quick(weight: Tensor, grad: Tensor, state: State, group: dict[str, Any]) -> bool:
    return (
        group.get("rule") != "lion"
        and weight.dtype == grad.dtype == state["exp_avg"].dtype
        and weight.dtype in (torch.float32, torch.float64)
        and weight.device.type in _FUSED
    )


def _fused(
    weights: list[Tensor],
    grads: list[Tensor],
    states: list[State],
    group: dict[str, Any],
    step: int,
    eps: float,
) -> None:
    count = torch.full((), float(step), dtype=torch.float32, device=weights[0].device)
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


def _quantised(
    weights: list[Tensor],
    grads: list[Tensor],
    states: list[State],
    starts: list[int],
    settings: StepSettings,
    grad_scale: Tensor | None,
) -> None:
    lion = settings.rule == "lion"
    whole = [w if w.is_contiguous() else w.contiguous() for w in weights]
    extra = {"kahan": "compensation", "master": "master"}.get(settings.mode, "")
    tensors = StepTensors(
        weights=whole,
        grads=[g.contiguous() for g in grads],
        first=[s["exp_avg"] for s in states],
        first_scales=scales_of(states, "exp_avg"),
        second=[] if lion else [s["exp_avg_sq"] for s in states],
        second_scales=[] if lion else scales_of(states, "exp_avg_sq"),
        extra=[s[extra] for s in states if extra in s],
        starts=starts,
        grad_scale=None if grad_scale is None else grad_scale.to(weights[0].device),
    )
    quantised_step(tensors, settings)
    for weight, made in zip(weights, whole, strict=True):
        if made is not weight:
            weight.copy_(made)
