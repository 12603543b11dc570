"""`--over` and `--budget` as typed, the grid, the names of trials, and what each trial is started with."""

from __future__ import annotations

import itertools
import math
import shlex
from pathlib import Path

import pytest
import sweep_fakes
import yaml
from shoestring.recipes import load_recipe
from shoestring.recipes.errors import UserError
from shoestring.train.sweep_grid import read_axis, read_job, short, split_values


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e-4,3e-4", ["1e-4", "3e-4"]),
        ("[q_proj, v_proj],all-linear", ["[q_proj, v_proj]", "all-linear"]),
        ("{name: adamw, beta: [1, 2]}, lion", ["{name: adamw, beta: [1, 2]}", "lion"]),
        ("'a,b',\"c,d\"", ["'a,b'", '"c,d"']),
        ("one", ["one"]),
    ],
)
def test_values_are_split_outside_brackets_and_quotes(text: str, values: list[str]) -> None:
    assert split_values(text) == values


def test_log_spaced_values() -> None:
    axis = read_axis("optimizer.learning_rate=log:1e-5..1e-3:5")
    assert axis.values == ("1e-5", "3.16e-5", "1e-4", "3.16e-4", "1e-3")
    ratios = [math.log10(float(b) / float(a)) for a, b in zip(axis.values, axis.values[1:], strict=False)]
    assert ratios == pytest.approx([0.5] * 4, abs=2e-3)
    assert read_axis("adapter.lora_alpha=log:8..128:3").values == ("8", "32", "128")


@pytest.mark.parametrize(
    ("value", "text"),
    [(1e-3, "1e-3"), (3.1623e-4, "3.16e-4"), (0.0316228, "0.0316"), (99.999, "100"), (123456.0, "1.23e5")],
)
def test_short_numbers_read_back(value: float, text: str) -> None:
    assert short(value) == text
    assert float(text) == pytest.approx(value, rel=5e-3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("adapter.r", "is not KEY=VALUE"),
        ("adapter..r=8", "is not KEY=VALUE"),
        ("=8,16", "is not KEY=VALUE"),
        ("adapter.r=8,,16", "has an empty value"),
        ("adapter.r=8,16,8", "has a value twice"),
        ("budget.time=3h,4h", "--budget"),
        ("output_dir=a,b", "output_dir=DIR"),
        ("adapter.r=log:8..4:3", "0 < LOW < HIGH"),
        ("adapter.r=log:a..b:3", "log:LOW..HIGH:COUNT"),
        ("adapter.r=log:1..9:1", "COUNT from 2"),
        ("adapter.r=log:1..9", "log:LOW..HIGH:COUNT"),
    ],
)
def test_what_is_no_axis(text: str, said: str) -> None:
    with pytest.raises(UserError, match="--over") as caught:
        read_axis(text)
    assert said in str(caught.value)


def test_the_grid_and_its_names(tmp_path: Path) -> None:
    source = sweep_fakes.recipe(tmp_path)
    job = read_job(
        str(source), [], ["optimizer.learning_rate=1e-4,1e-3", "adapter.r=8,32"], budget="steps=500"
    )
    assert [candidate.name for candidate in job.candidates] == [
        "learning_rate=1e-4,r=8",
        "learning_rate=1e-4,r=32",
        "learning_rate=1e-3,r=8",
        "learning_rate=1e-3,r=32",
    ]
    third = job.candidates[2]
    recipe = load_recipe(job.source, job.trial_overrides(third.values, third.name, 77)).recipe
    assert recipe.optimizer.learning_rate == 1e-3
    assert recipe.adapter is not None
    assert recipe.adapter.r == 8
    assert recipe.budget.steps == 77
    assert recipe.output_dir == str(tmp_path / "out/sweep/learning_rate=1e-3,r=8")


def test_names_stay_apart_and_fit_a_folder(tmp_path: Path) -> None:
    source = str(sweep_fakes.recipe(tmp_path))
    same_leaf = read_job(source, [], ["optimizer.name=adamw,lion", "schedule.name=rex,linear"], "steps=500")
    assert same_leaf.candidates[1].name == "optimizer.name=adamw,schedule.name=linear"
    long = read_job(source, [], [f"data.system_prompt=a/{'b' * 90}1,a/{'b' * 90}2"], "steps=500")
    names = [candidate.name for candidate in long.candidates]
    assert names[0].startswith("system_prompt=a-bbb")
    assert names[1] == names[0] + "-2"


