"""A run whose optimizer's state is on disk is the run that has it in memory, killed or not."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import forked
import pytest
import tiny
from shoestring.train.run import train_recipe

DISK = {"optimizer": "disk", "buffer_size": "16KiB", "buffer_count": 3, "io": "threads"}


def train(recipe: Path, *overrides: str) -> int:
    return train_recipe(str(recipe), overrides, fresh=False, started=time.monotonic())


def summary(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def losses(run: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows]


def assert_same(run: Path, other: Path) -> None:
    assert losses(run) == losses(other)
    for name in ("trained", "optimizer"):
        newest = [sorted(path.glob("checkpoint-*"))[-1] / f"{name}.safetensors" for path in (run, other)]
        assert newest[0].read_bytes() == newest[1].read_bytes()


def nothing_left(run: Path) -> bool:
    return not [path for path in (run / ".offload").rglob("*") if path.is_file()]


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": {"name": "adamw", "learning_rate": 1e-2}},
    "adamw bf16": {
        "model.dtype": "bfloat16",
        "optimizer": {"name": "adamw", "learning_rate": 1e-2, "weights": "master"},
    },
    "apollo": {"optimizer": {"name": "apollo", "learning_rate": 1e-2, "rank": 8}},
    "q_apollo": {"optimizer": {"name": "q_apollo", "learning_rate": 1e-2, "rank": 8}},
    "in backward": {"optimizer": {"name": "adamw", "learning_rate": 1e-2, "step_in_backward": True}},
    "lora": {"adapter": {"name": "lora", "r": 8}},
}
KILLED = {"adamw bf16", "apollo"}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_a_run_on_disk_is_the_run_in_memory(tmp_path: Path, name: str, monkeypatch: Any) -> None:
    changes = {"adapter": None, **OPTIMIZERS[name]}
    dtype = changes.pop("model.dtype", "float32")
    recipe = tiny.recipe(
        tmp_path, model={"model_name_or_path": str(tmp_path / "model"), "dtype": dtype}, **changes
    )
    memory, disk, broken = tmp_path / "memory", tmp_path / "disk", tmp_path / "broken"
    offload = f"offload={json.dumps(DISK)}"
    assert train(recipe, "offload.optimizer=device", f"output_dir={memory}") == 0
    assert train(recipe, offload, f"output_dir={disk}") == 0
    assert_same(disk, memory)
    assert summary(disk)["optimizer_state_bytes"] == summary(memory)["optimizer_state_bytes"]
    assert nothing_left(disk)

    if name not in KILLED:
        return
    from shoestring.train.engine import NativeEngine

    real, calls = NativeEngine.step, [0]

    def dies(self: NativeEngine, max_grad_norm: float | None) -> Any:
        calls[0] += 1
        if calls[0] == 7:
            raise KeyboardInterrupt  # between the gradient and the update
        return real(self, max_grad_norm)

    monkeypatch.setattr(NativeEngine, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, offload, f"output_dir={broken}")
    monkeypatch.setattr(NativeEngine, "step", real)
    assert train(recipe, "offload.optimizer=device", f"output_dir={broken}") == 0  # it may go on elsewhere
    assert summary(broken)["resumed_from"] == "checkpoint-000004"
    assert_same(broken, memory)


@pytest.mark.slow
def test_sigkill_leaves_a_file_that_the_next_start_removes(tmp_path: Path) -> None:
    recipe = tiny.recipe(
        tmp_path,
        adapter=None,
        budget={"steps": 80},
        checkpoint={"every": 10},
        eval={"samples": 0},
        offload=DISK,
    )
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train(recipe, "offload.optimizer=device", f"output_dir={whole}") == 0
    command = [sys.executable, "-m", "shoestring.train", str(recipe)]
    process = forked.Popen(command)
    while not list(run.glob("checkpoint-*")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (stale,) = [path for path in (run / ".offload").iterdir() if path.is_dir()]
    assert (stale / "optimizer").is_file()
    assert forked.run(command).returncode == 0
    assert not stale.exists()
    assert nothing_left(run)
    assert_same(run, whole)


def test_an_optimizer_whose_state_cannot_move_is_refused(tmp_path: Path) -> None:
    from shoestring.recipes.errors import UserError

    recipe = tiny.recipe(tmp_path, adapter=None, optimizer={"name": "adamw_8bit"}, offload=DISK)
    with pytest.raises(UserError, match=r"offload.optimizer\s+disk was given"):
        train(recipe)
