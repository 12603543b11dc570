"""sft_then_dpo: one budget over two objectives, each with rows, batch, rate and schedule of its own."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
from shoestring.train.run import train_recipe
from test_train_run import _one_thread, metrics, summary, weights  # noqa: F401 - a fixture


def pairs(path: Path, rows: int = 48) -> Path:
    """The chosen answer counts words of the prompt's kind; the rejected one is other words."""
    draw = random.Random(1)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            prompt, good, bad = (" ".join(draw.choices(tiny.WORDS, k=draw.randint(2, 6))) for _ in range(3))
            file.write(
                json.dumps({"prompt": prompt, "chosen": f"{good} sun", "rejected": f"{bad} cat"}) + "\n"
            )
    return path


def recipe(folder: Path, objective: Any, **sections: Any) -> Path:
    data = {
        "train": str(tiny.chats(folder / "chats.jsonl")),
        "eval": 0.1,
        "preferences": str(pairs(folder / "pairs.jsonl")),
    }
    given = {"data": data, "objective": objective, "budget": {"steps": 16}, **sections}
    return tiny.recipe(folder, **given)


def train(source: Path, *overrides: str) -> int:
    return train_recipe(str(source), overrides, fresh=False, started=time.monotonic())


def events(run: Path, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == name]


TWO = {"name": "sft_then_dpo", "split": 0.5, "dpo_learning_rate": 5e-3}


def test_both_stages_learn_what_they_are_for(tmp_path: Path) -> None:
    assert train(recipe(tmp_path, TWO)) == 0
    run = tmp_path / "run"
    log = metrics(run)
    assert [line["stage"] for line in log] == ["sft"] * 8 + ["dpo"] * 8
    measured = [event for event in events(run, "eval") if event.get("stage") == "dpo"]
    assert measured[0]["accuracy"] < measured[-1]["accuracy"]
    assert measured[0]["loss"] == pytest.approx(0.6931, abs=1e-3), "the reference is the model after sft"
    assert measured[-1]["loss"] < measured[0]["loss"]
    result = summary(run)
    sft = [event["loss"] for event in events(run, "eval") if event.get("stage") == "sft"]
    assert (result["eval_loss_before"], result["eval_loss"]) == (sft[0], sft[-1])
    assert result["final_progress"] == 1.0


def test_each_stage_warms_up_and_lands(tmp_path: Path) -> None:
    assert train(recipe(tmp_path, TWO, schedule={"name": "linear", "warmup_steps": 0})) == 0
    rates = [line["learning_rate"] for line in metrics(tmp_path / "run")]
    assert rates[:8] == pytest.approx([1e-2 * (1 - step / 8) for step in range(1, 9)], abs=1e-12)
    assert rates[8:] == pytest.approx([5e-3 * (1 - step / 8) for step in range(1, 9)], abs=1e-12)


@pytest.mark.parametrize("adapter", [{"name": "lora", "r": 4}, None], ids=["lora", "full"])
@pytest.mark.parametrize("dies_at", [5, 13], ids=["in sft", "in dpo"])
def test_a_run_killed_in_either_stage_goes_on_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_at: int, adapter: Any
) -> None:
    source = recipe(tmp_path, TWO, adapter=adapter, checkpoint={"every": 3, "keep_best": False})
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train(source, f"output_dir={whole}") == 0
    from shoestring.train.engine import NativeEngine

    real, calls = NativeEngine.step, [0]

    def dies(self: NativeEngine, max_grad_norm: float | None) -> Any:
        calls[0] += 1
        if calls[0] == dies_at:
            raise KeyboardInterrupt
        return real(self, max_grad_norm)

    monkeypatch.setattr(NativeEngine, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        train(source, f"output_dir={broken}")
    monkeypatch.setattr(NativeEngine, "step", real)
    assert train(source, f"output_dir={broken}") == 0
    assert [line["loss"] for line in metrics(broken)] == [line["loss"] for line in metrics(whole)]
    assert weights(broken) == weights(whole)


def test_an_automatic_split_says_why(tmp_path: Path) -> None:
    assert train(recipe(tmp_path, "sft_then_dpo")) == 0
    plan = json.loads((tmp_path / "run/plan.json").read_text())
    assert "fewer than 1,000" in plan["reasons"]["objective.split"]
    assert all("stage" not in line for line in metrics(tmp_path / "run")), "all of the budget for sft"


def test_dpo_alone(tmp_path: Path) -> None:
    data = {"train": str(pairs(tmp_path / "pairs.jsonl")), "eval": 0.2}
    assert train(tiny.recipe(tmp_path, data=data, objective="dpo", budget={"steps": 20})) == 0
    measured = events(tmp_path / "run", "eval")
    assert measured[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert measured[-1]["accuracy"] > 0.9
    assert measured[-1]["margin"] > 0


def test_the_report_shows_both_stages(tmp_path: Path) -> None:
    assert train(recipe(tmp_path, TWO)) == 0
    page = (tmp_path / "run/report.html").read_text()
    assert "Stages" in page
    assert "accuracy" in page
