"""Clipping of optimizers that read gradients twice: no pass more, and the step of clipped gradients."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from shoestring.offload import offload_optimizer
from shoestring.ops import low_rank, use_int8_weights
from shoestring.optimizers import (
    APOLLO,
    FRUGAL,
    QAPOLLO,
    AdamW,
    APOLLOMini,
    GaLore,
    NaturalGaLore,
    apollo,
    clip,
    clip_by_global_norm,
    clip_for_step,
    products,
    two_pass,
)
from torch import Tensor, nn

# Ranks that are thin beside these matrices in float32 (a thirty-second of their smaller side) or are not.
SHAPES = [(64, 96), (96, 64), (3, 64, 72), (64, 64)]
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "apollo": (APOLLO, {"rank": 1, "scale": None}),
    "apollo, thick": (APOLLO, {"rank": 8, "scale": None}),
    "apollo, scale_front": (APOLLO, {"rank": 1, "scale": 9.0, "scale_front": True}),
    "apollo, unlimited": (APOLLO, {"rank": 1, "norm_growth_limit": None}),
    "apollo_mini": (APOLLOMini, {}),
    "q_apollo": (QAPOLLO, {"rank": 1, "scale": None}),
    "galore": (GaLore, {"rank": 1}),
    "galore, thick": (GaLore, {"rank": 8}),
    "natural_galore": (NaturalGaLore, {"rank": 1, "history": 2}),
    **{
        f"frugal, {projection}, {rule}": (
            FRUGAL,
            {"density": 0.25, "projection": projection, "state_free": rule},
        )
        for projection, rule in (
            ("columns", "sgd"), ("columns", "sign_sgd"), ("randk", "sgd"), ("random", "sgd"), ("svd", "none"),
            ("blocks", "sgd"),
        )
    },
}  # fmt: skip
THIN = ["apollo", "apollo, scale_front", "apollo_mini"]


@pytest.fixture(autouse=True)
def _products_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 rounds a gradient and a scaled one otherwise."""
    monkeypatch.setattr(products, "_cpu_has_bfloat16", lambda: False)


