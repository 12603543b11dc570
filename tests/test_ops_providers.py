"""Which implementation runs, what overrides it, and what is said about it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from shoestring.ops import providers
from shoestring.recipes.errors import UserError
from shoestring.train.cli import app
from shoestring.train.run import train_recipe
from typer.testing import CliRunner

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_the_first_that_can_run_is_taken_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHOESTRING_OPS", raising=False)
    monkeypatch.setattr(providers, "_lacks", lambda provider, device: None)
    assert providers.choose("op", CPU, ["triton", "native"]) == "native"  # the interpreter is never unasked
    assert providers.choose("op", CUDA, ["triton"]) == "triton"
    assert providers.choose("op", CUDA, [], by_name=["triton"]) == "torch"
    assert providers.used["op"] == "torch"


def test_what_is_asked_for_runs_or_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOESTRING_OPS", "one=torch, two=triton")
    assert providers.choose("one", CPU, ["native"]) == "torch"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UserError, match=r"triton where two runs on cpu, but Triton's kernels need a CUDA"):
        providers.choose("two", CPU, ["triton"])
    with pytest.raises(UserError, match="it has none for these arguments"):
        providers.choose("two", CPU, ["native"])
    monkeypatch.setenv("SHOESTRING_OPS", "fast")
    with pytest.raises(UserError, match=r"SHOESTRING_OPS has 'fast'; allowed: triton, native, liger, torch"):
        providers.choose("one", CPU, [])


def test_a_run_says_what_it_lacks_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHOESTRING_OPS", raising=False)
    monkeypatch.setattr(providers, "find_spec", lambda name: None)
    (line,) = providers.lines(CUDA)
    assert line == (
        "ops: PyTorch's own operations are used, since Triton is not installed; "
        "pip install 'shoestring[kernels]'"
    )
    monkeypatch.setattr(providers, "find_spec", lambda name: object())
    monkeypatch.setattr(providers, "_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    assert "compute capability 8.0" in providers.lines(CUDA)[0]
    monkeypatch.setenv("SHOESTRING_OPS", "torch")
    assert providers.lines(CPU) == ["ops: SHOESTRING_OPS=torch"]


@pytest.mark.parametrize("verb", ["check", "plan", "train", "train --dry-run", "prune"])
def test_a_wrong_value_is_refused_before_the_model_is_looked_at(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOESTRING_OPS", "fast")
    path = tmp_path / "recipe.yaml"  # read and found sound; its model and its rows are not there
    path.write_text(f"model: {tmp_path / 'none'}\ndata: none.jsonl\nbudget: 1h\n")
    with pytest.raises(UserError, match="SHOESTRING_OPS has 'fast'; allowed: triton, native, liger, torch"):
        CliRunner().invoke(app, [*verb.split(), str(path)], catch_exceptions=False)


def test_a_run_that_is_called_from_python_measures_nothing_before_it_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached: list[object] = []
    monkeypatch.setattr("shoestring.plan.measure.measure", lambda *args: reached.append(args))
    monkeypatch.setattr("shoestring.train.building.read_facts", lambda *args: reached.append(args))
    monkeypatch.setenv("SHOESTRING_OPS", "adam_step=quick")
    with pytest.raises(UserError, match="SHOESTRING_OPS has 'adam_step=quick'"):
        train_recipe(str(tiny.recipe(tmp_path)), [], fresh=False, started=0.0)
    assert reached == []
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_is_not_there_costs_no_import_of_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nsys.argv = ['shoestring', 'train', 'nope.yaml']\n"
        "from shoestring.train.cli import main\n"
        "try:\n    main()\nexcept SystemExit as error:\n    print(error.code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == ["2", "False"], done.stderr
    assert "nope.yaml  no such file" in done.stderr
