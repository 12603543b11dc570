"""Decoder models whose layers differ in width: needs torch and transformers, and nothing else.

Each class is transformers' own with its layers narrowed as `layer_widths` of the config says, one entry a
layer:

    neurons       width of the MLP
    groups        heads of keys and values; each is read by num_attention_heads / num_key_value_heads queries
    value_width   channels of a head of v_proj, and of what o_proj reads of each head of queries
    rotary_pairs  null: q and k are whole; else, for each group, the pairs (i, i + head_dim/2) that its head
                  of k and its heads of q keep, the first halves first. A pair keeps its frequency
    biases        names of the projections that have a bias

The config's own widths are those of the widest layer; its numbers of heads may be larger, where the stock
class wants them to divide the hidden size. Attention scores are scaled by the width of a whole head.
"""
# transformers' classes have no types, and each family's attention its own order of arguments
# mypy: disable-error-code="misc,no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma.modeling_gemma import GemmaAttention
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention


class NarrowHeads:
    """The attention of a layer whose heads of q and k, and of v, have widths of their own."""

    value_width: int
    rotary_pairs: list[list[int]] | None

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [batch, tokens, d] -> the same shape, and the attention weights if they are made."""
        shape = hidden_states.shape[:-1]
        width = self.head_dim if self.rotary_pairs is None else 2 * len(self.rotary_pairs[0])
        queries = self.q_proj(hidden_states).view(*shape, -1, width)
        keys = self.k_proj(hidden_states).view(*shape, -1, width)
        if hasattr(self, "q_norm"):
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        queries, keys = queries.transpose(1, 2), keys.transpose(1, 2)
        values = self.v_proj(hidden_states).view(*shape, -1, self.value_width).transpose(1, 2)
        cos, sin = (self._of_pairs(each) for each in position_embeddings)
        keys = _rotated(keys, cos, sin)
        if self.rotary_pairs is not None:
            cos, sin = (each.repeat_interleave(self.num_key_value_groups, dim=1) for each in (cos, sin))
        queries = _rotated(queries, cos, sin)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.layer_idx)
        extra = {"softcap": self.attn_logit_softcapping} if isinstance(self, Gemma2Attention) else {}
        window = getattr(self, "sliding_window", getattr(self.config, "sliding_window", None))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, weights = attend(
            self,
            queries,
            keys,
            values,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=window,
            **extra,
            **kwargs,
        )
        return self.o_proj(output.reshape(*shape, -1).contiguous()), weights

    def _of_pairs(self: Any, rotation: Tensor) -> Tensor:
        """Cosines or sines [batch, tokens, head_dim] of the pairs, [batch, 1 or groups, tokens, width]."""
        if self.rotary_pairs is None:
            return rotation.unsqueeze(1)
        first = torch.tensor(self.rotary_pairs, device=rotation.device)
        index = torch.cat([first, first + self.head_dim // 2], dim=1)
        return rotation[:, :, index].transpose(1, 2)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos) + (turned * sin)


def eager_attention(
    module: Any,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Plain attention: queries [batch, heads, tokens, width], keys and values [batch, groups, past, ...]."""
    keys, values = (each.repeat_interleave(module.num_key_value_groups, dim=1) for each in (keys, values))
    scores = torch.matmul(queries, keys.transpose(2, 3)) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(queries.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, values).transpose(1, 2).contiguous(), weights


class PrunedLlamaAttention(NarrowHeads, LlamaAttention):
    """Llama's."""


class PrunedMistralAttention(NarrowHeads, MistralAttention):
    """Mistral's."""


class PrunedQwen2Attention(NarrowHeads, Qwen2Attention):
    """Qwen2's."""


class PrunedQwen3Attention(NarrowHeads, Qwen3Attention):
    """Qwen3's."""


class PrunedGemmaAttention(NarrowHeads, GemmaAttention):
    """Gemma's."""


class PrunedGemma2Attention(NarrowHeads, Gemma2Attention):
    """Gemma 2's."""


class PrunedGemma3Attention(NarrowHeads, Gemma3Attention):
    """Gemma 3's."""


NARROW: dict[type, type] = {
    LlamaAttention: PrunedLlamaAttention,
    MistralAttention: PrunedMistralAttention,
    Qwen2Attention: PrunedQwen2Attention,
    Qwen3Attention: PrunedQwen3Attention,
    GemmaAttention: PrunedGemmaAttention,
    Gemma2Attention: PrunedGemma2Attention,
    Gemma3Attention: PrunedGemma3Attention,
}


