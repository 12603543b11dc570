"""Snapshots of a Trainer of transformers: what they hold, when, as which folder; what is refused."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hf_trainer import trainer
from keeper_processes import QUICK, no_keeper_left
from safetensors.torch import load_file
from shoestring.checkpoint import SnapshotCallback, Snapshotter, keeping, snapshot_interval
from shoestring.checkpoint import snapshot as snapshot_module
from shoestring.checkpoint.errors import BrokenCheckpoint
from shoestring.checkpoint.trainer_folder import check_folder
from shoestring.recipes.errors import UserError
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

__all__ = ["no_keeper_left"]  # a fixture, for every test here


class Raises(TrainerCallback):
    """An exception before the optimizer step that follows `step`."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise RuntimeError("as if memory had run out")


class Counts(TrainerCallback, ExportableState):
    """A callback with a state, as EarlyStoppingCallback is."""

    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"steps": self.steps}}


def callback(**given: Any) -> tuple[SnapshotCallback, list[str]]:
    said: list[str] = []
    return SnapshotCallback(settings=QUICK, warn=said.append, **{"every_steps": 1, **given}), said


def same(a: Any, b: Any) -> bool:
    """Equal in types, order and every bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if hasattr(a, "tobytes"):
        return bool(a.tobytes() == b.tobytes())
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("kind", ["all weights", "lora"])
def test_the_folder_is_what_the_trainer_itself_writes(tmp_path: Path, kind: str) -> None:
    run = tmp_path / "run"
    snapshots, said = callback()
    failing = trainer(run, kind, [snapshots, Counts(), Raises(5)], save_strategy="steps", save_steps=5)
    failing.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    snapshots.resume(failing)
    with pytest.raises(RuntimeError, match="as if"):
        failing.train()
    theirs = (run / "checkpoint-5").rename(tmp_path / "theirs")
    again = trainer(run, kind, [snapshots], save_strategy="steps", save_steps=5)
    path = snapshots.resume(again)  # the exception was the trainer's death
    snapshots.leave()
    ours = run / "checkpoint-5"
    assert path == str(ours)
    assert said == [f"resumed from snapshot-000005 in memory, written as {ours}"]
    check_folder(ours, 5)
    assert {file.name for file in ours.iterdir()} == {file.name for file in theirs.iterdir()}
    assert (ours / "scaler.pt").exists()
    for file in theirs.iterdir():
        mine = ours / file.name
        if file.suffix == ".safetensors":
            assert same(load_file(mine), load_file(file))
        elif file.suffix in (".pt", ".pth"):
            # Made by this very test, so trusted: numpy's part of the generators is a pickle.
            assert same(torch.load(mine, weights_only=False), torch.load(file, weights_only=False)), file.name
        elif file.name == "trainer_state.json":
            control = ('"should_save": true', '"should_save": false')
            assert mine.read_text() == file.read_text().replace(*control)
            assert '"steps": 5' in mine.read_text()
        elif file.suffix == ".json":
            assert mine.read_text() == file.read_text()


def test_nothing_changes_while_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that takes longer than the forward and backward passes makes the optimizer wait."""
    copy = snapshot_module.write_contents

    def slowly(*given: Any) -> None:
        time.sleep(0.05)
        copy(*given)

    monkeypatch.setattr(snapshot_module, "write_contents", slowly)
    weights: dict[int, dict[str, torch.Tensor]] = {}
    compared = []

    class Compares(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
            weights[state.global_step] = trained

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step >= 3:
                snapshots._snapshotter.flush()
                found = snapshots._snapshotter.newest()
                assert found is not None
                held = found.tensors("model")
                assert held.keys() == weights[found.step].keys()
                assert all(same(tensor, weights[found.step][name]) for name, tensor in held.items())
                compared.append(found.step)

    snapshots, said = callback(every_steps=3)
    run = trainer(tmp_path / "run", "lora", [snapshots, Compares()])
    run.train(resume_from_checkpoint=snapshots.resume(run))
    assert compared == [3, 3, 3, 6, 6, 6, 9, 9, 9, 12, 12]
    assert said == []


def taken_at(monkeypatch: pytest.MonkeyPatch, run: Path, **given: Any) -> list[int]:
    """Steps of the snapshots of a training."""
    steps = []
    begin = Snapshotter.begin

    def noting(self: Snapshotter, step: int, **what: Any) -> bool:
        steps.append(step)
        return begin(self, step, **what)

    with monkeypatch.context() as patch:
        patch.setattr(Snapshotter, "begin", noting)
        snapshots, _ = callback(**{"every_steps": None, **given})
        training = trainer(run, "lora", [snapshots], max_steps=6)
        training.train(resume_from_checkpoint=snapshots.resume(training))
    return steps


def test_how_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert taken_at(monkeypatch, tmp_path / "steps", every_steps=2) == [2, 4]
    assert taken_at(monkeypatch, tmp_path / "seconds", every_seconds=1e-9) == [1, 2, 3, 4, 5]
    assert taken_at(monkeypatch, tmp_path / "rarely", every_seconds=3600) == [1]
    monkeypatch.setattr("shoestring.checkpoint.interval.MOST_OFTEN", 600.0)
    assert taken_at(monkeypatch, tmp_path / "daly") == [1]


def test_the_interval_is_dalys() -> None:
    snapshots, _ = callback(every_steps=None)
    snapshots._waited = 0.5
    cost = 0.25 + (2.0 - 0.5) + 3.0 / (os.cpu_count() or 1)
    measured = SimpleNamespace(waited_seconds=2.0, copy_seconds=3.0)
    assert snapshots._daly(measured, 0.25) == pytest.approx(snapshot_interval(cost, 6 * 3600))
    assert snapshots._daly(SimpleNamespace(waited_seconds=2.0, copy_seconds=0.0), 0.0) >= 1.0


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"every_seconds": 5, "every_steps": 2}, "every_seconds=5, every_steps=2: give one"),
        ({"every_seconds": 0}, "every_seconds=0: must be"),
        ({"every_seconds": float("nan")}, "every_seconds=nan: must be"),
        ({"every_seconds": "5"}, "every_seconds='5': must be"),
        ({"every_steps": 0}, "every_steps=0: must be"),
        ({"every_steps": 1.5}, "every_steps=1.5: must be"),
    ],
)
def test_settings_that_make_no_sense(given: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        SnapshotCallback(**given)


def test_trainers_that_cannot_have_snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshots, _ = callback()
    run = trainer(tmp_path / "run", "lora", [snapshots])
    with monkeypatch.context() as patch:
        patch.setattr(TrainingArguments, "world_size", property(lambda _: 4))
        with pytest.raises(UserError, match="is for one process; this Trainer has 4"):
            snapshots.resume(run)
    with monkeypatch.context() as patch:
        patch.setattr(TrainingArguments, "device", torch.device("xpu"))
        with pytest.raises(UserError, match="CPU and CUDA alone, not xpu"):
            snapshots.resume(run)
    for name in ("deepspeed", "fsdp"):
        with monkeypatch.context() as patch:
            patch.setattr(run, f"is_{name}_enabled", True)
            with pytest.raises(UserError, match=f"that {name} shards"):
                snapshots.resume(run)
    with monkeypatch.context() as patch:
        patch.setattr(run.args, "optim", "galore_adamw_layerwise")
        with pytest.raises(UserError, match="optim=galore_adamw_layerwise"):
            snapshots.resume(run)
    with pytest.raises(UserError, match="none of this trainer's callbacks"):
        callback()[0].resume(run)
    with pytest.raises(UserError, match="does not know this training"):
        run.train()
    assert not (tmp_path / "run" / "snapshots").exists()


def test_another_trainer_in_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "TAKEOVER", 0.2)
    first, _ = callback()
    assert first.resume(trainer(tmp_path / "run", "lora", [first])) is None
    second, _ = callback()
    with pytest.raises(UserError, match=f"process {os.getpid()} is training in this directory"):
        second.resume(trainer(tmp_path / "run", "lora", [second]))
    first.leave()


