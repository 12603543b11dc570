"""The verbs as a person types them: what they print, what they leave, and with which code they end."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import shoestring
import tiny
from shoestring.recipes.errors import UserError
from shoestring.train.cli import app
from shoestring.train.run import train_recipe
from typer.testing import CliRunner

VERBS = ("new", "check", "plan", "train", "eval", "chat", "export", "report", "schema", "doctor")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run: recipe.yaml, model/, chats.jsonl, run/."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = tiny.recipe(folder, budget={"steps": 3})
    assert train_recipe(str(recipe), [], fresh=False, started=time.monotonic()) == 0
    return folder


def shoestring_says(*arguments: str | Path, code: int = 0, stdin: str | None = None) -> str:
    """The output of a verb, carried out in this process; its own errors are raised."""
    done = CliRunner().invoke(app, [str(a) for a in arguments], input=stdin, catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done.output


def plain(text: str) -> str:
    """Without colours, and with white space in single blanks."""
    return re.sub(r"\s+", " ", re.sub(r"\x1b\[[0-9;]*m", "", text))


def test_help_names_every_verb_and_every_verb_has_an_example_or_needs_none() -> None:
    top = plain(shoestring_says("--help"))
    for verb in VERBS:
        assert f" {verb} " in top
        shown = plain(shoestring_says(verb, "--help"))
        assert "Usage:" in shown
        assert verb in ("schema", "doctor") or "Example" in shown, verb


def test_the_installed_command() -> None:
    command = Path(sys.executable).with_name("shoestring")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"shoestring {shoestring.__version__}\n"
    wrong = subprocess.run([command, "trian", "x"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "trian" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_help_comes_without_loading_torch() -> None:
    code = "import sys, shoestring.train.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_new_lists_prints_and_writes_presets(tmp_path: Path) -> None:
    listed = plain(shoestring_says("new"))
    assert "cpu-demo" in listed
    printed = shoestring_says("new", "cpu-demo")
    assert "budget" in printed
    written = tmp_path / "mine.yaml"
    said = shoestring_says("new", "cpu-demo", "-o", written)
    assert written.read_text() == printed
    assert f"shoestring plan {written}" in said
    with pytest.raises(UserError, match="exists"):
        shoestring_says("new", "cpu-demo", "-o", written)


def test_schema_is_a_closed_json_schema() -> None:
    schema = json.loads(shoestring_says("schema"))
    assert schema["additionalProperties"] is False
    assert {"model", "data", "budget"} <= set(schema["properties"])


def test_check_shows_samples_and_counts(finished: Path) -> None:
    said = plain(shoestring_says("check", finished / "recipe.yaml"))
    assert "messages" in said
    assert "is sound" in said
    assert re.search(r"\d+ ?%", said)


def test_plan_in_words_and_as_json_agree(finished: Path) -> None:
    words = plain(shoestring_says("plan", finished / "recipe.yaml"))
    plan = json.loads(shoestring_says("plan", finished / "recipe.yaml", "--json"))
    assert plan["steps"] == 3
    assert plan["memory"]["host"]["total"] > plan["memory"]["host"]["weights"] > 0
    for part in ("weights", "libraries", "other"):  # of a model so small, loading is the largest phase
        assert plan["memory"]["host"][part] > 0
        assert part in words


def test_a_dry_run_trains_nothing(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path)
    words = plain(shoestring_says("train", recipe, "--dry-run"))
    assert "12 steps" in words
    assert not (tmp_path / "run").exists()


def test_eval_repeats_the_runs_own_figure(finished: Path) -> None:
    summary = json.loads((finished / "run/summary.json").read_text())
    said = shoestring_says("eval", finished / "run")
    (loss,) = re.findall(r"^ +loss +(\d\.\d+)", said, flags=re.MULTILINE)
    assert float(loss) == pytest.approx(summary["eval_loss"], rel=0.02)  # the export is read in bfloat16


def test_eval_on_other_data(finished: Path, tmp_path: Path) -> None:
    tiny.chats(tmp_path / "more.jsonl", rows=5, seed=9)
    assert "on 5 held-out rows" in shoestring_says(
        "eval", finished / "run", "--data", tmp_path / "more.jsonl"
    )


def test_export_writes_what_it_says(finished: Path, tmp_path: Path) -> None:
    for to, file in (("merged", "model.safetensors"), ("adapter", "adapter_model.safetensors")):
        said = shoestring_says("export", finished / "run", "--to", to, "-o", tmp_path / to)
        assert (tmp_path / to / file).is_file()
        assert str(tmp_path / to) in said
    with pytest.raises(UserError, match="merged"):
        shoestring_says("export", finished / "run", "--to", "gguff", "-o", tmp_path / "x")
    with pytest.raises(UserError, match="checkpoint-000003"):
        shoestring_says("export", finished / "run", "--checkpoint", "checkpoint-9", "-o", tmp_path / "y")


def test_chat_answers_and_starts_anew(finished: Path) -> None:
    said = shoestring_says("chat", finished / "run", "--max-new-tokens", "3", stdin="a bee\n\nthe sun\n")
    assert said.count("you>") == 4  # two questions, an empty line, the end of input
    assert "new conversation" in said


def test_report_of_one_and_of_two_runs(finished: Path, tmp_path: Path) -> None:
    shoestring_says("report", finished / "run", "-o", tmp_path / "one.html")
    shoestring_says("report", finished / "run", finished / "run", "-o", tmp_path / "two.html")
    one, two = ((tmp_path / name).read_text() for name in ("one.html", "two.html"))
    assert "<svg" in one
    assert one != two
    with pytest.raises(UserError, match="is no run directory"):
        shoestring_says("report", tmp_path)


@pytest.mark.parametrize("verb", ["eval", "chat", "export"])
def test_a_folder_that_is_no_run(verb: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run directory"):
        shoestring_says(verb, tmp_path)


def test_doctor_names_the_machine_and_the_missing_parts(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else object())
    monkeypatch.chdir(finished)
    said = plain(shoestring_says("doctor"))
    assert "torch" in said
    assert "wandb missing" in said
    assert "shoestring[wandb]" in said
