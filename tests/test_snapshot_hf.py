"""Trainers of transformers that are killed go on from a snapshot, to the bit."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import CONTEXT
from hf_trainer import PER_EPOCH, STEPS, trainer
from keeper_processes import QUICK, keepers_of, kill, no_keeper_left, until
from shoestring.checkpoint import SnapshotCallback
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

__all__ = ["no_keeper_left"]  # a fixture, for every test here

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


class Dies(TrainerCallback):
    """Ends the process when the snapshot of `step` is whole, before the next one's optimizer step."""

    def __init__(self, snapshots: SnapshotCallback, step: int) -> None:
        self.snapshots, self.step = snapshots, step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.snapshots._snapshotter.flush()
            os.kill(os.getpid(), signal.SIGKILL)


class DiesSaving(Trainer):
    """Ends the process in the midst of its second checkpoint."""

    def _save_rng_state(self, output_dir: str) -> None:
        if output_dir.endswith("-8"):
            (snapshots,) = (
                part for part in self.callback_handler.callbacks if isinstance(part, SnapshotCallback)
            )
            snapshots._snapshotter.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_rng_state(output_dir)


def train(folder: Path, kind: str, dies: int | None, more: dict[str, Any], out: Path) -> None:
    """A user's program: started again, it goes on; `out` gets what it ends with and what it has said."""
    said: list[str] = []
    snapshots = SnapshotCallback(every_steps=1, settings=QUICK, warn=said.append)
    callbacks = [snapshots] if dies is None else [snapshots, Dies(snapshots, dies)]
    run = trainer(folder, kind, callbacks, **more)
    path = snapshots.resume(run)
    mean = run.train(resume_from_checkpoint=path).training_loss
    log = [
        {key: value for key, value in entry.items() if "runtime" not in key and "per_second" not in key}
        for entry in run.state.log_history
        if "train_loss" not in entry
    ]
    torch.save({"weights": run.model.state_dict(), "log": log, "mean": mean, "path": path, "said": said}, out)


def process(folder: Path, kind: str, dies: int | None = None, **more: Any) -> dict[str, Any]:
    """What `train` ends with in a process of its own; {} when it was killed."""
    out = folder.parent / "out.pt"
    out.unlink(missing_ok=True)
    child = CONTEXT.Process(target=train, args=(folder, kind, dies, more, out))
    child.start()
    child.join(60)
    killed = dies is not None or "of" in more
    assert child.exitcode == (-signal.SIGKILL if killed else 0)
    return {} if killed else torch.load(out, weights_only=True)


def assert_same(resumed: dict[str, Any], whole: dict[str, Any]) -> None:
    assert resumed["log"] == whole["log"]
    assert resumed["weights"].keys() == whole["weights"].keys()
    for name, weight in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], weight), name


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a training with all weights ends with."""
    return process(tmp_path_factory.mktemp("whole") / "run", "all weights")


@pytest.mark.parametrize("kind", ["all weights", "lora"])
def test_killed_and_resumed_is_the_same_to_the_bit(
    tmp_path: Path, kind: str, never_killed: dict[str, Any]
) -> None:
    whole = never_killed if kind == "all weights" else process(tmp_path / "whole", kind)
    assert whole["path"] is None
    assert keepers_of(tmp_path) == []
    assert [entry["step"] for entry in whole["log"]] == (
        [4, 8, 12] if kind == "all weights" else [*range(1, 15)]
    )
    run = tmp_path / "run"
    process(run, kind, dies=PER_EPOCH)  # where an epoch begins
    process(run, kind, dies=9)  # in the midst of one, after a first resume
    resumed = process(run, kind)
    assert resumed["path"] == str(run / "checkpoint-9")
    assert resumed["said"] == [f"resumed from snapshot-000009 in memory, written as {run / 'checkpoint-9'}"]
    assert_same(resumed, whole)
    assert keepers_of(tmp_path) == []
    assert len([*(run / "snapshots").glob("checkpoint-*")]) == 1
    if kind == "lora":
        weights = {file.name for file in (run / "checkpoint-9").glob("*.safetensors")}
        assert weights == {"adapter_model.safetensors"}


def test_evaluation_between_steps_is_in_the_snapshot(tmp_path: Path) -> None:
    """It draws from the generators, and its results are part of the log."""
    evaluates = {"eval_strategy": "steps", "eval_steps": 2}
    whole = process(tmp_path / "whole", "lora", **evaluates)
    assert sum("eval_loss" in entry for entry in whole["log"]) == STEPS // 2
    process(tmp_path / "run", "lora", dies=8, **evaluates)
    resumed = process(tmp_path / "run", "lora", **evaluates)
    assert resumed["path"] == str(tmp_path / "run" / "checkpoint-8")
    assert_same(resumed, whole)


def test_without_the_keeper_what_it_wrote_is_used(tmp_path: Path, never_killed: dict[str, Any]) -> None:
    run = tmp_path / "run"
    process(run, "all weights", dies=10)
    # What it says last: before that, the folder has its name and what it was made in is still there.
    until(lambda: "checkpoint-000010 written from memory" in (run / "snapshots/keeper.log").read_text())
    for pid in keepers_of(run):
        kill(pid)
    resumed = process(run, "all weights")
    assert resumed["said"] == [f"resumed from checkpoint-000010, written as {run / 'checkpoint-10'}"]
    assert_same(resumed, never_killed)
    # What the Trainer reports at the end is of the steps that this process made.
    each = process(tmp_path / "each", "all weights", logging_steps=1)
    losses = [entry["loss"] for entry in each["log"][10:]]
    assert resumed["mean"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def test_a_checkpoint_killed_while_it_was_saved_is_not_chosen(
    tmp_path: Path, never_killed: dict[str, Any]
) -> None:
    saves = {"save_strategy": "steps", "save_steps": 4}
    run = tmp_path / "run"
    process(run, "all weights", of=DiesSaving, **saves)
    assert get_last_checkpoint(str(run)) == str(run / "checkpoint-8")  # which the Trainer itself would choose
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, ignore=lambda _, names: [name for name in names if name == "snapshots"])
    resumed = process(run, "all weights", **saves)
    assert resumed["path"] == str(run / "checkpoint-7")
    torn = "it has no trainer_state.json, which is written last: the Trainer was killed while saving it"
    assert resumed["said"][0] == f"checkpoint-8 is skipped: {torn}"
    assert_same(resumed, never_killed)
    # Without a snapshot, the Trainer's own whole one; it does not hold the losses since the last log.
    older = process(copy, "all weights", **saves)
    assert older["path"] == str(copy / "checkpoint-4")
    assert_same(older, never_killed)
