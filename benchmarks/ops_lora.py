"""LoRA's layers, forward and backward: ours, PEFT's own, and the frozen base alone.

What LoRA costs is the time beyond the base's; the note says what share of PEFT's cost ours is. One row is a
set of layers of a decoder layer; with dropout, and on a 4-bit base, it is the same set. Times are the least
of six: the base is ten to twenty times its adapters, and on a shared machine its noise is larger than they
are. For that reason the rows "adapters alone" leave its products out: y and the base's part of dx are given.
The last rows are dropout alone: a mask that is a hash against PyTorch's.

    python benchmarks/ops.py --device cpu --only ops_lora
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from ops_timing import Row, extra_memory, median_seconds
from peft import LoraConfig, get_peft_model
from shoestring.models.weights import keep_four_bit_layout
from shoestring.ops import lora, lora_dropout, use_fused
from torch import Tensor, nn

RANK = 16
# name -> (in, out); SmolLM2-135M and Llama-3-8B
SMALL = {"q": (576, 576), "k": (576, 192), "v": (576, 192), "o": (576, 576)}
SMALL |= {"gate": (576, 1536), "up": (576, 1536), "down": (1536, 576)}
LARGE = {"q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024), "o": (4096, 4096)}
LARGE |= {"gate": (4096, 14336), "up": (4096, 14336), "down": (14336, 4096)}


def rows(device: torch.device) -> list[Row]:
    """One set of layers in two types, with and without dropout, and on 4 bits."""
    cpu = device.type == "cpu"
    tokens, shapes = (1024, SMALL) if cpu else (8192, LARGE)
    types = [torch.bfloat16, torch.float32] if cpu else [torch.bfloat16]
    found = [_layers(tokens, shapes, dtype, p, False, device) for dtype in types for p in (0.0, 0.1)]
    if find_spec("bitsandbytes") is not None:
        found.append(_layers(tokens, shapes, torch.bfloat16, 0.0, True, device))
    found += [_adapters(tokens, shapes, dtype, p, device) for dtype in types for p in (0.0, 0.1)]
    return [*found, *(_dropout(tokens, dtype, device) for dtype in types)]


def h200_rows() -> list[Row]:
    """What a layer of Llama-3-8B adds to its base at least, with W's products owned by cuBLAS."""
    found = []
    for p in (0.0, 0.1):
        for name, moved in (("forward", _forward_bytes), ("backward", _backward_bytes)):
            total = sum(moved(8192, *shape, p > 0) for shape in LARGE.values())
            flops = sum(8192 * RANK * (i + o) * (2 if name == "forward" else 4) for i, o in LARGE.values())
            kind = f"LoRA beyond its base, {name}, dropout {p}, 7 layers of 8192 tokens"
            found.append(Row(kind, {}, bytes=total, flops=float(flops)))
    return found


def _forward_bytes(tokens: int, width: int, out: int, dropped: bool) -> float:
    """x is read for h, and y read and written; the mask costs nothing where x is read."""
    del dropped
    return 2.0 * tokens * width + 4.0 * tokens * out


def _backward_bytes(tokens: int, width: int, out: int, dropped: bool) -> float:
    """g is read once for dh and dB, x for dA, and dx read and written; partial sums of 512 x 512."""
    del dropped
    return tokens * out * (2.0 + 8 * RANK / 256) + 6.0 * tokens * width


