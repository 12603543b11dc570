"""RUN/budget.yaml and the verb `budget`: what a running run takes over, and what a person reads."""

import fcntl
import json
import os

import pytest
from shoestring.recipes import UserError
from shoestring.recipes.running import BudgetConfig
from shoestring.schedules import Limits
from shoestring.train import cli
from shoestring.train.budget_file import BudgetFile
from typer.testing import CliRunner

GIVEN = BudgetConfig.model_validate({"time": "3h", "price": "2.49 USD/h"})


def watched(tmp_path):
    return BudgetFile(tmp_path / "budget.yaml", GIVEN)


def limits(budget):
    return Limits.from_recipe(budget)


# The file


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("40min\n", Limits(seconds=2400.0, price_per_hour=2.49)),
        ("time: 40min\n", Limits(seconds=2400.0, price_per_hour=2.49)),
        ("# cheaper now\nprice: 1.10 USD/h\n", Limits(seconds=10_800.0, price_per_hour=1.1)),
        ("cost: 5 USD\nsteps: 300\n", Limits(seconds=10_800.0, cost=5.0, steps=300, price_per_hour=2.49)),
        ("time: null\ntokens: 2M\n", Limits(tokens=2_000_000, price_per_hour=2.49)),
        ("epochs: 2\nenergy: 1 Wh\n", Limits(10_800.0, None, 2.49, 3600.0, None, None, 2.0)),
    ],
)
def test_keys_of_the_file_replace_those_of_the_recipe(tmp_path, text, expected):
    file = watched(tmp_path)
    assert file.poll() is None
    file.path.write_text(text)
    assert limits(file.poll()) == expected
    assert file.poll() is None
    assert file.take_warning() is None


def test_only_a_file_that_changed_is_read_again(tmp_path, monkeypatch):
    file = watched(tmp_path)
    file.path.write_text("40min\n")
    assert file.poll() is not None
    read = []
    monkeypatch.setattr("shoestring.train.budget_file.read_text", lambda *_: read.append(1))
    for _ in range(100):
        assert file.poll() is None
    assert read == []


def test_a_file_that_is_deleted_gives_the_recipe_back(tmp_path):
    file = watched(tmp_path)
    file.path.write_text("40min\n")
    file.poll()
    file.path.unlink()
    assert file.poll() == GIVEN
    assert file.poll() is None


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("time: 40\n", ":1  budget.time: 40 is not a duration such as 90s, 5min, 1h30m, 3h or 2d.   Did you"),
        ("# x\ntimes: 40min\n", ":2  budget.times is not a key.   Did you mean budget.time ?"),
        (
            "- 40min\n",
            "  is [40min]; allowed: a duration such as 40min, or some of time, cost, energy, tokens",
        ),
        ("", "  is empty; allowed: a duration such as 40min, or some of time"),
        ("time: [\n", "is not YAML"),
        ("cost: 5 EUR\n", ":1  budget.cost=5 EUR and budget.price=2.49 USD/h are in different currencies"),
        ("time: null\n", "budget has no limit; give at least one of time"),
        ("host_memory: 4GB\n", ":1  host_memory cannot change while a run goes on; allowed: time, cost"),
    ],
)
def test_what_is_no_budget_changes_nothing_and_is_told_once(tmp_path, text, sentence):
    file = watched(tmp_path)
    file.path.write_text(text)
    assert file.poll() is None
    warning = file.take_warning()
    assert str(file.path) in warning
    assert sentence in warning
    assert warning.splitlines()[-1] == "The budget stays as it was"
    assert file.take_warning() is None
    assert file.poll() is None
    file.path.write_text("time: 40min  # mended\n")
    assert limits(file.poll()).seconds == 2400.0


# The verb


def budget(folder, *words):
    """(exit code, what is said) of `shoestring budget FOLDER WORDS`."""
    found = CliRunner().invoke(cli.app, ["budget", str(folder), *words], env={"COLUMNS": "200"})
    if isinstance(found.exception, UserError):
        return found.exception.exit_code, str(found.exception)
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found.exit_code, found.output


@pytest.fixture
def stopped(tmp_path):
    """A run of 3 h with a price, stopped after 900 s and 120 steps."""
    (tmp_path / "resolved.yaml").write_text(
        "model: x\nbudget:\n  time: 3h  # recipe.yaml:3\n  price: 2.4 USD/h\n"
    )
    record = {"step": 120, "seconds": 900.0, "tokens": 60_000, "progress": 0.25, "cost": 0.6}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    return tmp_path


