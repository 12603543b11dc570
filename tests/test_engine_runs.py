"""Whole runs behind DeepSpeed and FSDP2: the native engine's losses, files and ends, whatever is in shards.

The native engine is the reference; that it is right by itself is test_train_run's affair.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from shoestring.recipes.errors import DivergedError
from shoestring.train import deepspeed_config
from shoestring.train.deepspeed_engine import DeepSpeedEngine
from shoestring.train.run import train_recipe

pytestmark = pytest.mark.xdist_group("engines")  # one process group and one import for all

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="the extra `deepspeed` is not installed"
)
DEEPSPEED = {
    "zero-0": {"name": "deepspeed", "zero_stage": 0},
    "zero-1": {"name": "deepspeed", "zero_stage": 1},
    "zero-2": {"name": "deepspeed", "zero_stage": 2},
    "zero-3": {"name": "deepspeed", "zero_stage": 3},
    "zero-1-cpu": {"name": "deepspeed", "zero_stage": 1, "offload_optimizer": "cpu"},
    "zero-3-cpu": {
        "name": "deepspeed",
        "zero_stage": 3,
        "offload_optimizer": "cpu",
        "offload_param": "cpu",
        "sub_group_size": 5000,
    },
}
FSDP2 = {"fsdp2": {"name": "fsdp2"}}
ENGINES: dict[str, dict[str, Any]] = {**DEEPSPEED, **FSDP2}


def engines(*names: str) -> Any:
    return [pytest.param(name, marks=needs_deepspeed) if name in DEEPSPEED else name for name in names]


one_of_each = pytest.mark.parametrize("engine", engines("zero-2", "zero-3", "fsdp2"))
TRAINED = {"lora": {}, "full": {"adapter": None, "optimizer": {"learning_rate": 3e-3}}}


@pytest.fixture(autouse=True, scope="module")
def _one_thread_and_no_process_group() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    os.environ.pop("LOCAL_RANK", None)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    with contextlib.suppress(ImportError):
        import deepspeed.comm.comm

        deepspeed.comm.comm.cdb = None


@pytest.fixture(autouse=True)
def _small_weights_are_cut_too(monkeypatch: Any) -> None:
    """DeepSpeed leaves weights below 100,000 elements whole: all of the tiny model."""
    monkeypatch.setattr(deepspeed_config, "PERSISTENT", 0)


def train(recipe: Path, *overrides: str) -> int:
    return train_recipe(str(recipe), overrides, fresh=False, started=time.monotonic())


def recipe_of(folder: Path, engine: str | None, **sections: Any) -> Path:
    folder.mkdir(exist_ok=True)
    given = {"budget": {"steps": 8}, "eval": {"samples": 0, "every": "50%"}, **sections}
    if engine is not None:
        given["engine"] = ENGINES[engine]
    return tiny.recipe(folder, **given)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def newest(run: Path) -> Path:
    return sorted(run.glob("checkpoint-*"))[-1]


def same_run(one: Path, other: Path, tolerance: float) -> None:
    """Losses, norms and rates of every step, the held-out loss, and the trained weights at the end."""
    for a, b in zip(metrics(one), metrics(other), strict=True):
        assert a["learning_rate"] == b["learning_rate"]
        assert a["loss"] == pytest.approx(b["loss"], abs=tolerance), a["step"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=100 * tolerance), a["step"]
    results = [json.loads((run / "summary.json").read_text()) for run in (one, other)]
    assert results[0]["eval_loss"] == pytest.approx(results[1]["eval_loss"], abs=tolerance)
    assert results[0]["eval_loss_before"] == results[1]["eval_loss_before"]
    mine, theirs = (load_file(newest(run) / "trained.safetensors") for run in (one, other))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=30 * tolerance)


@pytest.fixture(scope="module")
def native(tmp_path_factory: Any) -> dict[str, Path]:
    """Runs of the native engine to compare with: LoRA and full."""
    folder = tmp_path_factory.mktemp("native")
    runs = {}
    for kind, sections in TRAINED.items():
        assert train(recipe_of(folder / kind, None, **sections)) == 0
        runs[kind] = folder / kind / "run"
    return runs


@pytest.mark.parametrize(
    ("engine", "kind"),
    [
        *(pytest.param(*param.values, "full", marks=param.marks) for param in engines(*DEEPSPEED)),
        *((name, "full") for name in FSDP2),
        *(pytest.param(name, "lora", marks=needs_deepspeed) for name in ("zero-2", "zero-3")),
        ("fsdp2", "lora"),
    ],
)
def test_the_same_run_as_with_the_native_engine(
    tmp_path: Path, native: dict[str, Path], engine: str, kind: str
) -> None:
    assert train(recipe_of(tmp_path, engine, **TRAINED[kind])) == 0
    same_run(tmp_path / "run", native[kind], 1e-5)
    mine, theirs = (
        json.loads((newest(run) / "optimizer.json").read_text()) for run in (tmp_path / "run", native[kind])
    )
    assert mine == theirs  # names, shapes, dtypes, groups: the files do not know what engine wrote them
    states = [load_file(newest(run) / "optimizer.safetensors") for run in (tmp_path / "run", native[kind])]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=1e-4)
    assert (tmp_path / "run/final/config.json").is_file()


@needs_deepspeed
def test_a_killed_run_goes_on_to_the_bit(tmp_path: Path, monkeypatch: Any) -> None:
    """Others in test_engine_processes."""
    recipe = recipe_of(tmp_path, "zero-3", **TRAINED["lora"])
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train(recipe, f"output_dir={whole}") == 0
    real, calls = DeepSpeedEngine.step, [0]

    def dies(self: Any, max_grad_norm: float | None) -> Any:
        calls[0] += 1
        if calls[0] == 7:
            raise KeyboardInterrupt  # the process is gone between the gradient and the update
        return real(self, max_grad_norm)

    monkeypatch.setattr(DeepSpeedEngine, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, f"output_dir={broken}")
    assert train(recipe, f"output_dir={broken}") == 0
    assert json.loads((broken / "summary.json").read_text())["resumed_from"] == "checkpoint-000004"
    assert [line["loss"] for line in metrics(broken)] == [line["loss"] for line in metrics(whole)]
    for file in ("trained.safetensors", "optimizer.safetensors"):
        assert (newest(broken) / file).read_bytes() == (newest(whole) / file).read_bytes()


@needs_deepspeed
def test_micro_batches_add_up_in_host_memory(tmp_path: Path) -> None:
    micro = {
        "train": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
        "budget": {"steps": 4},
    }
    assert train(recipe_of(tmp_path / "own", None, **micro)) == 0
    assert train(recipe_of(tmp_path / "theirs", "zero-3-cpu", **micro)) == 0
    same_run(tmp_path / "theirs/run", tmp_path / "own/run", 1e-5)


@pytest.fixture(scope="module")
def in_bfloat16(tmp_path_factory: Any) -> tuple[dict[str, Any], Path]:
    """A recipe whose updates bfloat16 weights would round away, and its run with a float32 master."""
    folder = tmp_path_factory.mktemp("bfloat16")
    sections: dict[str, Any] = {
        "adapter": None,
        "model": {"model_name_or_path": str(tiny.model_folder(folder / "model")), "dtype": "bfloat16"},
        "optimizer": {"learning_rate": 1e-4, "max_grad_norm": None},
        "schedule": "constant",
        "budget": {"steps": 4},
        "data": {"train": str(tiny.chats(folder / "chats.jsonl")), "eval": 0.1},
    }
    master = {**sections, "optimizer": {**sections["optimizer"], "weights": "master"}}
    assert train(recipe_of(folder / "native", None, **master)) == 0
    return sections, folder / "native/run"


@one_of_each
def test_bfloat16_weights_are_stepped_in_float32(
    tmp_path: Path, in_bfloat16: tuple[dict[str, Any], Path], engine: str
) -> None:
    sections, native = in_bfloat16
    assert train(recipe_of(tmp_path, engine, **sections)) == 0
    mine, theirs = (load_file(newest(run) / "optimizer.safetensors") for run in (tmp_path / "run", native))
    names = [name for name in theirs if name.endswith("/master")]
    assert names
    for name in names:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=1.5e-4)
        assert mine[name].dtype == torch.float32
    kept = load_file(newest(tmp_path / "run") / "trained.safetensors")
    assert {weight.dtype for weight in kept.values()} == {torch.bfloat16}
    for name, weight in kept.items():
        assert torch.equal(weight, mine[f"{name}/master"].bfloat16()), name


@needs_deepspeed
def test_a_rate_that_diverges_stops_with_the_last_good_state(tmp_path: Path) -> None:
    sections = {"adapter": None, "optimizer": {"learning_rate": 1e30, "max_grad_norm": 1e30}}
    with pytest.raises(DivergedError) as stopped:
        train(recipe_of(tmp_path, "zero-3", **sections))
    text = str(stopped.value)
    assert "not finite" in text or "non-finite" in text
    assert "The state before that step is kept" in text
    kept = load_file(newest(tmp_path / "run") / "trained.safetensors")
    assert all(bool(torch.isfinite(weight).all()) for weight in kept.values())
    assert json.loads((newest(tmp_path / "run") / "trainer.json").read_text())["state"]["step"] == 1


@pytest.mark.parametrize("engine", engines("zero-1-cpu", "zero-3", "fsdp2"))
def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path: Path, engine: str, monkeypatch: Any) -> None:
    """Also where the loss itself is fine: DeepSpeed would step float32 weights and report a norm of 1."""
    from shoestring.train import objectives

    real, calls = objectives.LossModule.forward, [0]

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
            return loss.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return grad * float("inf")

    def forward(self: Any, batch: Any) -> Any:
        if self.training and torch.is_grad_enabled():
            calls[0] += 1
        loss = real(self, batch)
        return Poison.apply(loss) if calls[0] >= 3 and torch.is_grad_enabled() else loss

    monkeypatch.setattr(objectives.LossModule, "forward", forward)
    one_batch = {"train": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}}
    with pytest.raises(DivergedError, match="gradient norm"):
        train(recipe_of(tmp_path, engine, **one_batch))
    monkeypatch.setattr(objectives.LossModule, "forward", real)
    good = recipe_of(tmp_path / "good", engine, **one_batch, budget={"steps": 3}, checkpoint={"every": 2})
    assert train(good) == 0
    stopped, same = newest(tmp_path / "run"), tmp_path / "good/run/checkpoint-000002"
    assert stopped.name == same.name
    for file in ("trained.safetensors", "optimizer.safetensors"):
        assert (stopped / file).read_bytes() == (same / file).read_bytes()
