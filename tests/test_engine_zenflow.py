"""ZenFlow: what is refused, what DeepSpeed is told, and runs against a slow, obvious one in processes."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import forked
import forked_children
import pytest
import tiny
import torch
from safetensors.torch import load_file
from shoestring.recipes import DeepSpeedConfig, Recipe, load_recipe
from shoestring.recipes.engine import ZenFlowConfig
from shoestring.recipes.engine_checks import engine_problems
from shoestring.recipes.errors import UserError
from shoestring.train.deepspeed_config import deepspeed_config
from shoestring.train.deepspeed_zenflow import check_shapes

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
ENGINE: dict[str, Any] = {"name": "deepspeed", "zero_stage": 2, "offload_optimizer": "cpu"}
RIGHT: dict[str, Any] = {
    "model": "m",
    "data": "a.jsonl",
    "budget": "1h",
    "optimizer": {"name": "adamw", "max_grad_norm": None},
    "train": {"per_device_train_batch_size": 4},
}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str, str]] = {
    # case: zenflow, engine, other sections, key, what the sentence must say
    "stage 3": ({}, {"zero_stage": 3}, {}, "engine.zenflow", "zero_stage=2"),
    "stage 0": ({}, {"zero_stage": 0, "offload_optimizer": "none"}, {}, "engine.zenflow", "zero_stage=2"),
    "on the device": ({}, {"offload_optimizer": "none"}, {}, "engine.zenflow", "offload_optimizer=cpu"),
    "clipping": (
        {},
        {},
        {"optimizer": {"name": "adamw", "max_grad_norm": 1.0}},
        "optimizer.max_grad_norm",
        "max_grad_norm=null",
    ),
    "automatic rows": ({}, {}, {"train": {}}, "train.per_device_train_batch_size", "one micro-batch"),
    "accumulation": (
        {},
        {},
        {"train": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}},
        "train.gradient_accumulation_steps",
        "gradient_accumulation_steps=1",
    ),
    "bfloat16": (
        {},
        {},
        {"adapter": None, "model": {"model_name_or_path": "m", "dtype": "bfloat16"}},
        "model.dtype",
        "dtype=auto",
    ),
    "epochs": (
        {"select_strategy": "epoch"},
        {},
        {},
        "engine.zenflow.select_strategy",
        "select_strategy=step",
    ),
    "no interval": ({"select_interval": None}, {}, {}, "engine.zenflow.select_interval", "never again"),
    "updates by DeepSpeed": ({"update_interval": None}, {}, {}, "engine.zenflow.update_interval", "never"),
    "anew too soon": (
        {"select_interval": 3, "update_interval": 4},
        {},
        {},
        "engine.zenflow.select_interval",
        "select_interval=32",
    ),
    "another process": ({"overlap_step": True}, {}, {}, "engine.zenflow.overlap_step", "no checkpoint"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_kept_is_refused(case: str) -> None:
    zenflow, engine, sections, key, words = REFUSED[case]
    given = {**RIGHT, **sections, "engine": {**ENGINE, **engine, "zenflow": zenflow}}
    with pytest.raises(ValueError, match="engine") as refused:
        Recipe(**given)
    text = str(refused.value)
    assert f"{key}: " in text
    assert words in text
    broken = Recipe(**{**RIGHT, **sections}).model_copy(
        update={"engine": DeepSpeedConfig.model_validate({**ENGINE, **engine, "zenflow": zenflow})}
    )
    problems = engine_problems(broken)
    assert [problem.key for problem in problems] == [key]
    assert "   Set " in problems[0].text


def test_bounds_are_those_of_deepspeed() -> None:
    for wrong in ({"topk_ratio": 0.0}, {"topk_ratio": 1.0}, {"update_interval": 0}, {"ratio": 0.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Recipe(**RIGHT, engine={**ENGINE, "zenflow": wrong})
    recipe = Recipe(**RIGHT, engine={**ENGINE, "zenflow": {"update_interval": 8}})
    assert isinstance(recipe.engine, DeepSpeedConfig)
    assert recipe.engine.zenflow == ZenFlowConfig(update_interval=8)
    assert Recipe(**recipe.model_dump(mode="json")) == recipe


def test_the_command_line_reaches_it(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "model: m\ndata: a.jsonl\nbudget: 1h\noptimizer: {name: adamw, max_grad_norm: null}\n"
        "train: {per_device_train_batch_size: 4}\n"
        "engine: {name: deepspeed, offload_optimizer: cpu, zenflow: {topk_ratio: 0.2}}\n"
    )
    engine = load_recipe(str(path), ("engine.zenflow.update_interval=8",), env={}).recipe.engine
    assert isinstance(engine, DeepSpeedConfig)
    assert engine.zenflow == ZenFlowConfig(topk_ratio=0.2, update_interval=8)


def told(zenflow: ZenFlowConfig, trained: int) -> dict[str, Any]:
    engine = DeepSpeedConfig(offload_optimizer="cpu", zenflow=zenflow)
    return deepspeed_config(
        engine, trained=trained, max_grad_norm=None, bfloat16=False, on_cpu=True, scratch=None
    )


def test_what_deepspeed_is_told() -> None:
    config = told(ZenFlowConfig(update_interval=8, topk_ratio=0.3), trained=2_000_000_000)
    assert config["zero_optimization"]["zenflow"] == {
        "topk_ratio": 0.3,
        "select_strategy": "step",
        "select_interval": 32,
        "update_interval": 8,
        "full_warm_up_rounds": 0,
        "overlap_step": False,
    }
    assert config["zero_optimization"]["reduce_bucket_size"] == 2_000_000_000
    assert config["gradient_clipping"] == 0.0
    plain = deepspeed_config(
        DeepSpeedConfig(), trained=9, max_grad_norm=None, bfloat16=False, on_cpu=True, scratch=None
    )
    assert "optimizer" not in plain


@needs_deepspeed
def test_deepspeed_takes_our_bounds() -> None:
    from deepspeed.runtime.zenflow.zenflow_config import ZenFlowConfig as Theirs

    theirs = Theirs(**told(ZenFlowConfig(), trained=9)["zero_optimization"]["zenflow"])
    assert theirs.topk_ratio == ZenFlowConfig().topk_ratio
    assert set(ZenFlowConfig.model_fields) <= set(Theirs.model_fields)


def test_a_tensor_without_columns_is_refused() -> None:
    check_shapes({"a": torch.nn.Parameter(torch.zeros(2, 3)), "b": torch.nn.Parameter(torch.zeros(2))})
    with pytest.raises(UserError, match="conv has 3 dimensions"):
        check_shapes({"conv": torch.nn.Parameter(torch.zeros(2, 3, 4))})


@needs_deepspeed
def test_the_same_as_a_slow_one() -> None:
    script = Path(__file__).with_name("engine_zenflow.py")
    done = forked.run([sys.executable, script])
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULTS ")]
    results = json.loads(lines[0].removeprefix("RESULTS "))
    assert "Zenflow" not in done.stdout  # DeepSpeed prints in the middle of a run's own lines
    broken = results.pop("broken")
    assert len(results) == 4
    for case, result in results.items():
        assert max(result["differences"]) < 1e-6, case
        assert result["moments"] < 1e-6, case
        assert result["norms"] == pytest.approx(result["expected"], rel=1e-4), case
        assert result["put_back"], case
        assert result["contiguous"], case
    # All gradients broken: noticed before a column is stepped. Only columns that wait: at their update.
    assert broken["y"]["norms"][1:] == ["nan"]
    assert broken["x"]["norms"][3:] == ["nan"]
    assert broken["x"]["kept"]
    assert broken["y"]["kept"]


def run(recipe: Path, output: str, *arguments: str) -> str:
    done = forked.run(
        [
            sys.executable,
            "-c",
            forked_children.COMMAND,
            "train",
            str(recipe),
            f"output_dir={recipe.parent / output}",
            *arguments,
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "COLUMNS": "200"},
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.xdist_group("engines")
def test_a_run_says_what_it_gives_up_goes_on_and_learns(tmp_path: Path) -> None:
    """Paused half-way, between two updates, and gone on with; and on two processes."""
    recipe = tiny.recipe(
        tmp_path,
        adapter=None,
        engine={**ENGINE, "zenflow": {"update_interval": 2, "select_interval": 6, "full_warm_up_rounds": 1}},
        budget={"steps": 12},
        train={"per_device_train_batch_size": 4},
        optimizer={"name": "adamw", "learning_rate": 5e-3, "max_grad_norm": None},
        eval={"samples": 0},
    )
    run(recipe, "paused", "--pause-at", "0.6")
    said = json.loads((tmp_path / "paused/plan.json").read_text())["reasons"]["engine"]
    for words in ("nothing is clipped", "divergence shows in the loss alone", "are in no checkpoint"):
        assert words in said
    checkpoint = sorted((tmp_path / "paused").glob("checkpoint-*"))[-1]
    state = load_file(checkpoint / "optimizer.safetensors")
    trained = load_file(checkpoint / "trained.safetensors")
    shapes = {name: weight.shape for name, weight in trained.items()}
    assert {name: state[f"{name}/exp_avg"].shape for name in shapes} == shapes
    run(recipe, "paused")
    run(recipe, "two", "--num-processes", "2")
    for name in ("paused", "two"):
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["steps"] == 12
        assert summary["eval_loss"] < summary["eval_loss_before"] - 0.05
        assert (tmp_path / name / "final/config.json").is_file()
