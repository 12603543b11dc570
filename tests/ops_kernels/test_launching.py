"""Around every launch: the current device, and types that no default of the process decides."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from shoestring.ops import attention_flash
from shoestring.ops import grad_pack as ops_grad_pack
from shoestring.ops import kernels as room
from shoestring.ops.codec import code_count, scale_count
from shoestring.ops.kept import Kept
from shoestring.ops.kernels import (
    codec,
    cross_entropy,
    gathered,
    grad_pack,
    lora,
    low_rank,
    low_rank_write,
    numbers,
    quantised_step,
)
from shoestring.ops.step_call import StepSettings, StepTensors
from torch import Tensor
from triton.runtime.jit import KernelInterface


def drawn(device: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(device, dtype)


def run_codec(device: str) -> list[Tensor]:
    value, found = drawn(device, 600), []
    for law in ("companded", "dynamic"):
        codes = torch.zeros(code_count(600, law), dtype=torch.uint8, device=device)
        scales = torch.zeros(scale_count(600, law), dtype=torch.float32, device=device)
        codec.encode(value, codes, scales, law, signed=True, threshold=0.5)
        found += [codes, scales, codec.decode(codes, scales, 600, law, signed=True)]
    return found


def run_cross_entropy(device: str) -> list[Tensor]:
    logits, labels = drawn(device, 3, 40), torch.tensor([0, 39, 7], device=device)
    again = logits.clone()
    losses, sums = cross_entropy.losses_of_rows(logits, labels, bias=None, softcap=None, gradient=True)
    cross_entropy.slopes_of_rows(again, labels, sums, sums, bias=None, softcap=2.0)
    return [losses, sums, logits, again]


def run_gathered(device: str) -> list[Tensor]:
    total = torch.zeros(32, 16, dtype=torch.float32, device=device)
    rows = torch.tensor([1, 4, 5], device=device)
    grad, kept = (drawn(device, n, m, dtype=torch.bfloat16) for n, m in ((8, 32), (3, 16)))
    gathered.gathered(grad, rows, kept, total)
    return [total]


def run_grad_pack(device: str) -> list[Tensor]:
    return list(grad_pack.pack([drawn(device, 300), drawn(device, 77, dtype=torch.bfloat16)], None, None))


def run_lora(device: str) -> list[Tensor]:
    x, a, b = drawn(device, 20, 64), drawn(device, 2, 64), drawn(device, 70, 2)
    h = lora.down(x, a, 0.25, 9)
    dh, db = lora.up_backward(drawn(device, 20, 70), b, h, 0.5)
    dx = torch.zeros_like(x)
    return [h, dh, db, lora.down_backward(x, dh, a, dx, 0.25, 9), dx]


def run_low_rank(device: str) -> list[Tensor]:
    grad, basis = drawn(device, 1, 40, 20), drawn(device, 1, 20, 3)
    weight = drawn(device, 1, 40, 20)
    low_rank.add_product(weight, drawn(device, 1, 40, 3), drawn(device, 1, 20, 3), 0.9, None)
    parts, squares = low_rank.project(grad, basis, squares=True)
    m, v, norm = (torch.zeros(s, dtype=torch.float32, device=device) for s in ((1, 40, 3), (1, 40, 3), 1))
    scaled, raw = low_rank_write.moments(parts, m, v, (0.9, 0.99), 1e-6, None)
    factors = low_rank_write.factors(
        scaled, raw, squares, norm, per_channel=True, limit=1.1, before=1.0, first=True, rate=-0.1
    )
    low_rank_write.add_scaled(weight, grad, factors.unsqueeze(2), 0.9, None)
    moments = [torch.zeros(1, 40, 6, dtype=torch.float32, device=device) for _ in range(2)]
    low_rank_write.columns(
        weight, grad, *moments, 17, keep=0.9, rate=-0.1, free=-0.1, rule=1, betas=(0.9, 0.99), eps=1e-6,
        step=1, noise=None,
    )  # fmt: skip
    return [parts, squares, scaled, raw, factors, norm, m, v, weight, *moments]


def run_quantised_step(device: str) -> list[Tensor]:
    sizes = (512, 33)
    weights, grads = ([drawn(device, n + i) for n in sizes] for i in (0, 1))
    first, second = (
        [torch.zeros(n + i, dtype=dtype, device=device) for n in sizes]
        for i, dtype in enumerate((torch.int8, torch.uint8))
    )
    scales = [
        [torch.zeros(scale_count(n, "dynamic"), dtype=torch.float32, device=device) for n in sizes]
        for _ in range(2)
    ]
    quantised_step.step(
        StepTensors(weights, grads, first, scales[0], second, scales[1], [], [0, 5]),
        StepSettings("adamw", "dynamic", "plain", 0.01, (0.9, 0.99), 1e-6, 0.1, 1, 7),
    )
    return [*weights, *first, *second, *scales[0], *scales[1]]


RUNS: list[Callable[[str], list[Tensor]]] = [
    run_codec, run_cross_entropy, run_gathered, run_grad_pack, run_lora, run_low_rank, run_quantised_step,
]  # fmt: skip
EACH = pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__.removeprefix("run_"))
KERNELS = sorted(Path(room.__file__).parent.glob("*.py"))


def launches(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """(kernel, whether it stands in `with on_device_of(...)` or torch.cuda.device) of each launch."""
    guards = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.With)
        and ast.unparse(node.items[0]).startswith(("on_device_of(", "torch.cuda.device("))
    ]
    inside = {id(node) for guard in guards for node in ast.walk(guard)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            name = ast.unparse(node.func.value)
            if name.endswith("_kernel"):
                yield name, id(node) in inside


def test_no_launch_stands_outside_the_device_of_its_tensors() -> None:
    found = [pair for path in KERNELS for pair in launches(ast.parse(path.read_text(encoding="utf-8")))]
    assert len(found) >= 16
    assert [name for name, guarded in found if not guarded] == []
    defined = {
        node.name
        for path in KERNELS
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    assert {name for name, _ in found} == defined  # so each is launched by a line that the search has seen


@EACH
def test_a_kernel_runs_where_its_tensors_are(run, device, monkeypatch) -> None:
    """Whatever GPU is the current one: a context of the tensors' own GPU is entered around every launch."""
    entered: list[Any] = []
    launched: list[Any] = []

    class Recorded(torch.cuda.device_of):
        def __init__(self, tensor: Tensor) -> None:
            assert isinstance(tensor, Tensor)
            self.of = tensor.device
            super().__init__(tensor)

        def __enter__(self) -> None:
            super().__enter__()
            entered.append(self.of)

        def __exit__(self, *error: Any) -> Any:
            entered.pop()
            return super().__exit__(*error)

    found = KernelInterface.__getitem__

    def recorded(self: Any, grid: Any) -> Any:
        launched.append([*entered])
        return found(self, grid)

    monkeypatch.setattr(torch.cuda, "device_of", Recorded)
    monkeypatch.setattr(KernelInterface, "__getitem__", recorded)
    results = run(device)
    assert launched
    assert all(inside == [results[0].device] for inside in launched)
    assert entered == []


