"""Rows of benchmarks/ops.py: optimizer steps on a CPU, beside what a user would otherwise take."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from ops_timing import Row, median_seconds
from shoestring.optimizers import AdamW, Lion
from torch import nn

# 33.5 M parameters: far more than the caches hold.
SHAPES = [(4096, 2048)] * 4

_Maker = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def rows(device: torch.device) -> list[Row]:
    """AdamW and Lion: 8-bit state first, beside bitsandbytes, torchao (compiled) and PyTorch's fused one."""
    if device.type != "cpu":
        return []
    return [_eight_bits(torch.float32), _eight_bits(torch.bfloat16), _other_bits(), _lion()]


def _eight_bits(dtype: torch.dtype) -> Row:
    size = dtype.itemsize
    contenders = {
        "ours": _ours(AdamW, dtype, "native", state_bits=8),
        "ours, torch": _ours(AdamW, dtype, "torch", state_bits=8),
        "bitsandbytes": _stepper(_bitsandbytes("AdamW8bit"), dtype),
        "torchao": _stepper(_torchao("AdamW8bit"), dtype),
        "torch fused, 32 bits": _stepper(lambda p: torch.optim.AdamW(p, fused=True), dtype),
    }
    return Row(
        f"AdamW, 8-bit state, {_name(dtype)} weights, 33.5 M",
        _timed(contenders),
        bytes=_elements() * (3 * size + 4 + 4 * 4 / 256),
        note="torchao compiles its step with Inductor",
    )


def _other_bits() -> Row:
    contenders = {
        "ours": _ours(AdamW, torch.bfloat16, "native", state_bits=4),
        "ours, 16 bits": _ours(AdamW, torch.bfloat16, "native", state_bits=16),
        "ours, 32 bits, sr": _ours(AdamW, torch.bfloat16, "native", state_bits=32),
        "ours, 32 bits, master": _ours(AdamW, torch.bfloat16, "native", state_bits=32, weights="master"),
        "torchao, 4 bits": _stepper(_torchao("AdamW4bit"), torch.bfloat16),
    }
    return Row(
        "AdamW, 4-bit state, bf16 weights, 33.5 M",
        _timed(contenders),
        bytes=_elements() * (3 * 2 + 2 + 4 * 4 / 128),
    )


def _lion() -> Row:
    contenders = {
        "ours": _ours(Lion, torch.bfloat16, "native", state_bits=8),
        "ours, torch": _ours(Lion, torch.bfloat16, "torch", state_bits=8),
        "bitsandbytes": _stepper(_bitsandbytes("Lion8bit"), torch.bfloat16),
    }
    return Row(
        "Lion, 8-bit state, bf16 weights, 33.5 M",
        _timed(contenders),
        bytes=_elements() * (3 * 2 + 2 + 2 * 4 / 256),
    )


def _timed(contenders: dict[str, Callable[[], object]]) -> dict[str, float]:
    return median_seconds(contenders, torch.device("cpu"), rounds=5)


def _ours(kind: Any, dtype: torch.dtype, provider: str, **options: Any) -> Callable[[], object]:
    step = _stepper(lambda p: kind(p, **options), dtype)

    def run() -> None:
        with _provider(provider):
            step()

    return run


def _stepper(make: _Maker, dtype: torch.dtype) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator).to(dtype) * 0.01
    return make(parameters).step


def _bitsandbytes(name: str) -> _Maker:
    import bitsandbytes

    made: _Maker = getattr(bitsandbytes.optim, name)
    return made


def _torchao(name: str) -> _Maker:
    import torchao.optim

    made: _Maker = getattr(torchao.optim, name)
    return made


@contextmanager
def _provider(name: str) -> Iterator[None]:
    os.environ["SHOESTRING_OPS"] = f"quantised_step={name}"
    try:
        yield
    finally:
        del os.environ["SHOESTRING_OPS"]


def _elements() -> int:
    return sum(torch.Size(shape).numel() for shape in SHAPES)


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