def failed(run: Path, kind: str = "lora", change: Callable[[Trainer], object] = lambda _: None) -> None:
    """A training that ends by an exception after three steps."""
    snapshots, _ = callback()
    failing = trainer(run, kind, [snapshots, Raises(3)])
    change(failing)
    snapshots.resume(failing)
    with pytest.raises(RuntimeError, match="as if"):
        failing.train()
    snapshots.leave()


def test_a_snapshot_of_another_model_is_refused(tmp_path: Path) -> None:
    failed(tmp_path / "run")
    snapshots, _ = callback()
    other = trainer(tmp_path / "run", "lora", [snapshots], hidden=64)
    with pytest.raises(UserError, match=r"another model: .*lora_.* in the snapshot"):
        snapshots.resume(other)
    other = trainer(tmp_path / "run", "all weights", [snapshots])
    with pytest.raises(UserError, match="another model: only"):
        snapshots.resume(other)
    assert not [*(tmp_path / "run").glob("checkpoint-*")]


def test_weights_that_the_trainer_would_not_save_are_not_lost_in_silence(tmp_path: Path) -> None:
    def norms_too(run: Trainer) -> None:
        for name, parameter in run.model.named_parameters():
            if "norm" in name:
                parameter.requires_grad_(True)

    failed(tmp_path / "run", change=norms_too)
    snapshots, _ = callback()
    run = trainer(tmp_path / "run", "lora", [snapshots])
    norms_too(run)
    with pytest.raises(UserError, match=r"does not save .*norm.* as it is trained"):
        snapshots.resume(run)
    assert not [*(tmp_path / "run").glob("checkpoint-*")]


