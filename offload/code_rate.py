"""Whether and how quickly this machine decodes frozen layers (`coded_layers`)."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch

from ..ops import native
from ..ops.lossless import decode, encode
from ..ops.providers import choose
from .coded_layers import PART

_SECONDS = 0.15


@dataclass(frozen=True)
class CodeRate:
    """bytes_per_second: of weights decoded, by the threads that a run would take. share: bytes of their code
    over theirs, of normally distributed weights; those of a model take 1 % more.
    """

    bytes_per_second: float
    share: float


def cannot_decode() -> str | None:
    """Why there is no C++ decoder, in a few words. PyTorch's takes five seconds a GB, more than reading."""
    if choose("lossless", torch.device("cpu"), ["native"]) == "native":
        return None
    return native.missing() or f"SHOESTRING_OPS={os.environ.get('SHOESTRING_OPS')} forbids the C++ decoder"


def decoding_threads(device: str) -> int:
    """Threads that decode a layer: one where the CPU computes too; 4, or half of the cores, beside others."""
    return 1 if device == "cpu" else max(1, min(4, len(os.sched_getaffinity(0)) // 2))


def measure_decoding(device: str) -> CodeRate | None:
    """Decode a part of a layer again and again for _SECONDS; None where `cannot_decode` says why.

    By the clock, all of it: what else computes on this machine slows it as it would slow a run.
    """
    if cannot_decode() is not None:
        return None
    threads = decoding_threads(device)
    plain = (torch.randn(PART // 2, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    code, out, count = encode(plain), torch.empty_like(plain), 0
    decode(code, out, threads=threads)
    began = time.perf_counter()
    while (seconds := time.perf_counter() - began) < _SECONDS:
        decode(code, out, threads=threads)
        count += 1
    return CodeRate(count * PART / seconds, len(code) / PART)
