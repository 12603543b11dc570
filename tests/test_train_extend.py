"""More budget for a finished run: each rule, a leg that is killed, and what is refused."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from shoestring.recipes.errors import UserError
from shoestring.train.extend import extend_run
from shoestring.train.report import write_report
from shoestring.train.run import train_recipe
from test_train_run import _one_thread, metrics, summary, weights  # noqa: F401 - a fixture

PEAK = 1e-2


def train(recipe: Path, *overrides: str, **options: Any) -> int:
    return train_recipe(str(recipe), overrides, fresh=False, started=time.monotonic(), **options)


def extend(run: Path, *budget: str, rewarm: float | None = None) -> int:
    return extend_run(run, budget or ("steps=8",), rewarm=rewarm, started=time.monotonic())


def finished(folder: Path, schedule: dict[str, Any], **sections: Any) -> Path:
    given = {"schedule": schedule, "checkpoint": {"every": 1000, "keep_best": False}, **sections}
    assert train(tiny.recipe(folder, **given)) == 0
    return folder / "run"


def rates(run: Path) -> list[float]:
    return [round(line["learning_rate"] / PEAK, 6) for line in metrics(run)]


def events(run: Path, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == name]


def test_wsd_goes_on_from_the_state_before_its_decay(tmp_path: Path) -> None:
    run = finished(
        tmp_path,
        {"name": "wsd", "decay_fraction": 0.5, "decay_type": "linear", "warmup_steps": 0},
        checkpoint={"every": 1000, "keep_best": False, "keep_pre_decay": True, "keep": 1},
    )
    before = rates(run)
    hold = before.index(next(rate for rate in before if rate < 1.0))
    kept = run / f"checkpoint-{hold:06d}"
    assert kept.is_dir(), "the state before the first decayed step"
    state = json.loads((kept / "trainer.json").read_text())["state"]
    assert state["before_decay"] == state["step"] == hold
    assert before[-1] == 0.0
    assert extend(run) == 0
    result = summary(run)
    assert (result["steps"], result["legs"], result["budget"]["steps"]) == (20, 2, {"given": 20, "used": 20})
    assert rates(run)[12:] == [1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert json.loads((run / "legs.json").read_text())[0]["source"] == kept.name
    (event,) = events(run, "extend")
    assert event["rule"] == "wsd"
    assert event["source"] == kept.name
    assert json.loads((run / "summary-1.json").read_text())["steps"] == 12


def test_the_branch_starts_from_the_weights_that_were_kept(tmp_path: Path) -> None:
    schedule = {"name": "wsd", "decay_fraction": 0.5, "decay_type": "linear", "warmup_steps": 0}
    keep = {"every": 1000, "keep_best": False, "keep_pre_decay": True}
    run = finished(tmp_path, schedule, checkpoint=keep)
    kept = json.loads((run / "checkpoint-000012/trainer.json").read_text())["state"]["before_decay"]
    from safetensors.torch import load_file
    from shoestring.train.engine import NativeEngine

    saved = load_file(run / f"checkpoint-{kept:06d}/trained.safetensors")
    last = load_file(run / "checkpoint-000012/trained.safetensors")
    seen = []
    real = NativeEngine.load_state_dict

    def looks(self: NativeEngine, tensors: Any, settings: Any) -> None:
        real(self, tensors, settings)
        seen.append({name: p.detach().clone() for name, p in self.parameters.items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NativeEngine, "load_state_dict", looks)
        assert extend(run) == 0
    assert all(torch.equal(seen[0][name], saved[name]) for name in saved)
    assert any(not torch.equal(last[name], saved[name]) for name in saved)


def test_wsd_s_goes_straight_back_to_the_peak_from_the_decayed_state(tmp_path: Path) -> None:
    run = finished(tmp_path, {"name": "wsd_s", "decay_type": "linear", "decay_fraction": 0.5, "periods": 1})
    assert extend(run) == 0
    assert rates(run)[11] == 0.0
    assert rates(run)[12:] == [1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert events(run, "extend")[0]["source"] == "checkpoint-000012"


def test_a_constant_rate_stays(tmp_path: Path) -> None:
    run = finished(tmp_path, {"name": "constant", "warmup_steps": 0})
    assert extend(run) == 0
    assert set(rates(run)) == {1.0}


@pytest.mark.parametrize("name", ["rex", "cosine", "wsd"])
def test_others_warm_up_again_to_a_share_of_the_peak(tmp_path: Path, name: str) -> None:
    run = finished(tmp_path, {"name": name})
    assert extend(run, "steps=40", rewarm=0.4) == 0
    leg = rates(run)[12:]
    assert len(leg) == 40
    assert 0 < leg[0] <= 0.4 / 3 + 1e-6, "never a jump"
    assert max(leg) <= 0.4
    assert max(leg) > 0.3
    assert leg[-1] == 0.0
    assert "rises again" in events(run, "extend")[0]["text"]


def test_twice_and_in_another_unit(tmp_path: Path) -> None:
    run = finished(tmp_path, {"name": "constant"})
    assert extend(run, "tokens=600") == 0
    assert extend(run, "steps=3") == 0
    result = summary(run)
    assert result["legs"] == 3
    assert result["stop_reason"] == "steps"
    assert sorted(path.name for path in run.glob("summary-*.json")) == ["summary-1.json", "summary-2.json"]
    page = (run / "report.html").read_text()
    assert "leg 3" in page
    write_report([run], tmp_path / "again.html")


def test_a_killed_leg_goes_on_to_the_bit_with_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = {"name": "rex"}
    often = {"every": 4, "keep_best": False}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = finished(tmp_path / "a", schedule, checkpoint=often)
    broken = finished(tmp_path / "b", schedule, checkpoint=often)
    assert extend(whole, "steps=12") == 0

    from shoestring.train.engine import NativeEngine

    real, calls = NativeEngine.step, [0]

    def dies(self: NativeEngine, max_grad_norm: float | None) -> Any:
        calls[0] += 1
        if calls[0] == 7:
            raise KeyboardInterrupt
        return real(self, max_grad_norm)

    monkeypatch.setattr(NativeEngine, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        extend(broken, "steps=12")
    monkeypatch.setattr(NativeEngine, "step", real)
    with pytest.raises(UserError, match="has not finished its last extension"):
        extend(broken, "steps=99")
    assert extend(broken, "steps=12") == 0
    assert rates(broken) == rates(whole)
    assert summary(broken)["legs"] == 2
    assert weights(broken) == weights(whole)


def test_what_cannot_be_extended(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run directory"):
        extend(tmp_path)
    recipe = tiny.recipe(tmp_path)
    assert train(recipe, pause_at=0.5) == 0
    with pytest.raises(UserError, match="has not finished its budget"):
        extend(tmp_path / "run")
    assert train(recipe) == 0
    with pytest.raises(UserError, match="budget"):
        extend(tmp_path / "run", "soon")
    with pytest.raises(UserError, match="how much more"):
        extend_run(tmp_path / "run", [], rewarm=None, started=time.monotonic())


def test_a_finished_run_says_how_to_give_it_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny.recipe(tmp_path)
    assert train(recipe) == 0
    assert train(recipe) == 0
    assert "shoestring extend" in capsys.readouterr().out


def test_a_paused_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path)
    whole, paused = tmp_path / "whole", tmp_path / "paused"
    assert train(recipe, f"output_dir={whole}") == 0
    assert train(recipe, f"output_dir={paused}", pause_at=0.25) == 0
    left = json.loads((paused / "paused.json").read_text())
    assert (left["step"], left["progress"]) == (3, 0.25)
    assert left["eval_loss"] < left["eval_loss_before"]
    assert not (paused / "summary.json").exists()
    assert train(recipe, f"output_dir={paused}", pause_at=0.5) == 0
    assert train(recipe, f"output_dir={paused}") == 0
    assert rates(paused) == rates(whole)
    assert weights(paused) == weights(whole)
    assert not (paused / "paused.json").exists()


def test_a_changed_budget_at_a_resume_changes_no_rate_at_once(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, schedule={"name": "linear", "warmup_steps": 0})
    run = tmp_path / "run"
    assert train(recipe, pause_at=0.5) == 0
    assert train(recipe, "budget.steps=30") == 0
    after = rates(run)
    assert after[5] == 0.5
    assert after[6] == pytest.approx(0.5 - 0.5 / 24)
    assert after[-1] == 0.0
    assert len(after) == 30
