"""The section `engine`: short forms, what is refused and why, and what DeepSpeed is told."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from shoestring.recipes import DeepSpeedConfig, Recipe, load_recipe
from shoestring.recipes.engine_checks import engine_problems
from shoestring.recipes.errors import UserError
from shoestring.train.deepspeed_config import deepspeed_config
from shoestring.train.deepspeed_import import check_deepspeed
from shoestring.train.engines import check_engine
from shoestring.train.sharded import optimizer_of

SHORT: dict[str, Any] = {"model": "m", "data": "a.jsonl", "budget": "1h"}
CPU = SimpleNamespace(device=torch.device("cpu"), num_processes=1)
GPU = SimpleNamespace(device=torch.device("cuda"), num_processes=4)


def recipe(engine: Any, **sections: Any) -> Recipe:
    return Recipe(**SHORT, **sections, engine=engine)


def told(engine: DeepSpeedConfig, **changes: Any) -> dict[str, Any]:
    given = {"trained": 1000, "max_grad_norm": 1.0, "bfloat16": False, "on_cpu": False, "scratch": None}
    return deepspeed_config(engine, **{**given, **changes})


def test_short_forms_and_the_default() -> None:
    assert Recipe(**SHORT).engine.name == "native"
    assert recipe("deepspeed").engine == DeepSpeedConfig()
    assert recipe("fsdp2").engine.name == "fsdp2"
    assert recipe({"name": "deepspeed", "zero_stage": 3}).engine.zero_stage == 3  # type: ignore[union-attr]
    again = Recipe(**recipe("deepspeed").model_dump(mode="json"))
    assert again == recipe("deepspeed")


def test_the_command_line_replaces_the_engine(tmp_path: Any) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: m\ndata: a.jsonl\nbudget: 1h\n")
    resolved = load_recipe(str(path), ("engine=deepspeed", "engine.zero_stage=1"), env={})
    assert resolved.recipe.engine == DeepSpeedConfig(zero_stage=1)


NVME = {"offload_optimizer": "nvme", "nvme_path": "/d", "zero_stage": 3}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    # case: engine, other sections, key, what the sentence must say
    "nvme below stage 3": (
        {"offload_optimizer": "nvme", "nvme_path": "/d", "zero_stage": 2},
        {},
        "engine.offload_optimizer",
        "writes nothing to the disk",
    ),
    "cpu at stage 0": (
        {"offload_optimizer": "cpu", "zero_stage": 0},
        {},
        "engine.offload_optimizer",
        "stage=0",
    ),
    "weights below stage 3": ({"offload_param": "cpu"}, {}, "engine.offload_param", "zero_stage=2"),
    "no path": ({"offload_optimizer": "nvme", "zero_stage": 3}, {}, "engine.offload_optimizer", "nvme_path"),
    "path without disk": ({"nvme_path": "/d"}, {}, "engine.nvme_path", "offload_optimizer=nvme"),
    "aio without disk": ({"aio": {"queue_depth": 32}}, {}, "engine.aio", "offload_optimizer=nvme"),
    "pipeline without disk": ({"pipeline_read": True}, {}, "engine.pipeline_read", "offload_optimizer=nvme"),
    "few buffers": ({**NVME, "pipeline_read": True}, {}, "engine.buffer_count", "buffer_count=8"),
    "fewer buffers": (
        {**NVME, "pipeline_read": True, "pipeline_write": True, "buffer_count": 8},
        {},
        "engine.buffer_count",
        "buffer_count=12",
    ),
    "sub-groups below stage 3": ({"sub_group_size": 1000}, {}, "engine.sub_group_size", "zero_stage=3"),
    "hpz below stage 3": (
        {"zero_hpz_partition_size": 8},
        {},
        "engine.zero_hpz_partition_size",
        "zero_stage=3",
    ),
    "int8 gathering below stage 3": (
        {"zero_quantized_weights": True},
        {},
        "engine.zero_quantized_weights",
        "zero_stage=3",
    ),
    "matrices": ({}, {"optimizer": "muon", "adapter": None}, "optimizer.name", "rule for whole matrices"),
    "states of tensors": ({}, {"optimizer": "adafactor"}, "optimizer.name", "whole tensors"),
    "8-bit state": ({}, {"optimizer": {"state_bits": 8}}, "optimizer.state_bits", "float32 moments"),
    "kahan": ({}, {"optimizer": {"weights": "kahan"}}, "optimizer.weights", "engine=native"),
    "in the backward pass": (
        {},
        {"optimizer": {"step_in_backward": True}},
        "optimizer.step_in_backward",
        "after the backward pass",
    ),
    "sampled gradients": (
        {},
        {"train": {"wta_crs_ratio": 0.3}, "adapter": None},
        "train.wta_crs_ratio",
        "wta_crs_ratio=null",
    ),
    "our own offload": ({}, {"offload": {"optimizer": "disk"}}, "offload", "engine.nvme_path"),
    "4 bits in shards": (
        {"zero_stage": 3},
        {"model": {"model_name_or_path": "m", "load_in_4bit": True}},
        "model.load_in_4bit",
        "zero_stage=2",
    ),
    "two stages in shards": (
        {"zero_stage": 3},
        {"objective": "sft_then_dpo", "data": {"train": "a.jsonl", "preferences": "b.jsonl"}},
        "objective.name",
        "one after the other",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_ignored_or_wrong_is_refused(case: str) -> None:
    engine, sections, key, words = REFUSED[case]
    given = {**SHORT, **sections, "engine": {"name": "deepspeed", **engine}}
    with pytest.raises(ValueError, match="engine") as refused:
        Recipe(**given)
    text = str(refused.value)
    assert f"{key}: " in text
    assert words in text
    assert text.count("   ") >= 1  # what to type follows


def test_each_refusal_is_one_problem_with_one_cause() -> None:
    for case, (engine, sections, key, _) in REFUSED.items():
        given = {**SHORT, **sections}
        right = Recipe(**given)
        broken = right.model_copy(update={"engine": DeepSpeedConfig(**_deep(engine))})
        assert [problem.key for problem in engine_problems(broken)] == [key], case


def _deep(engine: dict[str, Any]) -> dict[str, Any]:
    return DeepSpeedConfig.model_validate(engine).model_dump() | engine


@pytest.mark.parametrize(
    "engine",
    [
        {**NVME, "offload_param": "cpu"},
        {
            **NVME,
            "pipeline_read": True,
            "pipeline_write": True,
            "buffer_count": 12,
            "aio": {"queue_depth": 32},
        },
        {"zero_stage": 3, "offload_param": "cpu", "sub_group_size": 1000, "zero_hpz_partition_size": 8},
        {"zero_stage": 1, "offload_optimizer": "cpu"},
        {"zero_stage": 0},
    ],
)
def test_what_works_is_accepted(engine: dict[str, Any]) -> None:
    assert recipe({"name": "deepspeed", **engine}).engine.name == "deepspeed"


def test_fsdp2_refuses_what_it_cannot_cut() -> None:
    with pytest.raises(ValueError, match="allowed: adamw"):
        recipe("fsdp2", optimizer="galore")
    with pytest.raises(ValueError, match="zero_stage 2"):
        Recipe(**{**SHORT, "model": {"model_name_or_path": "m", "load_in_4bit": True}, "engine": "fsdp2"})


def test_what_deepspeed_is_told() -> None:
    config = told(DeepSpeedConfig(zero_stage=1, offload_optimizer="cpu"))
    assert config["zero_optimization"]["stage"] == 1
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert "sub_group_size" not in config["zero_optimization"]
    assert config["gradient_clipping"] == 1.0
    assert config["zero_force_ds_cpu_optimizer"] is False  # PyTorch's AdamW: nothing is compiled
    assert "scheduler" not in config
    assert "optimizer" not in config
    assert told(DeepSpeedConfig(), max_grad_norm=None)["gradient_clipping"] == 0.0
    assert told(DeepSpeedConfig(), bfloat16=True)["bf16"] == {"enabled": True}


def test_the_disk_and_sizes_that_follow_from_the_model() -> None:
    nvme = DeepSpeedConfig(zero_stage=3, offload_optimizer="nvme", nvme_path="/d")
    config = told(nvme, scratch="/d/own")["zero_optimization"]
    assert config["reduce_bucket_size"] == 1000  # not 5e8 elements for a small model
    assert config["offload_optimizer"]["buffer_count"] == 4
    assert config["offload_optimizer"]["nvme_path"] == "/d/own"  # two runs would write the same files
    assert told(nvme)["aio"]["block_size"] == 1 << 20
    assert "aio" not in told(DeepSpeedConfig())


def test_on_a_cpu_nothing_is_pinned() -> None:
    config = told(DeepSpeedConfig(zero_stage=3, offload_optimizer="cpu", offload_param="cpu"), on_cpu=True)
    assert config["zero_optimization"]["offload_optimizer"]["pin_memory"] is False
    assert config["zero_optimization"]["offload_param"]["pin_memory"] is False
    assert config["zero_optimization"]["overlap_comm"] is False


def test_without_the_package_one_line_says_what_to_install(monkeypatch: Any) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "deepspeed" else real(name, *rest)
    )
    with pytest.raises(UserError, match="pip install") as refused:
        check_engine(recipe("deepspeed"), CPU)  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)
    assert refused.value.exit_code == 2
    check_engine(Recipe(**SHORT), CPU)  # type: ignore[arg-type]  # nobody else needs it


def test_what_the_machine_lacks_is_refused_before_anything_is_read() -> None:
    pytest.importorskip("deepspeed")
    for key in ("zero_quantized_weights", "zero_quantized_gradients"):
        with pytest.raises(UserError, match="NVIDIA GPU"):
            check_deepspeed(DeepSpeedConfig(zero_stage=3, **{key: True}), CPU)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="must divide"):
        check_deepspeed(DeepSpeedConfig(zero_stage=3, zero_hpz_partition_size=3), GPU)  # type: ignore[arg-type]
    check_deepspeed(DeepSpeedConfig(zero_stage=3, zero_hpz_partition_size=2), GPU)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no GPU"):
        check_engine(recipe({"name": "fsdp2", "cpu_offload": True}), CPU)  # type: ignore[arg-type]


def test_shards_are_stepped_in_float32() -> None:
    assert optimizer_of(recipe("deepspeed")).weights == "plain"  # type: ignore[union-attr]
    assert optimizer_of(Recipe(**SHORT)) == Recipe(**SHORT).optimizer


def test_the_recipes_of_the_page_are_recipes(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs/engines.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    names = []
    for number, block in enumerate(blocks):
        path = tmp_path / f"{number}.yaml"
        missing = "" if "budget:" in block else "model: m\ndata: a.jsonl\nbudget: 1h\n"
        path.write_text(missing + block)
        names.append(load_recipe(str(path), (), env={}).recipe.engine.name)
    assert names == ["native", "deepspeed", "deepspeed", "fsdp2"]
