"""Runs of two processes, killed: gone on with from memory to the bit; by another number; with one lost."""

from __future__ import annotations

import json
import os
import re
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
from shoestring.checkpoint.sharded_reading import shard_folders
from shoestring.train import loop
from shoestring.train.launch import _free_port
from shoestring.train.run import train_recipe

pytestmark = pytest.mark.slow

STEPS, DIES_AT = 8, 6
KINDS: dict[str, dict[str, Any]] = {
    "native": {"adapter": {"name": "lora", "r": 4, "lora_dropout": 0.2}},
    "fsdp2": {"engine": "fsdp2", "adapter": {"name": "lora", "r": 3}},
    "zero-1": {"engine": {"name": "deepspeed", "zero_stage": 1}, "adapter": None},
    "zero-3": {"engine": {"name": "deepspeed", "zero_stage": 3}, "adapter": {"name": "lora", "r": 3}},
}


def recipe(folder: Path, **sections: Any) -> Path:
    folder.mkdir(exist_ok=True)
    given: dict[str, Any] = {
        "budget": {"steps": STEPS},
        "checkpoint": {"every": 4, "keep_best": False, "in_memory": True, "snapshot_every": 1},
        "train": {"batch_tokens": 256},
        "optimizer": {"learning_rate": 3e-3},
        "eval": {"samples": 0},
        "export": "none",
    }
    return tiny.recipe(folder, **{**given, **sections})


def child(path: Path, rank: int, ranks: int, port: int, dies_at: int | None) -> None:
    os.environ.update(OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true")
    if rank == 0:
        os.dup2(os.open(path.with_name("said"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    torch.set_num_threads(1)
    if ranks > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(ranks),
            LOCAL_WORLD_SIZE=str(ranks),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    if "deepspeed" in path.read_text():
        from shoestring.train import deepspeed_config

        deepspeed_config.PERSISTENT = 0  # small weights are cut too
    record = loop._record

    def killing(run: Any, *values: Any) -> None:
        record(run, *values)
        if run.state.step == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)

    loop._record = killing
    code = train_recipe(str(path), (), fresh=False, started=time.monotonic())
    os._exit(code)  # a process group may outlive its use


def train(path: Path, ranks: int, dies_at: int | None = None) -> None:
    port = _free_port()
    children = [
        CONTEXT.Process(target=child, args=(path, rank, ranks, port, dies_at)) for rank in range(ranks)
    ]
    for process in children:
        process.start()
    for process in children:
        process.join(240)
    codes = {process.exitcode for process in children}
    assert codes == ({0} if dies_at is None else {-signal.SIGKILL})


def result(folder: Path) -> tuple[bytes, list[tuple[int, float]]]:
    run = folder / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = sorted({(line["step"], line["loss"]) for line in lines})
    return (run / f"checkpoint-{STEPS:06d}" / "trained.safetensors").read_bytes(), losses


def resumed_from(folder: Path) -> str:
    return str(json.loads((folder / "run/summary.json").read_text())["resumed_from"])


def keepers(folder: Path) -> dict[str, psutil.Process]:
    found = {}
    for process in psutil.process_iter(["cmdline", "status"]):
        line = process.info["cmdline"] or []
        ours = "shoestring.checkpoint.keeper" in line and line[-1].startswith(str(folder))
        if ours and process.info["status"] != "zombie":
            found[Path(line[-1]).name] = process
    return found


def nothing_left(folder: Path) -> None:
    until = time.monotonic() + 10
    while keepers(folder):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert shard_folders(folder / "run") == {}


@pytest.mark.parametrize("kind", KINDS)
def test_two_killed_processes_go_on_to_the_bit(tmp_path: Path, kind: str) -> None:
    whole, cut = (recipe(tmp_path / name, **KINDS[kind]) for name in ("whole", "cut"))
    train(whole, 2)
    train(cut, 2, dies_at=DIES_AT)
    train(cut, 2)
    assert "of 2 processes" in resumed_from(tmp_path / "cut")
    assert int(resumed_from(tmp_path / "cut").split("-")[1].split(" ")[0]) >= DIES_AT - 2
    assert result(tmp_path / "cut") == result(tmp_path / "whole")
    nothing_left(tmp_path)


def test_another_number_of_processes_and_one_that_is_lost(tmp_path: Path) -> None:
    plain = {"adapter": None}  # no generators are drawn from, so that only the order of sums differs
    alone = recipe(tmp_path / "alone", **plain)
    train(alone, 1)
    _, losses = result(tmp_path / "alone")
    cut = recipe(tmp_path / "cut", **plain)
    train(cut, 2, dies_at=3)
    lost = keepers(tmp_path)["0001-of-0002"]
    lost.kill()
    lost.wait()
    for path in (tmp_path / "cut/run/shards/0001-of-0002").glob("checkpoint-*"):
        shutil.rmtree(path)
    train(cut, 1, dies_at=6)  # and now of one
    train(cut, 3)
    said = (tmp_path / "cut/said").read_text()
    assert re.search("resuming at step [123]\n", said)  # there was nothing on the disk
    assert "goes on with 1 process, where 2 had begun" in said
    assert "goes on with 3 processes, where 1 had begun" in said
    for (step, mine), (_, theirs) in zip(result(tmp_path / "cut")[1], losses, strict=True):
        assert mine == pytest.approx(theirs, abs=2e-5), step
    nothing_left(tmp_path)
