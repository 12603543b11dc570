"""`quantised_step` in C++ (`step.cpp`): the layout of its arguments, and the call."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..codec import Law, dynamic_table, threshold_at
from ..rounding import Noise
from ..writing import Mode
from . import library

_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_KINDS: dict[Law | None, int] = {"companded": 2, "linear": 3, "dynamic": 4, "four": 5}
_MODES = {"sr": 1, "kahan": 2, "master": 3, "plain": 4}
_RULES = {"adamw": 0, "lion": 1, "direction": 2, "write": 3}
# Fewer elements for each thread than this are done before a thread has started.
_SHARE = 1 << 17


class _Job(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "grad", "first", "first_scales", "second")),
        *((name, ctypes.c_void_p) for name in ("second_scales", "extra")),
        ("elements", ctypes.c_int64),
        ("start", ctypes.c_int64),
    ]


class _Settings(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("rule", "kind", "mode", "weight_type", "grad_type", "threads")),
        *((name, ctypes.c_float) for name in ("keep", "beta1", "beta2", "eps", "rate")),
        *((name, ctypes.c_float) for name in ("root_correction", "threshold", "grad_scale")),
        ("key", ctypes.c_uint32),
        ("signed_table", ctypes.c_void_p),
        ("unsigned_table", ctypes.c_void_p),
    ]


def step(
    rule: str,
    weights: list[Tensor],
    grads: list[Tensor],
    first: list[Tensor],
    first_scales: list[Tensor],
    second: list[Tensor],
    second_scales: list[Tensor],
    extra: list[Tensor],
    *,
    law: Law | None,
    mode: Mode,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    key: int,
    starts: list[int],
    grad_scale: Tensor | None,
    skip: Tensor | None,
) -> None:
    """As `quantised_step.quantised_step`, for weights and gradients of float32 or bfloat16 on a CPU."""
    if skip is not None and bool(skip):
        return
    in_place = weights[0].dtype == torch.float32
    adam = rule == "adamw"
    _run(
        [weights, grads, first, first_scales, second, second_scales, extra],
        starts,
        rule=_RULES[rule],
        kind=_kind(law, first[0]),
        mode=0 if in_place else _MODES[mode],
        keep=1 - lr * weight_decay,
        beta1=betas[0],
        beta2=betas[1],
        eps=eps,
        rate=lr / (1 - betas[0] ** step) if adam else lr,
        root_correction=(1 - betas[1] ** step) ** -0.5 if adam else 1.0,
        threshold=threshold_at(step),
        grad_scale=1.0 if grad_scale is None else float(grad_scale),
        key=key & 0xFFFF_FFFF,
    )


def direction(
    values: list[Tensor],
    first: list[Tensor],
    first_scales: list[Tensor],
    second: list[Tensor],
    second_scales: list[Tensor],
    *,
    law: Law | None,
    betas: tuple[float, float],
    eps: float,
    step: int,
) -> None:
    """As `quantised_step.quantised_direction`."""
    _run(
        [values, values, first, first_scales, second, second_scales, []],
        [0] * len(values),
        rule=_RULES["direction"],
        kind=_kind(law, first[0]),
        mode=0,
        keep=1.0,
        beta1=betas[0],
        beta2=betas[1],
        eps=eps,
        rate=-1.0,
        root_correction=1.0,
        threshold=threshold_at(step),
        grad_scale=1.0,
        key=0,
    )


def write(
    weights: list[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    update: Tensor,
    rows: slice,
    *,
    keep: float,
    mode: Mode,
    noise: Sequence[Noise],
) -> None:
    """Rows of `weights` [E, m, n], contiguous bfloat16, ← keep · weights + `update` [B, rows, n], float32."""
    _, m, n = weights[0].shape
    beside = {"master": "master", "kahan": "compensation"}.get(mode)
    parts: list[list[Tensor]] = [[], [], []]  # weights, updates, masters or compensations
    starts = []
    pieces = iter(update)
    for weight, state, (_, start) in zip(weights, states, noise, strict=True):
        kept = None if beside is None else state[beside].view(weight.shape)
        for e in range(len(weight)):
            parts[0].append(weight[e, rows])
            parts[1].append(next(pieces))
            parts[2] += [] if kept is None else [kept[e, rows]]
            starts.append(start + (e * m + rows.start) * n)
    keys = {key for key, _ in noise}
    assert len(keys) == 1, "tensors that step together have one step"
    _run(
        [parts[0], parts[1], [], [], [], [], parts[2]],
        starts,
        rule=_RULES["write"],
        kind=0,
        mode=_MODES[mode],
        keep=keep,
        beta1=0.0,
        beta2=0.0,
        eps=0.0,
        rate=0.0,
        root_correction=1.0,
        threshold=0.0,
        grad_scale=1.0,
        key=keys.pop() & 0xFFFF_FFFF,
    )


def _run(lists: list[list[Tensor]], starts: list[int], **settings: Any) -> None:
    weights, grads = lists[0], lists[1] = lists[0], [g.contiguous() for g in lists[1]]
    jobs = (_Job * len(weights))()
    for i in range(len(jobs)):
        pointers = (tensors[i].data_ptr() if tensors else None for tensors in lists)
        jobs[i] = _Job(*pointers, weights[i].numel(), starts[i])
    signed, unsigned = dynamic_table(True), dynamic_table(False)
    given = _Settings(
        weight_type=_TYPES[weights[0].dtype],
        grad_type=_TYPES[grads[0].dtype],
        threads=max(1, min(torch.get_num_threads(), sum(w.numel() for w in weights) // _SHARE)),
        signed_table=signed.data_ptr(),
        unsigned_table=unsigned.data_ptr(),
        **settings,
    )
    library().shoestring_step(jobs, ctypes.c_int64(len(weights)), ctypes.byref(given))


def _kind(law: Law | None, first: Tensor) -> int:
    return _KINDS[law] if law is not None else _TYPES[first.dtype]
