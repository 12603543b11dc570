"""Landing: real runs, quiet and disturbed, against their budgets of time and money.

A run lands when it ends at most max(1 %, 1 s) over its budget, leaves at most one step and 3 % of it unused,
and its last step has at most 2 % of the peak rate.

    python benchmarks/landing.py                  # about 30 minutes on 2 otherwise idle cores
    python benchmarks/landing.py --quick          # three rows
    python benchmarks/landing.py --only "stopped" # rows whose name has the word

Results are appended to runs/bench/landing.jsonl as they come; rows that are in it are not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import tiny

RUNS = Path("runs/bench")
RESULTS = RUNS / "landing.jsonl"
OUTPUT = RUNS / "landing.out"
DEMO = "cpu-demo"
TINY = RUNS / "landing-tiny" / "recipe.yaml"
DELAY = 15.0
"""Seconds that the first step takes longer where that is the disturbance."""

DELAYED_STEP = f"""
import time
from shoestring.train.engine import NativeEngine
forward_backward, first = NativeEngine.forward_backward, [True]
def delayed(self, *args, **kwargs):
    if first:
        time.sleep({DELAY})
        first.clear()
    return forward_backward(self, *args, **kwargs)
NativeEngine.forward_backward = delayed
"""

Disturb = Callable[["Started"], None]


@dataclass
class Started:
    """A run that goes on: its process and its directory."""

    process: subprocess.Popen[bytes]
    run: Path
    command: list[str]
    environment: dict[str, str]

    def wait_until(self, share: float) -> None:
        """Until progress is at `share`, or the process has ended."""
        metrics = self.run / "metrics.jsonl"
        while self.process.poll() is None:
            lines = metrics.read_text().splitlines() if metrics.exists() else []
            if lines and lines[-1].endswith("}") and json.loads(lines[-1])["progress"] >= share:
                return
            time.sleep(0.05)

    def again(self) -> None:
        """The same command once more, after the process was killed."""
        self.process.wait()
        self.process = start(self.command, self.environment)


@dataclass(frozen=True)
class Row:
    """One run. budget: seconds that hold at the end; given: what the command says where that is not it."""

    name: str
    kind: str
    budget: float
    recipe: str | Path = DEMO
    overrides: tuple[str, ...] = ()
    given: str | None = None
    arguments: tuple[str, ...] = ()
    disturb: Disturb | None = None
    delayed: bool = False


def burn(started: Started) -> None:
    """From the middle on a niced program on each core takes a quarter of it."""
    started.wait_until(0.5)
    code = "import os\nos.nice(5)\nwhile True: pass"
    burners = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(os.cpu_count() or 1)]
    started.process.wait()
    for burner in burners:
        burner.kill()
        burner.wait()


def stop_for_20_seconds(started: Started) -> None:
    """The process is suspended and goes on."""
    started.wait_until(0.4)
    if started.process.poll() is None:
        started.process.send_signal(signal.SIGSTOP)
        time.sleep(20.0)
        started.process.send_signal(signal.SIGCONT)


def kill_and_resume(started: Started) -> None:
    """kill -9 in the middle, and the same command again."""
    started.wait_until(0.5)
    started.process.kill()
    started.again()


def slow_second_process(started: Started) -> None:
    """The process of rank 1 stands half of the time."""
    started.wait_until(0.1)
    children = psutil.Process(started.process.pid).children()
    (second,) = [child for child in children if child.environ().get("RANK") == "1"]
    try:
        while started.process.poll() is None:
            second.send_signal(signal.SIGSTOP)
            time.sleep(0.05)
            second.send_signal(signal.SIGCONT)
            time.sleep(0.05)
    except psutil.NoSuchProcess:
        pass  # it has ended


def give(text: str, share: float) -> Disturb:
    """Another budget while it runs."""

    def change(started: Started) -> None:
        started.wait_until(share)
        if started.process.poll() is None:
            (started.run / "budget.yaml").write_text(text)

    return change


def rows() -> list[Row]:
    """The table: SmolLM2-135M in steps of seconds, and a tiny model in steps of milliseconds."""

    def quiet(seconds: int, seed: int) -> Row:
        return Row(f"quiet {seconds} s, seed {seed}", "quiet", seconds, overrides=(f"train.seed={seed}",))

    wsd = ("schedule.name=wsd",)
    heavy = ("eval.every=10%", "checkpoint.every=10s")
    return [
        *(quiet(seconds, seed) for seconds, seed in ((60, 42), (60, 43), (120, 42), (180, 42))),
        Row("wsd", "profile", 60, overrides=wsd),
        Row("slow half way", "other programs", 90, disturb=burn),
        Row("stopped 20 s", "SIGSTOP", 100, disturb=stop_for_20_seconds),
        Row("killed and resumed", "kill -9", 120, DEMO, ("checkpoint.every=15s",), disturb=kill_and_resume),
        Row("heavy evaluations", "evaluations", 90, overrides=heavy),
        Row("cut to 80 s", "budget.yaml", 80, given="240s", disturb=give("80s\n", 0.1)),
        Row("raised to 100 s", "budget.yaml", 100, given="70s", disturb=give("time: 100s\n", 0.5)),
        Row("money", "money", 60, given="{cost: 0.06 USD, price: 3.6 USD/h}"),
        Row("tiny 25 s", "many steps", 25, TINY),
        Row("tiny 30 s", "many steps", 30, TINY),
        Row("tiny 45 s", "many steps", 45, TINY),
        Row("tiny wsd", "profile", 30, TINY, wsd),
        Row("tiny linear", "profile", 30, TINY, ("schedule.name=linear",)),
        Row("tiny evaluations", "evaluations", 30, TINY, ("eval.every=2%", "checkpoint.every=1s")),
        Row("tiny stopped 20 s", "SIGSTOP", 50, TINY, disturb=stop_for_20_seconds),
        Row("tiny slow half way", "other programs", 40, TINY, disturb=burn),
        Row("tiny killed and resumed", "kill -9", 60, TINY, ("checkpoint.every=2s",),
            disturb=kill_and_resume),
        Row("tiny delayed first step", "first step", 50, TINY, delayed=True),
        Row("tiny price doubles", "money", 42, TINY, (), "{cost: 0.036 USD, price: 1.8 USD/h}",
            disturb=give("price: 3.6 USD/h\n", 0.0)),
        Row("two processes", "processes", 40, TINY, arguments=("--num-processes", "2")),
        Row("two, one slowed", "processes", 40, TINY, arguments=("--num-processes", "2"),
            disturb=slow_second_process),
    ]  # fmt: skip


def start(command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """The command; what it says goes into a file."""
    with OUTPUT.open("w") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output)


def carry_out(row: Row) -> dict[str, Any]:
    """Run it and read what came of it."""
    run = RUNS / f"landing-{row.name.replace(' ', '-').replace(',', '')}"
    environment = dict(os.environ)
    if row.delayed:
        folder = RUNS / "landing-delay"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "sitecustomize.py").write_text(DELAYED_STEP)
        environment["PYTHONPATH"] = str(folder.resolve())
    base = [sys.executable, "-m", "shoestring.train", str(row.recipe), *row.overrides]
    base += [f"budget={row.given or f'{row.budget:g}s'}", f"output_dir={run}", *row.arguments]
    subprocess.run(["rm", "-rf", str(run)], check=True)  # not --fresh: the same command resumes
    began = time.monotonic()
    started = Started(start(base, environment), run, base, environment)
    if row.disturb is not None:
        row.disturb(started)
    code = started.process.wait()
    return {"name": row.name, "kind": row.kind, "code": code, "wall": time.monotonic() - began} | (
        measure(run, row) if code == 0 else {"lands": False, "said": OUTPUT.read_text()[-500:]}
    )


def measure(run: Path, row: Row) -> dict[str, Any]:
    """Against the limit that ended it: seconds, or money at the price of the end."""
    summary = json.loads((run / "summary.json").read_text())
    peak = json.loads((run / "plan.json").read_text())["learning_rate"]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    progress = [line["progress"] for line in metrics]
    gaps = [b["seconds"] - a["seconds"] for a, b in itertools.pairwise(metrics)]
    step = statistics.median(gaps) if gaps else 0.0
    amounts = summary["budget"][summary["stop_reason"]]
    over = (amounts["used"] - amounts["given"]) / amounts["given"]
    last = summary["final_learning_rate"] / peak
    budget = row.budget
    lands = (
        summary["stop_reason"] in ("time", "cost")
        and over * budget <= max(0.01 * budget, 1.0)
        and -over * budget <= step + 0.03 * budget
        and last <= 0.02
        and progress == sorted(progress)
    )
    return {
        "budget": budget,
        "seconds": summary["seconds"],
        "over": over,
        "progress": summary["final_progress"],
        "last": last,
        "steps": summary["steps"],
        "step_seconds": step,
        "eval_loss_before": summary["eval_loss_before"],
        "eval_loss": summary["eval_loss"],
        "lands": lands,
    }


def line(result: dict[str, Any]) -> str:
    """One row of the table."""
    head = f"| {result['kind']} | {result['name']} |"
    if result["code"]:
        return f"{head} | | | | | | exit code {result['code']} |"
    used = "over" if result["over"] > 0 else "unused"
    return (
        f"{head} {result['budget']:g} s | {result['seconds']:.1f} s | {abs(result['over']):.1%} {used} | "
        f"{result['steps']:,} | {result['progress']:.3f} | {result['last']:.2%} | "
        f"{'lands' if result['lands'] else 'MISSED'} |"
    )


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three rows")
    parser.add_argument("--only", help="rows whose name has this in it")
    options = parser.parse_args()
    RUNS.mkdir(parents=True, exist_ok=True)
    TINY.parent.mkdir(exist_ok=True)
    tiny.recipe(TINY.parent.resolve(), checkpoint={"every": "5s"})
    quick = ("tiny 30 s", "tiny slow half way", "stopped 20 s")
    done = {}
    if RESULTS.exists():
        done = {found["name"]: found for found in map(json.loads, RESULTS.read_text().splitlines())}
    print("| disturbance | run | budget | seconds | | steps | progress | last rate | |\n|" + "---|" * 9)
    missed = 0
    for row in rows():
        if (options.quick and row.name not in quick) or (options.only and options.only not in row.name):
            continue
        result = done.get(row.name)
        if result is None:
            result = carry_out(row)
            with RESULTS.open("a") as file:
                file.write(json.dumps(result) + "\n")
        missed += not result["lands"]
        print(line(result), flush=True)
    print(f"\n{missed} missed" if missed else "\nall land")


if __name__ == "__main__":
    main()
