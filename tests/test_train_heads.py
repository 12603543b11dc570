"""Adapters and softcaps on the output head: the loss in chunks trains what the own head of a model trains."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from shoestring.data import Batch, collate, make_rows
from shoestring.models import use_packed_attention
from shoestring.ops import use_fused
from shoestring.train import supervised
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 90,
    "pad_token_id": 0,
}


def model(kind: Any = LlamaConfig, dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    config = kind(**SHAPE, tie_word_embeddings=False, **settings)
    loaded = AutoModelForCausalLM.from_config(config, dtype=dtype)
    nn.init.normal_(loaded.lm_head.weight, std=0.5)
    use_packed_attention(loaded)
    return loaded


def adapted(base: nn.Module, **settings: Any) -> Any:
    wrapped = get_peft_model(base, LoraConfig(r=4, lora_alpha=12, **settings))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    use_fused(wrapped)
    return wrapped.train()


def batch() -> Batch:
    draw = np.random.default_rng(0)
    lengths = (9, 14, 7)
    return collate(
        make_rows(
            [draw.integers(1, 90, size=n).astype(np.int32) for n in lengths],
            [np.arange(n) >= 2 for n in lengths],
        ),
        [0, 1, 2],
        packed=True,
    )


def gradients(loss: Any, of: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    of.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        loss(of, batch()).backward()
    return {name: p.grad.clone() for name, p in of.named_parameters() if p.grad is not None}


HEADS = {
    "lora": {"target_modules": ["q_proj", "lm_head"]},
    "copy": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("head", HEADS)
def test_an_adapter_on_the_head_is_trained_in_chunks(head: str, dtype: torch.dtype, tolerance: float) -> None:
    wrapped = adapted(model(dtype=dtype), **HEADS[head])
    assert supervised.supervised_loss(wrapped) is supervised.chunked_loss
    ours = gradients(supervised.chunked_loss, wrapped, dtype)
    own = gradients(supervised.own_head_loss, wrapped, dtype)
    assert ours.keys() == own.keys()
    on_head = [name for name in ours if "lm_head" in name]
    assert len(on_head) == {"lora": 2, "copy": 1}[head]
    for name in ours:
        assert own[name].any()
        assert (ours[name] - own[name]).norm() <= tolerance * own[name].norm(), name


def test_a_step_on_the_head_lowers_the_loss() -> None:
    wrapped = adapted(model(), **HEADS["lora"])
    loss = supervised.supervised_loss(wrapped)
    found = gradients(loss, wrapped, torch.float32)
    before = loss(wrapped, batch()).item()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lm_head.lora" in name:
                parameter -= 1e-3 * found[name]
    assert loss(wrapped, batch()).item() < before - 1e-4


def test_dropout_on_the_head_is_at_work_in_training_alone() -> None:
    wrapped = adapted(model(), lora_dropout=0.5, target_modules=["lm_head"])
    loss = supervised.supervised_loss(wrapped)
    assert loss is supervised.chunked_loss
    assert loss(wrapped, batch()).item() != loss(wrapped, batch()).item()
    wrapped.eval()
    assert loss(wrapped, batch()).item() == pytest.approx(
        supervised.own_head_loss(wrapped, batch()).item(), rel=1e-6
    )


@pytest.mark.parametrize("head", HEADS)
def test_an_adapter_that_is_off_is_left_out(head: str) -> None:
    wrapped = adapted(model(), **HEADS[head])
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    on = supervised.chunked_loss(wrapped, batch()).item()
    with wrapped.disable_adapter():
        off = supervised.chunked_loss(wrapped, batch()).item()
        own = supervised.own_head_loss(wrapped, batch()).item()
    assert off == pytest.approx(own, rel=1e-5)
    assert abs(on - off) > 1e-3


def test_what_is_not_plain_lora_keeps_the_models_own_head() -> None:
    wrapped = adapted(model(), target_modules=["lm_head"], use_dora=True)
    assert supervised.supervised_loss(wrapped) is supervised.own_head_loss
    found = gradients(supervised.own_head_loss, wrapped, torch.float32)
    assert any("lora_magnitude_vector" in name for name in found)


def test_a_softcap_of_the_model_is_obeyed_in_chunks() -> None:
    capped = model(Gemma2Config, final_logit_softcapping=3.0, attn_logit_softcapping=None).train()
    assert supervised.supervised_loss(capped) is supervised.chunked_loss
    ours = gradients(supervised.chunked_loss, capped, torch.float32)
    own = gradients(supervised.own_head_loss, capped, torch.float32)
    for name in own:
        assert (ours[name] - own[name]).norm() <= 1e-4 * own[name].norm(), name
    # a model that says it caps its logits and does not is found out
    capped.config.final_logit_softcapping = 3.0
    capped.forward = _uncapped(capped)
    assert supervised.supervised_loss(capped) is supervised.own_head_loss


def _uncapped(of: Any) -> Any:
    real = type(of).forward

    def forward(*args: Any, **keys: Any) -> Any:
        of.config.final_logit_softcapping = None
        try:
            return real(of, *args, **keys)
        finally:
            of.config.final_logit_softcapping = 3.0

    return forward
