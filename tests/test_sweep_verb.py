"""`shoestring sweep` as typed: what it says, --fresh, refusals, the page; and with a real model."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import forked
import forked_children
import psutil
import pytest
import shoestring.train.sweep as sweep_module
import sweep_fakes
import tiny
import torch
from shoestring.recipes import load_recipe
from shoestring.recipes.errors import BudgetError, UserError
from shoestring.train.cli import app
from shoestring.train.report_data import read_run
from shoestring.train.run import train_recipe
from shoestring.train.signals import StopRequest
from shoestring.train.sweep_chart import COLORS, Curve, colored, rung_chart
from shoestring.train.sweep_costs import Figures
from shoestring.train.sweep_grid import read_job
from shoestring.train.sweep_plan import Overheads
from shoestring.train.sweep_process import Outcome, Task
from shoestring.train.sweep_rungs import conduct
from shoestring.train.sweep_state import check_settings, load_state
from sweep_fakes import Simulated
from typer.testing import CliRunner

OVER = "optimizer.learning_rate=1e-4,1e-3,1e-2"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe whose trials are simulated and whose plan is known."""
    monkeypatch.setattr(sweep_module, "trainer", lambda stop: Simulated())
    monkeypatch.setattr(sweep_module, "planner", lambda job: lambda amount: figures())
    return str(sweep_fakes.recipe(tmp_path))


def figures(eval_rows: int = 10) -> Figures:
    return Figures(1.0, Overheads(), 0.5, Overheads(8.0, 6.0, 1.0, 4.0), eval_rows)


