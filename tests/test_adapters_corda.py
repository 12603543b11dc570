"""CorDA: its start by the definition, what is left in the base, resume to the bit, plain LoRA in files."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel
from shoestring.adapters import attach, load_adapter_state, looks_at_rows, merge_in_place, save_adapter
from shoestring.models import load_model, read_facts
from shoestring.recipes import DpoObjective, LoraAdapter, ModelConfig, UserError, load_recipe
from shoestring.train.dpo import reference_kind
from shoestring.train.run import train_recipe
from test_train_run import losses, summary, weights
from torch import Tensor
from transformers import AutoModelForCausalLM

IDS = torch.arange(48).reshape(2, 24) % 23
MASK = torch.ones_like(IDS)
MASK[1, 15:] = 0
BATCHES = [{"input_ids": IDS, "attention_mask": MASK}, {"input_ids": IDS.flip(1), "attention_mask": MASK}]
ROWS = [IDS[0], IDS[1, :15], IDS.flip(1)[0], IDS.flip(1)[1, :15]]
METHODS = ("ipm", "kpm")
LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small are many times slower when several threads share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("base"))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    recipe = ModelConfig(model_name_or_path=str(folder))
    facts = read_facts(recipe)
    return load_model(facts, recipe, device=torch.device("cpu"), dtype=dtype).eval(), facts


def adapter(**keys: Any) -> LoraAdapter:
    return LoraAdapter(**{"r": 8, "init_lora_weights": "corda", **keys})


def attached(folder: Path, scale: float = 0.0, dtype: torch.dtype = torch.float32, **keys: Any) -> Any:
    base, facts = load(folder, dtype)
    model: Any = attach(base, adapter(**keys), facts, seed=0, batches=BATCHES).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model.eval()(input_ids=IDS).logits.float()
    return out


def second_moments(model: Any, name: str) -> Tensor:
    """Sum over the rows, each alone and without padding, of X^T X [in, in] in float64."""
    found: list[Tensor] = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda _, given: found.append(given[0][0].double()))
    with torch.no_grad():
        for row in ROWS:
            model(input_ids=row[None])
    handle.remove()
    return sum((x.T @ x for x in found), torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize("method", METHODS)
def test_the_factors_are_those_of_the_definition(method: str, folder: Path) -> None:
    """W C = U S V^T, C over its mean diagonal, damped by 0.01; r terms of U S (V^T C^-1) leave the base."""
    base, _ = load(folder)
    weight = base.get_submodule(LAYER).weight.detach().double()
    moments = second_moments(base, LAYER)
    moments /= moments.diagonal().mean()
    moments += 0.01 * torch.eye(len(moments), dtype=torch.float64)
    u, s, vt = torch.linalg.svd(weight @ moments, full_matrices=False)
    terms = slice(0, 8) if method == "ipm" else slice(len(s) - 8, len(s))
    right = vt[terms] @ torch.linalg.inv(moments)
    taken = u[:, terms] * s[terms] @ right
    layer = attached(folder, corda_method=method).get_submodule(f"base_model.model.{LAYER}")
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    assert layer.scaling["default"] == 4
    close: dict[str, float] = {"rtol": 1e-3, "atol": 1e-5}
    torch.testing.assert_close(4 * b @ a, taken, **close)
    torch.testing.assert_close(layer.get_base_layer().weight.double(), weight - taken, **close)
    torch.testing.assert_close(b.norm(dim=0), (s[terms] / 4).sqrt(), **close)
    torch.testing.assert_close(a.norm(dim=1), (s[terms] / 4).sqrt() * right.norm(dim=1), **close)


@pytest.mark.parametrize("method", METHODS)
def test_it_starts_at_the_base_and_padding_does_not_count(method: str, folder: Path) -> None:
    before = logits(load(folder)[0])
    model = attached(folder, corda_method=method)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    alone = [{"input_ids": row[None]} for row in ROWS]
    unmasked = [{"input_ids": batch["input_ids"]} for batch in BATCHES]
    for batches, same in ((alone, True), (unmasked, False)):
        base, facts = load(folder)
        again: Any = attach(base, adapter(corda_method=method), facts, seed=5, batches=batches)
        ours, theirs = (
            one.get_submodule(f"base_model.model.{LAYER}").get_base_layer().weight for one in (model, again)
        )
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5) is same


@pytest.mark.parametrize("keys", [{}, {"corda_method": "kpm"}, {"use_rslora": True}, {"use_dora": True}])
def test_a_portable_file_is_plain_lora_for_the_published_base(
    keys: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    model = attached(folder, 0.02, **keys)
    trained = logits(model)
    assert (trained - logits(load(folder)[0])).abs().max() > 1e-3
    save_adapter(model, tmp_path / "plain", portable=True)
    config = json.loads((tmp_path / "plain/adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert config["r"] == 16
    plain = PeftModel.from_pretrained(load(folder)[0], tmp_path / "plain")
    torch.testing.assert_close(logits(plain), trained, rtol=1e-3, atol=1e-4)
    save_adapter(model, tmp_path / "own")
    again = attached(folder, **keys)
    load_adapter_state(again, tmp_path / "own")
    assert torch.equal(logits(again), trained)
    torch.testing.assert_close(logits(merge_in_place(model)), trained, rtol=1e-3, atol=1e-5)


def test_a_bfloat16_base_loses_what_rounding_takes(folder: Path) -> None:
    before = logits(load(folder, torch.bfloat16)[0])
    model = attached(folder, dtype=torch.bfloat16)
    assert model.get_submodule(f"base_model.model.{LAYER}").get_base_layer().weight.dtype == torch.bfloat16
    assert (logits(model) - before).abs().max() < 0.03


def test_what_it_needs_is_told(folder: Path, tmp_path: Path) -> None:
    assert looks_at_rows(adapter())
    base, facts = load(folder)
    with pytest.raises(UserError, match="corda looks at training rows first, and there are none"):
        attach(base, adapter(), facts, seed=0)
    with pytest.raises(UserError, match=r"corda starts from 100 directions .*k_proj has 32"):
        attach(base, adapter(r=100, target_modules=["k_proj"]), facts, seed=0, batches=BATCHES)
    recipe = tiny.recipe(tmp_path, adapter={"name": "lora", "init_lora_weights": "corda"})
    with pytest.raises(UserError, match=r"init_lora_weights=corda needs weights that are not quantised"):
        load_recipe(str(recipe), ["model.load_in_4bit=true"])
    with pytest.raises(UserError, match=r"corda_method is .*allowed: ipm or kpm"):
        load_recipe(str(recipe), ["adapter.corda_method=pca"])


def test_its_base_is_no_reference_for_preferences() -> None:
    assert reference_kind(DpoObjective(), adapter()) == "frozen"
    with pytest.raises(UserError, match="corda changes the base weights"):
        reference_kind(DpoObjective(reference="adapter_off"), adapter())


def test_a_paused_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    keys = {"name": "lora", "r": 4, "init_lora_weights": "corda", "corda_method": "kpm"}
    recipe = tiny.recipe(tmp_path, adapter=keys, budget={"steps": 6}, eval={"samples": 0})
    whole, paused = tmp_path / "whole", tmp_path / "paused"

    def train(run: Path, **more: Any) -> int:
        return train_recipe(
            str(recipe), (f"output_dir={run}",), fresh=False, started=time.monotonic(), **more
        )

    assert train(whole) == 0
    assert summary(whole)["eval_loss"] < summary(whole)["eval_loss_before"]
    train(paused, pause_at=0.5)
    torch.manual_seed(999)
    assert train(paused) == 0
    assert losses(paused) == losses(whole)
    assert weights(paused) == weights(whole)
    merged = AutoModelForCausalLM.from_pretrained(whole / "final", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, whole / "final/adapter")
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-3, atol=1e-4)