@pytest.fixture
def running(stopped):
    """The same run, with the lock of a process that trains."""
    descriptor = os.open(stopped / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield stopped
    os.close(descriptor)


def rows(text):
    """The words of each line of the table, without the bar."""
    return [
        [cell.strip() for cell in line.split("  ") if cell.strip() and "━" not in cell]
        for line in text.splitlines()
    ]


def test_it_shows_what_is_given_used_and_left(stopped):
    code, text = budget(stopped)
    assert code == 0
    assert "stopped, step 120, 25% of the schedule" in text
    table = rows(text)
    assert ["time", "3 h 00 min", "15 min 00 s", "2 h 45 min"] in table
    assert ["cost", "–", "0.6 USD", "–"] in table
    assert ["tokens", "–", "60.0 k", "–"] in table
    assert ["price", "2.4 USD/h"] in table
    assert text.count("━") == 2  # of 24, for 8 %


def test_it_shows_the_budget_of_the_file(running):
    (running / "budget.yaml").write_text("time: 30min\n")
    code, text = budget(running)
    assert code == 0
    assert "running, step 120" in text
    assert ["time", "30 min 00 s", "15 min 00 s", "15 min 00 s"] in rows(text)


def test_a_new_budget_is_written_for_the_run_to_find(running):
    code, text = budget(running, "40min", "price=1.10 USD/h")
    assert code == 0
    assert text.splitlines() == [
        f"wrote {running / 'budget.yaml'}: time 10800 s -> 2400 s, price 2.4 an hour -> 1.1 an hour",
        "The run takes it over at its next step: its rate goes on from 25% of the schedule and lands at the "
        "new end",
    ]
    file = BudgetFile(running / "budget.yaml", GIVEN)
    assert limits(file.poll()) == Limits(seconds=2400.0, price_per_hour=1.1)
    assert budget(running, "cost=5 USD")[0] == 0
    assert limits(file.poll()) == Limits(seconds=2400.0, cost=5.0, price_per_hour=1.1)
    assert [path.name for path in running.glob("*.tmp*")] == []


def test_less_than_is_used_lands_a_running_run_and_is_refused_for_a_stopped_one(running):
    code, text = budget(running, "10min")
    assert code == 0
    assert text.splitlines()[1] == "time: more than that is used already, so the run lands at its next step"


def test_less_than_is_used_is_refused_for_a_stopped_run(stopped):
    code, text = budget(stopped, "10min")
    assert code == 2
    assert "has used more than that (time 15 min 00 s), and it has stopped" in text
    assert not (stopped / "budget.yaml").exists()


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("40", "budget.time: 40 is not a duration such as 90s, 5min, 1h30m, 3h or 2d.   Did you mean 40s ?"),
        ("soon", "budget.time: 'soon' is not a duration"),
        ("tme=3h", "budget.tme is not a key.   Did you mean budget.time ?"),
        ("cost=5 EUR", "budget.cost=5 EUR and budget.price=2.4 USD/h are in different currencies"),
        ("disk=5GB", "disk cannot change while a run goes on; allowed: time, cost, energy, tokens, steps"),
        ("time=", "'time=' gives no amount; allowed: a duration such as 40min, or NAME=AMOUNT"),
    ],
)
def test_what_is_no_budget_is_refused_and_nothing_written(running, word, sentence):
    code, text = budget(running, word)
    assert code == 2
    assert text.startswith("command line  ")
    assert sentence in text
    assert not (running / "budget.yaml").exists()


def test_a_finished_run_points_to_extend(stopped):
    used = {"time": {"given": 10_800.0, "used": 10_750.0}, "tokens": {"given": None, "used": 70_000}}
    summary = {"steps": 1400, "final_progress": 1.0, "budget": used, "legs": 1}
    (stopped / "summary.json").write_text(json.dumps(summary))
    code, text = budget(stopped)
    assert code == 0
    assert "finished, step 1,400, 100% of the schedule" in text
    assert f"shoestring extend {stopped} --budget 10min" in text
    code, text = budget(stopped, "4h")
    assert code == 2
    assert f"Give it more: shoestring extend {stopped} --budget 4h" in text


def test_a_run_at_its_end_is_told_that_more_comes_at_the_floor(stopped):
    record = {"step": 120, "seconds": 900.0, "tokens": 60_000, "progress": 1.0}
    (stopped / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    assert "further steps run at its floor" in budget(stopped, "5h")[1]


def test_a_folder_without_a_run_is_refused(tmp_path):
    code, text = budget(tmp_path, "40min")
    assert code == 2
    assert text.startswith(f"{tmp_path} is no run directory: it has no resolved.yaml.")
