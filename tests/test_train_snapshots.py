"""A killed run goes on from its keeper's snapshot, to the bit; and without a keeper from the disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
import torch
from forked import CONTEXT
from shoestring.checkpoint import Snapshotter
from shoestring.recipes.errors import UserError
from shoestring.train import loop
from shoestring.train.run import train_recipe

pytestmark = pytest.mark.slow

STEPS, DIES_AT = 12, 8
EVERY_STEP = {"every": 5, "keep_best": False, "in_memory": True, "snapshot_every": 1}
# What goes into a snapshot of each optimizer is in test_train_snapshot_contents.py.
KINDS: dict[str, dict[str, Any]] = {
    "dropout": {"adapter": {"name": "lora", "r": 4, "lora_dropout": 0.2}},
    "eva": {"adapter": {"name": "lora", "r": 4, "init_lora_weights": "eva"}},
    "8-bit state": {"adapter": None, "optimizer": {"name": "adamw", "learning_rate": 1e-3, "state_bits": 8}},
    "steps in backward": {
        "adapter": None,
        "optimizer": {"name": "adamw", "learning_rate": 1e-3, "step_in_backward": True},
    },
    "pruned on the way": {
        "adapter": None,
        "optimizer": {"name": "adamw", "learning_rate": 1e-3},
        "pruning": {"ratio": 0.2, "rounds": 3, "calibration_tokens": 512},
    },
    "accumulation": {"train": {"batch_tokens": 256, "gradient_accumulation_steps": 4}},
}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def recipe(folder: Path, **sections: Any) -> Path:
    folder.mkdir(exist_ok=True)
    given = {"budget": {"steps": STEPS}, "checkpoint": EVERY_STEP, "eval": {"samples": 0}, "export": "none"}
    return tiny.recipe(folder, **{**given, **sections})


def train(path: Path) -> int:
    torch.set_num_threads(1)
    return train_recipe(str(path), (), fresh=False, started=time.monotonic())


def die_at(path: Path, step: int, *, with_keeper: bool) -> None:
    """Train until `step` is recorded, and end by SIGKILL there."""
    record = loop._record

    def killing(run: Any, *values: Any) -> None:
        record(run, *values)
        if run.state.step == step:
            if with_keeper:
                os.kill(keeper_of(run), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

    loop._record = killing
    train(path)


def keeper_of(run: Any) -> int:
    pid: int = run.snapshots._own.keeper_pid
    return pid


def killed(path: Path, step: int, *, with_keeper: bool = False) -> None:
    process = CONTEXT.Process(target=die_at, args=(path, step), kwargs={"with_keeper": with_keeper})
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def result(folder: Path) -> tuple[bytes, list[tuple[int, float, float]], str | None]:
    run = folder / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = sorted({(line["step"], line["loss"], line["learning_rate"]) for line in lines})
    weights = (run / f"checkpoint-{STEPS:06d}" / "trained.safetensors").read_bytes()
    return weights, losses, json.loads((run / "summary.json").read_text())["resumed_from"]


def keepers(folder: Path) -> list[psutil.Process]:
    """Living ones of runs below `folder`."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        if "checkpoint.keeper" in line and str(folder) in line and process.info["status"] != "zombie":
            found.append(process)
    return found


def written_by_the_keeper(run: Path) -> str:
    """The newest checkpoint, once it is a later one than those that the run saved itself."""
    deadline = time.monotonic() + 30.0
    found: list[str] = []
    while time.monotonic() < deadline and (not found or found[-1] <= "checkpoint-000005"):
        found = sorted(place.name for place in run.glob("checkpoint-*"))
        time.sleep(0.05)
    assert found[-1] > "checkpoint-000005"
    return found[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_goes_on_from_memory_to_the_bit(tmp_path: Path, kind: str) -> None:
    whole, cut = (recipe(tmp_path / name, **KINDS[kind]) for name in ("whole", "cut"))
    assert train(whole) == 0
    killed(cut, DIES_AT)
    assert train(cut) == 0
    weights, losses, resumed = result(tmp_path / "cut")
    assert resumed is not None
    step = int(resumed.split("-")[1].split(" ")[0])
    assert step >= DIES_AT - 2  # a snapshot is whole once the next step has been made
    assert "memory" in resumed or step > 5  # or the keeper had it on the disk by then
    assert (weights, losses) == result(tmp_path / "whole")[:2]
    deadline = time.monotonic() + 10.0
    while keepers(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert keepers(tmp_path) == []


def test_without_its_keeper_it_goes_on_from_the_disk(tmp_path: Path) -> None:
    whole, cut = recipe(tmp_path / "whole"), recipe(tmp_path / "cut")
    assert train(whole) == 0
    killed(cut, DIES_AT, with_keeper=True)
    assert train(cut) == 0
    weights, losses, resumed = result(tmp_path / "cut")
    assert resumed == "checkpoint-000005"
    assert (weights, losses) == result(tmp_path / "whole")[:2]


def test_the_keeper_writes_the_newest_to_the_disk(tmp_path: Path) -> None:
    path = recipe(tmp_path / "cut")
    killed(path, DIES_AT)
    written = written_by_the_keeper(tmp_path / "cut" / "run")
    for keeper in keepers(tmp_path):
        keeper.kill()
        keeper.wait()
    assert train(path) == 0
    assert result(tmp_path / "cut")[2] == written


def test_a_fresh_start_forgets(tmp_path: Path) -> None:
    path = recipe(tmp_path / "cut")
    killed(path, DIES_AT)
    assert train_recipe(str(path), (), fresh=True, started=time.monotonic()) == 0
    assert result(tmp_path / "cut")[2] is None


def test_a_directory_made_anew_has_nothing_to_go_on_from(tmp_path: Path) -> None:
    path = recipe(tmp_path / "cut")
    killed(path, DIES_AT)
    written_by_the_keeper(tmp_path / "cut" / "run")
    shutil.rmtree(tmp_path / "cut" / "run")
    assert train(path) == 0
    assert result(tmp_path / "cut")[2] is None


def test_a_snapshot_that_fails_is_told_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise UserError("Snapshots in memory need 3 GB and 1 GB is free.")

    monkeypatch.setattr(Snapshotter, "begin", refused)
    assert train(recipe(tmp_path / "run")) == 0
    said = "".join(capsys.readouterr())
    assert said.count("no more snapshots in memory: Snapshots in memory need 3 GB") == 1
    assert (tmp_path / "run" / "run" / f"checkpoint-{STEPS:06d}").is_dir()


def test_snapshots_are_refused_where_there_can_be_none(tmp_path: Path) -> None:
    path = recipe(tmp_path / "disk", offload={"weights": "disk"})
    with pytest.raises(UserError, match=r"checkpoint\.in_memory  true was given, but weights are streamed"):
        train(path)
