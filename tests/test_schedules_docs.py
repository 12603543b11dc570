"""docs/schedules.md: its examples run, its table has every schedule with its mean, its recipes load."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from shoestring.recipes import load_recipe
from shoestring.recipes.schedules import ScheduleConfig
from shoestring.schedules import build_schedule

PAGE = Path(__file__).parent.parent / "docs" / "schedules.md"
TEXT = PAGE.read_text(encoding="utf-8")
KINDS = {kind.model_fields["name"].default: kind for kind in get_args(get_args(ScheduleConfig)[0])}


def blocks(language: str) -> list[str]:
    return [part.split("```")[0] for part in TEXT.split(f"```{language}\n")[1:]]


def test_the_examples_print_what_the_page_says(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    examples, names = blocks("python"), dict[str, Any]()
    assert len(examples) == 2
    for block in examples:
        exec(compile(block, str(PAGE), "exec"), names)
    printed = re.findall(r"It prints `([^`]*)`", TEXT)
    assert capsys.readouterr().out.splitlines() == printed == ["100 [0.0]", "True [0.0]"]
    assert names["clock"].seconds > 1.5
    assert (tmp_path / "scheduler.pt").is_file()


def test_the_table_has_every_schedule_with_its_mean() -> None:
    rows = [
        line.strip("| \n").split(" | ")
        for line in TEXT.splitlines()
        if re.match(r"\| `(?!name)\w+` \|", line)
    ]
    means = {row[0].strip("`"): row[2].strip(" |") for row in rows}
    assert list(means) == list(KINDS)
    n = 20_000
    for name, kind in KINDS.items():
        if name != "piecewise":
            schedule = build_schedule(kind())
            mean = sum(schedule((i + 0.5) / n) for i in range(n)) / n
            assert float(means[name]) == pytest.approx(mean, abs=5.1e-4), name


def test_the_recipes_load(tmp_path: Path) -> None:
    recipes = blocks("yaml")
    assert len(recipes) == 2
    points = [[1.0, 1.0, 0.01], [0.0, 0.05, 0.0]]
    for block, values in zip(recipes, points, strict=True):
        path = tmp_path / "recipe.yaml"
        path.write_text("model: m\ndata: d.jsonl\nbudget: 2h\n" + block, encoding="utf-8")
        schedule = build_schedule(load_recipe(path, env={}).recipe.schedule)
        assert [schedule(x) for x in (0.0, 0.5, 1.0)] == pytest.approx(values, abs=1e-12)