def says(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["sweep", *arguments], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return re.sub(r"\s+", " ", re.sub(r"\x1b\[[0-9;]*m", "", done.output))


def test_a_sweep_says_what_it_will_do_and_what_came_of_it(source: str, tmp_path: Path) -> None:
    said = says(source, "--over", OVER, "--budget", "steps=300")
    assert "3 trials in 300 steps" in said
    assert "3 0 % 33 % 60 180 steps, 60%" in said
    assert "a whole trial trains 180 steps" in said
    assert "learning_rate=1e-4 to 33 % held-out loss 1.46" in said
    assert "at 33 % of a trial's budget 1 of 3 go on: learning_rate=1e-3" in said
    assert re.search(r"learning_rate=1e-3 1\.26\d* 1\.018 landed 60 %", said)
    assert re.search(r"learning_rate=1e-2 1\.46\d* – at 33 % 20 %", said)
    assert str(tmp_path / "out/best.yaml") in said
    assert load_recipe(tmp_path / "out/best.yaml").recipe.optimizer.learning_rate == 1e-3


def test_a_dry_run_writes_nothing(source: str, tmp_path: Path) -> None:
    said = says(source, "--over", OVER, "--budget", "steps=300", "--dry-run")
    assert "trials: learning_rate=1e-4, learning_rate=1e-3, learning_rate=1e-2" in said
    assert "takes about" in said
    assert not (tmp_path / "out").exists()


def test_a_finished_sweep_is_shown_and_a_changed_one_refused(source: str, tmp_path: Path) -> None:
    says(source, "--over", OVER)
    before = (tmp_path / "out/sweep.json").read_bytes()
    again = says(source, "--over", OVER)
    assert "holds a finished sweep" in again
    assert "landed" in again
    for change, named in (
        (["--over", OVER + ",1e-1"], "--over: was optimizer.learning_rate=1e-4,1e-3,1e-2, now"),
        (["--over", OVER, "--budget", "steps=999"], "--budget: was steps=1000, now steps=999"),
        (["--over", OVER, "--reduction", "2"], "--reduction: was 3, now 2"),
        (["--over", OVER, "train.seed=7"], "train.seed: was 42, now 7"),
    ):
        with pytest.raises(UserError) as caught:
            says(source, *change)
        assert named in str(caught.value)
        assert "--fresh" in str(caught.value)
    assert (tmp_path / "out/sweep.json").read_bytes() == before


def test_fresh_deletes_the_old_sweep_and_nothing_else(source: str, tmp_path: Path) -> None:
    says(source, "--over", OVER)
    mine = tmp_path / "out/sweep/learning_rate=1e-4/notes.txt"
    mine.write_text("mine")
    says(source, "--over", "adapter.r=8,16", "--fresh")
    assert mine.read_text() == "mine"
    assert sorted(path.name for path in (tmp_path / "out/sweep").iterdir()) == [
        "learning_rate=1e-4",
        "r=16",
        "r=8",
    ]
    assert [path.name for path in mine.parent.iterdir()] == ["notes.txt"]


def test_refusals(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BudgetError, match=r"too little for 3 trials.*10 are the least") as caught:
        says(source, "--over", OVER, "--budget", "steps=40")
    assert "--budget steps=" in str(caught.value)
    with pytest.raises(UserError, match="allowed: held_out_loss, early_signals"):
        says(source, "--over", OVER, "--by", "loss")
    with pytest.raises(UserError, match=r"train\.batch_tokens is swept over"):
        says(source, "--over", "train.batch_tokens=256,512", "--by", "early_signals")
    with pytest.raises(UserError, match="allowed: auto"):
        says(source, "--over", OVER, "--rungs", "some")
    with pytest.raises(UserError, match="allowed: 1 to 1, or auto"):
        says(source, "--over", OVER, "--rungs", "2")
    monkeypatch.setattr(sweep_module, "planner", lambda job: lambda amount: figures(eval_rows=0))
    with pytest.raises(UserError, match=r"data\.eval=0\.05"):
        says(source, "--over", OVER)
    run = tmp_path / "out"
    (run / "resolved.yaml").write_text("")
    with pytest.raises(UserError, match=r"output_dir=.*out-sweep"):
        says(source, "--over", OVER)


def test_a_plan_that_does_not_fit_the_memory_is_another_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = read_job(str(sweep_fakes.recipe(tmp_path)), [], ["adapter.r=64,8,16"], "steps=300")
    asked: list[str] = []
    plan = {"reserve_guess": dict.fromkeys(("eval", "samples", "save", "report"), 1.0), "eval_rows": 3}
    plan |= {"timeline": {"load": 2.0}, "step_seconds": 0.5, "batch_tokens": 512}

    def make_plan(arguments: list[str]) -> tuple[dict[str, Any], float]:
        asked.append(arguments[1])
        if arguments[1] == "adapter.r=64":
            raise BudgetError("does not fit  needs 9 GB of 8 GB GPU memory")
        return plan, 5.0

    monkeypatch.setattr(sweep_module, "make_plan", make_plan)
    planner = sweep_module.planner(job)
    assert planner(100.0).overheads == planner(200.0).overheads == Overheads(10.0, 8.0, 2.0, 4.0)
    assert asked == ["adapter.r=64", "adapter.r=8", "adapter.r=8"]
    alone = sweep_module.planner(replace(job, candidates=job.candidates[:1]))
    with pytest.raises(BudgetError, match="needs 9 GB"):
        alone(100.0)


def test_a_state_that_cannot_be_read(tmp_path: Path) -> None:
    assert load_state(tmp_path / "sweep.json") is None
    for text in ("{", "[]", '{"format": 99}', '{"format": 1}'):
        (tmp_path / "sweep.json").write_text(text)
        with pytest.raises(UserError, match="--fresh"):
            load_state(tmp_path / "sweep.json")


def test_equal_settings_are_equal_through_json() -> None:
    settings = {"--over": ["a=1,2"], "recipe": {"x": {"y": 1.5, "z": ["q"]}, "empty": {}}}
    check_settings(json.loads(json.dumps(settings)), settings, output=Path("out"))


# The page


def test_the_page_is_one_offline_file_with_all_trials(source: str, tmp_path: Path) -> None:
    says(source, "--over", OVER)
    page = (tmp_path / "out/sweep.html").read_text()
    assert "{{" not in page
    assert "default-src 'none'" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert page.count("<polyline") == 3
    dots = re.findall(r"<path [^>]*d=\"([^\"]*)\"", page)
    assert sorted(path.count("M") for path in dots) == [1, 1, 2]
    assert re.search(r'class="figure best">1\.018<', page)
    assert "best: learning_rate=1e-3" in page


def curve(name: str, held_out: list[tuple[float, float]], won: bool = False, failed: bool = False) -> Curve:
    training = [(k / 10, 3.0 - k / 10) for k in range(1, 11)]
    return Curve(name, 0.5, won, failed, training, held_out)


def test_the_axis_shows_the_middle_and_keeps_dots_inside() -> None:
    curves = [curve("bad", [(0.33, 900.0)]), curve("good", [(0.33, 2.5), (1.0, 2.0)], won=True)]
    drawn = rung_chart(curves, (0.33,))
    heights = [int(y) for y in re.findall(r"M\d+ (-?\d+)h0", drawn)]
    assert heights[0] == 0
    assert all(0 < y < 10_000 for y in heights[1:])
    assert "<b>good</b>" in drawn
    assert rung_chart([], (0.33,)) == ""
    assert rung_chart([Curve("none", 0.0, False, False, [], [])], (0.33,)) == ""


def test_colors_run_through_the_list() -> None:
    assert colored(0.0) == "--c:hsl(250 70% 60%)"
    assert colored(1.0) == "--c:hsl(305 55% 55%)"
    assert colored(0.5) == "--c:hsl(85 65% 38%)"
    hues = [int(colored(k / 200).split("(")[1].split(" ")[0]) for k in range(201)]
    steps = [(a - b) % 360 for a, b in itertools.pairwise(hues)]
    assert max(steps) < 6, "the hue falls without a jump, through 0 too"
    assert len({colored(k / (len(COLORS) - 1)) for k in range(len(COLORS))}) == len(COLORS)


# With a real model


class InProcess:
    """Trials of a real model in this process: the trainer's own function instead of its command line."""

    def __call__(self, task: Task) -> Outcome:
        began, words, pause = time.monotonic(), task.arguments, None
        if "--pause-at" in words:
            words, pause = words[:-2], float(words[-1])
        code = train_recipe(words[0], words[1:], fresh=False, started=began, pause_at=pause)
        return Outcome(code, time.monotonic() - began)


def command(source: Path) -> list[str]:
    arguments = ["--over", "optimizer.learning_rate=1e-3,1e-2", "--budget", "steps=90", "--reduction", "2"]
    return [sys.executable, "-c", forked_children.COMMAND, "sweep", str(source), *arguments]


def losses(output: Path) -> dict[str, list[tuple[int, float, float]]]:
    found: dict[str, Any] = {}
    for path in sorted(output.glob("sweep/*/metrics.jsonl")):
        rows = map(json.loads, path.read_text().splitlines())
        found[path.parent.name] = [(row["step"], row["loss"], row["learning_rate"]) for row in rows]
    return found


@pytest.mark.slow
def test_killed_with_a_real_model_it_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    recipe = tiny.recipe(whole)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    job = read_job(str(recipe), [], ["optimizer.learning_rate=1e-3,1e-2"], "steps=90")
    sweep = sweep_fakes.sweep_of(job, InProcess(), now=time.monotonic, stop=StopRequest(), reduction=2)
    assert conduct(sweep) == 0
    torch.set_num_threads(threads)

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    typed = [*command(recipe), f"output_dir={broken}"]
    process = forked.Popen(typed, env=environment)
    second = broken / "sweep/learning_rate=1e-2/metrics.jsonl"
    end = time.monotonic() + 120
    while not second.exists() or second.read_text().count("\n") < 6:
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < end
        time.sleep(0.01)
    children = psutil.Process(process.pid).children()
    process.kill()
    for child in children:
        child.send_signal(signal.SIGKILL)
    assert process.wait(30) == -9
    done = forked.run(typed, env=environment, check=True)
    assert "learning_rate=1e-2 went to its end" in done.stdout

    both = (whole / "run", broken)
    states = [load_state(output / "sweep.json") for output in both]
    assert states[0] is not None
    assert states[1] is not None
    assert states[0].winner == states[1].winner == "learning_rate=1e-2"
    assert losses(broken) == losses(whole / "run")
    name = Path("sweep/learning_rate=1e-2")
    summaries = [json.loads((output / name / "summary.json").read_text()) for output in both]
    assert summaries[0]["eval_loss"] == summaries[1]["eval_loss"]
    assert sum(trial.spent for trial in states[1].trials) == 90
    assert (broken / "final/config.json").is_file()
    assert read_run(broken / name).finished
    assert not list((broken / "sweep/learning_rate=1e-3").glob("checkpoint-*"))