def narrow_heads(attention: Any, value_width: int, rotary_pairs: list[list[int]] | None) -> None:
    """Make a stock attention module compute with these widths; its projections are the caller's affair."""
    attention.__class__ = NARROW.get(type(attention), type(attention))
    attention.value_width, attention.rotary_pairs = value_width, rotary_pairs


def narrow_layer(layer: Any, widths: dict[str, Any]) -> None:
    """New projections of a stock layer, without values, in the shapes of its entry in `layer_widths`."""
    attention, mlp = layer.self_attn, layer.mlp
    hidden, groups, pairs = attention.q_proj.in_features, widths["groups"], widths["rotary_pairs"]
    heads = groups * attention.num_key_value_groups
    width = attention.head_dim if pairs is None else 2 * len(pairs[0])
    value = widths["value_width"]
    for home, name, inputs, outputs in (
        (mlp, "gate_proj", hidden, widths["neurons"]),
        (mlp, "up_proj", hidden, widths["neurons"]),
        (mlp, "down_proj", widths["neurons"], hidden),
        (attention, "q_proj", hidden, heads * width),
        (attention, "k_proj", hidden, groups * width),
        (attention, "v_proj", hidden, groups * value),
        (attention, "o_proj", heads * value, hidden),
    ):
        old = getattr(home, name).weight
        bias = name in widths["biases"]
        setattr(home, name, nn.Linear(inputs, outputs, bias=bias, device=old.device, dtype=old.dtype))
    mlp.intermediate_size = widths["neurons"]
    if pairs is not None or value != attention.head_dim:
        narrow_heads(attention, value, pairs)


class _Narrowed:
    # its kernels want one width for q, k and v
    _supports_flash_attn = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]  # of the stock class beside this one
        model: Any = self
        for layer, widths in zip(model.model.layers, config.layer_widths, strict=True):
            narrow_layer(layer, widths)


class PrunedLlamaConfig(LlamaConfig):
    """Llama's, and the widths of each layer."""

    model_type = "pruned_llama"


class PrunedLlamaForCausalLM(_Narrowed, LlamaForCausalLM):
    """Llama with layers of different widths."""

    config_class = PrunedLlamaConfig


class PrunedMistralConfig(MistralConfig):
    """Mistral's, and the widths of each layer."""

    model_type = "pruned_mistral"


class PrunedMistralForCausalLM(_Narrowed, MistralForCausalLM):
    """Mistral with layers of different widths."""

    config_class = PrunedMistralConfig


class PrunedQwen2Config(Qwen2Config):
    """Qwen2's, and the widths of each layer."""

    model_type = "pruned_qwen2"


class PrunedQwen2ForCausalLM(_Narrowed, Qwen2ForCausalLM):
    """Qwen2 with layers of different widths."""

    config_class = PrunedQwen2Config


class PrunedQwen3Config(Qwen3Config):
    """Qwen3's, and the widths of each layer."""

    model_type = "pruned_qwen3"


class PrunedQwen3ForCausalLM(_Narrowed, Qwen3ForCausalLM):
    """Qwen3 with layers of different widths."""

    config_class = PrunedQwen3Config


class PrunedGemmaConfig(GemmaConfig):
    """Gemma's, and the widths of each layer."""

    model_type = "pruned_gemma"


class PrunedGemmaForCausalLM(_Narrowed, GemmaForCausalLM):
    """Gemma with layers of different widths."""

    config_class = PrunedGemmaConfig


class PrunedGemma2Config(Gemma2Config):
    """Gemma 2's, and the widths of each layer."""

    model_type = "pruned_gemma2"


class PrunedGemma2ForCausalLM(_Narrowed, Gemma2ForCausalLM):
    """Gemma 2 with layers of different widths."""

    config_class = PrunedGemma2Config


class PrunedGemma3TextConfig(Gemma3TextConfig):
    """Gemma 3's, and the widths of each layer."""

    model_type = "pruned_gemma3_text"


class PrunedGemma3ForCausalLM(_Narrowed, Gemma3ForCausalLM):
    """Gemma 3 (text) with layers of different widths."""

    config_class = PrunedGemma3TextConfig
