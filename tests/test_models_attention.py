"""Packed attention is used where a trial finds it exact, and nowhere else."""

import pytest
import torch
from shoestring.models import plain_attention, use_packed_attention
from shoestring.models.attention import why_not_packed
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 64}
SMALL = {**SIZES, "num_hidden_layers": 2, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    "config",
    [LlamaConfig(), Qwen2Config(), Qwen3Config(), MistralConfig(), Gemma2Config(), GPT2Config()],
    ids=lambda config: config.model_type,
)
def test_plain_decoders_can_be_packed(config: PretrainedConfig) -> None:
    assert why_not_packed(config) == ""


def test_models_that_leak_or_refuse_are_not_packed() -> None:
    assert "its configuration is not that of a plain decoder" in why_not_packed(MambaConfig())
    assert "lets rows see each other" in why_not_packed(BloomConfig())
    mixed = Lfm2Config(layer_types=["conv", "full_attention"] * 16)  # the convolution carries over
    assert "lets rows see each other" in why_not_packed(mixed)
    assert "attention in chunks" in why_not_packed(Llama4TextConfig())


def test_switching_and_back() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL), attn_implementation="sdpa").eval()
    ids = torch.randint(0, 64, (1, 9))
    rows = [model(ids[:, :4]).logits, model(ids[:, 4:]).logits]
    assert use_packed_attention(model)
    packed = model(
        input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]), segments=(0, 4, 9)
    )
    assert (packed.logits - torch.cat(rows, 1)).abs().max() < 1e-5
    with plain_attention(model):
        assert model.config._attn_implementation == "sdpa"
        model.generate(ids, max_new_tokens=2, do_sample=False)
    assert model.config._attn_implementation == "shoestring"


def test_a_model_that_cannot_be_packed_keeps_its_attention() -> None:
    model = AutoModelForCausalLM.from_config(BloomConfig(hidden_size=64, n_layer=1, n_head=4, vocab_size=64))
    before = model.config._attn_implementation
    assert not use_packed_attention(model)
    with plain_attention(model):
        assert model.config._attn_implementation == before


def test_the_trial_leaves_the_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    why_not_packed(LlamaConfig(**SMALL, rope_theta=12345.0))
    assert torch.equal(torch.rand(3), expected)
