"""Which implementation runs, what overrides it, and what is said about it."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import tiny
import torch
from shoestring.ops import attention_flash, providers
from shoestring.ops.kernels import trial
from shoestring.recipes.errors import UserError
from shoestring.train.cli import app
from shoestring.train.run import train_recipe
from typer.testing import CliRunner

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_the_first_that_can_run_is_taken_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHOESTRING_OPS", raising=False)
    monkeypatch.setattr(providers, "_lacks", lambda provider, device: None)
    # the interpreter is never unasked
    assert providers.choose("codec", CPU, ["triton", "native"]) == "native"
    assert providers.choose("codec", CUDA, ["triton"]) == "triton"
    assert providers.choose("codec", CUDA, [], by_name=["triton"]) == "torch"
    assert providers.used["codec"] == "torch"


def test_what_is_asked_for_runs_or_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOESTRING_OPS", "codec=torch, writing=triton")
    assert providers.choose("codec", CPU, ["native"]) == "torch"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UserError, match=r"triton where writing runs on cpu, but Triton's kernels need"):
        providers.choose("writing", CPU, ["triton"])
    with pytest.raises(UserError, match="it has none for these arguments"):
        providers.choose("writing", CPU, ["native"])
    monkeypatch.setenv("SHOESTRING_OPS", "fast")
    with pytest.raises(UserError, match=r"SHOESTRING_OPS has 'fast'; allowed: triton, native, liger, torch"):
        providers.choose("codec", CPU, [])


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
    (line,) = providers.lines(CUDA)
    assert "compute capability 8.0" in line
    assert "pip install" not in line  # which would not help
    monkeypatch.setattr(providers, "_lacks", lambda provider, device: None)
    assert providers.lines(CUDA) == []
    monkeypatch.setattr(attention_flash, "missing", lambda: "this torch has none")
    (line,) = providers.lines(CUDA)
    assert line.endswith("since this torch has none; torch 2.12 has all of it")
    monkeypatch.setenv("SHOESTRING_OPS", "torch")
    assert providers.lines(CPU) == ["ops: SHOESTRING_OPS=torch"]


def test_an_operation_that_is_not_there_is_an_error_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOESTRING_OPS", "grad_pack=torch,adam_step=torch")
    with pytest.raises(UserError) as raised:
        providers.choose("codec", CPU, [])
    assert str(raised.value).splitlines() == [
        "SHOESTRING_OPS has 'adam_step=torch', but no operation is called 'adam_step'; "
        "did you mean quantised_step=torch?",
        "  Operations: codec, grad_pack, loss_head, lora_down, lora_down_backward, lora_up_backward, "
        "lossless, low_rank, quantised_step, rms_norm, rope, swiglu, token_log_probs, writing, wta_crs.",
    ]
    monkeypatch.setenv("SHOESTRING_OPS", "zzz=torch")
    with pytest.raises(UserError, match=r"no operation is called 'zzz'\n"):
        providers.check_asked()


def test_the_names_are_those_that_ask_and_documents_name_no_other() -> None:
    room = Path(providers.__file__).parent
    asked = {
        node.args[0].value
        for path in room.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).rpartition(".")[2] == "choose"
        and isinstance(node.args[0], ast.Constant)
    }
    assert asked == set(get_args(providers.Operation))
    top = Path(__file__).parents[1]
    texts = [*(top / "docs").glob("*.md"), top / "README.md", Path(providers.__file__)]
    examples = [
        value
        for path in texts
        for value in re.findall(r"SHOESTRING_OPS=([\w=,]*\w=\w+)", path.read_text(encoding="utf-8"))
    ]
    assert len(examples) > 5
    for value in examples:
        assert providers._wanted(value)


def test_triton_that_cannot_launch_is_not_chosen_and_its_error_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in a container without a C compiler: torch brings the package, the first launch would compile."""
    tried: list[int] = []

    def launch(index: int) -> None:
        tried.append(index)
        raise RuntimeError("Failed to find C compiler. Please specify via CC.\nMore.")

    monkeypatch.delenv("SHOESTRING_OPS", raising=False)
    monkeypatch.setattr(providers, "_capability", lambda index: (9, 0))
    monkeypatch.setattr(trial, "launch", launch)
    providers._fails.cache_clear()
    try:
        for _ in range(3):
            assert providers.choose("low_rank", CUDA, ["triton"]) == "torch"
        assert providers.choose("low_rank", CPU, ["native"]) in ("native", "torch")
        (line,) = providers.lines(CUDA)
        assert "RuntimeError: Failed to find C compiler. Please specify via CC." in line
        assert "python3-dev" in line
        assert "\n" not in line
        monkeypatch.setenv("SHOESTRING_OPS", "low_rank=triton")
        with pytest.raises(UserError, match="but Triton cannot launch a kernel"):
            providers.choose("low_rank", CUDA, ["triton"])
        assert tried == [0]  # once in all
    finally:
        providers._fails.cache_clear()


def test_on_this_machine_the_trial_launches_or_says_why() -> None:
    """In a process of its own, where nothing is interpreted."""
    code = (
        "import torch\nfrom shoestring.ops import providers\n"
        "print(torch.cuda.is_available(), providers._fails(0))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    available, _, said = done.stdout.strip().partition(" ")
    assert said == "None" if available == "True" else said.startswith("Triton cannot launch"), done.stderr


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
