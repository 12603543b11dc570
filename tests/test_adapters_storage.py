"""Adapters on disk: what is saved is what is loaded, and what does not fit is refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from shoestring.adapters import attach, compare_logits, load_adapter_state, merge_in_place, save_adapter
from shoestring.models.facts import build_skeleton
from shoestring.ops import use_fused
from shoestring.recipes.choices import LoraAdapter
from shoestring.recipes.errors import UserError
from transformers import LlamaConfig, LlamaForCausalLM

IDS = torch.arange(48).reshape(2, 24) % 96
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 96}
CONFIG = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
FACTS: Any = SimpleNamespace(
    source="org/small", parameters=0, tied=False, skeleton=lambda: build_skeleton(CONFIG)
)
BATCHES = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}] * 2


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small are many times slower when several threads share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval()


def attached(keys: dict[str, Any], train: bool, **more: Any) -> Any:
    wrapped = attach(base(), LoraAdapter(**{"r": 8, **keys}), FACTS, seed=3, batches=BATCHES, **more).eval()
    if train:
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
    return wrapped


STARTS: list[dict[str, Any]] = [
    {},
    {"use_dora": True},
    {"use_rslora": True, "rank_pattern": {"q_proj": 4}},
    {"modules_to_save": ["lm_head"]},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "olora"},
    {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": "loftq"},
    {"init_lora_weights": "eva"},
]


PORTABLE: list[dict[str, Any]] = [
    {},
    *({"init_lora_weights": start} for start in ("pissa", "olora", "orthogonal", "eva")),
    {"init_lora_weights": "pissa", "use_dora": True},
    {"init_lora_weights": "olora", "use_rslora": True, "lora_alpha": 8},
    {
        "init_lora_weights": "pissa",
        "use_rslora": True,
        "rank_pattern": {"q_proj": 4},
        "alpha_pattern": {r"layers\.1\..*v_proj": 64},
        "modules_to_save": ["norm"],
    },
]


@pytest.mark.parametrize("keys", STARTS, ids=str)
def test_a_checkpoint_loads_into_a_model_built_alike(keys: dict[str, Any], tmp_path: Path) -> None:
    wrapped = attached(keys, train=True)
    save_adapter(wrapped, tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "org/small"
    again = attached(keys, train=False, saved=json.loads((tmp_path / "adapter_config.json").read_text()))
    load_adapter_state(again, tmp_path)
    assert torch.equal(again(IDS).logits, wrapped(IDS).logits)
    for (name, value), (_, other) in zip(wrapped.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(value, other), name
        assert value.requires_grad == other.requires_grad


@pytest.mark.parametrize("keys", PORTABLE, ids=str)
def test_a_portable_adapter_fits_the_unchanged_base(keys: dict[str, Any], tmp_path: Path) -> None:
    wrapped = attached(keys, train=True)
    expected = wrapped(IDS).logits.detach()
    save_adapter(wrapped, tmp_path, portable=True)
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert (loaded(IDS).logits - expected).abs().max() / expected.abs().max() < 1e-5
    assert torch.equal(wrapped(IDS).logits, expected)  # saving changes nothing


def test_a_portable_loftq_adapter_is_off_by_what_its_start_was_off(tmp_path: Path) -> None:
    """Its base was quantised: the update is exact, and the start's error stays behind with that base."""
    keys = {"init_lora_weights": "loftq", "loftq_bits": 8}
    whole = base()(IDS).logits.detach()
    start = (attached(keys, train=False)(IDS).logits - whole).norm()
    wrapped = attached(keys, train=True)
    save_adapter(wrapped, tmp_path, portable=True)
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert (loaded(IDS).logits - wrapped(IDS).logits).norm() < 2 * start
    assert (wrapped(IDS).logits - whole).norm() > 5 * start


def test_fused_layers_save_and_merge_like_peft(tmp_path: Path) -> None:
    wrapped = attached({}, train=True)
    expected = wrapped(IDS).logits.detach()
    assert use_fused(wrapped)
    save_adapter(wrapped, tmp_path)
    assert (PeftModel.from_pretrained(base(), tmp_path)(IDS).logits - expected).abs().max() < 1e-4
    assert (merge_in_place(wrapped)(IDS).logits - expected).abs().max() < 1e-4


def test_another_rank_does_not_fit(tmp_path: Path) -> None:
    save_adapter(attached({"r": 4}, train=True), tmp_path)
    with pytest.raises(UserError) as caught:
        load_adapter_state(attached({}, train=False), tmp_path)
    assert "does not fit the adapter of the recipe" in str(caught.value)
    assert "It was trained with r=4, use_dora=False on org/small" in str(caught.value)


def test_other_modules_do_not_fit(tmp_path: Path) -> None:
    save_adapter(attached({"target_modules": ["q_proj"]}, train=True), tmp_path)
    with pytest.raises(UserError, match="24 tensors missing, 0 unexpected"):
        load_adapter_state(attached({}, train=False), tmp_path)
    save_adapter(attached({}, train=True), tmp_path)
    with pytest.raises(UserError, match="0 tensors missing, 24 unexpected"):
        load_adapter_state(attached({"target_modules": ["q_proj"]}, train=False), tmp_path)


def test_a_folder_without_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors, so it holds no adapter"):
        load_adapter_state(attached({}, train=False), tmp_path)


def test_comparing_logits() -> None:
    torch.manual_seed(0)
    a = torch.randn(2, 5, 40, dtype=torch.float64)
    noisy = a + 0.01 * torch.randn_like(a)
    same = compare_logits(a, a, torch.float32)
    assert (same["max_abs"], same["top1_agreement"], same["within_tolerance"]) == (0.0, 1.0, True)
    close = compare_logits(a, noisy, torch.bfloat16)
    p, q = a.softmax(-1), noisy.softmax(-1)
    assert close["mean_kl"] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-2)
    assert close["within_tolerance"]
    assert not compare_logits(a, noisy, torch.float32)["within_tolerance"]
    assert not compare_logits(a, torch.randn_like(a), torch.bfloat16)["within_tolerance"]
