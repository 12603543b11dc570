"""A run that is killed again and again, also while it resumes, ends as if it had never stopped.

Its budget only goes down: no crash gives back a second, a token or a step.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import shoestring.train.building as building
from forked import CONTEXT
from keeper_processes import no_keeper_left
from shoestring.train import loop
from test_train_snapshots import STEPS, one_thread, recipe, result, train

__all__ = ["no_keeper_left", "one_thread"]  # fixtures, for every test here
pytestmark = pytest.mark.slow


def die(path: Path, moment: int | str) -> None:
    """Train, and end by SIGKILL: when the step is recorded, or at a moment of the resume."""
    record, weights, random = loop._record, building.load_weights, building.set_generators

    def at_step(run: Any, *values: Any) -> None:
        record(run, *values)
        if run.state.step == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def before_weights(*values: Any) -> None:
        if moment == "before the weights":
            os.kill(os.getpid(), signal.SIGKILL)
        weights(*values)

    def at_the_end(*values: Any) -> list[str]:
        if moment == "after the weights":
            os.kill(os.getpid(), signal.SIGKILL)
        return random(*values)

    loop._record = at_step
    building.load_weights = before_weights
    building.set_generators = at_the_end
    train(path)


def spent(run: Path) -> dict[str, float]:
    """The last that the run has written down of what it consumed."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = max(records, key=lambda record: record["seconds"])
    return {"seconds": last["seconds"]}


def resumes(run: Path) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "resume"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the same run comes to without a crash."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(recipe(folder)) == 0
    return result(folder)[:2], json.loads((folder / "run" / "summary.json").read_text())


@pytest.mark.parametrize(
    "moments",
    [
        (4, 9),
        (5, "before the weights", 8),
        (6, "after the weights", 6),  # the same step again: no progress between two crashes
        (3, 7, 11),
    ],
    ids=str,
)
def test_killed_again_and_again(tmp_path: Path, whole: Any, moments: tuple[int | str, ...]) -> None:
    path, run = recipe(tmp_path), tmp_path / "run"
    consumed: list[float] = []
    for moment in moments:
        process = CONTEXT.Process(target=die, args=(path, moment))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        consumed.append(spent(run)["seconds"])
    assert train(path) == 0
    weights_and_curve, summary = whole
    assert result(tmp_path)[:2] == weights_and_curve  # final weights, losses and rates, to the bit
    ended = json.loads((run / "summary.json").read_text())
    for key in ("steps", "tokens", "trained_tokens", "final_progress", "final_learning_rate", "stop_reason"):
        assert ended[key] == summary[key], key
    assert ended["steps"] == STEPS
    # Time goes on from where each crash left it, and so does what is counted at each resume.
    assert consumed == sorted(consumed)
    at_resume = [event["seconds"] for event in resumes(run)]
    assert len(at_resume) == len(moments)
    for before, after in zip(consumed, at_resume, strict=True):
        assert after >= before
    assert ended["seconds"] >= max(at_resume)
