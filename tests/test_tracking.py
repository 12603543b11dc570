"""The run directory, metrics.jsonl, events.jsonl, summary.json and environment.json."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from shoestring.recipes.errors import UserError
from shoestring.train.environment import describe_environment, redact, redact_command
from shoestring.train.rundir import RunDir, finite, write_json
from shoestring.train.tracking import METRIC_FIELDS, EventsLog, MetricsLog, Summary, Tracking, read_jsonl


def record(step: int, **more: float) -> dict[str, float]:
    return {"step": step, "seconds": step * 0.5, "tokens": step * 100, "loss": 3.0 / step, **more}


# --- the directory


def test_a_file_in_the_way_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError) as caught:
        RunDir(tmp_path / "runs")
    assert str(caught.value) == (
        f"output_dir      {tmp_path}/runs is a file, not a folder.\n"
        "                Choose another one: output_dir=runs/NAME"
    )


def test_a_second_process_is_refused_and_told_who_is_there(tmp_path: Path) -> None:
    program = (
        "import sys, time; from shoestring.train.rundir import RunDir\n"
        "with RunDir(sys.argv[1]).lock(): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError) as caught, RunDir(tmp_path).lock():
            pass
        assert str(caught.value) == (
            f"output_dir      {tmp_path} is in use: process {holder.pid} trains into it.\n"
            f"                Wait for it, end it with `kill {holder.pid}` (it saves first),\n"
            "                or choose another folder: output_dir=runs/NAME"
        )
    finally:
        holder.kill()
        holder.wait()
    with RunDir(tmp_path).lock():  # the kill has released it
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"


def test_json_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    write_json(path, {"a": 1})

    def broken(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert RunDir(tmp_path).leftovers() == [tmp_path / f".plan.json.tmp{os.getpid()}"]
    assert RunDir(tmp_path).remove_leftovers()
    assert RunDir(tmp_path).leftovers() == []


def test_not_finite_numbers_become_null() -> None:
    value = {"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": (-float("inf"),)}}
    assert finite(value) == {"a": None, "b": [None, 1.5], "c": {"d": [None]}}


def test_clear_deletes_what_a_run_writes_and_nothing_else(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for name in ("metrics.jsonl", "summary.json", "notes.txt", "my-data.jsonl"):
        (tmp_path / name).write_text("x")
    for name in ("checkpoint-000010", "final", "kept"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    run.best.symlink_to("checkpoint-000010")
    assert run.holds_run()
    run.clear()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "my-data.jsonl", "notes.txt"]
    assert (tmp_path / "kept" / "file").exists()
    assert not run.holds_run()


def test_model_writer_saves_a_full_model_with_its_tokenizer(tmp_path: Path) -> None:
    class Saves:
        def __init__(self, name: str) -> None:
            self.name = name

        def save_pretrained(self, folder: Path) -> None:
            (folder / self.name).write_text("x")

    RunDir(tmp_path / "run").model_writer(Saves("model"), Saves("tokenizer"))(tmp_path)
    assert {"model", "tokenizer"} <= {path.name for path in tmp_path.iterdir()}


# --- metrics and events


def test_a_metrics_line_has_every_field_of_the_design(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    log.write(record(1, accuracy=0.5, grad_norm=float("nan")))
    line = json.loads((tmp_path / "m.jsonl").read_text())  # readable while the log is open
    assert list(line) == [*METRIC_FIELDS, "accuracy"]
    assert line["grad_norm"] is None
    assert line["watts"] is None
    assert line["loss"] == 3.0
    log.close()


def test_a_resume_drops_the_steps_that_will_come_again(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    log = MetricsLog(path)
    for step in range(1, 8):
        log.write(record(step))
    log.close()
    with open(path, "a") as file:
        file.write('{"step": 8, "loss"')  # a kill in mid-write
    log = MetricsLog(path, after_step=5)
    for step in range(6, 9):
        log.write(record(step))
    log.close()
    assert [line["step"] for line in read_jsonl(path)] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_fresh_start_begins_an_empty_file(tmp_path: Path) -> None:
    MetricsLog(tmp_path / "m.jsonl").write(record(1))
    MetricsLog(tmp_path / "m.jsonl")
    assert (tmp_path / "m.jsonl").read_text() == ""


def test_events_are_kept_and_a_torn_line_harms_no_other(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    log = EventsLog(path, seconds=lambda: 1.23456)
    log.write("start", step=0)
    log.close()
    with open(path, "a") as file:
        file.write('{"event": "sa')
    log = EventsLog(path, seconds=lambda: 2.0)
    log.write("resume", step=4, path=tmp_path)
    log.close()
    assert read_jsonl(path) == [
        {"event": "start", "seconds": 1.235, "step": 0},
        {"event": "resume", "seconds": 2.0, "step": 4, "path": str(tmp_path)},
    ]


def test_a_long_file_is_thinned_and_keeps_its_last_line(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1001)))
    steps = [line["step"] for line in read_jsonl(path, at_most=100)]
    assert len(steps) <= 101
    assert (steps[0], steps[-1]) == (0, 1000)
    assert read_jsonl(tmp_path / "missing.jsonl") == []


def test_the_summary_has_exactly_the_fields_of_the_design(tmp_path: Path) -> None:
    assert [one.name for one in fields(Summary)] == [
        "stop_reason", "steps", "tokens", "trained_tokens", "seconds", "budget", "final_progress",
        "final_learning_rate", "train_loss", "eval_loss_before", "eval_loss", "best_eval_loss",
        "tokens_per_second", "peak_device_bytes", "peak_host_bytes", "predicted_device_bytes",
        "predicted_host_bytes", "optimizer_state_bytes", "disk_bytes_written", "energy_joules",
        "energy_source", "cost", "resumed_from", "final_path", "legs",
    ]  # fmt: skip
    Summary(stop_reason="time", budget={"time": {"given": 180.0, "used": 179.2}}).write(
        tmp_path / "summary.json"
    )
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written["budget"] == {"time": {"given": 180.0, "used": 179.2}}
    assert written["energy_joules"] is None


def test_tracking_writes_both_files_and_times_blocks(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    tracking = Tracking(run, seconds=lambda: 7.0)
    tracking.metrics(record(3))
    tracking.event("eval", step=3, kind="eval", duration=1.5, loss=2.0)
    with tracking.timed("save") as more:
        more["path"] = "checkpoint-000003"
    assert tracking.state_dict() == {}
    tracking.finish(Summary())
    tracking.finish()
    assert [line["event"] for line in read_jsonl(run.events)] == ["eval", "save"]
    saved = read_jsonl(run.events)[1]
    assert saved["kind"] == "save"
    assert saved["step"] == 3
    assert saved["path"] == "checkpoint-000003"
    assert 0 <= saved["duration"] < 1


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    tracking = Tracking(RunDir(tmp_path), seconds=lambda: 0.0, active=False)
    tracking.metrics(record(1))
    tracking.event("stop")
    tracking.finish(Summary())
    assert list(tmp_path.iterdir()) == []


# --- environment


def test_the_environment_tells_versions_but_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 30)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    found = describe_environment(["shoestring", "train", "r.yaml", "hub.token=verysecret", "train.seed=1"])
    text = json.dumps(found)
    assert "a" * 30 not in text
    assert "0123456789abcdef" not in text
    assert "verysecret" not in text
    assert found["command"] == "shoestring train r.yaml hub.token=*** train.seed=1"
    assert found["variables"]["OMP_NUM_THREADS"] == "2"
    assert found["libraries"]["torch"]
    assert found["cores"] >= 1
    assert found["cpu"]


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["train", "--api-key", "abc", "x"], "train --api-key *** x"),
        (["--hub-token=abc"], "--hub-token=***"),
        (["budget.tokens=5000", "batch_tokens=7"], "budget.tokens=5000 batch_tokens=7"),
        (["model=hf_abcdefghijklmnopqrst"], "model=***"),
        (["data=https://me:pw@host/x.jsonl"], "data=https://***@host/x.jsonl"),
        (["data=https://host/x?sig=abc&v=1"], "data=https://host/x?sig=***&v=1"),
        (["name=two words"], "'name=two words'"),
        (["data.eos_token=</s>"], "'data.eos_token=</s>'"),
    ],
)
def test_command_lines_without_secrets(arguments: list[str], shown: str) -> None:
    assert redact_command(arguments) == shown


def test_configs_without_secrets() -> None:
    given = {
        "a": {"api_key": "x", "eos_token": "</s>", "tokens": 5, "use_auth_token": True},
        "password": ["y"],
    }
    assert redact(given) == {
        "a": {"api_key": "***", "eos_token": "</s>", "tokens": 5, "use_auth_token": True},
        "password": ["***"],
    }
