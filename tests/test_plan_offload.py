"""The plan's part of offload: tiers, bytes, seconds, writes, refusals; a measurement given by a formula."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from plan_cases import GIGA, Meter, machine, recipe, rows, tiny_facts
from rich.console import Console
from shoestring.models.facts import ModelFacts, build_skeleton
from shoestring.models.weights import load_model
from shoestring.offload import rates as disk_probe
from shoestring.offload.place import offload_optimizer
from shoestring.offload.rates import DiskRates
from shoestring.offload.segments import cut_into_segments
from shoestring.offload.steppers import stepper_for
from shoestring.optimizers import build_optimizer, slots
from shoestring.plan import Plan, make_plan
from shoestring.plan.machine import Machine
from shoestring.plan.offload import move_state
from shoestring.plan.show import render
from shoestring.recipes.errors import BudgetError, UserError

WRITE = 5e8  # bytes a second of the test machine's disk


@functools.cache
def facts() -> ModelFacts:
    """A Llama of 38 million parameters that exists as shapes only: its state is larger than the buffers."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=10,
        num_attention_heads=8,
        vocab_size=8000,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    skeleton = build_skeleton(config)
    found = [(slot.name, slot.shape) for slot in slots(skeleton)]
    count = sum(torch.Size(shape).numel() for _, shape in found)
    return replace(
        tiny_facts(),
        config=config,
        parameters=count,
        embedding_parameters=8000 * 512,
        layers=10,
        hidden_size=512,
        vocab_size=8000,
        parameter_shapes=tuple(found),
    )


def plan(*overrides: str, on: Machine | None = None, **given: Any) -> Plan:
    """The plan of full tuning, 1,000 steps at most."""
    given = {"world_size": 1, "measure": Meter(per_token=1e4), "libraries": 0, "can_pack": True, **given}
    counted = ("budget.time=null", "budget.steps=1000", "train.batch_tokens=4096")
    wanted = recipe("adapter=null", *counted, *overrides)
    return make_plan(wanted, on or machine(), facts(), rows(), **given)


PARAMETERS = 38_185_472
TIGHT = machine(host=0.75)  # weights, gradients and the buffers, but not the two moments


def test_nothing_changes_where_all_fits() -> None:
    made = plan()
    assert made.placement.all_on_device
    assert made.placement.tier("optimizer") == "device"
    assert made.disk_writes == made.disk_bytes
    assert [key for key in made.reasons if key.startswith("offload") or key == "disk_writes"] == []
    assert "ring" not in made.memory["host"]


def test_auto_takes_the_disk_only_where_memory_is_short() -> None:
    roomy, tight = plan(), plan(on=TIGHT)
    assert roomy.parameters == PARAMETERS
    assert tight.placement.tier("optimizer") == "disk"
    assert tight.predicted_host_bytes <= 0.75 * GIGA < roomy.predicted_host_bytes
    assert tight.optimizer_bytes == roomy.optimizer_bytes == pytest.approx(8 * roomy.parameters, rel=0.01)
    ring = next(placed for placed in tight.placement.parts if placed.part == "ring")
    assert tight.memory["host"]["ring"] == ring.bytes
    assert 3 * (15 << 20) < ring.bytes <= 6 * (16 << 20)
    assert tight.memory["host"]["optimizer"] < 0.001 * tight.optimizer_bytes  # what is too small to move
    assert tight.reasons["offload.optimizer"].startswith("does not fit the device; ")


def test_the_step_takes_what_the_disk_takes() -> None:
    made = plan("offload.optimizer=disk")
    moved = made.optimizer_bytes - 6 * 15.1e6  # six segments stay in the buffers
    assert made.update_seconds == pytest.approx(2 * moved / WRITE, rel=0.1)
    before = plan()
    added = made.update_seconds - before.update_seconds
    assert made.step_seconds - before.step_seconds == pytest.approx(added)
    line = made.reasons["offload.optimizer"]
    assert line.startswith("offload.optimizer=disk; ")
    assert line.endswith(" s at 500 MB/s, read and written together")


