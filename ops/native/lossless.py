"""The lossless codec in C++ (`lossless.cpp`)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import library


def encode(bits: Tensor, others: Tensor, bases: Tensor, low: Tensor, planes: Tensor) -> Tensor:
    """As `lossless.encode_parts`."""
    rest = torch.empty_like(low)
    run = library().shoestring_lossless_encode
    run.restype = ctypes.c_int64
    given = [ctypes.c_void_p(t.data_ptr()) for t in (bases, others, low, planes, rest)]
    threads = ctypes.c_int64(torch.get_num_threads())
    count: int = run(ctypes.c_void_p(bits.data_ptr()), ctypes.c_int64(len(bits)), *given, threads)
    return rest[:count]


def decode(
    bits: Tensor,
    others: Tensor,
    starts: Tensor,
    bases: Tensor,
    low: Tensor,
    planes: Tensor,
    rest: Tensor,
    *,
    threads: int | None = None,
) -> bool:
    """As `lossless.decode_parts`."""
    run = library().shoestring_lossless_decode
    run.restype = ctypes.c_int64
    given = [ctypes.c_void_p(t.data_ptr()) for t in (bases, others, starts, low, planes, rest)]
    count = ctypes.c_int64(threads or torch.get_num_threads())
    wrong: int = run(ctypes.c_void_p(bits.data_ptr()), ctypes.c_int64(len(bits)), *given, count)
    return wrong == 0
