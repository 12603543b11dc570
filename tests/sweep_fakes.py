"""Trials without a model: a trainer that keeps the contract of `shoestring train --pause-at` in plain files.

`Simulated` runs in this process on a fake clock. As a script it is a real process that can be killed:

    python tests/sweep_fakes.py RECIPE KEY=VALUE ... [--pause-at SHARE]
    python tests/sweep_fakes.py sweep RECIPE BUDGET KEY=VALUES [...]      a whole sweep of such processes
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from shoestring.recipes import load_recipe
from shoestring.recipes.errors import ShoestringError
from shoestring.train.signals import StopRequest, stop_on_signals
from shoestring.train.sweep_costs import Figures
from shoestring.train.sweep_grid import Job, read_job
from shoestring.train.sweep_leg import Sweep
from shoestring.train.sweep_plan import Overheads, make_ladder
from shoestring.train.sweep_process import Outcome, Task, trainer
from shoestring.train.sweep_rungs import conduct
from shoestring.train.sweep_state import FILE, State, Trial, load_state

BEST_RATE = 1e-3
TOKENS = 100  # of a step
LONGEST_STEP = 2.7  # seconds
GUESS = Overheads(first=8.0, again=6.0, pause=1.0, landing=4.0)
SLEEP = "FAKE_STEP_SECONDS"


def recipe(folder: Path, **sections: Any) -> Path:
    """A recipe whose model and data are never opened."""
    given = {"model": "nowhere", "data": "nothing.jsonl", "budget": {"steps": 1000}}
    path = folder / "fake.yaml"
    path.write_text(yaml.safe_dump({**given, "output_dir": str(folder / "out"), **sections}))
    return path


def loss_at(rate: float, progress: float) -> float:
    """Falls with progress; lowest at BEST_RATE whatever the progress."""
    return 1.0 + 0.2 * math.log10(rate / BEST_RATE) ** 2 + math.exp(-4.0 * progress)


@dataclass
class FakeRun:
    """The state of a trial, as its checkpoint holds it."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    progress: float = 0.0
    weight: float = 1.0
    given: float = 0.0
    """The limit that progress runs to, from `since` where `used` was spent."""
    since: float = 0.0
    used: float = 0.0


def train(
    arguments: list[str],
    *,
    spend: Callable[[str], float],
    stop: Callable[[], bool] = lambda: False,
    diverges_above: float = math.inf,
    diverges_at: float = 0.0,
) -> int:
    """One process of a trial. spend(kind): lets the time of "first", "again", "step", "pause" or "landing"
    pass and returns its seconds."""
    pause_at = float(arguments[arguments.index("--pause-at") + 1]) if "--pause-at" in arguments else None
    words = arguments[: arguments.index("--pause-at")] if pause_at is not None else arguments
    config = load_recipe(words[0], words[1:]).recipe
    folder, rate = Path(config.output_dir), config.optimizer.learning_rate or 1e-4
    run = _restore(folder)
    run.seconds += spend("again" if run.step else "first")
    limit, used = _limit(config.budget)
    given = float(getattr(config.budget, limit)) - (GUESS.landing if limit == "time" else 0.0)
    if given != run.given or limit == "time":  # a changed budget: the rest is sloped anew
        run.given, run.since, run.used = given, run.progress, getattr(run, used)
    log = [row for row in _rows(folder) if row["step"] <= run.step]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    while pause_at is None or run.progress < pause_at - 1e-9:
        if stop():
            _save(folder, run)
            return 143
        if getattr(run, used) + {"time": LONGEST_STEP, "tokens": TOKENS, "steps": 1}[limit] > given:
            break
        step_seconds = spend("step")
        after = getattr(run, used) + {"time": step_seconds, "tokens": TOKENS, "steps": 1}[limit]
        share = (after - run.used) / (given - run.used)
        run.seconds += step_seconds
        run.step, run.tokens = run.step + 1, run.tokens + TOKENS
        run.progress = run.since + (1.0 - run.since) * share
        run.weight = 0.9 * run.weight + rate * (1.0 - run.progress)
        row = {"step": run.step, "seconds": run.seconds, "tokens": run.tokens, "progress": run.progress}
        row |= {"loss": loss_at(rate, run.progress) + 0.1, "learning_rate": rate, "grad_norm": run.weight}
        row |= {"tokens_per_second": TOKENS / step_seconds}
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        if rate > diverges_above and run.progress >= diverges_at:
            (folder / "events.jsonl").write_text(json.dumps({"event": "diverged", "step": run.step}) + "\n")
            return 4
        if run.step % 5 == 0:
            _save(folder, run)
    result = {"step": run.step, "tokens": run.tokens, "progress": run.progress}
    result["eval_loss"] = loss_at(rate, run.progress)
    _save(folder, run)
    if pause_at is not None and run.progress >= pause_at - 1e-9:
        run.seconds += spend("pause")
        _write(folder / "paused.json", {**result, "seconds": run.seconds, "eval_loss_before": 3.0})
        return 0
    run.seconds += spend("landing")
    (folder / "final").mkdir(exist_ok=True)
    (folder / "final" / "weight").write_text(repr(run.weight))
    summary = {"final_progress": run.progress, "eval_loss": result["eval_loss"], "steps": run.step}
    _write(folder / "summary.json", {**summary, "tokens": run.tokens, "seconds": run.seconds})
    return 0