def test_writes_are_predicted_and_their_wear_is_said() -> None:
    made = plan("offload.optimizer=disk")
    state = made.disk_writes - made.disk_bytes
    assert state == pytest.approx(1000 * (made.optimizer_bytes - 6 * 15.1e6), rel=0.1)
    share = float(re.search(r"; ([\d.]+) % of the 600 TB", made.reasons["disk_writes"])[1])  # type: ignore[index]
    assert share == pytest.approx(100 * made.disk_writes / 600e12, rel=0.05)
    double = plan("offload.optimizer=disk", world_size=2)
    assert double.disk_writes - double.disk_bytes == pytest.approx(2 * state, rel=0.01)
    assert double.update_seconds == pytest.approx(2 * made.update_seconds, rel=0.05)


def test_a_larger_ring_writes_less_and_one_that_holds_all_writes_nothing() -> None:
    six, twelve = plan("offload.optimizer=disk"), plan("offload.optimizer=disk", "offload.buffer_count=12")
    assert six.disk_writes > twelve.disk_writes > twelve.disk_bytes
    assert six.memory["host"]["ring"] < twelve.memory["host"]["ring"]
    all_of_it = plan("offload.optimizer=disk", "offload.buffer_count=100")
    assert all_of_it.disk_writes == all_of_it.disk_bytes
    assert "all of it fits the buffers" in all_of_it.reasons["offload.optimizer"]


def test_a_plan_with_state_on_disk_there_and_back() -> None:
    made = plan("offload.optimizer=disk")
    again = Plan.from_json(json.dumps(made.to_json()))
    assert again == made
    assert again.placement.tier("optimizer") == "disk"
    old = {k: v for k, v in plan().to_json().items() if k not in ("placement", "disk_writes")}
    assert Plan.from_json(old).placement.tier("optimizer") == "device"


def screen(made: Plan) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(made))
    return console.export_text()


def test_the_placement_on_the_screen() -> None:
    text = screen(plan("offload.optimizer=disk"))
    for words in (
        "lives on",
        "optimizer     disk",
        "ring",
        "disk writes",
        "usual drive",
    ):
        assert words in text
    assert "lives on" not in screen(plan())


def test_host_memory_is_the_device_of_a_cpu() -> None:
    made = plan("offload.optimizer=host", "offload.activations=host", "offload.weights=host")
    assert made.placement.all_on_device
    for key in ("optimizer", "activations", "weights"):
        line = f"host memory is the device of this machine: offload.{key}=host changes nothing"
        assert made.reasons[f"offload.{key}"] == line
        assert line in screen(made)
    assert made.memory == plan().memory


@pytest.mark.parametrize(
    ("optimizer", "why"),
    [
        ("adamw_8bit", "state_bits=8"),
        ("badam", "one block"),
        ("lomo", "no state"),
        ("came", "library"),
    ],
)
def test_a_state_that_cannot_go_there_is_refused(optimizer: str, why: str) -> None:
    with pytest.raises(UserError) as caught:
        plan(f"optimizer={optimizer}", "offload.optimizer=disk")
    text = str(caught.value)
    assert text.startswith(
        f"offload.optimizer  disk was given, but the state of optimizer.name={optimizer} stays:"
    )
    assert why in text
    assert text.endswith("offload.optimizer=auto")
    assert plan(f"optimizer={optimizer}").placement.tier("optimizer") == "device"


def test_a_gpu_takes_host_memory_before_the_disk() -> None:
    meter = {"measure": Meter(per_token=1e3)}
    fits = plan(on=machine("cuda", gpu=2.0), **meter)
    assert fits.placement.all_on_device
    host = plan(on=machine("cuda", gpu=1.1), **meter)
    assert host.placement.tier("optimizer") == "host"
    assert host.memory["host"]["optimizer"] == pytest.approx(host.optimizer_bytes, rel=0.01)
    assert "ring" not in host.memory["host"]
    assert host.disk_writes == host.disk_bytes
    disk = plan(on=machine("cuda", gpu=1.1, host=0.7), **meter)
    assert disk.placement.tier("optimizer") == "disk"
    assert "optimizer" not in disk.memory["host"]
    assert disk.memory["host"]["ring"] > 0
    assert disk.update_seconds > host.update_seconds >= fits.update_seconds
    given = plan("offload.optimizer=host", on=machine("cuda", gpu=24.0), **meter)
    assert given.reasons["offload.optimizer"].startswith("offload.optimizer=host; ")


