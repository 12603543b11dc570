"""State on host memory or disk is, to the last bit, what it is in memory."""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from shoestring.checkpoint import load_optimizer_state, open_checkpoint, optimizer_state, save
from shoestring.offload import offload_optimizer
from shoestring.offload.lift import Lift
from shoestring.offload.stored import Stored, whole
from shoestring.optimizers import (
    APOLLO,
    COSMOS,
    FRUGAL,
    SOAP,
    AdamW,
    APOLLOMini,
    BAdam,
    GaLore,
    Muon,
    NaturalGaLore,
    step_in_backward,
)
from torch import Tensor, nn

KIB = 1024
LARGE = 3 * (1 << 17) + 123  # elements: is cut where the rule allows it, and ends in the middle of a block


def parameters(dtype: torch.dtype) -> list[tuple[str, nn.Parameter]]:
    """Large, odd, tiny, empty and scalar ones."""
    torch.manual_seed(0)
    shapes = {
        "embed_tokens.weight": (LARGE // 3, 3),
        "layers.0.proj.weight": (96, 64),
        "layers.0.norm.weight": (64,),
        "layers.1.proj.weight": (64, 200),
        "layers.1.wide.weight": (200, 96),
        "tiny": (3,),
        "scalar": (),
    }
    return [(name, nn.Parameter(torch.randn(shape).to(dtype) * 0.1)) for name, shape in shapes.items()]


def groups(named: list[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """Two with other rates and decay."""
    is_matrix = [name.startswith("layers") and p.ndim == 2 for name, p in named]
    matrices = [pair for pair, matrix in zip(named, is_matrix, strict=True) if matrix]
    others = [pair for pair, matrix in zip(named, is_matrix, strict=True) if not matrix]
    return [
        {"params": matrices, "lr": 3e-3, "weight_decay": 0.1},
        {"params": others, "lr": 1e-3, "weight_decay": 0.0, "kind": "adamw"},
    ]


def torch_adamw(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    plain = [{**group, "params": [p for _, p in group["params"]]} for group in groups(named)]
    for group in plain:
        group.pop("kind", None)
    return torch.optim.AdamW(plain, fused=True)


MAKERS = {
    "torch adamw": torch_adamw,
    "adamw": lambda named: AdamW(groups(named), weights="plain"),
    "adamw sr": lambda named: AdamW(groups(named), weights="sr", seed=3),
    "adamw kahan": lambda named: AdamW(groups(named), weights="kahan", state_bits=16),
    "adamw master": lambda named: AdamW(groups(named), weights="master"),
    "adamw 8 bits": lambda named: AdamW(groups(named), state_bits=8),
    "adamw 8 bits master": lambda named: AdamW(groups(named), state_bits=8, weights="master"),
    "apollo": lambda named: APOLLO(groups(named), rank=8, update_proj_gap=4),
    "apollo_mini": lambda named: APOLLOMini(groups(named)),
    "galore": lambda named: GaLore(groups(named), rank=8, update_proj_gap=4, state_bits=8),
    "natural_galore": lambda named: NaturalGaLore(groups(named), rank=8),
    "frugal": lambda named: FRUGAL(groups(named), update_proj_gap=4),
    "cosmos": lambda named: COSMOS(groups(named), rank=8),
    "muon": lambda named: Muon(groups(named)),
    "soap": lambda named: SOAP(groups(named), weights="master"),
}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "scratch"
    left = [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()]
    assert left == []


def give_gradients(named: list[tuple[str, nn.Parameter]], step: int) -> None:
    """The same for every copy; some parameters have none at some steps, and the last has its first late."""
    generator = torch.Generator().manual_seed(step)
    for number, (name, p) in enumerate(named):
        grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        absent = (step + number) % 5 == 0 or (name == "scalar" and step < 4)
        p.grad = None if absent else grad


def set_rates(optimizer: torch.optim.Optimizer, step: int) -> None:
    for number, group in enumerate(optimizer.param_groups):
        group["lr"] = (3e-3 if number == 0 else 1e-3) * (1 - step / 100)


def run(named: list[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        give_gradients(named, step)
        set_rates(optimizer, step)
        optimizer.step()


def copies(named: list[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
    return copy.deepcopy(named)


def assert_equal_states(
    here: torch.optim.Optimizer,
    own: list[tuple[str, nn.Parameter]],
    there: torch.optim.Optimizer,
    others: list[tuple[str, nn.Parameter]],
) -> None:
    for (name, p), (_, q) in zip(own, others, strict=True):
        assert torch.equal(p, q), name
        first, second = here.state.get(p, {}), there.state.get(q, {})
        assert list(first) == list(second), name
        for key in first:
            a, b = (whole(v) if isinstance(v, Stored) else v for v in (first[key], second[key]))
            if isinstance(a, Tensor):
                assert (a.dtype, a.shape) == (b.dtype, b.shape), (name, key)
                assert torch.equal(a, b), (name, key)
            else:
                assert a == b, (name, key)


def cases() -> Iterator[Any]:
    for number, name in enumerate(MAKERS):
        rng = random.Random(number)
        for tier in ("host", "disk") if number % 3 == 0 else ("disk",):
            yield pytest.param(
                name,
                tier,
                torch.bfloat16 if number % 2 else torch.float32,
                rng.choice([64, 200, 1600, 4000]) * KIB,
                rng.choice([3, 4, 7]),
                rng.choice([1, 2, 5]),
                id=f"{name} on {tier}",
            )


@pytest.mark.parametrize(("name", "tier", "dtype", "buffer_size", "buffer_count", "threads"), list(cases()))
def test_fifty_steps_with_a_resume_are_those_in_memory(
    disk: Path, name: str, tier: Any, dtype: torch.dtype, buffer_size: int, buffer_count: int, threads: int
) -> None:
    own = parameters(dtype)
    others = copies(own)
    options: dict[str, Any] = {
        "tier": tier,
        "folder": disk,
        "buffer_size": buffer_size,
        "buffer_count": buffer_count,
        "io_threads": threads,
    }
    memory = MAKERS[name](own)
    offloaded, lines = offload_optimizer(MAKERS[name](others), **options)
    assert tier in lines[0]
    for piece in (range(3), range(3, 25)):
        run(own, memory, piece)
        run(others, offloaded, piece)
        assert_equal_states(memory, own, offloaded, others)

    checkpoint_folder = disk.parent / "run"
    tensors, json = optimizer_state(offloaded, others)
    in_memory_tensors, in_memory_json = optimizer_state(memory, own)
    assert json == in_memory_json
    assert list(tensors) == list(in_memory_tensors)
    path = save(checkpoint_folder, step=25, tensors={"optimizer": tensors}, json={"optimizer": json})
    same = save(
        checkpoint_folder, step=26, tensors={"optimizer": in_memory_tensors}, json={"optimizer": json}
    )
    assert (path / "optimizer.safetensors").read_bytes() == (same / "optimizer.safetensors").read_bytes()
    offloaded.close()

    resumed_weights = copies(others)
    resumed, _ = offload_optimizer(MAKERS[name](resumed_weights), **options)
    checkpoint = open_checkpoint(path)
    load_optimizer_state(
        resumed, resumed_weights, checkpoint.open_tensors("optimizer"), checkpoint.json("optimizer")
    )
    back_weights = copies(others)
    back = MAKERS[name](back_weights)
    load_optimizer_state(
        back, back_weights, checkpoint.open_tensors("optimizer"), checkpoint.json("optimizer")
    )
    run(own, memory, range(25, 50))
    run(resumed_weights, resumed, range(25, 50))
    run(back_weights, back, range(25, 50))
    assert_equal_states(memory, own, resumed, resumed_weights)
    assert_equal_states(memory, own, back, back_weights)
    resumed.close()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("numel", [LARGE, 5 * (1 << 17), (1 << 20) + 7])
def test_a_cut_tensor_gets_the_bits_of_the_whole_one(numel: int, threads: int, disk: Path) -> None:
    """torch's fused kernel splits its work among threads: no split may show in the result."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        weight = torch.randn(numel)
        own, other = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
        memory = torch.optim.AdamW([own], lr=1e-2, fused=True)
        made = torch.optim.AdamW([other], lr=1e-2, fused=True)
        offloaded, _ = offload_optimizer(made, tier="disk", folder=disk, buffer_size=1 << 20)
        for _ in range(3):
            own.grad = torch.randn(numel)
            other.grad = own.grad.clone()
            memory.step()
            offloaded.step()
        assert torch.equal(own, other)
        offloaded.close()
    finally:
        torch.set_num_threads(before)


def test_steps_inside_the_backward_pass(disk: Path) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(1)
        model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
        return model, AdamW(model.named_parameters(), lr=1e-2)

    own, memory = build()
    other, made = build()
    offloaded, _ = offload_optimizer(made, tier="disk", folder=disk, buffer_size=40 * KIB, buffer_count=3)
    inputs = torch.randn(20, 16, 64)
    reads = []
    for x in inputs:
        for model, optimizer in ((own, memory), (other, offloaded)):
            with step_in_backward(optimizer, max_grad_norm=0.1):
                model(x).square().mean().backward()
        reads.append(offloaded.traffic[0])
        for p, q in zip(own.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)
    assert_equal_states(memory, list(own.named_parameters()), offloaded, list(other.named_parameters()))
    assert reads[-1] > 0
    offloaded.close()


def test_state_that_was_there_before_moves_along(disk: Path) -> None:
    own = parameters(torch.float32)
    others = copies(own)
    memory, made = torch_adamw(own), torch_adamw(others)
    run(own, memory, range(5))
    run(others, made, range(5))
    offloaded, _ = offload_optimizer(made, tier="disk", folder=disk, buffer_size=1 << 20)
    run(own, memory, range(5, 10))
    run(others, offloaded, range(5, 10))
    assert_equal_states(memory, own, offloaded, others)
    offloaded.close()


def test_torch_state_dicts_go_both_ways(disk: Path) -> None:
    own = parameters(torch.float32)
    others, thirds = copies(own), copies(own)
    memory = torch_adamw(own)
    offloaded, _ = offload_optimizer(torch_adamw(others), tier="disk", folder=disk, buffer_size=1 << 20)
    run(own, memory, range(6))
    offloaded.load_state_dict(memory.state_dict())
    for (_, p), (_, q) in zip(own, others, strict=True):
        q.data.copy_(p.data)
    run(own, memory, range(6, 12))
    run(others, offloaded, range(6, 12))
    assert_equal_states(memory, own, offloaded, others)
    back = torch_adamw(thirds)
    back.load_state_dict(offloaded.state_dict())
    for (_, p), (_, q) in zip(own, thirds, strict=True):
        q.data.copy_(p.data)
    assert_equal_states(memory, own, back, thirds)
    offloaded.close()


def test_a_torch_schedule_and_zero_grad_work_on_it(disk: Path) -> None:
    own = parameters(torch.float32)
    offloaded, _ = offload_optimizer(torch_adamw(own), tier="disk", folder=disk)
    schedule = torch.optim.lr_scheduler.LinearLR(offloaded, 1.0, 0.5, total_iters=10)
    give_gradients(own, 1)
    offloaded.step()
    schedule.step()
    offloaded.zero_grad()
    assert all(p.grad is None for _, p in own)
    assert offloaded.inner.param_groups[0]["lr"] == pytest.approx(3e-3 * 0.95)
    offloaded.close()


@pytest.mark.parametrize("where", ["host", "device", "split"])
@pytest.mark.parametrize("name", ["adamw master", "adamw sr", "apollo"])
def test_updates_on_host_and_accelerator_are_those_in_memory(disk: Path, name: str, where: Any) -> None:
    """The copies up and down, with the CPU in the accelerator's place: there both kernels are one."""
    own = parameters(torch.bfloat16)
    others = copies(own)
    memory = MAKERS[name](own)
    offloaded, _ = offload_optimizer(MAKERS[name](others), tier="disk", folder=disk, buffer_size=64 * KIB)
    lift = Lift(offloaded._stepper, torch.device("cpu"), where)
    offloaded._lift = lift
    run(own, memory, range(12))
    run(others, offloaded, range(12))
    assert_equal_states(memory, own, offloaded, others)
    on_host, on_device = lift._host_seconds is not None, lift._trip_seconds is not None
    master = name == "adamw master"
    assert on_host == (master and where != "device")
    assert on_device == (not master or where != "host")
    offloaded.close()


def test_memory_stays_within_the_ring(tmp_path: Path) -> None:
    """75 MB of state through a ring of 9 MB: the peak grows by that and 5 %, and in 200 steps no further."""
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536"
    }  # holes in the heap are not what is measured
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    before, after_two, after_all, ring = map(int, done.stdout.split()[-4:])
    small = 3 << 20  # what a chunk of the update, a thread's stack and a page here and there take
    assert after_two - before <= 1.05 * ring + small
    assert after_all - after_two <= 0.05 * ring + small


PEAK = """
import resource, sys
from pathlib import Path
import torch
from shoestring.offload import offload_optimizer
from shoestring.offload.lift import Lift
from shoestring.optimizers import AdamW
torch.set_num_threads(1)
weights = [torch.nn.Parameter(torch.ones(1 << 20, dtype=torch.bfloat16)) for _ in range(6)]
for p in weights:
    p.grad = torch.ones_like(p)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
warm = torch.nn.Parameter(torch.zeros(1 << 18, dtype=torch.bfloat16))
warm.grad = torch.ones_like(warm)
disk = {"tier": "disk", "folder": Path(sys.argv[1]), "buffer_size": 2 << 20, "io": "threads"}
first, _ = offload_optimizer(AdamW([warm], weights="master"), **disk)
first.step()
first.close()
before = peak()
optimizer, _ = offload_optimizer(AdamW(weights, weights="master"), **disk)
ring = sum(len(b.memory) for b in optimizer._holder._buffers)
for _ in range(2):
    optimizer.step()
after_two = peak()
for _ in range(200):
    optimizer.step()
optimizer.wait()
print(before, after_two, peak(), ring)
optimizer.close()
"""


def test_optimizers_that_cannot_be_moved_say_so(disk: Path) -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])})
    badam = BAdam(model.named_parameters(), lr=1e-3)
    with pytest.raises(TypeError, match="BAdam cannot keep its state on another tier"):
        offload_optimizer(badam, tier="disk", folder=disk)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="SGD cannot keep its state"):
        offload_optimizer(sgd, tier="disk", folder=disk)