@EACH
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_no_default_of_the_process_decides_a_type(run, default, device) -> None:
    wanted = run(device)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        found = run(device)
    finally:
        torch.set_default_dtype(before)
    for ours, exact in zip(found, wanted, strict=True):
        assert ours.dtype == exact.dtype
        assert torch.equal(ours, exact)


@EACH
def test_no_default_device_moves_a_table(run, device, monkeypatch) -> None:
    """Of addresses, owners and codes: they are made on the CPU and sent, and kept for all later calls."""
    for module in (ops_grad_pack, quantised_step):
        for name in {"_TABLES", "_OWNERS", "_ROWS"} & set(vars(module)):
            monkeypatch.setattr(module, name, Kept(1 << 20, lambda table: 1))
    monkeypatch.setattr(numbers, "_tables", {})
    with torch.device("meta"):
        found = run(device)
    for ours, exact in zip(found, run(device), strict=True):
        assert torch.equal(ours, exact)


@pytest.mark.gpu
@EACH
def test_on_the_second_gpu_while_the_first_is_the_current_one(run) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    torch.cuda.set_device(0)
    wanted, found = run("cuda:0"), run("cuda:1")
    assert torch.cuda.current_device() == 0
    for ours, exact in zip(found, wanted, strict=True):
        assert ours.device.index == 1
        assert torch.equal(ours.cpu(), exact.cpu())


@pytest.mark.gpu
def test_what_is_made_for_a_launch_waits_for_no_gpu() -> None:
    """Of gradients that have moved and rows that were never packed: a copy of pageable memory would wait."""
    grads = [drawn("cuda", n) for n in (300, 40_000)]
    scales = [torch.zeros(2, dtype=torch.float32, device="cuda") for _ in range(2)]
    codes = [torch.zeros(512, dtype=dtype, device="cuda") for dtype in (torch.int8, torch.uint8)]
    settings = StepSettings("adamw", "dynamic", "plain", 0.01, (0.9, 0.99), 1e-6, 0.1, 1, 7)

    def everything(shift: int) -> None:
        ops_grad_pack.global_norm([g[shift:] for g in grads])
        attention_flash._starts((0, 7 + shift, 9876), torch.device("cuda", 0))
        weight = grads[1][512 * shift :][:512]
        quantised_step.step(
            StepTensors([weight], [weight], [codes[0]], [scales[0]], [codes[1]], [scales[1]], [], [shift]),
            settings,
        )

    everything(1)  # kernels are compiled, and tables of codes sent
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything(2)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu
@EACH
def test_on_a_stream_of_its_own(run) -> None:
    wanted = run("cuda")
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        found = run("cuda")
    side.synchronize()
    for ours, exact in zip(found, wanted, strict=True):
        assert torch.equal(ours, exact)
