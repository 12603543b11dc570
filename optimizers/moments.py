"""State in 32, 16 or 8 bits: plain tensors in an optimizer's `state`, read and written by range.

32 is the arithmetic's own type (float32, or float64 for float64 weights) and is changed in place; 16 is
bfloat16. 8 is blockwise: each 256 consecutive elements of the flattened tensor share a scale, and codes
follow a square law, which needs no table and no search:

    signed (a mean):          x = s c |c| / 127²            c in -127..127,  s = max |x| of the block
    unsigned (mean square):   x = s (c / 255)⁴              c in 1..255,     s = max x of the block

A table of 256 values as in arXiv:2110.02861 is as precise, but finding the nearest entry costs twenty times
as much on a CPU. No code of a mean square is zero, since a small one rounded to zero makes a huge step. A
mean square moves by a thousandth a step, less than half a code, and would stand still under rounding to
nearest: its rounding threshold walks through [0, 1) from step to step (by the golden ratio), which is right
on average and needs no random numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 256
"""Elements that share one scale."""
SMALLEST = 4096
"""Tensors with fewer elements keep 32 bits: they weigh nothing, and norms and biases are sensitive."""

_GOLDEN = 0.6180339887498949
State = dict[str, Any]


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that updates of weights of `dtype` are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def moment_bytes(elements: int, bits: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of one moment of `elements` elements for weights of `dtype`."""
    if bits == 32 or elements < SMALLEST:
        return elements * computing_dtype(dtype).itemsize
    return 2 * elements if bits == 16 else elements + 4 * -(-elements // BLOCK)


def new_moment(
    state: State, key: str, shape: tuple[int, ...], *, bits: int, like: Tensor, signed: bool = True
) -> None:
    """Put a zero moment of `shape` into `state`: `key`, and `key`_scale where it has 8 bits."""
    elements = torch.Size(shape).numel()
    device = like.device
    if bits == 32 or elements < SMALLEST:
        state[key] = torch.zeros(shape, dtype=computing_dtype(like.dtype), device=device)
    elif bits == 16:
        state[key] = torch.zeros(shape, dtype=torch.bfloat16, device=device)
    elif bits == 8:
        state[key] = torch.zeros(shape, dtype=torch.int8 if signed else torch.uint8, device=device)
        state[f"{key}_scale"] = torch.zeros(-(-elements // BLOCK), device=device)
    else:
        raise ValueError(f"state_bits is {bits}; allowed: 32, 16, 8")


def read(state: State, key: str, part: slice | None = None) -> Tensor:
    """A moment in the computing type: of its own shape, or flat elements `part` (a multiple of BLOCK in).

    With 32 bits it is the state itself, to be changed in place.
    """
    stored: Tensor = state[key]
    flat = stored if part is None else stored.view(-1)[part]
    if stored.dtype in (torch.float32, torch.float64):
        return flat
    if stored.dtype == torch.bfloat16:
        return flat.float()
    first = 0 if part is None else part.start // BLOCK
    return _decode(flat, state[f"{key}_scale"][first:])


def write(state: State, key: str, value: Tensor, step: int, part: slice | None = None) -> None:
    """Store what `read` gave and the update changed. step: of the optimizer, moves the rounding threshold."""
    stored: Tensor = state[key]
    flat = stored if part is None else stored.view(-1)[part]
    if stored.dtype in (torch.float32, torch.float64):
        if value.data_ptr() != flat.data_ptr():
            flat.copy_(value)
    elif stored.dtype == torch.bfloat16:
        flat.copy_(value)
    else:
        first = 0 if part is None else part.start // BLOCK
        _encode(value, flat, state[f"{key}_scale"][first:], step)


def _blocks(flat: Tensor) -> Tensor:
    rest = flat.numel() % BLOCK
    padded = torch.nn.functional.pad(flat, (0, BLOCK - rest)) if rest else flat
    return padded.view(-1, BLOCK)


def _encode(value: Tensor, codes: Tensor, scales: Tensor, step: int) -> None:
    blocks = _blocks(value.reshape(-1).float())
    if codes.dtype == torch.int8:
        largest = blocks.abs().amax(1, keepdim=True)
        root = blocks.abs().mul_(largest.clamp(min=1e-38).reciprocal_()).sqrt_()
        code = torch.copysign(root, blocks).mul_(127.0).round_()
    else:
        largest = blocks.amax(1, keepdim=True)
        root = blocks.mul(largest.clamp(min=1e-38).reciprocal_()).sqrt_().sqrt_()
        threshold = (step * _GOLDEN) % 1.0
        code = root.mul_(255.0).add_(threshold).floor_().clamp_(1.0, 255.0)
    codes.view(-1).copy_(code.view(-1)[: codes.numel()])
    scales[: len(blocks)].copy_(largest.view(-1))


def _decode(codes: Tensor, scales: Tensor) -> Tensor:
    shape = codes.shape
    blocks = _blocks(codes.reshape(-1).float())
    scale = scales[: len(blocks), None]
    if codes.dtype == torch.int8:
        value = (blocks * blocks.abs()).mul_(scale * (1 / 127**2))
    else:
        value = blocks.mul_(1 / 255).square_().square_().mul_(scale)
    return value.view(-1)[: codes.numel()].view(shape)
