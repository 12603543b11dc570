"""Causal attention over packed rows on the CPU: small matmuls and a softmax for each row and query block.

Why not torch's flash kernel: on the CPU its backward does not use the bf16 matrix instructions well. For
rows of 100 to 400 tokens (9 heads, 3 key heads, d 64) it takes 2 to 6 times as long as this; see
docs/performance.md.

    S = scale * Q K^T + mask,  P = softmax(S),  O = P V
    dV = P^T dO,  dP = dO V^T,  dS = P * (dP - rowsum(P * dP)),  dQ = scale * dS K,  dK = scale * dS^T Q

Short rows keep their P for backward; longer ones compute it again, so that a layer keeps Q, K and V only.
Queries go in blocks: keys after the block are never touched, and the scores of one block stay in the cache.
The heads that share a key head are rows of one matmul, so keys are never repeated. Scores are rounded to the
input's type, the softmax is float32 inside, as in transformers' eager attention; float32 input is float32
throughout. Plain softmax backward: Dao et al., arXiv 2205.14135, section 3.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .autocast import computing_dtype

# Query rows of one block. Scores of 3 heads x 320 x 320 in bf16 are 0.6 MB: they fit a core's L2 cache.
BLOCK = 320
# Rows up to this length keep their weights: heads * length values a token, a few times the size of q.
KEPT = 256


def blocked_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: tuple[int, ...], scale: float, window: int | None
) -> Tensor:
    """query [1, heads, T, d], key and value [1, kv_heads, T, d] -> [1, T, heads, d]; deterministic."""
    # RoPE leaves float32 queries and keys beside a bf16 value when the weights are float32 under autocast.
    query, key, value = (tensor.to(computing_dtype(tensor)) for tensor in (query, key, value))
    output: Tensor = _BlockedAttention.apply(query, key, value, segments, scale, window)  # type: ignore[no-untyped-call]  # torch has no types here
    return output


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: tuple[int, ...],
        scale: float,
        window: int | None,
    ) -> Tensor:
        ctx.segments, ctx.scale, ctx.window = segments, scale, window
        heads, tokens = query.shape[1:3]
        output = query.new_empty(1, tokens, heads, value.shape[-1])
        mask = _mask(query, segments)
        kept = []
        for rows, keys in _blocks(segments, window):
            q, k, v = _heads(query, key, rows), key[0, :, keys], value[0, :, keys]
            weights = _weights(q, k, mask, scale, rows, keys, window)
            _store(output, torch.bmm(weights, v), rows)
            if keys.stop - keys.start <= KEPT and any(ctx.needs_input_grad):
                kept.append(weights)
        ctx.save_for_backward(query, key, value, *kept)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        remaining = iter(kept)
        scale: float = ctx.scale
        grad_query = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        grad_key = torch.empty_like(key.transpose(1, 2), memory_format=torch.contiguous_format)
        grad_value = torch.empty_like(value.transpose(1, 2), memory_format=torch.contiguous_format)
        grad_output = grad_output.transpose(1, 2)
        mask = _mask(query, ctx.segments)
        fresh = -1  # keys before this one already hold a gradient
        for rows, keys in _blocks(ctx.segments, ctx.window):
            q, k, v = _heads(query, key, rows), key[0, :, keys], value[0, :, keys]
            grad = _heads(grad_output, value, rows)
            if keys.stop - keys.start <= KEPT:
                weights = next(remaining)
            else:
                weights = _weights(q, k, mask, scale, rows, keys, ctx.window)
            grad_weights = torch.bmm(grad, v.transpose(1, 2))
            scores = torch._softmax_backward_data(grad_weights, weights, -1, grad.dtype)
            empty = scores.new_empty(())
            _store(grad_query, torch.baddbmm(empty, scores, k, beta=0, alpha=scale), rows)
            dk = torch.baddbmm(empty, scores.transpose(1, 2), q, beta=0, alpha=scale)
            dv = torch.bmm(weights.transpose(1, 2), grad)
            for total, part in ((grad_key, dk), (grad_value, dv)):
                part = part.transpose(0, 1)
                old = max(0, min(fresh, keys.stop) - keys.start)
                total[0, keys.start : keys.start + old] += part[:old]
                total[0, keys.start + old : keys.stop] = part[old:]
            fresh = keys.stop
        return (
            grad_query.transpose(1, 2),
            grad_key.transpose(1, 2),
            grad_value.transpose(1, 2),
            None,
            None,
            None,
        )


def _blocks(segments: tuple[int, ...], window: int | None) -> Iterator[tuple[slice, slice]]:
    """Query rows and the keys that they may see, in the order of the rows."""
    for start, end in itertools.pairwise(segments):
        count = -(-(end - start) // BLOCK)
        edges = [start + (end - start) * i // count for i in range(count + 1)]
        for first, last in itertools.pairwise(edges):
            oldest = start if window is None else max(start, first - window + 1)
            yield slice(first, last), slice(oldest, last)


def _heads(tensor: Tensor, like: Tensor, rows: slice) -> Tensor:
    """[1, heads, T, d] -> [kv_heads, groups * rows, d]: the query heads of a key head, one after another."""
    kv_heads = like.shape[1]
    return tensor[0, :, rows].reshape(kv_heads, -1, tensor.shape[-1])


def _store(total: Tensor, part: Tensor, rows: slice) -> None:
    """Inverse of `_heads` into a [1, T, heads, d] tensor."""
    heads, width = total.shape[2:]
    total[0, rows] = part.view(heads, -1, width).transpose(0, 1)


def _mask(query: Tensor, segments: tuple[int, ...]) -> Tensor:
    longest = max(b - a for a, b in itertools.pairwise(segments))
    side = min(longest, BLOCK)
    return query.new_full((side, side), float("-inf")).triu_(1)


def _weights(
    q: Tensor, k: Tensor, mask: Tensor, scale: float, rows: slice, keys: slice, window: int | None
) -> Tensor:
    """softmax(scale * q k^T + mask): [kv_heads, groups * rows, keys]."""
    length = rows.stop - rows.start
    scores = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=scale)
    by_head = scores.view(-1, length, scores.shape[-1])
    by_head[:, :, rows.start - keys.start :].add_(mask[:length, :length])
    if window is not None:
        # key column c stands at keys.start + c; query row r at rows.start + r sees the last `window` keys
        row = torch.arange(rows.start, rows.stop)[:, None]
        column = torch.arange(keys.start, keys.stop)[None]
        by_head.masked_fill_(column <= row - window, float("-inf"))
    return torch.softmax(scores, dim=-1)