def test_the_training_must_begin_where_resume_said(tmp_path: Path) -> None:
    failed(tmp_path / "run")
    snapshots, _ = callback()
    run = trainer(tmp_path / "run", "lora", [snapshots])
    assert snapshots.resume(run) is not None
    with pytest.raises(UserError, match="begins at step 0, where resume"):
        run.train()
    regrouped = trainer(tmp_path / "run", "lora", [snapshots])
    path = snapshots.resume(regrouped)
    parameters = [p for p in regrouped.model.parameters() if p.requires_grad]
    regrouped.optimizer = torch.optim.AdamW([{"params": parameters[::-1]}, {"params": []}])
    with pytest.raises(UserError, match="state was saved for"):
        regrouped.train(resume_from_checkpoint=path)
    snapshots.leave()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the Trainer itself."""
    folder = tmp_path_factory.mktemp("whole")
    trainer(folder, "all weights", [], max_steps=2, save_strategy="steps", save_steps=2).train()
    return folder / "checkpoint-2"


def cut(file: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[: len(data) * 3 // 4])

    return spoil


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (cut("model.safetensors"), "model.safetensors is not a safetensors file"),
        (cut("optimizer.pt"), "its optimizer.pt is cut off"),
        (cut("trainer_state.json"), "its trainer_state.json is cut off"),
        (lambda folder: (folder / "model.safetensors").unlink(), "it has no weights"),
        (lambda folder: (folder / "scheduler.pt").unlink(), "no scheduler.pt"),
        (lambda folder: (folder / "rng_state.pth").write_bytes(b""), "its rng_state.pth is cut off"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "model-00002-of-00002.safetensors"}}'
            ),
            "no model-00002-of-00002.safetensors",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {'),
            "its model.safetensors.index.json is cut off",
        ),
        (lambda folder: (folder / "trainer_state.json").write_text('{"global_step": 1}'), "another step"),
    ],
)
def test_what_is_whole(whole: Path, tmp_path: Path, spoil: Callable[[Path], None], text: str) -> None:
    folder = shutil.copytree(whole, tmp_path / "checkpoint-2")
    check_folder(folder, 2)
    spoil(folder)
    with pytest.raises(BrokenCheckpoint, match=text):
        check_folder(folder, 2)


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parent.parent / "docs" / "checkpoints.md").read_text()
    _, example = re.findall(r"```python3\n(.*?)```", page, re.DOTALL)
    promised = re.search(r"The last line is `(.*)`", page)
    assert promised is not None
    exec(compile(example, "docs/checkpoints.md", "exec"), {})
    assert capsys.readouterr().out.splitlines()[-1] == promised[1]