@pytest.mark.parametrize(
    ("given", "unit", "amount"),
    [
        ("30min", "time", 1800.0),
        ("time=90s", "time", 90.0),
        ("tokens=2M", "tokens", 2e6),
        ("steps=600", "steps", 600.0),
        (None, "steps", 1000.0),
    ],
)
def test_budgets(tmp_path: Path, given: str | None, unit: str, amount: float) -> None:
    source = str(sweep_fakes.recipe(tmp_path))
    job = read_job(source, [], ["adapter.r=8,16"], given)
    assert (job.unit, job.amount) == (unit, amount)


def test_other_limits_of_the_recipe_do_not_reach_the_trials(tmp_path: Path) -> None:
    limits = {"time": "3h", "epochs": 2, "cost": "5 USD", "price": "2 USD/h", "host_memory": "4GB"}
    source = str(sweep_fakes.recipe(tmp_path, budget=limits))
    job = read_job(source, [], ["adapter.r=8,16"], "tokens=1M")
    budget = load_recipe(source, job.trial_overrides({"adapter.r": "8"}, "r=8", 1234.9)).recipe.budget
    assert budget.tokens == 1234
    assert (budget.time, budget.epochs, budget.cost) == (None, None, None)
    assert budget.host_memory == 4e9


def test_time_keeps_its_fractions(tmp_path: Path) -> None:
    source = str(sweep_fakes.recipe(tmp_path))
    job = read_job(source, [], ["adapter.r=8,16"], "30min")
    budget = load_recipe(source, job.trial_overrides({}, "r=8", 123.4567)).recipe.budget
    assert budget.time == 123.4567
    assert budget.steps is None


def test_a_recipe_without_a_budget_needs_one(tmp_path: Path) -> None:
    source = tmp_path / "bare.yaml"
    source.write_text(yaml.safe_dump({"model": "m", "data": "d.jsonl"}))
    assert read_job(str(source), [], ["adapter.r=8,16"], "30min").amount == 1800.0
    with pytest.raises(UserError):
        read_job(str(source), [], ["adapter.r=8,16"], None)


@pytest.mark.parametrize(
    ("over", "budget", "overrides", "said"),
    [
        ([], "30min", [], "--over  is missing"),
        (["adapter.r=8"], "30min", [], "makes one trial"),
        (["adapter.r=8,16"], "30", [], "--budget"),
        (["adapter.r=8,16"], "cost=20 USD", [], "allowed: 30min, time=30min, tokens=2M or steps=600"),
        (["adapter.r=8,16"], "epochs=3", [], "allowed: 30min"),
        (["adapter.r=8,16", "adapter.r=32,64"], "30min", [], "given twice"),
        (["adapter.r=8,16"], "30min", ["adapter.r=4"], "given twice"),
        (["adapter.rank=8,16"], "30min", [], "adapter.rank"),
        (["optimizer.learning_rate=1e-3,fast"], "30min", [], "optimizer.learning_rate"),
        (["adapter.r=8,16"], None, ["budget={time: 1h, steps: 5}"], "time, steps"),
    ],
)
def test_mistakes_are_named_before_anything_runs(tmp_path: Path, over, budget, overrides, said) -> None:
    with pytest.raises(UserError) as caught:
        read_job(str(sweep_fakes.recipe(tmp_path)), overrides, over, budget)
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_commands_of_the_page_are_sound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs/sweep.md").read_text(encoding="utf-8")
    commands = [shlex.split(line) for line in page.splitlines() if line.startswith("shoestring sweep ")]
    assert len(commands) == 1
    for command in commands:
        pairs = list(itertools.pairwise(command))
        over = [value for option, value in pairs if option == "--over"]
        (budget,) = [value for option, value in pairs if option == "--budget"]
        job = read_job(command[2], [], over, budget)
        assert (len(job.candidates), job.unit, job.amount) == (6, "time", 1200.0)
        assert job.output == Path("runs/cpu-demo")
