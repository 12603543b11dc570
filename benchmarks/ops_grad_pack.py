"""Rows of benchmarks/ops.py: the norm of all gradients, and their packed copy, beside PyTorch's own."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from ops_timing import Row, median_seconds
from shoestring.ops.grad_pack import global_norm, pack
from torch import Tensor

# 67 M elements in 16 tensors: far more than the caches hold; and adapters: many small ones.
LARGE, SMALL = [(4096, 1024)] * 16, [(8, 576)] * 400


def rows(device: torch.device) -> list[Row]:
    """Norm alone, and norm with a copy to bfloat16; `native` and `torch` are ours, on a GPU `triton`."""
    cases = [(dtype, LARGE) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    return [
        *(_norm(dtype, shapes, device) for dtype, shapes in [*cases, (torch.float32, SMALL)]),
        *(_copy(dtype, device) for dtype in (torch.float32, torch.bfloat16)),
    ]


def _norm(dtype: torch.dtype, shapes: list[tuple[int, int]], device: torch.device) -> Row:
    grads = _gradients(dtype, shapes, device)
    exact = float(sum(g.double().square().sum() for g in grads)) ** 0.5
    contenders = {
        **{_label(p): _with(p, lambda: global_norm(grads)) for p in _providers(device)},
        "torch, foreach": lambda: _foreach(grads),
        "torch, clip_grad's": lambda: torch.nn.utils.get_total_norm(grads),
    }
    errors = {name: abs(float(run()) / exact - 1) for name, run in contenders.items()}
    read = sum(g.nbytes for g in grads)
    return Row(
        f"norm of {len(grads)} gradients, {_name(dtype)}, {read >> 20} MiB",
        median_seconds(contenders, device),
        bytes=read,
        note="relative error: " + ", ".join(f"{name} {error:.0e}" for name, error in errors.items()),
    )


def _copy(dtype: torch.dtype, device: torch.device) -> Row:
    grads = _gradients(dtype, LARGE, device)
    target = torch.empty(sum(g.numel() for g in grads), dtype=torch.bfloat16, device=device)
    scale = torch.tensor(1 / 1024, device=device)

    def separately() -> None:
        """Unscale, look for what is not finite, norm, cast, copy: an operation each."""
        scaled = [g * scale for g in grads]
        torch.stack([g.isfinite().all() for g in scaled]).all()
        _foreach(scaled)
        torch.cat([g.view(-1).bfloat16() for g in scaled], out=target)

    contenders: dict[str, Callable[[], object]] = {
        **{_label(p): _with(p, lambda: pack(grads, target=target, scale=scale)) for p in _providers(device)},
        "torch, separately": separately,
    }
    return Row(
        f"unscale, norm, finite, largest, copy to bf16 of {_name(dtype)}, 67 M",
        median_seconds(contenders, device),
        bytes=sum(g.nbytes for g in grads) + target.nbytes,
    )


def _gradients(dtype: torch.dtype, shapes: list[tuple[int, int]], device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, device=device, generator=generator).to(dtype) for shape in shapes]


def _foreach(grads: list[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2.0, dtype=torch.float32)))


def _providers(device: torch.device) -> list[str]:
    return ["triton", "torch"] if device.type == "cuda" else ["native", "torch"]


def _label(provider: str) -> str:
    return "ours, torch" if provider == "torch" else "ours"


def _with(provider: str, run: Callable[[], object]) -> Callable[[], object]:
    def chosen() -> object:
        os.environ["SHOESTRING_OPS"] = f"grad_pack={provider}"
        return run()

    return chosen


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    for row in rows(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
        print(row.name)
        for name, seconds in row.seconds.items():
            print(f"    {name:20} {1e3 * seconds:7.2f} ms, {row.bytes / seconds / 1e9:5.1f} GB/s")
        print(f"    {row.note}" * bool(row.note))
