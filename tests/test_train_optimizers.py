"""Every optimizer from a recipe: a whole run that learns, and a killed one that goes on to the bit."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, get_args

import pytest
import tiny
import torch
from safetensors.torch import load_file
from shoestring.plan import Plan
from shoestring.recipes import OptimizerConfig
from shoestring.train.engine import NativeEngine
from shoestring.train.run import train_recipe
from test_train_run import losses, summary, weights

NAMES = [choice.model_fields["name"].default for choice in get_args(get_args(OptimizerConfig)[0])]
RATES = {"lomo": 0.3, "adafactor": 0.1, "adalomo": 0.1, "galore": 0.03, "natural_galore": 0.03, "came": 1e-3}
OPTIONS: dict[str, dict[str, Any]] = {
    "apollo": {"update_proj_gap": 3, "rank": 4},
    "apollo_mini": {"update_proj_gap": 3},
    "q_apollo": {"update_proj_gap": 3},
    "galore": {"update_proj_gap": 3},
    "natural_galore": {"update_proj_gap": 3, "history": 3},
    "frugal": {"update_proj_gap": 3},
    "soap": {"precondition_frequency": 3},
    "badam": {"switch_block_every": 3},
}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def optimizer_of(name: str) -> dict[str, Any]:
    return {"name": name, "learning_rate": RATES.get(name, 1e-2), **OPTIONS.get(name, {})}


def train(recipe: Path, *overrides: str) -> int:
    return train_recipe(str(recipe), overrides, fresh=False, started=time.monotonic())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_with_it_and_a_killed_run_goes_on_to_the_bit(
    name: str, tmp_path: Path, monkeypatch: Any
) -> None:
    sections: dict[str, Any] = {"adapter": None, "optimizer": optimizer_of(name), "budget": {"steps": 10}}
    if name == "schedule_free_adamw":
        sections["schedule"] = "constant"
    recipe = tiny.recipe(tmp_path, eval={"samples": 0}, **sections)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train(recipe, f"output_dir={whole}") == 0
    result = summary(whole)
    assert result["eval_loss"] < result["eval_loss_before"]
    plan = Plan.from_json((whole / "plan.json").read_text())
    # the plan does not know the size of a head, and counts a block for each row of queries and keys
    less = 1000 if name == "adam_mini" else 0
    assert plan.optimizer_bytes - less <= result["optimizer_state_bytes"] <= plan.optimizer_bytes

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
    assert losses(broken) == losses(whole)
    assert weights(broken) == weights(whole)
    final = load_file(whole / "final/model.safetensors")
    assert {value.dtype for value in final.values()} <= {torch.bfloat16, torch.float32}


def test_the_screen_says_what_adamw_takes(tmp_path: Path, capsys: Any) -> None:
    recipe = tiny.recipe(
        tmp_path, adapter=None, optimizer=optimizer_of("apollo"), budget={"steps": 2}, eval={"samples": 0}
    )
    assert train(recipe) == 0
    captured = capsys.readouterr()
    printed = " ".join((captured.err + captured.out).split())
    assert "apollo: 14 matrices" in printed
    assert "AdamW takes 1 embeddings" in printed


def test_adapters_train_with_a_matrix_rule_too(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, optimizer=optimizer_of("muon"), budget={"steps": 6}, eval={"samples": 0})
    assert train(recipe) == 0
    result = summary(tmp_path / "run")
    assert result["eval_loss"] < result["eval_loss_before"]
