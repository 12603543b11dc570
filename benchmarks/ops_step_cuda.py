"""Rows of benchmarks/ops.py: the optimizer step of one layer of Llama-3-8B on a GPU, in one launch.

218 million parameters in 9 tensors, beside bitsandbytes, torchao, PyTorch's fused AdamW, and what
torch.compile makes of the formulas. A note says what the whole model's 8.03e9 parameters take at that rate.

    python benchmarks/ops.py --device cuda --only ops_step_cuda
    python benchmarks/ops.py --floors --only ops_step_cuda
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from ops_timing import H200_COPY, Row, median_seconds
from shoestring.ops.codec import Law, block_of, code_count, scale_count
from shoestring.ops.quantised_step import bytes_per_element, quantised_step
from shoestring.ops.rounding import noise_key, noise_start
from shoestring.ops.step_call import Rule, StepSettings, StepTensors
from torch import Tensor, nn

SHAPES = [
    (4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096),
    (14336, 4096), (14336, 4096), (4096, 14336), (4096,), (4096,),
]  # fmt: skip
PARAMETERS = 8.03e9
BF16, FP32 = torch.bfloat16, torch.float32
Run = Callable[[], object]


def rows(device: torch.device) -> list[Row]:
    """All kinds of state, each beside what comes nearest to it; nothing without a GPU."""
    if device.type != "cuda":
        return []
    random = {"bf16_stochastic_round": True}
    third: dict[str, dict[str, Run | None]] = {
        "8 bits": {
            "bitsandbytes": stepper("bitsandbytes.optim", "AdamW8bit", BF16, device),
            "torchao": stepper("torchao.optim", "AdamW8bit", BF16, device, **random),
            "torch.compile": compiled(SHAPES, device),
        },
        "4 bits": {"torchao": stepper("torchao.optim", "AdamW4bit", BF16, device, **random)},
        "bf16": {"torch fused": stepper("torch.optim", "AdamW", BF16, device, fused=True)},
        "float32": {"torch fused": stepper("torch.optim", "AdamW", FP32, device, fused=True)},
        "lion, 8 bits": {"bitsandbytes": stepper("bitsandbytes.optim", "Lion8bit", BF16, device)},
    }
    found = []
    for name, (case, moments) in CASES.items():
        others = third.pop(name, {})  # so that their states go when they have been timed
        contenders = ours(SHAPES, device, **case) | {n: run for n, run in others.items() if run is not None}
        seconds = median_seconds(contenders, device)
        whole = seconds["ours"] * PARAMETERS / _elements(SHAPES) * 1e3
        note = f"{PARAMETERS:.3g} parameters: {whole:.1f} ms"
        found.append(Row(f"step, {name}", seconds, _bytes(case, moments) * _elements(SHAPES), note=note))
    return found


def h200_rows() -> list[Row]:
    """What a step of the whole model reads and writes at least."""
    return [Row(f"step, {name}, 8.03e9", {}, _bytes(*case) * PARAMETERS) for name, case in CASES.items()]


# Settings of `ours`, and bytes of both moments (of lion the one) per element with their scales.
CASES: dict[str, tuple[dict[str, Any], float]] = {
    "8 bits": ({"law": "companded"}, 2 + 8 / 256),
    "8 bits, kahan": ({"law": "companded", "mode": "kahan"}, 2 + 8 / 256),
    "8 bits, bitsandbytes' table": ({"law": "dynamic"}, 2 + 8 / 256),
    "4 bits": ({"law": "four"}, 1 + 8 / 128),
    "bf16": ({"moment": BF16}, 4),
    "float32, bf16 weights": ({}, 8),
    "float32, bf16 weights, master": ({"mode": "master"}, 8),
    "float32": ({"weight": FP32}, 8),
    "lion, 8 bits": ({"rule": "lion", "law": "companded"}, 1 + 4 / 256),
    "direction, 8 bits": ({"rule": "direction", "law": "companded", "weight": FP32}, 2 + 8 / 256),
}


def ours(
    shapes: list[Any], device: torch.device, rule: Rule = "adamw", law: Law | None = None,
    weight: torch.dtype = BF16, moment: torch.dtype = FP32, mode: Any = "sr",
) -> dict[str, Run]:  # fmt: skip
    """The step as it is chosen on `device`, and by PyTorch's operations, over tensors of its own."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    weights = [torch.randn(size, device=device).to(weight) for size in sizes]
    grads = [torch.randn(size, device=device).to(weight) for size in sizes]

    def moments(signed: bool) -> tuple[list[Tensor], list[Tensor]]:
        if law is None:
            return [torch.zeros(size, dtype=moment, device=device) for size in sizes], []
        kind = torch.int8 if signed else torch.uint8
        codes = [torch.zeros(code_count(size, law), dtype=kind, device=device) for size in sizes]
        return codes, [torch.zeros(scale_count(size, law), device=device) for size in sizes]

    first, first_scales = moments(True)
    second, second_scales = moments(False) if rule != "lion" else ([], [])
    extra: list[Tensor] = []
    if weight == BF16 and mode in ("kahan", "master"):
        extra = [w.to(BF16 if mode == "kahan" else FP32) for w in weights]
    alone = rule == "direction"  # its gradients are all there is
    starts = [noise_start(i) for i in range(len(sizes))]
    tensors = StepTensors(
        weights, [] if alone else grads, first, first_scales, second, second_scales, extra, starts,
        grad_scale=None if alone else torch.ones((), device=device),
    )  # fmt: skip
    settings = StepSettings(
        rule=rule, law=law, mode=mode, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, step=2,
        key=noise_key(0, 2),
    )  # fmt: skip

    def step() -> None:
        quantised_step(tensors, settings)

    def reference() -> None:
        os.environ["SHOESTRING_OPS"] = "torch"
        try:
            step()
        finally:
            del os.environ["SHOESTRING_OPS"]

    return {"ours": step, "PyTorch's operations": reference}


