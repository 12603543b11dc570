"""Which changes of a recipe, of the data, the model or the processes stop a resume, and how that is said."""

import json
from pathlib import Path
from typing import Any

import pytest
from shoestring.checkpoint import check_identity, differences, run_identity
from shoestring.recipes.errors import UserError

RECIPE: dict[str, Any] = {
    "model": {"model_name_or_path": "m", "revision": None},
    "budget": {"time": 60.0},
    "optimizer": {"name": "adamw", "learning_rate": 1e-3, "betas": (0.9, 0.95)},
    "adapter": None,
    "eval": {"every": "10%"},
    "checkpoint": {"keep": 2},
    "track": {"report_to": []},
    "export": {},
    "output_dir": "runs/a",
}


def identity(world_size: int = 1, data: str = "d", base: str = "b", **sections: Any) -> dict[str, Any]:
    return run_identity({**RECIPE, **sections}, data=data, base=base, world_size=world_size)


def refusal(current: dict[str, Any]) -> str:
    saved = json.loads(json.dumps(identity()))  # as it comes back from a checkpoint
    with pytest.raises(UserError) as told:
        check_identity(saved, current, output_dir=Path("runs/a"))
    assert len(str(told.value).splitlines()) <= 6
    return str(told.value)


def test_the_same_run_and_changes_that_touch_no_step_pass() -> None:
    saved = json.loads(json.dumps(identity()))
    check_identity(saved, identity(), output_dir=Path("runs/a"))
    free = identity(
        output_dir="runs/b",
        checkpoint={"keep": 9},
        track={"report_to": ["wandb"]},
        export=None,
        eval={"every": 5},
    )
    check_identity(saved, free, output_dir=Path("runs/a"))
    check_identity(saved, identity(budget={"time": 90.0}), output_dir=Path("runs/a"), allow={"recipe.budget"})


def test_a_changed_key_is_named_with_both_values_and_the_ways_out() -> None:
    assert refusal(identity(optimizer={"name": "adamw", "learning_rate": 2e-4, "betas": [0.9, 0.95]})) == (
        "runs/a: holds the checkpoints of another run; one thing differs:\n"
        "  optimizer.learning_rate: was 0.001, now 0.0002\n"
        "Undo the change to resume; or start over with --fresh; or keep both: output_dir=runs/a-2"
    )


def test_many_changes_stay_within_six_lines() -> None:
    current = identity(
        2,
        "e",
        "c",
        budget={"time": 5.0},
        adapter={"name": "lora", "r": 8},
        model={"model_name_or_path": "n" * 90},
    )
    assert refusal(current).splitlines()[:5] == [
        "runs/a: holds the checkpoints of another run; 7 things differ:",
        f"  model.model_name_or_path: was m, now {'n' * 57}...",
        "  budget.time: was 60.0, now 5.0",
        "  data: the rows are not those it was trained on (files edited, or other options)",
        "  and 4 more",
    ]


def test_base_and_processes_have_their_own_words() -> None:
    assert "  model: the frozen weights are not those it was trained on\n" in refusal(identity(base="c"))
    assert "  processes: was 1, now 4\n" in refusal(identity(world_size=4))


def test_differences_of_any_flat_records() -> None:
    nan = float("nan")
    assert differences({"a": 1, "b": nan, "c": [1]}, {"a": 2, "b": nan, "c": (1,), "d": None}) == {
        "a": (1, 2)
    }
