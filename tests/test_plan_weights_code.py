"""The choice of how frozen layers lie on disk: by rates, by the recipe, in the plan and in a run."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import tiny
from plan_cases import Meter, machine, recipe, rows
from shoestring.offload.code_rate import CodeRate
from shoestring.offload.coded_layers import PART
from shoestring.offload.layer_buffers import THREADS
from shoestring.offload.placement import Placement
from shoestring.ops import native
from shoestring.plan import Plan, make_plan
from shoestring.plan.weights_code import decide
from shoestring.recipes.errors import UserError
from shoestring.train.run import train_recipe
from test_plan_offload import facts

GIGA = 10**9
RATE = CodeRate(4e9, 0.7)  # 1 GB takes 0.25 s


@pytest.mark.parametrize(
    ("compute", "reading", "shared", "coded", "why"),
    [
        (0.1, 1.0, False, True, "in about 11.2 of 16 bits there, 1.4 times as quick"),  # the disk decides
        (0.9, 1.0, False, True, "1.1 times as quick"),  # then computing does
        (0.97, 1.0, False, False, "decoding would take 0.25 s, reading takes 1 s"),  # not worth it
        (1.1, 1.0, False, False, "reading them is hidden behind computing"),
        (0.1, 0.2, False, False, "decoding would take 0.25 s, reading takes 0.2 s"),  # a disk too quick
        (0.1, 1.0, True, True, "1.4 times as quick"),
        (0.6, 1.0, True, True, "1.2 times as quick"),  # the cores compute and decode, one after the other
        (0.71, 1.0, True, False, "decoding would take 0.25 s of the cores that compute"),
        (2.0, 1.0, True, False, "reading them is hidden behind computing"),
    ],
)
def test_by_rates(compute: float, reading: float, shared: bool, coded: bool, why: str) -> None:
    found = decide(RATE, compute=compute, reading=reading, bytes_read=GIGA, shared=shared)
    assert found.coded == coded
    assert found.why.endswith(why)
    assert found.why.startswith("as they are") != coded


def plan(*overrides: str, on: Any = None, rate: CodeRate | None = RATE, seconds: float = 1e-5) -> Plan:
    on = on or machine()
    on.__dict__["decoding"] = rate
    wanted = recipe(
        "adapter=lora", "train.batch_tokens=2048", "budget.tokens=100000", "budget.time=null", *overrides
    )
    measure = Meter(per_token=1e4, seconds=seconds)
    return make_plan(wanted, on, facts(), rows(), world_size=1, libraries=0, can_pack=True, measure=measure)


def code_of(made: Plan) -> tuple[bool, str]:
    line = made.reasons["offload.weights"]
    return made.placement.coded, line.partition("; on disk ")[2]


def test_the_plan_takes_it_where_the_disk_is_waited_for() -> None:
    disk = "offload.weights=disk"
    assert code_of(plan(disk)) == (True, "in about 11.2 of 16 bits there, 1.4 times as quick")
    slow = plan(disk, seconds=1e-3)
    assert code_of(slow) == (
        False,
        "as they are, not in 11.2 of 16 bits: reading them is hidden behind computing",
    )
    missing = "as they are, since nothing here decodes them quickly"
    assert code_of(plan(disk, rate=None)) == (False, missing)
    assert code_of(plan(disk, "offload.weights_code=raw")) == (
        False,
        "as they are (offload.weights_code=raw)",
    )
    assert code_of(plan(disk, "model.dtype=float32")) == (False, "")
    assert not plan().placement.coded


def test_the_plan_counts_its_memory_and_no_room_less() -> None:
    coded, raw = plan("offload.weights=disk"), plan("offload.weights=disk", "offload.weights_code=raw")
    assert coded.memory["host"]["decoding"] == THREADS * PART
    assert coded.memory["host"]["total"] - raw.memory["host"]["total"] == THREADS * PART
    assert "decoding" not in raw.memory["host"]
    assert coded.disk_writes == raw.disk_writes
    assert coded.step_seconds == raw.step_seconds, "a bound: what the code saves is not counted"
    on = machine("cuda", gpu=24.0)
    assert plan("offload.weights=disk", "model.dtype=bfloat16", on=on).memory["host"]["decoding"] > 0


def test_a_plan_there_and_back_and_one_from_before() -> None:
    made = plan("offload.weights=disk")
    assert Plan.from_json(json.dumps(made.to_json())) == made
    old = [{k: v for k, v in part.items() if k != "coded"} for part in made.placement.to_json()]
    assert not Placement.from_json(old).coded


@pytest.mark.skipif(native.missing() is not None, reason=f"no C++ here: {native.missing()}")
def test_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ("offload.weights=disk", "offload.weights_code=lossless")
    assert code_of(plan(*wanted, seconds=1e-3)) == (True, "coded (offload.weights_code=lossless)")
    monkeypatch.setenv("SHOESTRING_OPS", "torch")
    assert code_of(plan(*wanted)) == (
        False,
        "as they are, since SHOESTRING_OPS=torch forbids the C++ decoder",
    )


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        ((), "only layers on disk are coded: offload.weights=disk."),
        (("offload.weights=host",), "only layers on disk are coded: offload.weights=disk."),
        (("offload.weights=disk", "model.dtype=float32"), "not float32: model.dtype=bfloat16."),
        (
            (
                "offload.weights=disk",
                "adapter=null",
                "optimizer.step_in_backward=true",
                "train.batch_tokens=null",
            ),
            "all are trained: adapter=lora.",
        ),
    ],
)
def test_asked_for_where_nothing_can_be_coded(overrides: tuple[str, ...], why: str) -> None:
    with pytest.raises(UserError) as caught:
        plan("offload.weights_code=lossless", *overrides)
    text = str(caught.value)
    assert text.startswith("offload.weights_code  lossless was given, but only ")
    assert why in text
    assert text.endswith("Set that, or leave this out: offload.weights_code=auto")


@pytest.mark.skipif(native.missing() is not None, reason=f"no C++ here: {native.missing()}")
def test_a_run_with_coded_layers_is_the_run_without(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("shoestring.offload.coded_layers.PART", 4 * 4096)
    monkeypatch.setattr("shoestring.offload.layer_tier.PART", 4 * 4096)
    losses = {}
    for code in ("raw", "lossless"):
        folder = tmp_path / code
        folder.mkdir()
        path = tiny.recipe(folder, offload={"weights": "disk", "weights_code": code})
        changes = ("model.dtype=bfloat16",)
        assert train_recipe(str(path), changes, fresh=False, started=time.monotonic()) == 0
        lines = (folder / "run/metrics.jsonl").read_text().splitlines()
        losses[code] = [json.loads(line)["loss"] for line in lines]
        said = "of 16 bits a weight, decoded while they are read" in capsys.readouterr().out
        assert said == (code == "lossless")
    assert losses["raw"] == losses["lossless"]
