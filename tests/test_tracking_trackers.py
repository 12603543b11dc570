"""What outside trackers are told: W&B and trackio by stand-in modules, TensorBoard by its own files."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from shoestring.recipes.errors import UserError
from shoestring.train.rundir import RunDir
from shoestring.train.trackers import open_trackers, wandb_mode
from shoestring.train.tracking import Summary, Tracking, read_jsonl

CONFIG = {"optimizer": {"learning_rate": 1e-3}, "hub": {"api_key": "very-secret"}}


class FakeRun:
    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.id, self.url, self.dir = (
            settings.get("id"),
            "https://wandb.example/run",
            "/somewhere/offline-run-1/files",
        )
        self.name = settings.get("name")
        self.logged: list[Any] = []
        self.metrics: list[Any] = []
        self.summary: dict[str, Any] = {}
        self.finished = False
        self.fail = False

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, figures: dict[str, float], step: int | None = None) -> None:
        if self.fail:
            raise ConnectionError("the server went away\nand more")
        self.logged.append((figures, step))

    def finish(self) -> None:
        self.finished = True


def fake_module(monkeypatch: pytest.MonkeyPatch, name: str, refuse_online: bool = False) -> list[FakeRun]:
    runs: list[FakeRun] = []
    module: Any = ModuleType(name)

    def init(**settings: Any) -> FakeRun:
        if refuse_online and settings["mode"] == "online":
            raise TimeoutError("no route to host")
        runs.append(FakeRun(**settings))
        return runs[-1]

    module.init = init
    module.Settings = lambda **settings: SimpleNamespace(**settings)
    module.teardown = lambda: None
    module.finish = lambda: runs[-1].finish()
    monkeypatch.setitem(sys.modules, name, module)
    return runs


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_RUN_ID", "WANDB_DIR", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_wandb_is_offline_without_a_key_and_gets_the_recipe_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = fake_module(monkeypatch, "wandb")
    trackers = open_trackers(["wandb"], folder=tmp_path, project="p", run_name="r", config=CONFIG)
    told = runs[0].settings
    assert told["mode"] == "offline"
    assert (told["project"], told["name"], told["dir"]) == ("p", "r", str(tmp_path))
    assert told["config"] == {"optimizer": {"learning_rate": 1e-3}, "hub": {"api_key": "***"}}
    assert trackers.lines == ["W&B: offline; send it later with: wandb sync /somewhere/offline-run-1"]


def test_wandb_keeps_its_run_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = fake_module(monkeypatch, "wandb")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    first = open_trackers(["wandb"], folder=tmp_path, project="p", run_name="r", config={})
    state = first.state_dict()
    open_trackers(["wandb"], folder=tmp_path, project="p", run_name="r", config={}, state=state, after_step=5)
    assert runs[0].settings["id"] == runs[1].settings["id"] == state["wandb"]["id"]
    assert runs[1].settings["resume"] == "allow"
    assert runs[1].settings["mode"] == "online"
    # Steps may come again after a resume, so they are a value on their own axis and not W&B's counter.
    assert ("*", "step") in runs[0].metrics
    first.log({"train/loss": 1.0}, 7)
    assert runs[0].logged == [({"train/loss": 1.0, "step": 7}, None)]


def test_wandb_that_cannot_be_reached_goes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = fake_module(monkeypatch, "wandb", refuse_online=True)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    trackers = open_trackers(["wandb"], folder=tmp_path, project="p", run_name="r", config={})
    assert [run.settings["mode"] for run in runs] == ["offline"]
    assert trackers.warnings == ["W&B cannot be reached (no route to host); logging offline"]


def test_the_mode_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wandb_mode() == "offline"
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password key\n")
    assert wandb_mode() == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.mine.example")
    assert wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert wandb_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode() == "disabled"


def test_trackio_resumes_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    runs = fake_module(monkeypatch, "trackio")
    first = open_trackers(["trackio"], folder=tmp_path, project="p", run_name="r", config=CONFIG)
    first.log({"train/loss": 1.0}, 3)
    first.finish({"steps": 3, "stop_reason": "time"})
    assert runs[0].settings["resume"] == "never"
    assert runs[0].settings["embed"] is False
    assert runs[0].settings["config"]["hub"] == {"api_key": "***"}
    assert runs[0].logged == [({"train/loss": 1.0}, 3), ({"summary/steps": 3}, None)]
    assert runs[0].finished
    open_trackers(
        ["trackio"], folder=tmp_path, project="p", run_name="other", config={}, state=first.state_dict()
    )
    assert (runs[1].settings["name"], runs[1].settings["resume"]) == ("r", "allow")
    assert capsys.readouterr().out == ""


def test_tensorboard_files_hold_each_step_once_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for after_step, steps in ((0, range(1, 8)), (5, range(6, 10))):
        trackers = open_trackers(
            ["tensorboard"], folder=tmp_path, project="p", run_name="r", config=CONFIG, after_step=after_step
        )
        for step in steps:
            trackers.log({"train/loss": 10.0 * (after_step or 1) + step}, step)
        assert trackers.finish({"steps": 9}) == []
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    values = [(event.step, event.value) for event in found.Scalars("train/loss")]
    assert values == [
        (1, 11.0),
        (2, 12.0),
        (3, 13.0),
        (4, 14.0),
        (5, 15.0),
        (6, 56.0),
        (7, 57.0),
        (8, 58.0),
        (9, 59.0),
    ]
    text = found.Tensors("recipe/r/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "learning_rate" in text
    assert "very-secret" not in text


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "trackio"])
def test_a_missing_library_is_one_line_with_the_command(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError) as caught:
        open_trackers([name], folder=tmp_path, project="p", run_name="r", config={})
    assert str(caught.value) == (
        f"track.report_to: {name} needs a library that is not installed ({name}).   Type: pip install {name}"
    )


def test_a_library_that_does_not_start_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = ModuleType("trackio")
    module.init = lambda **_: (_ for _ in ()).throw(RuntimeError("no token\nlong text"))
    monkeypatch.setitem(sys.modules, "trackio", module)
    with pytest.raises(UserError) as caught:
        open_trackers(["trackio"], folder=tmp_path, project="p", run_name="r", config={})
    assert str(caught.value) == (
        "track.report_to: trackio did not start: no token\n"
        "  Train without it: track.report_to=[]   (all figures are in metrics.jsonl anyway)"
    )


def test_a_failing_tracker_is_a_warning_once_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = fake_module(monkeypatch, "wandb")
    trackers = open_trackers(["wandb", "tensorboard"], folder=tmp_path, project="p", run_name="r", config={})
    run = RunDir(tmp_path)
    tracking = Tracking(run, seconds=lambda: 1.0, trackers=trackers)
    tracking.metrics({"step": 1, "loss": 2.0})
    runs[0].fail = True
    for step in (2, 3):
        tracking.metrics({"step": step, "loss": 2.0})
    tracking.event("eval", step=3, kind="eval", duration=1.0, loss=1.5)
    assert tracking.state_dict() == {"wandb": {"id": runs[0].id}, "tensorboard": {}}
    tracking.finish(Summary(steps=3))
    warnings = [line["text"] for line in read_jsonl(run.events) if line["event"] == "warning"]
    assert warnings == [
        "wandb stopped taking figures (ConnectionError: the server went away); "
        "the run goes on, metrics.jsonl has them all"
    ]
    assert len(read_jsonl(run.metrics)) == 3

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in found.Scalars("train/loss")] == [1, 2, 3]
    assert [event.value for event in found.Scalars("eval/loss")] == [1.5]


def test_figures_that_are_not_numbers_stay_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = fake_module(monkeypatch, "wandb")
    trackers = open_trackers(["wandb"], folder=tmp_path, project="p", run_name="r", config={})
    tracking = Tracking(RunDir(tmp_path), seconds=lambda: 1.0, trackers=trackers)
    tracking.metrics({"step": 1, "loss": 2.0, "watts": None, "seconds": 4.0, "note": "x"})
    tracking.finish(Summary(steps=1, stop_reason="time"))
    assert runs[0].logged == [({"train/loss": 2.0, "step": 1}, None)]
    assert runs[0].summary == {"stop_reason": "time", "steps": 1}
    assert runs[0].finished