def test_a_gpu_swaps_activations_where_that_is_quicker_than_computing_them_again() -> None:
    """Each of the 10 layers keeps 20 kB a token; to compute one again takes 33 microseconds a token."""
    tokens, kept = 4096, 2e4 * 4096
    meter = {"measure": Meter(per_token=2e5, seconds=1e-3)}
    one = ("train.gradient_accumulation_steps=1", "offload.optimizer=device", "checkpoint.in_memory=false")

    def on(link: float, gpu: float = 1.8, host: float = 16.0) -> Plan:
        bare = machine("cuda", gpu=gpu, host=host)
        return plan(*one, on=replace(bare, given_rates=replace(bare.rates, host_link=link)), **meter)

    roomy, again, quick, slow = on(2e10, gpu=9.0), on(0.0), on(2e10), on(1e7)
    assert (roomy.micro_tokens, roomy.swapped_layers, roomy.recomputed_layers) == (tokens, 0, 0)
    assert (again.micro_tokens, again.swapped_layers) == (tokens, 0)
    assert 0 < again.recomputed_layers < 10
    assert (quick.micro_tokens, quick.recomputed_layers) == (tokens, 0)
    assert quick.swapped_layers == again.recomputed_layers + 1  # one more: what is on its way is there too
    waiting = next(placed for placed in quick.placement.parts if placed.part == "swapped")
    assert (waiting.tier, waiting.bytes) == ("host", pytest.approx(quick.swapped_layers * kept))
    assert quick.memory["host"]["activations"] == waiting.bytes
    assert quick.memory["device"]["total"] <= 1.8e9
    assert "swapped to host memory" in quick.reasons["activation_checkpointing"]
    # The first copy back runs beside nothing; all others run beside the layers' work.
    assert quick.step_seconds == pytest.approx(roomy.step_seconds + kept / 2e10, rel=1e-6)
    assert (slow.swapped_layers, slow.recomputed_layers) == (0, again.recomputed_layers)
    assert on(2e10, host=again.memory["host"]["total"] / 1e9 + 0.05).swapped_layers == 0


def test_swapping_that_is_asked_for_is_done_on_a_gpu_alone() -> None:
    given = plan("offload.activations=host", on=machine("cuda", gpu=24.0), measure=Meter(per_token=1e5))
    assert (given.swapped_layers, given.recomputed_layers) == (facts().layers, 0)
    assert plan("offload.activations=host").swapped_layers == 0


# Refusals


def test_the_disk_is_among_the_changes_of_a_recipe_that_keeps_state_in_memory() -> None:
    with pytest.raises(BudgetError) as caught:
        plan("offload.optimizer=device", on=TIGHT)
    text = str(caught.value)
    assert re.search(r"(cheapest change|or): offload\.optimizer=disk  -> 0\.\d\d GB, ", text)
    assert plan("offload.optimizer=disk", on=TIGHT).placement.tier("optimizer") == "disk"


def test_full_tuning_is_told_that_even_the_weights_can_go() -> None:
    small = machine(host=0.5)
    with pytest.raises(BudgetError) as caught:
        plan(on=small)
    change = "model.dtype=bfloat16 optimizer.weights=master offload.optimizer=disk"
    assert f": {change}  -> " in str(caught.value)
    made = plan(*change.split(), on=small)
    assert made.dtype == "bfloat16"
    assert made.optimizer_bytes == pytest.approx(12 * made.parameters, rel=0.01)


def test_the_slowness_of_a_change_counts_the_optimizer() -> None:
    with pytest.raises(BudgetError) as caught:
        plan("offload.optimizer=device", on=TIGHT, measure=Meter(per_token=1e4, seconds=1e-5))
    slower = re.search(r"offload\.optimizer=disk  -> [\d.]+ GB, (\d+)% slower", str(caught.value))
    assert slower is not None
    assert int(slower[1]) > 100  # 41 ms of computing for 4,096 tokens, and 0.9 s for the disk


