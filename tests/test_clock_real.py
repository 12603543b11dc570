"""Landing of real processes: slowed half way, stopped, with the time of day set, two at once, a budget cut.

Start-up takes much of these budgets, and the machine that runs tests is busy: bounds are in seconds.
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
from forked import CONTEXT

pytestmark = pytest.mark.slow
together = pytest.mark.xdist_group("side by side")


BUDGET = 36.0  # of which three runs on two cores leave some tenths of a second: less than a hundredth
OVER = 1.5
UNUSED = 6.0

# Read by every Python process of a run: logs what the clock of each rank does.
SITE = """
import json, os
if "RANK" in os.environ:
    from shoestring.schedules.clock import Clock
    log = open(os.path.join(os.environ["RANK_LOGS"], f"rank-{os.environ['RANK']}.jsonl"), "a", 1)
    finish = Clock.finish_step
    def finish_step(self, *args, **kwargs):
        finish(self, *args, **kwargs)
        log.write(json.dumps([self.steps, self.progress]) + "\\n")
    Clock.finish_step = finish_step
"""


@dataclass
class Process:
    """A run in a process of its own."""

    folder: Path
    process: Any

    @property
    def run(self):
        return self.folder / "run"

    def alive(self):
        if isinstance(self.process, subprocess.Popen):
            return self.process.poll() is None
        return self.process.is_alive()

    def signal(self, number):
        os.kill(self.process.pid, number)

    def metrics(self):
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def summary(self):
        return json.loads((self.run / "summary.json").read_text())

    def wait_until(self, reached):
        """Until a line of metrics satisfies `reached`."""
        deadline = time.monotonic() + 120.0
        while time.monotonic() < deadline and self.alive():
            lines = self.metrics()
            if lines and reached(lines[-1]):
                return
            time.sleep(0.05)
        raise AssertionError(self.output())

    def output(self):
        return (self.folder / "output").read_text()[-2000:]

    def finish(self):
        if isinstance(self.process, subprocess.Popen):
            code = self.process.wait(120)
        else:
            self.process.join(120)
            code = self.process.exitcode
        assert code == 0, self.output()

    def end(self):
        if self.alive():
            self.process.kill()


def recipe_in(folder, budget):
    folder.mkdir()
    return tiny.recipe(
        folder,
        budget={"time": f"{budget:g}s"},
        checkpoint={"every": "4s", "keep_best": False},
        eval={"samples": 1, "max_new_tokens": 4, "every": "20%"},
    )


def train(recipe, output, time_of_day):
    """In a process of the server."""
    import torch
    from shoestring.train.run import train_recipe

    torch.set_num_threads(1)
    with open(output, "w", buffering=1) as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        began, real = time.monotonic(), time.time
        if time_of_day:
            shifts = [(4.0, 0.0), (8.0, 3600.0), (float("inf"), -86_400.0)]

            def shifted():
                passed = time.monotonic() - began
                return real() + next(shift for until, shift in shifts if passed < until)

            time.time = shifted
        sys.exit(train_recipe(str(recipe), [], fresh=False, started=began))


def start(folder, budget=BUDGET, time_of_day=False):
    recipe = recipe_in(folder, budget)
    process = CONTEXT.Process(target=train, args=(recipe, folder / "output", time_of_day))
    process.start()
    return Process(folder, process)


def duty_cycle(process, running, stopped, while_true):
    """Let a process run and stand in turns."""
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        while while_true():
            process.send_signal(signal.SIGSTOP)
            time.sleep(stopped)
            process.send_signal(signal.SIGCONT)
            time.sleep(running)


def landed(process, budget=BUDGET):
    """The run ended inside its budget, annealed, and its progress only ever rose."""
    process.finish()
    summary = process.summary()
    assert summary["stop_reason"] == "time"
    assert summary["budget"]["time"]["given"] == budget
    assert -OVER <= budget - summary["seconds"] <= UNUSED
    assert summary["final_progress"] >= 0.99
    peak = json.loads((process.run / "plan.json").read_text())["learning_rate"]
    assert summary["final_learning_rate"] <= 0.02 * peak
    progress = [line["progress"] for line in process.metrics()]
    assert progress == sorted(progress)
    rises = [b - a for a, b in itertools.pairwise(progress[:-2])]
    assert max(rises) <= 0.1
    return summary


@pytest.fixture(scope="module")
def side_by_side(tmp_path_factory):
    """Three runs at once, each disturbed in its own way."""
    folder = tmp_path_factory.mktemp("runs")
    slowed = start(folder / "slowed")
    stopped = start(folder / "stopped", time_of_day=True)
    cut = start(folder / "cut", budget=600.0)
    processes = [slowed, stopped, cut]
    try:
        cut.wait_until(lambda line: line["step"] >= 10)
        (cut.run / "budget.yaml").write_text(f"time: {BUDGET:g}s\n")
        stopped.wait_until(lambda line: line["progress"] >= 0.2)
        stopped.signal(signal.SIGSTOP)
        time.sleep(4.0)
        stopped.signal(signal.SIGCONT)
        slowed.wait_until(lambda line: line["progress"] >= 0.5)
        duty_cycle(psutil.Process(slowed.process.pid), 0.1, 0.03, slowed.alive)
        yield {"slowed": slowed, "stopped": stopped, "cut": cut}
    finally:
        for process in processes:
            process.end()


@together
def test_a_slowdown_by_a_third_half_way(side_by_side):
    landed(side_by_side["slowed"])


@together
def test_a_stopped_process_whose_time_of_day_is_set_twice(side_by_side):
    process = side_by_side["stopped"]
    landed(process)
    seconds = [line["seconds"] for line in process.metrics()]
    gaps = [b - a for a, b in itertools.pairwise(seconds)]
    assert max(gaps) >= 3.5  # the seconds in which it stood are counted
    assert max(gaps) <= 15.0  # an hour of the time of day is not


@together
def test_a_budget_that_is_cut_while_it_runs(side_by_side):
    process = side_by_side["cut"]
    landed(process)
    events = [json.loads(line) for line in (process.run / "events.jsonl").read_text().splitlines()]
    (changed,) = [event for event in events if event["event"] == "budget"]
    assert changed["text"].startswith(f"budget: time 600 s -> {BUDGET:g} s; progress goes on from ")


def test_all_ranks_see_one_progress_when_one_is_slower(tmp_path):
    budget, folder = 36.0, tmp_path / "two"
    recipe = recipe_in(folder, budget)
    (folder / "sitecustomize.py").write_text(SITE)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RANK_LOGS": str(folder), "PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "shoestring.train", str(recipe), "--num-processes", "2"]
    with (folder / "output").open("w") as output:
        process = Process(folder, subprocess.Popen(command, env=environment, stdout=output, stderr=output))
    try:
        process.wait_until(lambda line: line["step"] >= 5)
        children = psutil.Process(process.process.pid).children()
        (second,) = [child for child in children if child.environ().get("RANK") == "1"]
        duty_cycle(second, 0.05, 0.05, process.alive)
        landed(process, budget)
    finally:
        if process.alive():
            process.signal(signal.SIGTERM)
            process.process.wait(60)
    logs = [(folder / f"rank-{rank}.jsonl").read_text() for rank in range(2)]
    assert logs[0] == logs[1]
    assert len(logs[0].splitlines()) == process.summary()["steps"]
