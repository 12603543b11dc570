"""State in 32, 16, 8 or 4 bits: plain tensors in an optimizer's `state`, read and written by range.

32 is the arithmetic's own type (float32, or float64 for float64 weights) and is changed in place, and moments
of float64 weights have it whatever the bits; 16 is bfloat16; 8 and 4 are blockwise codes of `ops/codec.py`,
whose law the name of their scales says: `KEY_scale`
for the square laws in 8 bits, `KEY_scale_linear`, `KEY_scale_dynamic`, `KEY_scale_four`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.codec import LAWS, Law, block_of, code_count, decode, encode, scale_count, threshold_at
from ..ops.quantised_step import quantised_step
from ..ops.step_call import StepSettings, StepTensors

BLOCK = 256
"""Elements that share one scale in 8 bits; ranges of state start at multiples of it."""
SMALLEST = 4096
"""Tensors with fewer elements keep 32 bits: they weigh nothing, and norms and biases are sensitive."""

State = dict[str, Any]


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that updates of weights of `dtype` are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def moment_bytes(elements: int, bits: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of one moment of `elements` elements for weights of `dtype`."""
    if _is_whole(elements, bits, dtype):
        return elements * computing_dtype(dtype).itemsize
    if bits == 16:
        return 2 * elements
    law: Law = "four" if bits == 4 else "companded"
    return code_count(elements, law) + 4 * scale_count(elements, law)


def _is_whole(elements: int, bits: int, dtype: torch.dtype) -> bool:
    """Whether a moment has the computing type: who computes in float64 has not asked for few digits."""
    return bits == 32 or elements < SMALLEST or dtype == torch.float64


def new_moment(
    state: State,
    key: str,
    shape: tuple[int, ...],
    *,
    bits: int,
    like: Tensor,
    signed: bool = True,
    code: Law = "companded",
) -> None:
    """Put a zero moment of `shape` into `state`: `key`, and its scales where it has 8 or 4 bits.

    code: the law of 8 bits. Codes of 4 bits are flat, two in a byte.
    """
    elements = torch.Size(shape).numel()
    device = like.device
    if _is_whole(elements, bits, like.dtype):
        state[key] = torch.zeros(shape, dtype=computing_dtype(like.dtype), device=device)
    elif bits == 16:
        state[key] = torch.zeros(shape, dtype=torch.bfloat16, device=device)
    elif bits in (8, 4):
        law: Law = "four" if bits == 4 else code
        dtype = torch.int8 if signed else torch.uint8
        stored = (code_count(elements, law),) if bits == 4 else shape
        state[key] = torch.zeros(stored, dtype=dtype, device=device)
        scales = torch.zeros(scale_count(elements, law), dtype=torch.float32, device=device)
        state[_scale_key(key, law)] = scales
    else:
        raise ValueError(f"state_bits is {bits}; allowed: 32, 16, 8, 4")


def law_of(state: State, key: str) -> Law | None:
    """The law of a moment's codes, None where it has none."""
    if state[key].dtype not in (torch.int8, torch.uint8):
        return None
    return next(law for law in LAWS if _scale_key(key, law) in state)


def scales_of(states: list[State], key: str) -> list[Tensor]:
    """The scales of moments of one law, in a list; empty where they have none."""
    law = law_of(states[0], key)
    return [] if law is None else [state[_scale_key(key, law)] for state in states]


def read(state: State, key: str, part: slice | None = None) -> Tensor:
    """A moment in the computing type: of its own shape, or flat elements `part` (a multiple of BLOCK in).

    With 32 bits it is the state itself, to be changed in place; with 4 bits all of it is flat.
    """
    stored: Tensor = state[key]
    law = law_of(state, key)
    if law is None:
        flat = stored if part is None else stored.view(-1)[part]
        return flat.float() if stored.dtype == torch.bfloat16 else flat
    codes, scales = _from(state, key, law, part)
    if part is not None:
        return decode(codes, scales, part.stop - part.start, law, signed=stored.dtype == torch.int8)
    elements = 2 * stored.numel() if law == "four" else stored.numel()
    value = decode(codes, scales, elements, law, signed=stored.dtype == torch.int8)
    return value if law == "four" else value.view(stored.shape)


def write(state: State, key: str, value: Tensor, step: int, part: slice | None = None) -> None:
    """Store what `read` gave and the update changed. step: of the optimizer, moves the rounding threshold."""
    stored: Tensor = state[key]
    law = law_of(state, key)
    if law is not None:
        codes, scales = _from(state, key, law, part)
        signed = stored.dtype == torch.int8
        encode(value, codes, scales, law, signed=signed, threshold=threshold_at(step))
        return
    flat = stored if part is None else stored.view(-1)[part]
    if stored.dtype == torch.bfloat16 or value.data_ptr() != flat.data_ptr():
        flat.copy_(value)


def is_narrow(state: State) -> bool:
    """Whether the moments have fewer than 32 bits: `advance` is one pass where read and write are many."""
    return state["exp_avg"].dtype in (torch.bfloat16, torch.int8)


def advance(
    states: list[State], values: Tensor, *, betas: tuple[float, float], eps: float, step: int
) -> Tensor:
    """M / (√V + ε) of gradients `values` [B, ...], float32, as many of a state as it has; they are used up.

    Both moments of all states, which are alike, move on.
    """
    values = values.float().contiguous()
    tensors = StepTensors(
        weights=list(values.chunk(len(states))),
        grads=[],
        first=[state["exp_avg"] for state in states],
        first_scales=scales_of(states, "exp_avg"),
        second=[state["exp_avg_sq"] for state in states],
        second_scales=scales_of(states, "exp_avg_sq"),
        extra=[],
        starts=[0] * len(states),
    )
    settings = StepSettings(
        rule="direction",
        law=law_of(states[0], "exp_avg"),
        mode="plain",
        lr=1.0,
        betas=betas,
        eps=eps,
        weight_decay=0.0,
        step=step,
        key=0,
    )
    quantised_step(tensors, settings)
    return values


def _from(state: State, key: str, law: Law, part: slice | None) -> tuple[Tensor, Tensor]:
    """Codes and scales from the start of `part` on, flat."""
    first = 0 if part is None else part.start
    codes: Tensor = state[key].view(-1)[first // (2 if law == "four" else 1) :]
    scales: Tensor = state[_scale_key(key, law)][first // block_of(law) :]
    return codes, scales


def _scale_key(key: str, law: Law) -> str:
    return f"{key}_scale" if law == "companded" else f"{key}_scale_{law}"
