"""DeepSpeed and FSDP2 in two processes: the losses of one, resumed to the bit, the same files."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
import tiny
import torch
from safetensors.torch import load_file
from shoestring.train.launch import _free_port
from shoestring.train.run import train_recipe
from shoestring.train.zero_states import shard_of

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("engines")]

ENGINES: dict[str, dict[str, Any]] = {
    "zero-2": {"engine": {"name": "deepspeed", "zero_stage": 2, "offload_optimizer": "cpu"}, "adapter": None},
    "zero-3": {"engine": {"name": "deepspeed", "zero_stage": 3}, "adapter": {"name": "lora", "r": 3}},
    "fsdp2": {"engine": "fsdp2", "adapter": {"name": "lora", "r": 3}},
}
if importlib.util.find_spec("deepspeed") is None:
    ENGINES = {"fsdp2": ENGINES["fsdp2"]}
PAUSED = [name for name in ENGINES if name != "zero-2"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: Any) -> Path:
    """FOLDER/NAME/native, of one process; and /whole and some /paused, of the same two processes."""
    folder: Path = tmp_path_factory.mktemp("runs")
    for name, sections in ENGINES.items():
        place = folder / name
        place.mkdir()
        given = {
            "budget": {"steps": 8},
            "train": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
            "optimizer": {"learning_rate": 3e-3},
            "eval": {"samples": 1, "max_new_tokens": 2, "every": "50%"},
            **sections,
        }
        # Two processes make twice the micro-batches: as many for one process alone, for comparison.
        alone = {**given, "engine": "native"}
        alone["train"] = {**given["train"], "gradient_accumulation_steps": 4}
        recipe = tiny.recipe(place, **alone)
        native = f"output_dir={place / 'native'}"
        assert train_recipe(str(recipe), (native,), fresh=False, started=time.monotonic()) == 0
        tiny.recipe(place, **given)
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    script = Path(__file__).with_name("engine_processes.py")
    children = [
        forked.Popen(
            [sys.executable, script, folder, *PAUSED],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            errors=folder / f"stderr-{rank}",
        )
        for rank in range(2)
    ]
    try:
        codes = [child.wait(timeout=900) for child in children]
    finally:
        for child in children:
            child.kill()
    assert codes == [0, 0], "".join((folder / f"stderr-{rank}").read_text()[-3000:] for rank in range(2))
    return folder


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_as_one(runs: Path, engine: str) -> None:
    one, two = runs / engine / "native", runs / engine / "whole"
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5), a["step"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4), a["step"]
    results = [json.loads((run / "summary.json").read_text()) for run in (one, two)]
    assert results[0]["eval_loss"] == pytest.approx(results[1]["eval_loss"], abs=1e-5)
    assert (two / "final/config.json").is_file()


@pytest.mark.parametrize("engine", ENGINES)
def test_the_files_do_not_know_how_many_wrote_them(runs: Path, engine: str) -> None:
    one, two = (runs / engine / name / "checkpoint-000008" for name in ("native", "whole"))
    for file, tolerance in (("trained", 3e-4), ("optimizer", 1e-3)):
        mine, theirs = (load_file(folder / f"{file}.safetensors") for folder in (two, one))
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)
    assert json.loads((one / "optimizer.json").read_text()) == json.loads(
        (two / "optimizer.json").read_text()
    )


@pytest.mark.parametrize("engine", PAUSED)
def test_two_processes_go_on_to_the_bit(runs: Path, engine: str) -> None:
    whole, paused = runs / engine / "whole", runs / engine / "paused"
    assert [line["loss"] for line in metrics(paused)] == [line["loss"] for line in metrics(whole)]
    for file in ("trained.safetensors", "optimizer.safetensors"):
        mine, theirs = (folder / "checkpoint-000008" / file for folder in (paused, whole))
        assert mine.read_bytes() == theirs.read_bytes()


def test_a_shard_is_a_run_of_elements_with_zeros_after_the_last(monkeypatch: Any) -> None:
    value = torch.arange(1.0, 6.0).view(5, 1)
    for rank, expected in ((0, [1.0, 2.0, 3.0]), (1, [4.0, 5.0, 0.0])):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        assert shard_of(value, 3).tolist() == expected