def test_a_cap_on_writes_is_kept_and_what_is_proposed_is_enough() -> None:
    cap = "offload.max_disk_writes=100GB"
    with pytest.raises(BudgetError) as caught:
        plan("offload.optimizer=disk", cap)
    text = str(caught.value)
    assert caught.value.exit_code == 3
    assert text.startswith("offload.max_disk_writes  the run would write ")
    assert "and 100GB is allowed" in text
    for key in (r"offload\.max_disk_writes=[\w.]+", r"budget\.steps=\d+", r"train\.batch_tokens=\d+"):
        found = re.search(key, text.partition("give")[2])
        assert found is not None, key
        change = [found[0]]
        if "batch" in key:
            tokens = int(found[0].partition("=")[2])
            change += ["budget.steps=null", f"budget.tokens={4096 * 1000}"]
            assert tokens > 4096
        kept = [] if "max_disk" in key else [cap]
        assert plan("offload.optimizer=disk", *kept, *change).disk_writes > 0
    assert "optimizer.state_bits=8" in text
    with pytest.raises(BudgetError, match=r"checkpoint\.every=100%"):
        plan("offload.max_disk_writes=1MB")
    assert plan(cap).disk_writes < 100e9


def test_scratch_space_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = plan("offload.optimizer=disk", on=machine(disk=100))
    kept = sum(placed.bytes for placed in files.placement.parts if placed.part == "optimizer")
    small = 4 * (files.optimizer_bytes + 2 * 4 * files.parameters) + 4 * files.parameters + kept / 2
    with pytest.raises(BudgetError, match=r"scratch files 0\.\d\d GB"):
        plan("offload.optimizer=disk", on=machine(disk=small / GIGA))
    assert plan("offload.optimizer=device", on=machine(disk=small / GIGA)).steps == 1000
    if Path("/dev/shm").stat().st_dev != tmp_path.stat().st_dev:
        here = replace(machine(disk=small / GIGA), output_dir=str(tmp_path))
        assert plan("offload.optimizer=disk", "offload.disk_path=/dev/shm", on=here).steps == 1000


def test_the_lines_of_the_page() -> None:
    page = (Path(__file__).parent.parent / "docs" / "offload.md").read_text(encoding="utf-8")
    made = plan("offload.optimizer=disk")
    for part, _, _, why in made.placement.rows():
        assert part not in ("optimizer", "ring") or f"GB   {why}\n" in page
    assert f"{made.reasons['disk_writes']}\n" in page
    with pytest.raises(BudgetError) as caught:
        plan("offload.optimizer=disk", "offload.max_disk_writes=100GB")
    assert all(f"    {line}\n" in page for line in str(caught.value).splitlines())


# What is predicted is what is done


@pytest.mark.parametrize(
    "optimizer",
    [
        "adamw",
        "adamw optimizer.state_bits=8",
        "adamw model.dtype=bfloat16 optimizer.weights=master",
        "muon",
        "soap",
    ],
)
def test_bytes_are_those_of_the_segments(optimizer: str, tmp_path: Path) -> None:
    wanted = recipe(
        "adapter=null",
        *f"optimizer={optimizer}".split(),
        "offload.buffer_size=100KB",
        "offload.buffer_count=3",
    )
    dtype = getattr(torch, wanted.model.dtype or "float32")
    model = load_model(tiny_facts(), wanted.model, device=torch.device("cpu"), dtype=dtype)
    inner = build_optimizer(model, wanted.optimizer)
    stepper = stepper_for(inner)
    parameters = [(p, group) for group in inner.param_groups for p in group["params"]]
    real = cut_into_segments(parameters, stepper.layout, stepper.can_cut, 100_000)
    predicted = move_state("disk", wanted.optimizer, slots(model), dtype, wanted.offload, accelerated=False)
    assert predicted.elsewhere == pytest.approx(sum(one.nbytes for one in real), rel=0.01)
    assert predicted.ring == 3 * max(one.nbytes for one in real)
    for parameter, _ in parameters:
        parameter.grad = torch.ones_like(parameter)
    offloaded, _ = offload_optimizer(
        inner, tier="disk", folder=tmp_path, buffer_size=100_000, buffer_count=3, io="threads"
    )
    steps = 4
    for _ in range(steps):
        offloaded.step()
    _, written = offloaded.traffic
    offloaded.close()
    assert written == pytest.approx(steps * predicted.step.written, rel=0.05)