def made(kind: str, shapes: list[tuple[int, ...]] = SHAPES, **options: Any) -> tuple[Any, list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(3)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    bias = nn.Parameter(torch.randn(30, generator=generator))
    rule, own = KINDS[kind]
    groups = [{"params": params, "kind": "matrix"}, {"params": [bias], "kind": "adamw"}]
    return rule(groups, lr=1e-2, update_proj_gap=3, eps=1e-3, **own, **options), [*params, bias]


def give_gradients(params: list[nn.Parameter], seed: int, size: float = 1.0) -> float:
    """Gradients of norm about 1 · size · √elements; their norm."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = size * torch.randn(p.shape, generator=generator)
    return float(torch.cat([p.grad.double().flatten() for p in params if p.grad is not None]).norm())


def run(kind: str, clipping: Any, steps: int = 5, **options: Any) -> tuple[list[Tensor], list[float]]:
    """Weights after some steps that are clipped to half, not clipped, and so on, and the norms."""
    optimizer, params = made(kind, **options)
    norms = []
    for step in range(steps):
        whole = give_gradients(params, step)
        norm = clipping(optimizer, params, (0.3 if step % 2 == 0 else 3) * whole)
        assert float(norm) == pytest.approx(whole, rel=2e-6)
        norms.append(float(norm))
        optimizer.step()
        assert optimizer.grad_scale is None
    return [p.detach().clone() for p in params], norms


def before(optimizer: Any, parameters: list[Tensor], max_norm: float) -> Tensor:
    return clip_by_global_norm(parameters, max_norm)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_clips_is_a_step_on_clipped_gradients(kind: str) -> None:
    (ours, _), (theirs, _) = run(kind, clip_for_step), run(kind, before)
    unclipped, _ = run(kind, lambda optimizer, parameters, _: clip_for_step(optimizer, parameters, 1e9))
    starts = made(kind)[1]
    for a, b, c, start in zip(ours, theirs, unclipped, starts, strict=True):
        way = float((b - start).norm())
        assert float((a - b).norm()) < 2e-4 * way
        assert float((a - c).norm()) > 1e-3 * way or not bool((b - start).any())


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("kind", ["apollo", "apollo, thick", "galore", "frugal, columns, sgd"])
def test_so_it_is_with_few_bits_of_state(kind: str, bits: int) -> None:
    shapes = [(64, 96), (128, 96)]
    found = []
    for clipping in (clip_for_step, before):
        optimizer, params = made(kind, shapes, state_bits=bits)
        starts = [p.detach().clone() for p in params]
        for step in range(3):
            clipping(optimizer, params, 0.3 * give_gradients(params, step))
            optimizer.step()
        found.append(torch.cat([(p - s).detach().flatten() for p, s in zip(params, starts, strict=True)]))
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 2e-2


@pytest.mark.parametrize("kind", THIN)
def test_a_gradient_is_read_once_for_its_norm_and_its_sketch(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer, params = made(kind)
    measured: list[list[Tensor]] = []
    looks: list[Tensor] = []
    measure, look = clip.global_norm, low_rank.first_pass

    def counted_norm(grads: list[Tensor]) -> Tensor:
        measured.append(grads)
        return measure(grads)

    def counted_look(grad: Tensor, projection: Tensor, **options: Any) -> low_rank.FirstPass:
        looks.append(grad)
        return look(grad, projection, **options)

    monkeypatch.setattr(clip, "global_norm", counted_norm)
    monkeypatch.setattr(apollo, "first_pass", counted_look)
    for step in range(2):
        give_gradients(params, step)
        clip_for_step(optimizer, params, 1.0)
        optimizer.step()
        assert len(looks) == 4
        assert [len(grads) for grads in measured] == [1]  # the bias
        assert not optimizer._looked
        measured.clear()
        looks.clear()


@pytest.mark.parametrize("kind", ["apollo", "apollo, thick", "q_apollo", "galore"])
def test_state_elsewhere_gives_the_same_bits(kind: str, tmp_path: Path) -> None:
    found = []
    for tier in ("device", "disk"):
        optimizer, params = made(kind)
        stepped = optimizer
        if tier == "disk":
            stepped, _ = offload_optimizer(optimizer, tier="disk", folder=tmp_path, buffer_size=1 << 20)
        for step in range(4):
            norm = clip_for_step(stepped, params, 0.3 * give_gradients(params, step))
            assert len(optimizer._looked) == (4 if kind in ("apollo", "q_apollo") else 0)
            stepped.step()
            assert not optimizer._looked
        found.append([norm, *(p.detach() for p in params)])
        if tier == "disk":
            stepped.close()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_sketches_that_are_not_thin_are_not_kept() -> None:
    optimizer, params = made("apollo, thick")
    give_gradients(params, 0)
    assert optimizer.first_pass() == ([], None)
    optimizer, params = made("apollo")
    assert optimizer.first_pass() == ([], None)  # without gradients
    give_gradients(params, 0)
    read, squares = optimizer.first_pass()
    assert [id(p) for p in read] == [id(p) for p in params[:-1]]
    exact = sum(float(p.grad.double().square().sum()) for p in read if p.grad is not None)
    assert float(squares) == pytest.approx(exact, rel=1e-6)
    kept = sum(t.nbytes for entry in optimizer._looked.values() for t in entry.found)
    assert 0 < kept <= two_pass._KEPT * sum(p.grad.nbytes for p in read if p.grad is not None)


@pytest.mark.parametrize("how", ["in place", "another"])
def test_a_gradient_that_changes_before_the_step_is_read_again(how: str) -> None:
    found = []
    for looks in (True, False):
        optimizer, params = made("apollo")
        give_gradients(params, 0)
        if looks:
            optimizer.first_pass()
        for p in params:
            assert p.grad is not None
            if how == "in place":
                p.grad.mul_(p.grad)
            else:
                p.grad = p.grad.square()
        optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in params]))
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", THIN)
def test_a_gradient_that_is_not_finite_is_seen_and_leaves_nothing(kind: str) -> None:
    """The step is skipped, as a run does; the next is as if it had never been."""
    found = []
    for bad in (True, False):
        optimizer, params = made(kind)
        for step in range(4):
            if bad:
                give_gradients(params, 100 + step)
                assert params[1].grad is not None
                params[1].grad[3, 5] = float("nan" if step % 2 else "inf")
                state = copy.deepcopy(optimizer.state_dict())
                assert not bool(torch.isfinite(clip_for_step(optimizer, params, 1.0)))
                if step:  # before the first there is none
                    after = optimizer.state_dict()["state"]
                    for i, entry in state["state"].items():
                        assert all(torch.equal(value, after[i][key]) for key, value in entry.items())
            give_gradients(params, step)
            clip_for_step(optimizer, params, 1.0)
            optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in params]))
    assert torch.equal(*found)


def test_parameters_that_are_clipped_apart_are_measured_apart() -> None:
    """The norm is that of the parameters asked for, whatever else the optimizer steps."""
    optimizer, params = made("apollo")
    give_gradients(params, 0)
    part = params[:2]
    whole = torch.cat([p.grad.double().flatten() for p in part if p.grad is not None]).norm()
    assert float(clip_for_step(optimizer, part, None)) == pytest.approx(float(whole), rel=1e-6)
    assert not optimizer._looked
    assert optimizer.grad_scale is None


def test_int8_weights_and_dense_ones_are_clipped_alike() -> None:
    found = []
    for clipping in (clip_for_step, before):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Sequential(nn.Linear(64, 64, bias=False)), nn.Linear(64, 64, bias=False))
        use_int8_weights(model[0])
        optimizer = QAPOLLO(model.parameters(), lr=1e-2, rank=1, scale=None, eps=1e-3)
        params = list(model.parameters())
        for step in range(3):
            model(torch.randn(8, 64, generator=torch.Generator().manual_seed(step))).square().sum().backward()
            clipping(optimizer, params, 0.5)
            optimizer.step()
            optimizer.zero_grad()
        found.append(model(torch.eye(64)).detach())
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 1e-2


def test_an_optimizer_that_scales_nothing_gets_scaled_gradients() -> None:
    p = nn.Parameter(torch.ones(4))
    p.grad = torch.full((4,), 2.0)
    assert float(clip_for_step(torch.optim.SGD([p], lr=1.0), [p], 1.0)) == 4.0
    torch.testing.assert_close(p.grad, torch.full((4,), 0.5))
    own = AdamW([p], lr=1.0)
    p.grad = torch.full((4,), 2.0)
    assert float(clip_for_step(own, [p], 1.0)) == 4.0
    assert float(own.grad_scale) == 0.25  # type: ignore[arg-type]
    assert bool((p.grad == 2).all())