def _limit(budget: Any) -> tuple[str, str]:
    names = {"time": "seconds", "tokens": "tokens", "steps": "step"}
    (limit,) = [name for name in names if getattr(budget, name) is not None]
    return limit, names[limit]


def _restore(folder: Path) -> FakeRun:
    folder.mkdir(parents=True, exist_ok=True)
    saved = sorted(folder.glob("checkpoint-*/trainer.json"))
    if not saved:
        return FakeRun()
    run = FakeRun(**json.loads(saved[-1].read_text())["state"])
    run.seconds = max([run.seconds, *(row["seconds"] for row in _rows(folder))])
    return run


def _rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _save(folder: Path, run: FakeRun) -> None:
    path = folder / f"checkpoint-{run.step:06d}"
    path.mkdir(exist_ok=True)
    _write(path / "trainer.json", {"state": vars(run), "clock": {"seconds": run.seconds}})


def _write(path: Path, value: Any) -> None:
    aside = path.with_name(path.name + ".new")
    aside.write_text(json.dumps(value))
    os.replace(aside, path)


@dataclass
class Simulated:
    """A Runner in this process: time is a number. noise: of every duration, a share of it."""

    noise: float = 0.0
    seed: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: {"first": 8.0, "again": 6.0, "step": 2.0, "pause": 1.0, "landing": 4.0}
    )
    outside: float = 0.5
    codes: dict[str, int] = field(default_factory=dict)
    diverges_above: float = math.inf
    diverges_at: float = 0.0
    now: float = 0.0
    tasks: list[Task] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def __call__(self, task: Task) -> Outcome:
        """Run the task to its end."""
        self.tasks.append(task)
        began = self.now
        task.folder.mkdir(parents=True, exist_ok=True)
        with open(task.folder / "log.txt", "a") as log:
            log.write(f"$ shoestring train {' '.join(task.arguments)}\nit said this\n")
        code = self.codes.get(task.name)
        if code is None:
            code = train(
                task.arguments,
                spend=self._spend,
                diverges_above=self.diverges_above,
                diverges_at=self.diverges_at,
            )
        self.now += self.outside
        return Outcome(code, self.now - began)

    def _spend(self, kind: str) -> float:
        given = self.seconds[kind] * (1.0 + self.noise * self._random.uniform(-1.0, 1.0))
        self.now += given
        return given


def sweep_of(
    job: Job, run: Any, *, now: Callable[[], float], stop: StopRequest | None = None, reduction: int = 3
) -> Sweep:
    """A sweep at work on `job`, from sweep.json where there is one."""
    state = load_state(job.output / FILE)
    if state is None:
        trials = [Trial(candidate.name, candidate.values) for candidate in job.candidates]
        state = State({}, trials, guess=GUESS if job.unit == "time" else Overheads())
    job.output.mkdir(parents=True, exist_ok=True)
    return Sweep(
        job=job,
        ladder=make_ladder(len(job.candidates), reduction),
        by="held_out_loss",
        state=state,
        run=run,
        stop=stop or StopRequest(),
        say=print,
        began=now(),
        now=now,
        before=state.seconds,
    )


def figures(amount: float) -> Figures:
    """What a plan would say of these trials in a budget of time."""
    return Figures(step=2.0, costs=GUESS, step_seconds=2.0, overheads=GUESS, eval_rows=10)


def _process() -> int:
    if sys.argv[1] == "sweep":
        source, budget, *over = sys.argv[2:]
        with stop_on_signals() as stop:
            run = trainer(stop, (sys.executable, __file__))
            return conduct(sweep_of(read_job(source, [], over, budget), run, now=time.monotonic, stop=stop))
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    signal.signal(signal.SIGINT, lambda number, _: stopped.append(number))
    pace = float(os.environ.get(SLEEP, "0"))

    def spend(kind: str) -> float:
        if kind == "step":
            time.sleep(pace)
        return 0.01

    return train(sys.argv[1:], spend=spend, stop=lambda: bool(stopped))


if __name__ == "__main__":
    try:
        sys.exit(_process())
    except ShoestringError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
