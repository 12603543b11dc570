"""Whole runs with the layers' weights on disk: the run with them in memory, step by step."""

from __future__ import annotations

import json
import time

import pytest
import shoestring.train.building
import shoestring.train.run
import tiny
import torch
from safetensors.torch import load_file
from shoestring.recipes.errors import UserError
from shoestring.train.run import train_recipe


def go(path, **options):
    return train_recipe(str(path), (), fresh=False, started=time.monotonic(), **options)


def run(folder, **sections):
    folder.mkdir()
    assert go(tiny.recipe(folder, **sections)) == 0
    steps = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "run/summary.json").read_text())
    weights = {}
    for path in sorted((folder / "run/final").glob("*.safetensors")):
        weights |= load_file(path)
    return [step["loss"] for step in steps], summary, weights


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_from_disk_is_the_run_in_memory(tmp_path, monkeypatch, kind):
    sections = {}
    if kind == "full":
        one = {"micro_tokens": None, "micro_rows": None}  # micro-batch a step, in memory too
        order = shoestring.train.building.Order
        monkeypatch.setattr(shoestring.train.building, "Order", lambda rows, **o: order(rows, **{**o, **one}))
        sections = {"adapter": None, "optimizer": {"name": "lomo", "learning_rate": 1e-1}}
    losses, summary, weights = run(tmp_path / "memory", **sections)
    streamed = run(tmp_path / "disk", **sections, offload={"weights": "disk"})
    assert streamed[0] == losses
    assert streamed[1]["eval_loss"] == summary["eval_loss"]
    assert streamed[2].keys() - {"lm_head.weight"} == weights.keys() - {"lm_head.weight"}
    assert all(torch.equal(streamed[2][name], weights[name]) for name in weights if name in streamed[2])
    assert list((tmp_path / "disk/run").rglob("weights")) == []


def test_it_resumes(tmp_path):
    sections = {"adapter": None, "optimizer": {"name": "lomo", "learning_rate": 1e-1}}
    _, _, wanted = run(tmp_path / "whole", **sections, offload={"weights": "disk"})
    folder = tmp_path / "parts"
    folder.mkdir()
    path = tiny.recipe(folder, **sections, offload={"weights": "disk"})
    assert go(path, pause_at=0.5) == 0
    assert go(path) == 0
    got = {}
    for file in sorted((folder / "run/final").glob("*.safetensors")):
        got |= load_file(file)
    assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == []


def test_what_needs_all_weights_is_refused(tmp_path):
    (tmp_path / "dora").mkdir()
    path = tiny.recipe(
        tmp_path / "dora", adapter={"name": "lora", "r": 4, "use_dora": True}, offload={"weights": "disk"}
    )
    with pytest.raises(UserError, match=r"offload\.weights\s+disk was given, but DoRA"):
        go(path)
