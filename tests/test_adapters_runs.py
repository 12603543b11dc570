"""Whole runs with the adapters that are ours, and with ranks from the data: kill, resume, export, load."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel
from shoestring.models import read_facts
from shoestring.plan.defaults import learning_rate_for
from shoestring.plan.objectives import reference_is_frozen
from shoestring.plan.precision import Precision
from shoestring.plan.sizes import count_sizes
from shoestring.plan.trained import find_trained
from shoestring.recipes import DpoObjective, ModelConfig, SokaAdapter, SvfitAdapter, UserError, load_recipe
from shoestring.train.dpo import reference_kind
from shoestring.train.engine import NativeEngine
from shoestring.train.run import train_recipe
from test_train_run import losses, summary, weights
from transformers import AutoModelForCausalLM

ADAPTERS: dict[str, dict[str, Any]] = {
    "svfit": {"name": "svfit"},
    "soka": {"name": "soka", "r": 4, "target_modules": ["q_proj", "down_proj"]},
    "ranks": {"name": "lora", "r": 4, "rank_allocation": "block_influence"},
}
IDS = torch.arange(40)[None] % 23


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(recipe: Path, *overrides: str) -> int:
    return train_recipe(str(recipe), overrides, fresh=False, started=time.monotonic())


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_killed_run_goes_on_to_the_bit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = ADAPTERS[name]
    recipe = tiny.recipe(tmp_path, adapter=adapter, budget={"steps": 8}, eval={"samples": 0})
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train(recipe, f"output_dir={whole}") == 0
    assert summary(whole)["eval_loss"] < summary(whole)["eval_loss_before"]
    real, calls = NativeEngine.step, [0]

    def dies(self: NativeEngine, max_grad_norm: float | None) -> Any:
        calls[0] += 1
        if calls[0] == 6:
            raise KeyboardInterrupt
        return real(self, max_grad_norm)

    monkeypatch.setattr(NativeEngine, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, f"output_dir={broken}")
    monkeypatch.setattr(NativeEngine, "step", real)
    torch.manual_seed(999)
    assert train(recipe, f"output_dir={broken}") == 0
    assert summary(broken)["resumed_from"] == "checkpoint-000004"
    assert losses(broken) == losses(whole)
    assert weights(broken) == weights(whole)


@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_and_adapter_say_the_same_in_plain_libraries(name: str, tmp_path: Path, capsys: Any) -> None:
    """SVFit's adapter is a LoRA; SoKA's is its own, which PEFT knows because shoestring is imported here."""
    recipe = tiny.recipe(tmp_path, adapter=ADAPTERS[name], budget={"steps": 4}, eval={"samples": 0})
    assert train(recipe, "export.final=adapter") == 0
    printed = "".join(capsys.readouterr())
    expected = {"svfit": "svfit: ", "soka": "soka: ", "ranks": "rank_allocation=block_influence: ranks of "}
    assert expected[name] in printed
    config = json.loads((tmp_path / "run/final/adapter_config.json").read_text())
    assert config["peft_type"] == ("SOKA (import shoestring.adapters)" if name == "soka" else "LORA")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    before = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, tmp_path / "run/final"))
    assert (adapted - before).abs().max() > 1e-3
    assert train(recipe, "export.final=merged", f"output_dir={tmp_path / 'merged'}") == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged/final", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), adapted, rtol=1e-4, atol=1e-5)


def test_the_plan_counts_factors_and_trained_numbers(tmp_path: Path) -> None:
    """By energy the most there may be, and the frozen vectors beside the model in its own type."""
    facts = read_facts(ModelConfig(model_name_or_path=str(tiny.model_folder(tmp_path / "model"))))
    precision = Precision("bfloat16", False, "")
    sizes = {}
    for name, adapter in {**ADAPTERS, "svfit": {"name": "svfit"}}.items():
        recipe = load_recipe(str(tiny.recipe(tmp_path, adapter=adapter))).recipe
        sizes[name] = count_sizes(recipe, facts, find_trained(recipe, facts), precision, libraries=0)
    plain = 2 * facts.parameters
    # q and o are 64 x 64, k and v 32 x 64, gate, up and down 128 x 64
    assert sizes["svfit"].adapter == 4 * 2 * (5 * 64 + 2 * 32)
    assert sizes["svfit"].weights == plain + 2 * 2 * (2 * 64 * 128 + 2 * 32 * 96 + 3 * 64 * 192)
    # 64 x 64 as 8 x 8 (x) 8 x 8, 64 x 128 as 8 x 16 (x) 8 x 8; factors are float32 whatever the base is
    assert sizes["soka"].adapter == 4 * 2 * 4 * (2 * 64 + 128 + 64)
    assert sizes["soka"].weights == plain + sizes["soka"].adapter
    assert sizes["ranks"].weights == plain
    assert sizes["svfit"].adapter_file == sizes["svfit"].adapter + 2 * (sizes["svfit"].weights - plain)


def test_the_rate_of_svfit_is_a_multiple_of_loras() -> None:
    usual: dict[str, Any] = {"adapter": True, "optimizer": "adamw", "parameters": 135e6}
    lora = learning_rate_for(**usual, batch_tokens=2048, steps=300)
    assert (lora, learning_rate_for(**usual, batch_tokens=2048, steps=300, svfit=True)) == (1e-3, 2e-2)


def test_what_does_not_go_together_is_told(tmp_path: Path) -> None:
    cases = {
        "adapter.rank_pattern={q_proj: 2}": "adapter.rank_pattern gives ranks itself",
        "adapter.init_lora_weights=eva": "adapter.init_lora_weights=eva shares ranks out by itself",
        "adapter.init_lora_weights=orthogonal": "=orthogonal needs even ranks",
    }
    recipe = tiny.recipe(tmp_path, adapter=ADAPTERS["ranks"], budget={"steps": 2})
    for override, text in cases.items():
        with pytest.raises(UserError, match=text):
            train(recipe, override)
    recipe = tiny.recipe(tmp_path, adapter={"name": "svfit"}, budget={"steps": 2})
    with pytest.raises(UserError, match="adapter=svfit needs all weights at once at its start"):
        train(recipe, "offload.weights=disk")
    with pytest.raises(UserError, match=r"adapter\.lora_alpha is not a key of svfit; lora has it"):
        train(recipe, "adapter.lora_alpha=8")


def test_switched_off_they_are_the_reference_of_dpo() -> None:
    for adapter in (SvfitAdapter(), SokaAdapter()):
        assert reference_kind(DpoObjective(), adapter) == "adapter_off"
        assert reference_kind(DpoObjective(reference="adapter_off"), adapter) == "adapter_off"
        assert not reference_is_frozen(DpoObjective(), adapter)
    assert reference_is_frozen(DpoObjective(reference="frozen"), SvfitAdapter())
