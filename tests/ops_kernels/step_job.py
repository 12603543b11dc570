"""Tensors and settings of one call of a quantised step, and what the step is in float64 by its formulas."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from shoestring.ops import codec
from shoestring.ops.codec import block_of, code_count, scale_count
from shoestring.ops.quantised_step import quantised_step
from shoestring.ops.rounding import noise_key, noise_start
from shoestring.ops.step_call import StepSettings, StepTensors
from torch import Tensor

from .harness import Guarded

# One number, none, just above a block, just above a tile; the first and the third are no multiples of 16.
SIZES = [1, 0, 273, 2192]
BF16, FP32 = torch.bfloat16, torch.float32


@dataclass
class Job:
    """Tensors of one call, in guard bands, and its settings."""

    rule: Any = "adamw"
    weight: torch.dtype = FP32
    grad: torch.dtype = FP32
    moment: torch.dtype = FP32
    law: Any = None
    mode: Any = "plain"
    sizes: list[int] = field(default_factory=lambda: list(SIZES))
    device: str = "cpu"
    step: int = 3
    lr: float = 0.03
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.1
    seed: int = 0
    off: int = 0
    """Bytes by which all tensors begin behind a multiple of 16."""

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.guard = Guarded()

        def drawn(n: int, size: float) -> Tensor:
            return torch.randn(n, generator=generator) * size

        def put(value: Tensor, dtype: torch.dtype) -> Tensor:
            pad = self.off // dtype.itemsize
            inner = self.guard.empty(value.numel() + pad, dtype, self.device)[pad:]
            return inner.copy_(value)

        spread = [torch.logspace(-3, 0, n) if n else torch.ones(0) for n in self.sizes]
        for s in spread:
            s[5::16] = 0.0  # where there has never been a gradient
        self.weights = [put(drawn(n, 0.02), self.weight) for n in self.sizes]
        self.grads = [put(drawn(n, 1.0) * s, self.grad) for n, s in zip(self.sizes, spread, strict=True)]
        means = [drawn(n, 0.5) * s for n, s in zip(self.sizes, spread, strict=True)]
        squares = [(drawn(n, 1.0) * s).square() for n, s in zip(self.sizes, spread, strict=True)]
        if self.rule == "lion":
            squares = []
        if self.rule == "direction":
            self.weights, self.grads = self.grads, []
        self.first, self.first_scales = self._moments(means, True, put)
        self.second, self.second_scales = self._moments(squares, False, put)
        self.extra: list[Tensor] = []
        if self.weight != FP32 and self.mode == "master":
            self.extra = [put(w.float().cpu() * (1 + drawn(len(w), 1e-3)), FP32) for w in self.weights]
        elif self.weight != FP32 and self.mode == "kahan":
            self.extra = [put(w.float().cpu() * drawn(len(w), 1e-3), BF16) for w in self.weights]

    def _moments(self, values: list[Tensor], signed: bool, put: Any) -> tuple[list[Tensor], list[Tensor]]:
        if self.law is None:
            return [put(v, self.moment) for v in values], []
        codes, scales = [], []
        for v in values:
            code = torch.zeros(code_count(len(v), self.law), dtype=torch.int8 if signed else torch.uint8)
            scale = torch.zeros(scale_count(len(v), self.law))
            codec.encode(v, code, scale, self.law, signed=signed, threshold=0.5)
            codes.append(put(code, code.dtype))
            scales.append(put(scale, FP32))
        return codes, scales

    @property
    def lists(self) -> list[list[Tensor]]:
        """In the order of `StepTensors`."""
        return [
            self.weights, self.grads, self.first, self.first_scales, self.second, self.second_scales,
            self.extra,
        ]  # fmt: skip

    @property
    def starts(self) -> list[int]:
        return [noise_start(i) for i in range(len(self.sizes))]

    @property
    def key(self) -> int:
        return noise_key(self.seed, self.step)

    def run(self, only: slice = slice(None), **more: Any) -> None:
        self.run_unguarded(only, **more)
        self.guard.check()

    def run_unguarded(self, only: slice = slice(None), **more: Any) -> None:
        quantised_step(self.tensors(only, **more), self.settings)

    def tensors(self, only: slice = slice(None), **more: Any) -> StepTensors:
        return StepTensors(*[part[only] for part in self.lists], self.starts[only], **more)

    @property
    def settings(self) -> StepSettings:
        return StepSettings(
            rule=self.rule, law=self.law, mode=self.mode, lr=self.lr, betas=self.betas, eps=self.eps,
            weight_decay=self.weight_decay, step=self.step, key=self.key,
        )  # fmt: skip

    def moments(self, i: int, signed: bool) -> Tensor:
        """A moment of tensor i in float64, by the laws."""
        codes, scales = (self.first, self.first_scales) if signed else (self.second, self.second_scales)
        if self.law is None:
            return codes[i].double().cpu()
        size, block = self.sizes[i], block_of(self.law)
        return (
            entry(codes_of(codes[i], size, self.law, signed), self.law, signed)
            * scales[i].double().cpu().repeat_interleave(block)[:size]
        )

    def bits(self) -> list[Tensor]:
        whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
        return [t.clone().view(whole[t.dtype.itemsize]) for part in self.lists for t in part]


def codes_of(stored: Tensor, size: int, law: str, signed: bool) -> Tensor:
    """int64 codes, two a byte where there are four bits."""
    codes = stored.cpu().view(torch.uint8).long()
    bits = 8
    if law == "four":
        codes, bits = torch.stack([codes & 15, codes >> 4], 1).view(-1)[:size], 4
    if signed and law != "dynamic":
        codes = torch.where(codes >= 1 << (bits - 1), codes - (1 << bits), codes)
    return codes


def top_of(law: str, signed: bool) -> int:
    return (7 if signed else 15) if law == "four" else (127 if signed else 255)


def entry(codes: Tensor, law: str, signed: bool) -> Tensor:
    """What codes stand for, of a scale of 1, in float64."""
    if law == "dynamic":
        return codec.dynamic_table(signed).double()[codes]
    share = codes.double() / top_of(law, signed)
    power = (1 if law == "linear" else 2) if signed else (2 if law == "linear" else 4)
    return share.sign() * share.abs() ** power


def exact(job: Job, i: int, grad_scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """In float64 the change of the weight (decay included) or the direction, and both moments after it."""
    g, m = (job.grads or job.weights)[i].double().cpu() * grad_scale, job.moments(i, True)
    w = (job.extra[i] if job.mode == "master" and job.extra else job.weights[i]).double().cpu()
    b1, b2 = job.betas
    if job.rule == "lion":
        direction = (b1 * m + (1 - b1) * g).sign()
        return -job.lr * (direction + job.weight_decay * w), b2 * m + (1 - b2) * g, torch.ones(0)
    m, v = b1 * m + (1 - b1) * g, b2 * job.moments(i, False) + (1 - b2) * g * g
    if job.rule == "direction":
        return m / (v.sqrt() + job.eps), m, v
    direction = (m / (1 - b1**job.step)) / ((v / (1 - b2**job.step)).sqrt() + job.eps)
    return -job.lr * (direction + job.weight_decay * w), m, v
