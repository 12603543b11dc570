"""Real processes of a sweep: their log, signals, a kill in the middle, and what is left afterwards."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import sweep_fakes
from shoestring.recipes.errors import BudgetError, ShoestringError, UserError
from shoestring.train.launch import STARTED_AT
from shoestring.train.signals import StopRequest
from shoestring.train.sweep_process import Task, last_lines, make_plan, trainer, wait_until_free
from shoestring.train.sweep_results import (
    clear_trial,
    drop_checkpoints,
    read_result,
    run_clock,
    start_and_end,
    why_failed,
)

SCRIPT = str(Path(sweep_fakes.__file__))
OVER = "optimizer.learning_rate=1e-4,1e-3,1e-2"


def task(folder: Path, *arguments: str) -> Task:
    return Task("t", folder / "t", list(arguments))


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_output_goes_to_the_log_and_the_code_comes_back(tmp_path: Path) -> None:
    code = f"import os, sys; print('said', os.environ['{STARTED_AT}'] > '', *sys.argv[1:]); sys.exit(3)"
    run = trainer(StopRequest(), python(code))
    assert run(task(tmp_path, "a", "b=c")).code == 3
    assert run(task(tmp_path, "d")).seconds > 0
    assert (tmp_path / "t/log.txt").read_text().splitlines() == [
        "$ shoestring train a b=c",
        "said True a b=c",
        "$ shoestring train d",
        "said True d",
    ]
    assert last_lines(tmp_path / "t") == ["said True d"]
    assert last_lines(tmp_path / "nowhere") == []


def test_the_trials_clock_starts_with_its_process(tmp_path: Path) -> None:
    code = f"import os, time; print(time.monotonic() - float(os.environ['{STARTED_AT}']))"
    whole = trainer(StopRequest(), python(code))(task(tmp_path)).seconds
    assert 0 < float(last_lines(tmp_path / "t")[0]) < whole


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_is_passed_on_once_and_waited_for(tmp_path: Path, number: int) -> None:
    code = (
        "import signal, sys, time\n"
        "got = []\n"
        "for n in (2, 15): signal.signal(n, lambda n, f: got.append(n))\n"
        "print('ready', flush=True)\n"
        "while not got: time.sleep(0.01)\n"
        "time.sleep(0.3); print(got, flush=True); sys.exit(128 + got[0])"
    )
    stop = StopRequest()

    def request() -> None:
        wait_for(lambda: "ready" in last_lines(tmp_path / "t"))
        stop.signal_number = number

    threading.Thread(target=request).start()
    assert trainer(stop, python(code))(task(tmp_path)).code == 128 + number
    assert last_lines(tmp_path / "t")[-1] == f"[{number:d}]"


def test_plans_come_back_as_values_and_errors_as_what_they_are() -> None:
    values, seconds = make_plan(
        ["r"], python("import sys; print('a note\\n{\"steps\": 3}', file=sys.stdout)")
    )
    assert values == {"steps": 3}
    assert seconds > 0
    for code, kind in ((2, UserError), (3, BudgetError), (1, ShoestringError)):
        with pytest.raises(kind, match="it is wrong") as caught:
            make_plan(["r"], python(f"import sys; print('it is wrong', file=sys.stderr); sys.exit({code})"))
        assert caught.value.exit_code == code


def test_waiting_for_a_process_that_is_left(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    lock.write_text("4711\n")
    said: list[str] = []
    with open(lock) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        began = time.monotonic()
        threading.Timer(0.3, lambda: fcntl.flock(held, fcntl.LOCK_UN)).start()
        wait_until_free(tmp_path, said.append, StopRequest())
        assert time.monotonic() - began > 0.2
    assert len(said) == 1
    assert "4711" in said[0]
    wait_until_free(tmp_path / "nothing", said.append, StopRequest())


# What a run directory says


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def test_results_of_a_pause_and_of_a_finished_run(tmp_path: Path) -> None:
    assert read_result(tmp_path, 0.5) is None
    paused = {"progress": 0.35, "step": 7, "seconds": 12.5, "tokens": 700, "eval_loss": 1.5}
    write(tmp_path / "paused.json", paused)
    assert read_result(tmp_path, 1.0) is None
    assert read_result(tmp_path, 0.5) is None, "that pause was an earlier one"
    result = read_result(tmp_path, 1 / 3)
    assert result is not None
    assert (result.loss, result.step, result.finished) == (1.5, 7, False)
    summary = {"final_progress": 1.0, "steps": 20, "seconds": 30.0, "tokens": 2000, "eval_loss": 1.25}
    write(tmp_path / "summary.json", summary)
    landed = read_result(tmp_path, 1.0)
    assert landed is not None
    assert (landed.loss, landed.seconds, landed.finished) == (1.25, 30.0, True)


def test_the_clock_that_a_resume_counts_from(tmp_path: Path) -> None:
    assert run_clock(tmp_path) == 0.0
    write(tmp_path / "checkpoint-000004/trainer.json", {"clock": {"seconds": 9.0}})
    write(tmp_path / "checkpoint-000008/trainer.json", {"clock": {"seconds": 20.0}})
    assert run_clock(tmp_path) == 20.0
    write(tmp_path / "metrics.jsonl", {"step": 9, "seconds": 23.0})
    assert run_clock(tmp_path) == 23.0


def test_what_a_leg_spent_outside_its_steps(tmp_path: Path) -> None:
    # 5 earlier steps ended at 20 s; then a start of 6 s, two steps of 2 s, one of 3 s, and 1.5 s to the end
    rows = [(5, 500, 20.0, 50.0), (6, 600, 28.0, 50.0), (7, 700, 30.0, 50.0), (8, 850, 33.0, 50.0)]
    lines = [{"step": s, "tokens": t, "seconds": c, "tokens_per_second": r} for s, t, c, r in rows]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert start_and_end(tmp_path, step=5, tokens=500, clock=20.0, seconds=14.5) == (6.0, 1.5)
    assert start_and_end(tmp_path, step=8, tokens=850, clock=33.0, seconds=5.0) is None


def test_reasons_for_the_table(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("$ shoestring train a\nbudget.time  too short\n\n")
    assert why_failed(tmp_path, 3) == "does not fit: budget.time  too short"
    assert why_failed(tmp_path, 2).startswith("refused: ")
    assert why_failed(tmp_path, 1) == "ended with code 1: budget.time  too short"
    assert why_failed(tmp_path, -9) == "killed by signal 9"
    assert why_failed(tmp_path, 4) == "diverged"
    write(tmp_path / "events.jsonl", {"event": "diverged", "step": 12})
    assert why_failed(tmp_path, 4) == "diverged at step 12"


def test_only_what_runs_wrote_is_deleted(tmp_path: Path) -> None:
    trial = tmp_path / "r=8"
    for name in ("checkpoint-000004/trainer.json", "metrics.jsonl", "log.txt", "paused.json", "mine.txt"):
        write(trial / name, {})
    (trial / "best").symlink_to("checkpoint-000004")
    drop_checkpoints(trial)
    assert sorted(path.name for path in trial.iterdir()) == [
        "log.txt",
        "metrics.jsonl",
        "mine.txt",
        "paused.json",
    ]
    clear_trial(trial)
    assert [path.name for path in trial.iterdir()] == ["mine.txt"]
    (trial / "mine.txt").unlink()
    clear_trial(trial)
    assert not trial.exists()


# Whole sweeps of real, fake trials


def start(source: Path, pace: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, SCRIPT, "sweep", str(source), "steps=60", OVER],
        env=os.environ | {sweep_fakes.SLEEP: str(pace)},
        stdout=subprocess.DEVNULL,
    )


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def legs(output: Path) -> object:
    state = json.loads((output / "sweep.json").read_text())
    keys = ("rung", "progress", "loss", "spent", "step")
    return [[t["name"], t["state"], [[leg[k] for k in keys] for leg in t["legs"]]] for t in state["trials"]]


def bits(output: Path) -> dict[str, list[tuple[float, float, float]]]:
    return {
        path.parent.name: [
            (row["loss"], row["learning_rate"], row["grad_norm"])
            for row in map(json.loads, path.read_text().splitlines())
        ]
        for path in sorted(output.glob("sweep/*/metrics.jsonl"))
    }


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_in_the_middle_it_goes_on_to_the_same_bits(tmp_path: Path, number: int) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
        sweep_fakes.recipe(folder)
    assert start(whole / "fake.yaml", 0.0).wait(60) == 0
    process = start(broken / "fake.yaml", 0.1)
    second = broken / "out/sweep/learning_rate=1e-3/metrics.jsonl"
    wait_for(lambda: second.exists() and len(second.read_text().splitlines()) >= 3)
    children = psutil.Process(process.pid).children()
    assert len(children) == 1
    process.send_signal(number)
    assert process.wait(30) == (-9 if number == signal.SIGKILL else 143)
    if sys.platform == "linux":  # elsewhere it trains on to its pause, and the next start waits for it
        wait_for(lambda: not children[0].is_running() or children[0].status() == psutil.STATUS_ZOMBIE)
    state = json.loads((broken / "out/sweep.json").read_text())
    assert state["running"]["name"] == "learning_rate=1e-3"
    assert start(broken / "fake.yaml", 0.0).wait(60) == 0
    assert legs(broken / "out") == legs(whole / "out")
    assert bits(broken / "out") == bits(whole / "out")
    assert (broken / "out/final/weight").read_bytes() == (whole / "out/final/weight").read_bytes()
