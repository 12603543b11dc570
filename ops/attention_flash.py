"""Packed attention on CUDA: torch's variable-length flash attention, one launch for all rows.

`varlen_attn` came with torch 2.10, its scale and its window with 2.11, key heads fewer than query heads with
2.12. It looks at none of what the kernel refuses, so `takes` does: halves on Ampere and newer, heads of up to
256 elements that go by eights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .kept import Kept, sent, stream_of

_WIDEST = 256
_STARTS: Kept[Tensor] = Kept(1 << 18, Tensor.numel)


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `flash_attention` runs for query [B, heads, T, d], key and value [B, kv_heads, T, d]."""
    if not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16) or query.shape[0] != 1:
        return False
    width = query.shape[-1]
    if width != value.shape[-1] or width % 8 or width > _WIDEST:
        return False
    if torch.version.hip is None and _capability(query.device.index or 0) < (8, 0):
        return False
    varlen, grouped = varlen_attn(), query.shape[1] != key.shape[1]
    return varlen is not None and (not grouped or "enable_gqa" in _parameters(varlen))


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: tuple[int, ...],
    scale: float,
    window: int | None,
    longest: int,
) -> Tensor:
    """Causal attention in each of `segments`, the longest of `longest` tokens; [1, T, heads, d].

    window: how many keys a query sees, itself among them. For what `takes` says yes to.
    """
    varlen = varlen_attn()
    if varlen is None:
        raise RuntimeError(missing())
    starts = _starts(segments, query.device)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    window_size = (-1 if window is None else window - 1, 0)
    output: Tensor = varlen(
        q, k, v, starts, starts, longest, longest, scale=scale, window_size=window_size, **grouped
    )
    return output[None]


@cache
def varlen_attn() -> Callable[..., Any] | None:
    """torch's function, where it takes a scale and a window."""
    try:
        from torch.nn.attention.varlen import varlen_attn as function
    except ImportError:  # torch before 2.10
        return None
    return function if {"scale", "window_size"} <= _parameters(function) else None


def missing() -> str | None:
    """What this torch lacks of all that `flash_attention` can do."""
    function = varlen_attn()
    if function is None:
        return f"torch {torch.__version__} has no variable-length attention with a scale and a window"
    if "enable_gqa" not in _parameters(function):
        return f"the variable-length attention of torch {torch.__version__} has no grouped heads"
    return None


@cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _starts(segments: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [rows + 1]: asked for by every layer, and once more by each that is computed again."""
    if torch.compiler.is_compiling():
        return torch.tensor(segments, dtype=torch.int32, device=device)
    return _STARTS.find(
        (segments, device, stream_of(device)),
        lambda: sent(torch.tensor(segments, dtype=torch.int32, device="cpu"), device),
    )
