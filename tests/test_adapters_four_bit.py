"""Adapters on a 4-bit base, and LoftQ, which prepares for one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from shoestring.adapters import attach, compare_logits, merge_in_place
from shoestring.models import load_model, read_facts, weight_reader
from shoestring.ops import use_fused
from shoestring.recipes.choices import LoraAdapter
from shoestring.recipes.errors import UserError
from shoestring.recipes.model_data import ModelConfig
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("bitsandbytes")
IDS = torch.arange(64).reshape(2, 32) % 96
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small are many times slower when several threads share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 96}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1)
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def load(folder: Path, four_bit: bool, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    recipe = ModelConfig(model_name_or_path=str(folder), load_in_4bit=four_bit)
    facts = read_facts(recipe)
    return load_model(facts, recipe, device=CPU, dtype=dtype), facts


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("keys", [{}, {"use_dora": True}, {"target_modules": ["q_proj"]}])
def test_training_and_merging_on_four_bits(
    folder: Path, keys: dict[str, Any], fused: bool, tmp_path: Path
) -> None:
    base, facts = load(folder, True)
    before = base(IDS).logits.detach()
    wrapped: Any = attach(base, LoraAdapter(r=8, **keys), facts, seed=0).eval()
    if fused:
        use_fused(wrapped)
    assert compare_logits(before, wrapped(IDS).logits.detach(), torch.bfloat16)["within_tolerance"]
    wrapped(IDS).logits.float().square().mean().backward()
    assert all(parameter.grad is not None for parameter in wrapped.parameters() if parameter.requires_grad)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    after = wrapped(IDS).logits.detach()
    assert not compare_logits(before, after, torch.bfloat16)["within_tolerance"]
    merged = merge_in_place(wrapped)
    assert type(merged) is LlamaForCausalLM
    assert {type(module).__name__ for module in merged.modules() if "Linear" in type(module).__name__} == {
        "Linear"
    }
    assert compare_logits(after, merged(IDS).logits, torch.bfloat16)["within_tolerance"]
    merged.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert getattr(again.config, "quantization_config", None) is None
    assert torch.equal(again(IDS).logits, merged(IDS).logits)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_change_the_base_are_refused(folder: Path, start: Any) -> None:
    base, facts = load(folder, True)
    with pytest.raises(
        UserError, match=f"{start} takes a part out of the base weights, which 4 bits cannot hold"
    ):
        attach(base, LoraAdapter(init_lora_weights=start), facts, seed=0)


def test_all_weights_cannot_be_trained_in_four_bits(folder: Path) -> None:
    base, facts = load(folder, True)
    with pytest.raises(UserError, match=r"model\.load_in_4bit holds them in 4 bits"):
        attach(base, None, facts, seed=0)


@torch.no_grad()
def distance(model: Any, reference: torch.Tensor) -> float:
    return float((model(IDS).logits.float() - reference).norm() / reference.norm())


@pytest.mark.parametrize("four_bit", [False, True], ids=["float_base", "four_bit_base"])
def test_loftq_starts_nearer_to_the_original_than_the_quantised_base(folder: Path, four_bit: bool) -> None:
    original, facts = load(folder, False, torch.float32)
    reference = original(IDS).logits.detach()
    quantised = distance(load(folder, True, torch.float32)[0], reference)
    errors = []
    for iterations in (1, 4):
        base = load(folder, four_bit, torch.float32)[0]
        adapter = LoraAdapter(r=16, init_lora_weights="loftq", loftq_iter=iterations)
        wrapped = attach(base, adapter, facts, seed=0, original_weight=weight_reader(facts)).eval()
        errors.append(distance(wrapped, reference))
    assert errors[0] < 0.8 * quantised
    assert errors[1] < errors[0]


def test_loftq_is_the_best_rank_r_answer_to_the_error(folder: Path) -> None:
    """float64 reference: s B A is the truncated SVD of W - Q, so what is left is the tail of the spectrum."""
    original, facts = load(folder, False, torch.float32)
    weight = original.model.layers[0].mlp.up_proj.weight.detach().double()
    wrapped: Any = attach(original, LoraAdapter(r=8, init_lora_weights="loftq"), facts, seed=0)
    layer = wrapped.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    quantised = layer.base_layer.weight.detach().double()
    left = (weight - quantised - layer.get_delta_weight("default").detach().double()).norm()
    tail = torch.linalg.svdvals(weight - quantised)[8:].square().sum().sqrt()
    assert left == pytest.approx(float(tail), rel=2e-3)


def test_eight_bit_loftq_needs_no_quantised_base(folder: Path) -> None:
    original, facts = load(folder, False, torch.float32)
    reference = original(IDS).logits.detach()
    adapter = LoraAdapter(r=8, init_lora_weights="loftq", loftq_bits=8)
    assert distance(attach(original, adapter, facts, seed=0).eval(), reference) < 0.02


def test_loftq_on_four_bits_needs_the_original(folder: Path) -> None:
    base, facts = load(folder, True)
    with pytest.raises(UserError, match="loftq on a 4-bit base needs the unquantised weights"):
        attach(base, LoraAdapter(init_lora_weights="loftq"), facts, seed=0)
