"""`quantised_step` in C++ (`step.cpp`): the layout of its arguments, and the call."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..codec import Law, dynamic_table, threshold_at
from ..rounding import Noise
from ..step_call import StepSettings, StepTensors
from ..step_check import check_tensors
from ..writing import Mode
from . import library

_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_KINDS: dict[Law | None, int] = {"companded": 2, "linear": 3, "dynamic": 4, "four": 5}
_MODES = {"sr": 1, "kahan": 2, "master": 3, "plain": 4}
_RULES = {"adamw": 0, "lion": 1, "direction": 2, "write": 3}
# Fewer elements for each thread than this are done before a thread has started.
_SHARE = 1 << 17


class _Settings(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("rule", "kind", "mode", "weight_type", "grad_type", "threads")),
        *((name, ctypes.c_float) for name in ("decay", "beta1", "beta2", "gain1", "gain2", "eps", "rate")),
        *((name, ctypes.c_float) for name in ("root_correction", "threshold", "grad_scale")),
        ("key", ctypes.c_uint32),
        ("signed_table", ctypes.c_void_p),
        ("unsigned_table", ctypes.c_void_p),
    ]


def step(tensors: StepTensors, settings: StepSettings) -> None:
    """As `quantised_step.quantised_step`, for weights and gradients of float32 or bfloat16 on a CPU."""
    if tensors.skip is not None and bool(tensors.skip):
        return
    in_place = tensors.weights[0].dtype == torch.float32
    law, scale, betas = settings.law, tensors.grad_scale, settings.betas
    given = _Settings(
        rule=_RULES[settings.rule],
        kind=_TYPES[tensors.first[0].dtype] if law is None else _KINDS[law],
        mode=0 if in_place else _MODES[settings.mode],
        decay=settings.decay,
        beta1=betas[0],
        beta2=betas[1],
        gain1=1 - betas[0],  # here, in double
        gain2=1 - betas[1],
        eps=settings.eps,
        rate=settings.rate,
        root_correction=settings.root,
        threshold=threshold_at(settings.step),
        grad_scale=1.0 if scale is None else float(scale),
        key=settings.key & 0xFFFF_FFFF,
    )
    _run(tensors.columns, tensors.starts, given)


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
    key = keys.pop() & 0xFFFF_FFFF
    given = _Settings(rule=_RULES["write"], mode=_MODES[mode], decay=1 - keep, grad_scale=1.0, key=key)
    sizes = [(rows.stop - rows.start) * n] * len(starts)
    check_tensors("weights", parts[0], (torch.bfloat16,), -1, sizes)
    check_tensors("updates", parts[1], (torch.float32,), -1, sizes)
    if beside is not None:
        held = torch.float32 if mode == "master" else torch.bfloat16
        check_tensors(beside, parts[2], (held,), -1, sizes)
    _run([parts[0], parts[1], [], [], [], [], parts[2]], starts, given)
    increment_version(weights if beside is None else [*weights, *(state[beside] for state in states)])


def _run(columns: list[list[Tensor]], starts: list[int], given: _Settings) -> None:
    """One pass over tensors that have been checked; puts types, threads and tables in `given`.

    columns: in the order of C++'s `Job`, whose fields all have 64 bits.
    """
    weights, grads = columns[:2]
    none = [0] * len(weights)
    addresses = [list(map(Tensor.data_ptr, column)) if column else none for column in columns]
    sizes = list(map(Tensor.numel, weights))
    jobs = array("Q", chain.from_iterable(zip(*addresses, sizes, starts, strict=True)))
    elements = sum(sizes)
    given.weight_type, given.grad_type = _TYPES[weights[0].dtype], _TYPES[grads[0].dtype]
    given.threads = max(1, min(torch.get_num_threads(), elements // _SHARE))
    given.signed_table = dynamic_table(True).data_ptr()
    given.unsigned_table = dynamic_table(False).data_ptr()
    address = ctypes.c_void_p(jobs.buffer_info()[0])
    library().shoestring_step(address, ctypes.c_int64(len(weights)), ctypes.byref(given))