def stepper(module: str, name: str, dtype: torch.dtype, device: torch.device, **more: Any) -> Run | None:
    """The step of a library's optimizer over the layer's tensors, made when it is first called.

    None where the library is not installed.
    """
    if find_spec(module.partition(".")[0]) is None:
        return None
    made: list[torch.optim.Optimizer] = []

    def step() -> None:
        if not made:
            parameters = [nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in SHAPES]
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            made.append(getattr(import_module(module), name)(parameters, lr=1e-4, weight_decay=0.01, **more))
        made[0].step()

    return step


def compiled(shapes: list[Any], device: torch.device, backend: str = "inductor") -> Run:
    """8-bit AdamW in PyTorch's operations, a tensor at a time, as torch.compile makes it."""
    block = block_of("companded")
    states = []
    for shape in shapes:
        blocks = torch.Size(shape).numel() // block
        w, g = (torch.randn(blocks, block, device=device).to(BF16) for _ in range(2))
        codes = [torch.zeros(blocks, block, dtype=kind, device=device) for kind in (torch.int8, torch.uint8)]
        states.append((w, g, *codes, *(torch.zeros(blocks, 1, device=device) for _ in range(2))))
    one = torch.compile(_plain, dynamic=True, backend=backend)
    rate, threshold = torch.tensor(1e-4, device=device), torch.tensor(0.3, device=device)

    def step() -> None:
        for state in states:
            one(*state, rate, threshold)

    return step


def _plain(
    w: Tensor, g: Tensor, m_codes: Tensor, v_codes: Tensor, m_scales: Tensor, v_scales: Tensor,
    rate: Tensor, threshold: Tensor,
) -> None:  # fmt: skip
    c = m_codes.float()
    m = torch.lerp(c * c.abs() * (m_scales / 127**2), g.float(), 0.1)
    v = (v_codes.float() / 255).square().square() * v_scales * 0.999 + g.float().square() * 0.001
    moved = w.float() * (1 - 0.01 * rate) - rate * m / (v.sqrt() + 1e-8)
    noise = torch.randint_like(moved, 1 << 16, dtype=torch.int32)
    w.copy_(((moved.view(torch.int32) + noise) & -65536).view(torch.float32))
    m_scales.copy_(m.abs().amax(1, keepdim=True))
    v_scales.copy_(v.amax(1, keepdim=True))
    share = m / m_scales.clamp(min=1.2e-38)
    m_codes.copy_((share.abs().sqrt() * share.sign() * 127).round())
    root = (v / v_scales.clamp(min=1.2e-38)).sqrt().sqrt()
    v_codes.copy_((root * 255 + threshold).floor().clamp(1, 255))


def _bytes(case: dict[str, Any], moments: float) -> float:
    weight = case.get("weight", BF16).itemsize
    if case.get("rule") == "direction":  # the values are the gradient, and are read once
        return 2 * weight + 2 * moments
    extra = {"kahan": 2, "master": 4}.get(case.get("mode", "sr"), 0)
    if extra == 4:  # the weight is written alone: its master is what is read
        return bytes_per_element(0, weight, moments, extra) + weight
    return bytes_per_element(weight, weight, moments, extra)


def _elements(shapes: list[Any]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)


if __name__ == "__main__":
    for row in h200_rows():
        print(f"{row.name:50} {row.bytes / PARAMETERS:6.2f} bytes  {row.bytes / H200_COPY * 1e3:5.1f} ms")
