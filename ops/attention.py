"""Causal attention over packed rows: registered with transformers as the implementation "shoestring".

Several rows lie one after the other in one sequence. `segments` = (0, n1, n1 + n2, ..., T) names their
boundaries and reaches this function as a keyword argument of the model's forward; no token sees another
row, and no [T, T] mask is built. One dispatch point, `packed_attention`:

    CUDA, half precision     ops/attention_flash.py: torch's own for rows of any length, where it has one
    CPU, no dropout          ops/attention_cpu.py: two to five times the speed of torch's flash kernel
    everything else          `reference`: scaled_dot_product_attention or plain matmuls, row by row

Layouts: query [B, heads, T, d], key and value [B, kv_heads, T, d], result [B, T, heads, d].
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from .attention_cpu import blocked_attention
from .attention_flash import flash_attention, takes

NAME = "shoestring"
# What some models add to the scores; none of it is ignored in silence.
_REFUSED = ("s_aux", "sinks", "position_bias", "head_mask", "block_table")


def register() -> None:
    """Make `model.set_attn_implementation("shoestring")` known to transformers; harmless when repeated."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """transformers' mask hook: no mask for whole unpadded sequences, its own boolean mask for all else.

    Raises NotImplementedError for attention in chunks longer sequences are cut into: the attention function
    never hears of those.
    """
    chunk = getattr(config, "attention_chunk_size", None)
    whole = attention_mask is None and q_length == kv_length and q_offset == kv_offset == 0
    if whole and not use_vmap:
        if chunk is not None and kv_length > chunk:
            raise NotImplementedError("attention in chunks is not packed; use attn_implementation: sdpa")
        return None
    from transformers.masking_utils import sdpa_mask

    mask: Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        use_vmap=use_vmap,
        **kwargs,
    )
    return mask


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    segments: tuple[int, ...] | None = None,
    position_ids: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface; [B, heads, T, d] -> ([B, T, heads, d], None).

    Without `segments`, boundaries are read from `position_ids` that start again at zero, so that a packed
    batch of other code is right too. A mask (padding, a cache) goes the way of transformers' sdpa.

    Raises:
        ValueError: segments together with a mask or a batch, or segments that do not span the sequence.
        NotImplementedError: the model adds something else to its scores (attention sinks, biases).
    """
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"packed attention does not know {name}")
    if segments is not None:
        if attention_mask is not None:
            raise ValueError("segments and an attention mask were both given: packed rows have no mask")
        check_segments(segments, query)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    length = query.shape[2]
    if attention_mask is None and causal and length == key.shape[2]:
        if segments is None and length > 1:
            segments = segments_of(position_ids, query.shape[0])
        bounds = segments or (0, length)
        return (
            packed_attention(
                query,
                key,
                value,
                bounds,
                scaling=scaling,
                sliding_window=sliding_window,
                softcap=softcap,
                dropout=dropout,
            ),
            None,
        )
    if segments is not None:
        raise ValueError("segments were given to attention that is not causal, or has a cache")
    if softcap is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        output, _ = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
        return output, None
    allowed = attention_mask
    if allowed is None and causal and length > 1:
        allowed = causal_mask(length, key.shape[2], None, query.device)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return plain_attention(query, key, value, allowed, scale, softcap, dropout).transpose(1, 2), None


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: tuple[int, ...],
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention inside each segment; the one dispatch point. [B, heads, T, d] -> [B, T, heads, d].

    `sliding_window` counts the token itself: a query sees the last `sliding_window` keys. `softcap` c turns
    a score s into c * tanh(s / c).
    """
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    longest = max(b - a for a, b in itertools.pairwise(segments))
    window = None if sliding_window is None or sliding_window >= longest else sliding_window
    if softcap is None and dropout == 0.0:
        if takes(query, key, value):
            return flash_attention(query, key, value, segments, scale, window, longest)
        if query.device.type == "cpu" and query.shape[0] == 1 and query.dtype != torch.float64:
            return blocked_attention(query, key, value, segments, scale, window)
    return reference(query, key, value, segments, scale, window, softcap, dropout)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: tuple[int, ...],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Row by row with PyTorch's own attention; [B, T, heads, d]."""
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    for start, end in itertools.pairwise(segments):
        q, k, v = (tensor[:, :, start:end] for tensor in (query, key, value))
        cut = window if window is not None and window < end - start else None
        if softcap is not None:
            allowed = causal_mask(end - start, end - start, cut, query.device)
            output = plain_attention(q, k, v, allowed, scale, softcap, dropout)
        else:
            mask = None if cut is None else causal_mask(end - start, end - start, cut, query.device)
            output = nn.functional.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=mask is None, scale=scale, enable_gqa=grouped
            )
        outputs.append(output.transpose(1, 2))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None,
    scale: float,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """Attention by its formula, softmax in float32; `allowed` boolean, broadcastable to the scores."""
    groups = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(groups, dim=1)
    value = value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if allowed is not None:  # after the cap, or a masked key would come back with weight exp(-cap)
        scores = scores.masked_fill(~allowed, float("-inf"))
    weights = torch.softmax(scores, dim=-1).to(query.dtype)
    return nn.functional.dropout(weights, dropout) @ value


def causal_mask(q_length: int, kv_length: int, window: int | None, device: torch.device) -> Tensor:
    """Boolean [q, kv]; the last query sits on the last key; True where a query may look."""
    row = torch.arange(kv_length - q_length, kv_length, device=device)[:, None]
    column = torch.arange(kv_length, device=device)[None]
    allowed = column <= row
    return allowed if window is None else allowed & (column > row - window)


def check_segments(segments: tuple[int, ...], query: Tensor) -> None:
    """Raise ValueError unless the boundaries rise from 0 to the length of a batch of one."""
    rising = all(a < b for a, b in itertools.pairwise(segments))
    if query.shape[0] != 1 or len(segments) < 2 or segments[0] != 0 or not rising:
        raise ValueError(f"segments {segments[:4]}... need a batch of one and boundaries that rise from 0")
    if segments[-1] != query.shape[2]:
        raise ValueError(f"segments end at {segments[-1]}, the sequence has {query.shape[2]} tokens")


def segments_of(position_ids: Tensor | None, batch: int) -> tuple[int, ...] | None:
    """Boundaries of packed rows, from positions that start again at zero; None for a single row."""
    if position_ids is None or position_ids.ndim != 2 or batch != 1 or position_ids.shape[0] != 1:
        return None
    starts = sorted({0, *(position_ids[0] == 0).nonzero().flatten().tolist()})
    return (*starts, position_ids.shape[1]) if len(starts) > 1 else None
