"""APOLLO, APOLLO-Mini, GaLore and FRUGAL whole: the kernels' steps beside PyTorch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shoestring.ops import providers
from shoestring.optimizers import (
    APOLLO,
    FRUGAL,
    APOLLOMini,
    GaLore,
    NaturalGaLore,
    clip_by_global_norm,
    clip_for_step,
    matrix,
    products,
    two_pass,
)
from torch import Tensor, nn

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "apollo": (APOLLO, {"rank": 6, "scale": None, "sketch_dtype": torch.float32}),
    "apollo_mini": (APOLLOMini, {"sketch_dtype": torch.float32}),
    "galore": (GaLore, {"rank": 6, "product_dtype": torch.float32}),
    "natural_galore": (NaturalGaLore, {"rank": 3, "history": 2, "product_dtype": torch.float32}),
    "frugal": (FRUGAL, {"density": 0.4}),
}
SHAPES = [(40, 24), (24, 40), (17, 17), (3, 20, 30)]
COMMON = {"lr": 1e-2, "weight_decay": 0.1, "update_proj_gap": 2}


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("the weights were not written by a kernel")


def stepped(
    provider: str, kind: str, shapes: list[tuple[int, ...]], monkeypatch: Any, device: str, *,
    dtype: torch.dtype = torch.float32, alone: bool = True, clipping: Any = None, **options: Any,
) -> list[Tensor]:  # fmt: skip
    """The weights after three steps of one optimizer."""
    generator = torch.Generator().manual_seed(5)
    starts = [torch.randn(shape, generator=generator) for shape in shapes]
    params = [nn.Parameter(start.to(device, dtype, copy=True)) for start in starts]
    optimizer_class, own = KINDS[kind]
    optimizer = optimizer_class(params, **{**COMMON, **own, **options})
    monkeypatch.setenv("SHOESTRING_OPS", f"low_rank={provider}")
    with monkeypatch.context() as patch:
        if provider == "triton" and alone:
            patch.setattr(matrix, "add_step", refuse)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(device, dtype)
            if clipping is not None:
                clipping(optimizer, params, 20.0)
            optimizer.step()
            assert providers.used["low_rank"] == provider
    assert all(bool((p != s.to(device, dtype)).any()) for p, s in zip(params, starts, strict=True))
    return [torch.cat([p.detach().double().flatten() for p in params]), *(s.flatten() for s in starts)]


def moved_apart(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Difference of the ways travelled from the same start, relative to theirs."""
    start = torch.cat(theirs[1:]).to(theirs[0].device).double()
    return float((ours[0] - theirs[0]).norm() / (theirs[0] - start).norm())


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_step_is_pytorchs(kind, device, monkeypatch):
    found = [stepped(p, kind, SHAPES, monkeypatch, device) for p in ("triton", "torch")]
    assert moved_apart(*found) < 2e-5


@pytest.mark.parametrize("kind", ["apollo", "apollo_mini", "galore", "frugal"])
def test_bfloat16_weights_are_rounded_by_the_same_bits(kind, device, monkeypatch):
    """Two gradients that differ in float32's last digit round alike but at the very border of two values."""
    ours, theirs = (
        stepped(p, kind, SHAPES[1:], monkeypatch, device, dtype=torch.bfloat16)[0]
        for p in ("triton", "torch")
    )
    assert float((ours == theirs).double().mean()) > 0.995
    assert float((ours - theirs).abs().max()) < 2.0**-6  # one place of what is below 4
    other = stepped("torch", kind, SHAPES[1:], monkeypatch, device, dtype=torch.bfloat16, seed=1)[0]
    assert float((other == theirs).double().mean()) < 0.9
    near = [
        stepped(p, kind, SHAPES[:1], monkeypatch, device, dtype=torch.bfloat16, weights="plain")[0]
        for p in ("triton", "torch")
    ]
    assert float((near[0] == near[1]).double().mean()) > 0.995


@pytest.mark.parametrize("kind", ["apollo", "galore"])
def test_products_in_bfloat16_stay_near(kind, device, monkeypatch):
    narrow = {
        "apollo": {"rank": 16, "sketch_dtype": torch.bfloat16},
        "galore": {"product_dtype": torch.bfloat16},
    }
    found = [stepped(p, kind, SHAPES[:1], monkeypatch, device, **narrow[kind]) for p in ("triton", "torch")]
    assert moved_apart(*found) < 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_clipping_is_done_by_the_kernels(kind, device, monkeypatch):
    """The gradients' norms are about 60; ranks are thin enough for the early first pass, or are not."""
    monkeypatch.setattr(products, "_cpu_has_bfloat16", lambda: False)  # which rounds what is scaled otherwise
    shapes, thin = [(64, 72), (72, 64)], {} if kind in ("apollo_mini", "frugal") else {"rank": 1}
    for options in ({}, thin) if thin else ({},):

        def before(_: Any, params: list[Tensor], limit: float) -> None:
            clip_by_global_norm(params, limit)

        ways = {"triton": clip_for_step, "torch": clip_for_step, "torch, before": before}
        found = [
            stepped(way.split(",")[0], kind, shapes, monkeypatch, device, clipping=clipping, **options)
            for way, clipping in ways.items()
        ]
        assert moved_apart(found[0], found[2]) < 5e-5
        assert moved_apart(found[1], found[2]) < 5e-5


@pytest.mark.parametrize("kind", ["apollo", "apollo_mini", "galore", "frugal"])
def test_matrices_stacked_for_a_launch_are_those_stepped_alone(kind, device, monkeypatch):
    monkeypatch.setattr(matrix, "_CPU_BATCH", 1 << 20)
    shapes = [(20, 30)] * 3
    together = stepped("triton", kind, shapes, monkeypatch, device)
    monkeypatch.setattr(two_pass, "_ALONE", 1)
    alone = stepped("triton", kind, shapes, monkeypatch, device)
    assert moved_apart(together, alone) < 1e-6


@pytest.mark.parametrize("kind", ["apollo", "galore", "frugal"])
def test_few_bits_of_state_and_what_is_kept_beside_a_weight(kind, device, monkeypatch):
    big = [(96, 72)]
    for options in ({"state_bits": 8, "rank": 48, "density": 0.7}, {"state_bits": 16}):
        known = {k: v for k, v in options.items() if k == "state_bits" or k in KINDS[kind][1]}
        found = [stepped(p, kind, big, monkeypatch, device, **known) for p in ("triton", "torch")]
        assert moved_apart(*found) < 2e-3
    for mode in () if kind == "frugal" else ("kahan", "master"):  # its one pass is all or nothing
        given = {"dtype": torch.bfloat16, "weights": mode, "alone": False}
        found = [stepped(p, kind, SHAPES[:1], monkeypatch, device, **given) for p in ("triton", "torch")]
        assert float((found[0][0] == found[1][0]).double().mean()) > 0.99


def test_float64_asked_of_the_kernels_is_refused(device, monkeypatch):
    with pytest.raises(Exception, match="it has none for these arguments"):
        stepped("triton", "apollo", SHAPES[:1], monkeypatch, device, dtype=torch.float64)