def _layers(
    tokens: int,
    shapes: dict[str, tuple[int, int]],
    dtype: torch.dtype,
    p: float,
    four_bit: bool,
    device: torch.device,
) -> Row:
    torch.manual_seed(0)
    base = nn.ModuleDict({name: _linear(*shape, dtype, four_bit, device) for name, shape in shapes.items()})
    keep_four_bit_layout(base)
    holder: Any = nn.Module()
    holder.layers = copy.deepcopy(base)
    holder.is_loaded_in_4bit = four_bit
    config = LoraConfig(r=RANK, lora_dropout=p, target_modules=list(shapes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(holder, config).to(device).train()
    ours = copy.deepcopy(peft)
    assert use_fused(ours) == [f"fused: {len(shapes)} LoRA layers"]
    x = {width: torch.randn(tokens, width, device=device).to(dtype) for width, _ in shapes.values()}
    g = {out: torch.randn(tokens, out, device=device).to(dtype) for _, out in shapes.values()}

    def run(layers: Any) -> Callable[[], None]:
        def once() -> None:
            for name, (width, out) in shapes.items():
                layers[name](x[width].detach().requires_grad_()).backward(g[out])

        return once

    contenders = {
        "ours": run(ours.base_model.model.layers),
        "PEFT": run(peft.base_model.model.layers),
        "base alone": run(base),
    }
    memory = {name: extra_memory(once, device) for name, once in contenders.items()}
    seconds = _least(contenders, device)
    cost, theirs = (seconds[name] - seconds["base alone"] for name in ("ours", "PEFT"))
    kind = "NF4 base, " if four_bit else ""
    return Row(
        f"{len(shapes)} layers, {kind}{tokens} tokens, rank {RANK}, dropout {p}, {str(dtype)[6:]}",
        seconds,
        bytes=0.0,
        flops=sum(4.0 * tokens * i * o + 6.0 * tokens * RANK * (i + o) for i, o in shapes.values()),
        memory=memory,
        note=f"LoRA's cost beyond the base: {cost / theirs:.2f} of PEFT's" if theirs > 0 else "",
    )


def _adapters(
    tokens: int, shapes: dict[str, tuple[int, int]], dtype: torch.dtype, p: float, device: torch.device
) -> Row:
    """What is done beside the base's products: PEFT's formula under autograd, and ours step by step."""
    cases = []
    for width, out in shapes.values():
        x, y, g, dx = (torch.randn(tokens, n, device=device).to(dtype) for n in (width, out, out, width))
        a, b = (torch.randn(shape, device=device) / 30 for shape in ((RANK, width), (out, RANK)))
        x.grad = dx
        cases.append((x.requires_grad_(), y, g, dx, a.requires_grad_(), b.requires_grad_()))

    def peft() -> None:
        for x, y, g, _, a, b in cases:
            seen = nn.functional.dropout(x.to(a.dtype), p) if p else x.to(a.dtype)
            added = nn.functional.linear(nn.functional.linear(seen, a), b) * 0.7
            (y + added).to(dtype).backward(g)

    @torch.no_grad()
    def ours() -> None:
        for x, y, g, dx, a, b in cases:
            seed = 5 if p else None
            low, high = a.to(dtype), b.to(dtype)
            h = lora._down(x, low, p, seed)
            y.addmm_(h, high.t(), alpha=0.7)
            dh, _ = lora._up_backward(g, b, h, 0.7)
            lora._down_backward(x, dh, low, dx, p, seed)

    seconds = _least({"ours": ours, "PEFT": peft}, device)
    moved = (_forward_bytes, _backward_bytes)
    return Row(
        f"adapters alone, {len(shapes)} layers, dropout {p}, {str(dtype)[6:]}",
        seconds,
        bytes=sum(f(tokens, *shape, p > 0) for f in moved for shape in shapes.values()) * dtype.itemsize / 2,
        flops=sum(6.0 * tokens * RANK * (i + o) for i, o in shapes.values()),
    )


def _least(contenders: dict[str, Callable[[], None]], device: torch.device) -> dict[str, float]:
    tries = [median_seconds(contenders, device, rounds=1) for _ in range(6)]
    return {name: min(found[name] for found in tries) for name in contenders}


def _linear(width: int, out: int, dtype: torch.dtype, four_bit: bool, device: torch.device) -> nn.Module:
    if not four_bit:
        return nn.Linear(width, out, bias=False, dtype=dtype, device=device).requires_grad_(False)
    from bitsandbytes import nn as quantised

    layer = quantised.Linear4bit(width, out, bias=False, compute_dtype=dtype, quant_type="nf4")
    weight = torch.randn(out, width) / width**0.5
    layer.weight = quantised.Params4bit(weight, quant_type="nf4", requires_grad=False)
    return layer.to(device)


def _dropout(tokens: int, dtype: torch.dtype, device: torch.device) -> Row:
    x: Tensor = torch.randn(tokens, 1536 if device.type == "cpu" else 4096, device=device).to(dtype)
    contenders = {
        "ours": lambda: lora_dropout.zeroed(x, 0.1, 5),
        "PyTorch's dropout": lambda: nn.functional.dropout(x, 0.1),
    }
    memory = {name: extra_memory(once, device) for name, once in contenders.items()}
    return Row(
        f"dropout of {tokens} x {x.shape[1]}, {str(dtype)[6:]}",
        median_seconds(contenders, device),
        bytes=2.0 * x.nbytes,
        memory=memory,
    )
