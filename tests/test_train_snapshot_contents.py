"""A snapshot holds, file by file, what a checkpoint of the same step holds: both resume the same run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from pydantic import TypeAdapter
from shoestring.checkpoint import Snapshotter, open_checkpoint, optimizer_state, random_state, save
from shoestring.optimizers import build_optimizer, set_rate
from shoestring.recipes import OptimizerConfig
from shoestring.train.run import train_recipe
from shoestring.train.snapshots import Snapshots
from test_train_optimizers import NAMES, _one_thread, optimizer_of
from test_train_stages import pairs

__all__ = ["_one_thread"]  # a fixture
pytestmark = pytest.mark.slow

FULL = {"adapter": None, "optimizer": {"name": "adamw", "learning_rate": 1e-3}}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"adapter": {"name": "lora", "r": 4, "use_dora": True}},
    "padded": {**FULL, "data": {"packing": False}},
    "workers": {"data": {"num_workers": 2}},
    "accumulation": {**FULL, "train": {"gradient_accumulation_steps": 3, "batch_tokens": 300}},
    "frozen reference": {**FULL, "objective": {"name": "dpo", "reference": "frozen"}},
}


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_is_in_it(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {
            "layers": torch.nn.ModuleList(
                [torch.nn.Linear(64, 128), torch.nn.LayerNorm(128), torch.nn.Linear(128, 64)]
            )
        }
    )
    config = TypeAdapter(OptimizerConfig).validate_python(optimizer_of(name))
    optimizer = build_optimizer(model, config.model_copy(update={"weight_decay": 0.01}))
    names = dict(model.named_parameters())
    with Snapshotter(tmp_path / "run") as snapshots:
        for _ in range(2):
            set_rate(optimizer, 1e-3)
            value = torch.randn(8, 64)
            for layer in model["layers"]:  # type: ignore[union-attr]
                value = layer(value)
            value.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        tensors, settings = optimizer_state(optimizer, names)
        parts = {"trained": dict(names), "optimizer": tensors}
        json = {"optimizer": settings, "random": [random_state()]}
        assert snapshots.begin(2, tensors=parts, json=json)
        snapshots.wait()
        saved = save(tmp_path / "disk", step=2, tensors=parts, json=json)
        snapshots.flush()
        found = snapshots.newest()
        assert found is not None
        assert found.files.keys() == open_checkpoint(saved).manifest.files.keys()
        for file in found.files:
            assert bytes(found.file(file)) == (saved / file).read_bytes(), file
        del found


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_checkpoint(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sections = dict(KINDS[kind])
    if "objective" in sections:
        sections["data"] = {"train": str(pairs(tmp_path / "pairs.jsonl")), "eval": 0.2}
    elif "data" in sections:
        sections["data"] |= {"train": str(tiny.chats(tmp_path / "chats.jsonl")), "eval": 0.1}
    recipe = tiny.recipe(
        tmp_path,
        budget={"steps": 3},
        eval={"samples": 0, "every": "100%"},
        export="none",
        checkpoint={"every": 2, "keep_best": False, "in_memory": True, "snapshot_every": 2},
        **sections,
    )
    compared = []
    take = Snapshots.take

    def taking(self: Snapshots, run: Any) -> None:
        take(self, run)
        assert self._own is not None
        self._own.flush()
        found = self._own.newest()
        assert found is not None
        assert found.step == run.state.step == 2
        saved = open_checkpoint(run.run_dir.path / "checkpoint-000002")
        shared = {name for name in saved.manifest.files if name in found.files}
        assert {"trained.safetensors", "optimizer.safetensors", "trainer.json", "random.json"} <= shared
        for name in shared - {"trainer.json", "adapter_config.json"}:  # PEFT writes more into the latter
            assert bytes(found.file(name)) == (saved.path / name).read_bytes(), name
        mine, theirs = found.json("trainer"), saved.json("trainer")
        assert mine.keys() == theirs.keys()
        assert mine["state"] == theirs["state"]
        assert mine["identity"] == theirs["identity"]
        assert mine["clock"]["seconds"] >= theirs["clock"]["seconds"]
        compared.append(shared)

    monkeypatch.setattr(Snapshots, "take", taking)
    assert train_recipe(str(recipe), (), fresh=False, started=time.monotonic()) == 0
    assert len(compared) == 1
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 3