def test_the_disk_is_measured_once_and_only_where_it_is_considered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def measure(folder: Path) -> DiskRates:
        asked.append(folder)
        return DiskRates(read=2e9, write=1e9, mixed=1.5e9)

    monkeypatch.setattr(disk_probe, "measure_disk", measure)
    here = replace(machine(), given_rates=None, output_dir=str(tmp_path))
    plan(on=here)
    assert asked == []
    made = plan("offload.optimizer=disk", f"output_dir={tmp_path}", on=here)
    assert asked == [tmp_path / ".offload"]
    assert " at 1,500 MB/s" in made.reasons["offload.optimizer"]


# Streamed weights


def test_streamed_layers_leave_memory_and_take_time() -> None:
    lora = ("adapter=lora", "budget.tokens=100000", "budget.steps=null", "budget.time=null")

    def made(*overrides: str, **given: Any) -> Plan:
        given = {"on": machine(), "measure": Meter(per_token=1e4, seconds=1e-5), **given}
        wanted = recipe(*lora, "train.batch_tokens=2048", "export.final=adapter", *overrides)
        around = {"world_size": 1, "libraries": 0, "can_pack": True, "measure": given["measure"]}
        return make_plan(wanted, given["on"], facts(), rows(), **around)

    held, streamed = made(), made("offload.weights=disk")
    layers = 2 * (PARAMETERS - 8000 * 512 - 512)  # bfloat16; the final norm is no layer's
    assert streamed.placement.tier("weights") == "disk"
    assert next(p.bytes for p in streamed.placement.parts if p.part == "weights") == pytest.approx(
        layers, rel=0.01
    )
    freed = held.memory["host"]["weights"] - streamed.memory["host"]["weights"]
    assert freed == pytest.approx(0.8 * layers, rel=0.02)  # two of ten layers are in memory
    assert streamed.activation_checkpointing
    assert not held.activation_checkpointing
    # A micro-batch of 1,024 tokens computes for 14 ms; in the meantime the layers are read twice.
    assert streamed.accumulation == 2
    assert streamed.step_seconds - streamed.update_seconds == pytest.approx(4 * layers / WRITE, rel=0.02)
    assert streamed.disk_writes - streamed.disk_bytes == pytest.approx(layers, rel=0.01)
    gpu = made("offload.weights=host", on=machine("cuda", gpu=24.0))
    wide = 2 if gpu.dtype == "float32" else 1  # without a GPU to ask
    assert gpu.memory["host"]["weights"] == pytest.approx(wide * layers, rel=0.01)
    assert gpu.memory["device"]["weights"] < wide * held.memory["host"]["weights"]


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (("adapter=lora", "model.load_in_4bit=true"), "4-bit weights are not streamed"),
        ((), "must take its step while it is there"),
        (("optimizer.step_in_backward=true", "train.gradient_accumulation_steps=2"), "of one\n"),
        (("optimizer=q_apollo", "optimizer.step_in_backward=true"), "int8 weights"),
        (("adapter=lora", "adapter.use_dora=true"), "DoRA starts from the norms"),
        (("adapter=lora", "adapter.init_lora_weights=pissa_niter_4"), "weights=pissa_niter_4 starts from"),
        (("adapter=lora", "adapter.init_lora_weights=olora"), "weights=olora starts from all weights"),
        (("train.wta_crs_ratio=0.3",), "sampled weight gradients"),
        (("optimizer.step_in_backward=true", "objective=dpo"), "preferences need a copy"),
    ],
)
def test_weights_that_cannot_be_streamed_are_refused(overrides: tuple[str, ...], why: str) -> None:
    with pytest.raises(UserError, match=r"offload\.weights  disk was given, but ") as caught:
        plan("offload.weights=disk", "train.batch_tokens=null", *overrides)
    assert why in str(caught.value)
    assert str(caught.value).endswith("or offload.weights=device")


def test_trained_layers_are_written_in_every_step() -> None:
    streamed = plan("offload.weights=disk", "optimizer.step_in_backward=true", "offload.optimizer=device")
    layers = 4 * (PARAMETERS - 8000 * 512 - 512)
    assert streamed.disk_writes - streamed.disk_bytes == pytest.approx(1001 * layers, rel=0.01)
    assert streamed.disk_bytes > layers  # the export
