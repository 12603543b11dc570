"""Whole runs of a tiny model: landing, resume to the bit, signals, two processes, divergence."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import forked
import forked_children
import pytest
import tiny
import torch
from shoestring.recipes.errors import DivergedError, UserError
from shoestring.schedules import Clock
from shoestring.train.run import train_recipe
from shoestring.train.tracking import METRIC_FIELDS, Summary

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(recipe: Path, *overrides: str, fresh: bool = False) -> int:
    return train_recipe(str(recipe), overrides, fresh=fresh, started=time.monotonic())


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def summary(run: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return read


def losses(run: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["learning_rate"]) for line in metrics(run)]


def weights(run: Path) -> bytes:
    newest = sorted(run.glob("checkpoint-*"))[-1]
    return (newest / "trained.safetensors").read_bytes()


def command(recipe: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "shoestring.train", str(recipe), *arguments]


def test_a_landing_without_time_for_all_held_out_rows_compares_equal_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recipe(name: str, eval_rows: int) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        held_out = tiny.chats(folder / "held-out.jsonl", rows=eval_rows, seed=9)
        data = {"train": str(tiny.chats(folder / "chats.jsonl")), "eval": str(held_out)}
        return tiny.recipe(folder, data=data, eval={"rows": 3, "samples": 0})

    assert train(recipe("a", 12)) == 0
    monkeypatch.setattr(Clock, "rest_fits", lambda self, kind, taken, rest: self.stop_reason is None)
    assert train(recipe("b", 12)) == 0
    monkeypatch.undo()
    assert train(recipe("c", 3)) == 0
    whole, cut, few = (summary(tmp_path / name / "run") for name in "abc")
    both = ("eval_loss_before", "eval_loss")
    assert whole["eval_loss_before"] != cut["eval_loss_before"]
    events = [json.loads(line) for line in (tmp_path / "b" / "run" / "events.jsonl").read_text().splitlines()]
    rows = [event["rows"] for event in events if event["event"] == "eval"]
    assert (rows[0], rows[-1]) == (12, 3)
    assert [cut[key] for key in both] == pytest.approx([few[key] for key in both], rel=1e-5)


def test_a_run_lands_and_leaves_what_the_design_says(tmp_path: Path) -> None:
    assert train(tiny.recipe(tmp_path)) == 0
    run = tmp_path / "run"
    result = summary(run)
    assert list(result) == [field.name for field in fields(Summary)]
    assert (result["stop_reason"], result["steps"], result["final_progress"]) == ("steps", 12, 1.0)
    assert result["eval_loss"] < result["eval_loss_before"]
    assert result["final_learning_rate"] == 0.0
    assert all(set(METRIC_FIELDS) <= set(line) for line in metrics(run))
    assert [line["step"] for line in metrics(run)] == list(range(1, 13))
    for name in (
        "recipe.yaml",
        "resolved.yaml",
        "plan.json",
        "environment.json",
        "report.html",
        "events.jsonl",
    ):
        assert (run / name).stat().st_size > 0
    assert [path.name for path in sorted(run.glob("checkpoint-*"))] == [
        "checkpoint-000008",
        "checkpoint-000012",
    ]


def test_the_best_checkpoint_is_kept(tmp_path: Path) -> None:
    assert train(tiny.recipe(tmp_path, checkpoint={"every": 1000, "keep": 1})) == 0
    assert (tmp_path / "run/best/trained.safetensors").is_file()


def test_final_loads_with_plain_transformers_and_with_peft(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert train(tiny.recipe(tmp_path)) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run/final", dtype=torch.float32).eval()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "run/final/adapter")).eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"adapter": {"name": "lora", "r": 4, "lora_dropout": 0.1}},
        {"adapter": None},
        {"data.packing": False},
        {"data.num_workers": 2},
        {"optimizer": {"name": "adamw_8bit", "learning_rate": 1e-2}},
        {"train": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}},
    ],
    ids=["lora", "dropout", "full", "padded", "workers", "8bit", "accumulation"],
)
def test_a_killed_run_goes_on_to_the_bit(tmp_path: Path, changes: dict[str, Any], monkeypatch: Any) -> None:
    sections = {key: value for key, value in changes.items() if "." not in key}
    overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items() if "." in key]
    recipe = tiny.recipe(tmp_path, **sections)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train(recipe, *overrides, f"output_dir={whole}") == 0

    from shoestring.train.engine import NativeEngine

    real, calls = NativeEngine.step, [0]

    def dies(self: NativeEngine, max_grad_norm: float | None) -> Any:
        calls[0] += 1
        if calls[0] == 7:
            raise KeyboardInterrupt  # the process is gone between the gradient and the update
        return real(self, max_grad_norm)

    monkeypatch.setattr(NativeEngine, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, *overrides, f"output_dir={broken}")
    monkeypatch.setattr(NativeEngine, "step", real)
    torch.manual_seed(999)  # whatever the new process has drawn must not matter
    assert train(recipe, *overrides, f"output_dir={broken}") == 0
    assert losses(broken) == losses(whole)
    assert weights(broken) == weights(whole)
    assert summary(broken)["resumed_from"] == "checkpoint-000004"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path: Path, number: int, code: int) -> None:
    recipe = tiny.recipe(tmp_path, budget={"steps": 60}, checkpoint={"every": 1000}, eval={"samples": 0})
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train(recipe, f"output_dir={whole}") == 0
    process = forked.Popen(command(recipe))
    log = run / "metrics.jsonl"
    while not log.exists() or log.read_text().count("\n") < 3:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(60) == code
    stopped_at = metrics(run)[-1]["step"]
    assert (run / f"checkpoint-{stopped_at:06d}").is_dir()
    assert not (run / "summary.json").exists()
    assert forked.run(command(recipe)).returncode == 0
    assert losses(run) == losses(whole)
    assert weights(run) == weights(whole)


@pytest.mark.slow
def test_sigkill_loses_at_most_the_steps_since_the_last_checkpoint(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, budget={"steps": 80}, checkpoint={"every": 10}, eval={"samples": 0})
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train(recipe, f"output_dir={whole}") == 0
    process = forked.Popen(command(recipe))
    while not list(run.glob("checkpoint-*")):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert forked.run(command(recipe)).returncode == 0
    assert losses(run) == losses(whole)
    assert weights(run) == weights(whole)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["ours", "torchrun"])
def test_two_processes_train_as_one(tmp_path: Path, launcher: str) -> None:
    recipe = tiny.recipe(tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(recipe, f"output_dir={one}") == 0
    arguments = [str(recipe), f"output_dir={two}"]
    if launcher == "ours":
        start = [sys.executable, "-c", forked_children.COMMAND, "train", *arguments, "--num-processes", "2"]
    else:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        start = [*torchrun, "-m", "shoestring.train", *arguments]
    done = forked.run(start, env=ENVIRONMENT, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    for (_, a, rate_a), (_, b, rate_b) in zip(losses(one), losses(two), strict=True):
        assert abs(a - b) < 1e-5
        assert rate_a == rate_b
    assert abs(summary(one)["eval_loss"] - summary(two)["eval_loss"]) < 1e-5


@pytest.mark.slow
def test_accelerate_launch(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, budget={"steps": 2})
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "-m",
        "shoestring.train",
        str(recipe),
    ]
    done = forked.run([*launch, "eval.samples=0"], env=ENVIRONMENT, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert summary(tmp_path / "run")["steps"] == 2


def test_a_rate_that_diverges_stops_with_the_last_good_state(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, adapter=None, optimizer={"learning_rate": 1e30, "max_grad_norm": 1e30})
    with pytest.raises(DivergedError) as stopped:
        train(recipe)
    assert stopped.value.exit_code == 4
    text = str(stopped.value)
    assert "not finite" in text or "non-finite" in text
    assert "optimizer.learning_rate=" in text
    assert list((tmp_path / "run").glob("checkpoint-*"))
    assert not (tmp_path / "run/summary.json").exists()


def test_the_same_seed_gives_the_same_run(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, budget={"steps": 4})
    for name in ("a", "b"):
        assert train(recipe, f"output_dir={tmp_path / name}") == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_accumulation_equals_the_big_batch(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, train={}, budget={"steps": 6})
    for name, rows, times in (("big", 6, 1), ("small", 2, 3)):
        shape = [f"train.per_device_train_batch_size={rows}", f"train.gradient_accumulation_steps={times}"]
        assert train(recipe, *shape, f"output_dir={tmp_path / name}") == 0
    for (_, a, _), (_, b, _) in zip(losses(tmp_path / "big"), losses(tmp_path / "small"), strict=True):
        assert abs(a - b) < 1e-5


def test_checkpointing_activations_changes_no_loss(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, budget={"steps": 4})
    for name, wanted in (("kept", "false"), ("again", "true")):
        assert train(recipe, f"train.activation_checkpointing={wanted}", f"output_dir={tmp_path / name}") == 0
    for (_, a, _), (_, b, _) in zip(losses(tmp_path / "kept"), losses(tmp_path / "again"), strict=True):
        assert abs(a - b) < 1e-6


def test_another_rate_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path)
    assert train(recipe) == 0
    (tmp_path / "run/summary.json").unlink()
    with pytest.raises(UserError, match=r"optimizer\.learning_rate"):
        train(recipe, "optimizer.learning_rate=5e-3")
    assert train(recipe, "optimizer.learning_rate=5e-3", fresh=True) == 0


def test_a_finished_run_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny.recipe(tmp_path, budget={"steps": 2})
    assert train(recipe) == 0
    before = (tmp_path / "run/summary.json").read_bytes()
    assert train(recipe) == 0
    assert "--fresh" in capsys.readouterr().out
    assert (tmp_path / "run/summary.json").read_bytes() == before


def test_a_cut_checkpoint_is_skipped_with_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny.recipe(tmp_path)
    assert train(recipe) == 0
    run = tmp_path / "run"
    expected = losses(run)
    (run / "summary.json").unlink()
    newest = sorted(run.glob("checkpoint-*"))[-1]
    os.truncate(newest / "trained.safetensors", 100)
    assert train(recipe) == 0
    assert newest.name in capsys.readouterr().out
    assert losses(run) == expected
    assert summary(run)["resumed_from"] == "checkpoint-000008"


def test_early_stopping(tmp_path: Path) -> None:
    recipe = tiny.recipe(
        tmp_path,
        optimizer={"learning_rate": 1e-9},
        eval={"every": 1, "early_stopping_patience": 2, "samples": 0},
        budget={"steps": 50},
    )
    assert train(recipe) == 0
    assert summary(tmp_path / "run")["stop_reason"] in ("early_stopping", "steps")


@pytest.mark.parametrize("final", ["adapter", "none"])
def test_other_exports(tmp_path: Path, final: str) -> None:
    assert train(tiny.recipe(tmp_path, budget={"steps": 2}, export={"final": final})) == 0
    assert (tmp_path / "run/final/adapter_config.json").exists() == (final == "adapter")
    assert (summary(tmp_path / "run")["final_path"] is None) == (final == "none")
