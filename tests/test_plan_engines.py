"""What an engine holds by the plan: against a table written out by hand, in plans, in real processes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
import tiny
from plan_cases import Meter, machine, recipe, rows
from rich.console import Console
from shoestring.plan import Plan, make_plan
from shoestring.plan.engines import Counts, held_by
from shoestring.plan.memory import Sizes, footprint
from shoestring.plan.show import render
from shoestring.recipes import DeepSpeedConfig, Recipe
from shoestring.recipes.errors import BudgetError
from shoestring.train.deepspeed_config import deepspeed_config
from shoestring.train.launch import _free_port
from test_plan_offload import PARAMETERS, facts

# A million weights that are all trained; the rest in numbers that no other quotient gives by chance.
COUNTS: dict[str, Any] = {
    "elements": 1_000_000,
    "trained": 1_000_000,
    "largest": 90_000,
    "layers": 8,
    "root_trained": 200_000,
    "accumulates": True,
}
FLOAT32 = Counts(weights=4_000_000, itemsize=4, root=800_000, **COUNTS)
BFLOAT16 = Counts(weights=2_000_000, itemsize=2, root=400_000, **COUNTS)

# engine, weights' type, processes: on the device, in host memory. Thousands of bytes.
KILO = 1000
NVME = {"zero_stage": 3, "offload_optimizer": "nvme", "nvme_path": "/d"}
TABLE: list[tuple[dict[str, Any], Counts, int, dict[str, int], dict[str, int]]] = [
    ({"zero_stage": 0}, FLOAT32, 4, {"weights": 4000, "gradients": 4000, "optimizer": 8000}, {}),
    ({"zero_stage": 0}, BFLOAT16, 4, {"weights": 2000, "gradients": 2000, "optimizer": 12000}, {}),
    (
        {"zero_stage": 1},
        FLOAT32,
        4,
        {"weights": 4000, "gradients": 4000, "optimizer": 3000, "buckets": 4000},
        {},
    ),
    (
        {"zero_stage": 2},
        FLOAT32,
        1,
        {"weights": 4000, "gradients": 4000, "optimizer": 12000, "buckets": 4000},
        {},
    ),
    (
        {"zero_stage": 2},
        FLOAT32,
        4,
        {"weights": 4000, "gradients": 1000, "optimizer": 3000, "buckets": 4000},
        {},
    ),
    (
        {"zero_stage": 2},
        BFLOAT16,
        4,
        {"weights": 2000, "gradients": 500, "optimizer": 3000, "buckets": 2000},
        {},
    ),
    (
        {"zero_stage": 3},
        BFLOAT16,
        4,
        {"weights": 500, "gathered": 2000, "gradients": 500, "optimizer": 3000, "buckets": 2000},
        {},
    ),
    (
        {"zero_stage": 3, "zero_hpz_partition_size": 2},
        BFLOAT16,
        4,
        {"weights": 1500, "gathered": 2000, "gradients": 500, "optimizer": 3000, "buckets": 2000},
        {},
    ),
    # Host memory: float32 gradients to step, and those that add up; stage 2 keeps these twice.
    (
        {"zero_stage": 1, "offload_optimizer": "cpu"},
        FLOAT32,
        4,
        {"weights": 4000, "gradients": 4000, "optimizer": 0, "buckets": 4720},
        {"optimizer": 3000, "gradients": 2000},
    ),
    (
        {"zero_stage": 2, "offload_optimizer": "cpu"},
        BFLOAT16,
        4,
        {"weights": 2000, "gradients": 0, "optimizer": 0, "buckets": 2360},
        {"optimizer": 3000, "gradients": 2000},
    ),
    # ZenFlow: a tenth of the columns has two moments and a gradient on the device, twice at an update.
    (
        {"zero_stage": 2, "offload_optimizer": "cpu", "zenflow": {}},
        FLOAT32,
        4,
        {"weights": 4000, "gradients": 800, "optimizer": 800, "buckets": 8720},
        {"optimizer": 3000, "gradients": 3000},
    ),
    (
        {"zero_stage": 1, "offload_optimizer": "cpu", "zenflow": {"topk_ratio": 0.25}},
        FLOAT32,
        4,
        {"weights": 4000, "gradients": 6000, "optimizer": 2000, "buckets": 8720},
        {"optimizer": 3000, "gradients": 2000},
    ),
    (
        {"zero_stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"},
        FLOAT32,
        4,
        {"weights": 0, "gathered": 4000, "gradients": 0, "optimizer": 0, "buckets": 4000},
        {"weights": 1000, "optimizer": 3000, "gradients": 2000},
    ),
    # 4 buffers of 4 bytes for 250,000 elements, or for a sub-group of 10,000.
    (
        NVME,
        FLOAT32,
        4,
        {"weights": 1000, "gathered": 4000, "gradients": 0, "optimizer": 0, "buckets": 4000},
        {"gradients": 1000, "buffers": 4000},
    ),
    (
        {**NVME, "sub_group_size": 10_000},
        FLOAT32,
        4,
        {"weights": 1000, "gathered": 4000, "gradients": 0, "optimizer": 0, "buckets": 4000},
        {"gradients": 1000, "buffers": 160},
    ),
    # Root 800 and two of eight layers of 400; the root's gradient twice, 200,000 elements of 4 and 4 bytes.
    (
        {"name": "fsdp2"},
        FLOAT32,
        4,
        {"weights": 1000, "gradients": 1000, "optimizer": 2000, "gathered": 1600, "buckets": 1600},
        {},
    ),
    (
        {"name": "fsdp2", "reshard_after_forward": False},
        BFLOAT16,
        4,
        {"weights": 1000, "gradients": 1000, "optimizer": 2000, "gathered": 2000, "buckets": 1200},
        {},
    ),
    (
        {"name": "fsdp2", "cpu_offload": True},
        BFLOAT16,
        2,
        {"weights": 0, "gradients": 0, "optimizer": 0, "gathered": 800, "buckets": 1200},
        {"weights": 2000, "gradients": 2000, "optimizer": 4000},
    ),
]


SHORT: dict[str, Any] = {
    "model": "m",
    "data": "d",
    "budget": "1h",
    "optimizer": {"max_grad_norm": None},
    "train": {"per_device_train_batch_size": 1},
}


def with_engine(engine: dict[str, Any]) -> Recipe:
    return Recipe(**SHORT, engine={"name": "deepspeed", **engine})


@pytest.mark.parametrize("row", range(len(TABLE)))
def test_each_part_is_that_of_the_table(row: int) -> None:
    engine, counts, processes, device, host = TABLE[row]
    held = held_by(with_engine(engine), counts, world_size=processes, accelerated=False)
    assert held is not None
    assert held.device == {name: size * KILO for name, size in device.items()}
    assert held.host == {name: size * KILO for name, size in host.items()}


def test_what_is_gathered_saved_and_on_disk() -> None:
    for counts, saved in ((FLOAT32, 2_000_000), (BFLOAT16, 3_000_000)):  # 8 and 12 bytes, on four processes
        held = held_by(with_engine({"zero_stage": 2}), counts, world_size=4, accelerated=False)
        assert held is not None
        assert (held.whole, held.saved, held.disk) == (counts.weights, saved, 0)
    narrow = held_by(with_engine({"name": "fsdp2"}), BFLOAT16, world_size=4, accelerated=False)
    assert narrow is not None
    assert narrow.whole == 4_000_000  # trained weights are made float32 before they are cut
    disk = held_by(with_engine(NVME), FLOAT32, world_size=4, accelerated=False)
    assert disk is not None
    assert disk.disk == 4_000_000
    assert held_by(with_engine({"name": "native"}), FLOAT32, world_size=4, accelerated=True) is None


def test_buckets_are_what_deepspeed_is_told() -> None:
    """Two where reductions run beside the backward pass; of a large model 5e8 elements."""
    huge = Counts(**{**vars(FLOAT32), "trained": 2_000_000_000})
    for stage, accelerated in ((1, True), (2, False), (2, True), (3, True)):
        engine = DeepSpeedConfig(zero_stage=stage)
        told = deepspeed_config(
            engine,
            trained=huge.trained,
            max_grad_norm=None,
            bfloat16=False,
            on_cpu=not accelerated,
            scratch=None,
        )["zero_optimization"]
        held = held_by(with_engine({"zero_stage": stage}), huge, world_size=2, accelerated=accelerated)
        assert held is not None
        buffers = 2 if stage == 2 and told["overlap_comm"] else 1
        assert held.device["buckets"] == 4 * buffers * told["reduce_bucket_size"]


def test_the_worst_phase_counts_gathering() -> None:
    """On a GPU the shards and the whole weights; on a CPU the state to save too."""
    held = held_by(with_engine({"zero_stage": 2}), FLOAT32, world_size=4, accelerated=True)
    sizes = Sizes(
        weights=4_000_000,
        unquantised=4_000_000,
        adapter=0,
        trained=4_000_000,
        gradients=4_000_000,
        optimizer=8_000_000,
        update=None,  # type: ignore[arg-type]  # no time is asked for
        largest=0,
        libraries=0,
        merged=0,
        held=held,
    )
    gpu = footprint("cuda", sizes, activations=0, logits=0)
    train = 4_000_000 + 1_000_000 + 3_000_000 + 2 * 4_000_000
    gather = 4_000_000 + 4_000_000 + 3_000_000
    assert gpu.phases["train"] - gpu.phases["gather"] == train - gather
    assert gpu.host["state to save"] == 2_000_000
    cpu = footprint("cpu", sizes, activations=0, logits=0)
    assert cpu.phases["train"] - cpu.phases["gather"] == train - gather - 2_000_000
    assert cpu.phases["load"] > 4_000_000  # each process loads the whole model


def plan(engine: str, *overrides: str, processes: int = 1, gpu: float = 0.0, host: float = 16.0) -> Plan:
    """Full tuning of 38 million weights; the measurement by a formula."""
    wanted = recipe(
        "adapter=null", "budget.time=null", "budget.steps=100", f"engine.name={engine}", *overrides
    )
    return make_plan(
        wanted,
        machine("cuda" if gpu else "cpu", host=host, gpu=gpu),
        facts(),
        rows(),
        world_size=processes,
        measure=Meter(per_token=1e4),
        libraries=0,
        can_pack=True,
    )


def test_plans_show_the_parts_and_one_line() -> None:
    made = plan("deepspeed", "engine.zero_stage=2", processes=4, gpu=8)
    device = made.memory["device"]
    assert device["optimizer"] == 12 * -(-PARAMETERS // 4)
    assert device["weights"] == 4 * PARAMETERS
    assert made.reasons["engine"].startswith(
        "optimizer state and gradients in 4 parts, one a process; loaded"
    )
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(render(made))
    shown = console.export_text()
    assert "in 4 parts" in shown
    assert "buckets" in shown
    assert "engine" not in plan("native").reasons
    assert Plan.from_json(made.to_json()) == made


def test_what_fits_in_shards_is_not_refused() -> None:
    """Bytes a weight: 4, 4 of gradient, 8 of buckets and 12 of state; the last and the gradient in four."""
    with pytest.raises(BudgetError) as refused:
        plan("deepspeed", "engine.zero_stage=2", "export.final=none", gpu=1.25)
    text = str(refused.value)
    assert "engine.offload_optimizer=cpu" in text
    assert "adamw_8bit" not in text  # which this engine would refuse
    assert plan("deepspeed", "engine.zero_stage=2", "export.final=none", gpu=1.25, processes=4)
    moved = plan("deepspeed", "engine.zero_stage=2", "engine.offload_optimizer=cpu", gpu=1.25)
    assert moved.memory["device"]["optimizer"] == 0
    assert moved.memory["host"]["optimizer"] == 12 * PARAMETERS


def test_processes_on_a_cpu_share_one_memory() -> None:
    one, four = (plan("fsdp2", processes=count, host=16) for count in (1, 4))
    assert four.memory_limits["host"] == one.memory_limits["host"] // 4
    assert four.memory["host"]["optimizer"] * 4 == pytest.approx(one.memory["host"]["optimizer"], rel=1e-6)
    assert four.memory["device"] == {}


@pytest.mark.slow
def test_real_processes_hold_what_the_plan_says(tmp_path: Path) -> None:
    """Tensors alive before a step, beside those before the engine began, against the parts."""
    processes = 2
    model = tiny.model_folder(tmp_path / "model", layers=8)
    data = tiny.chats(tmp_path / "chats.jsonl")
    for name, engine in (
        ("zero-2", {"name": "deepspeed", "zero_stage": 2}),
        ("zero-2-cpu", {"name": "deepspeed", "zero_stage": 2, "offload_optimizer": "cpu"}),
        ("zero-3", {"name": "deepspeed", "zero_stage": 3}),
        ("fsdp2", {"name": "fsdp2"}),
    ):
        (tmp_path / name).mkdir()
        tiny.recipe(
            tmp_path / name,
            model=str(model),
            data={"train": str(data), "eval": 0.1},
            adapter=None,
            engine=engine,
            budget={"steps": 2},
            train={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
            optimizer={"learning_rate": 1e-3},
            eval={"samples": 0},
            export={"final": "none"},
        )
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    script = Path(__file__).with_name("engine_memory.py")
    children = [
        forked.Popen(
            [sys.executable, script, tmp_path],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            errors=tmp_path / f"stderr-{rank}",
        )
        for rank in range(processes)
    ]
    try:
        codes = [child.wait(timeout=400) for child in children]
    finally:
        for child in children:
            child.kill()
    assert codes == [0] * processes, (tmp_path / "stderr-0").read_text()[-3000:]
    for line in json.loads((tmp_path / "held.json").read_text()):
        assert line["found"] == pytest.approx(line["planned"], rel=0.1), line
