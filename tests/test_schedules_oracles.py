"""The schedulers of torch and transformers as oracles.

Theirs give the rate at the beginning of a step, ours that of its end, so our sequence is theirs one call
earlier: our step k of T has their factor k of 0 ... T.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from shoestring.recipes import (
    CosineSchedule,
    InverseSqrtSchedule,
    LinearSchedule,
    OneCycleSchedule,
    Piece,
    PiecewiseSchedule,
    PolynomialSchedule,
    WsdSchedule,
)
from shoestring.recipes.schedules import ScheduleConfig
from shoestring.schedules import Clock, Limits, build_schedule
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, OneCycleLR, PolynomialLR
from transformers import get_scheduler

TOTAL = 100


def ours(config: ScheduleConfig, total: int = TOTAL) -> list[float]:
    """Factors of the steps of a run limited by steps."""
    schedule = build_schedule(config)
    clock = Clock(Limits(steps=total), started=0.0, now=lambda: 0.0, warmup=schedule.warmup)
    factors = []
    while (permit := clock.plan_step(tokens=100)).go:
        factors.append(schedule.factor(permit))
        clock.finish_step(0.0, 100)
    return factors


def theirs(make: Callable[[torch.optim.Optimizer], Any], calls: int = TOTAL) -> list[float]:
    """Factors after 0, 1, ... calls."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    factors = [optimizer.param_groups[0]["lr"]]
    for _ in range(calls):
        optimizer.step()
        scheduler.step()
        factors.append(optimizer.param_groups[0]["lr"])
    return factors


def peer(name: str, warmup: int, /, **options: Any) -> list[float]:
    return theirs(lambda o: get_scheduler(name, o, warmup, TOTAL, scheduler_specific_kwargs=options))


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize(
    ("config", "name", "options"),
    [
        (LinearSchedule, "linear", {}),
        (CosineSchedule, "cosine", {}),
        (partial(PolynomialSchedule, power=2.0), "polynomial", {"power": 2.0, "lr_end": 0.0}),
    ],
    ids=["linear", "cosine", "polynomial"],
)
def test_of_transformers_one_call_earlier(config: Any, name: str, options: Any, warmup: int) -> None:
    assert ours(config(warmup_steps=float(warmup))) == pytest.approx(
        peer(name, warmup, **options)[1:], abs=1e-12
    )


@pytest.mark.parametrize("kind", ["linear", "cosine", "1-sqrt"])
@pytest.mark.parametrize(("warmup", "decay"), [(0, 20), (10, 45), (10, 90)])
def test_wsd_is_warmup_stable_decay_of_transformers(kind: Any, warmup: int, decay: int) -> None:
    config = WsdSchedule(warmup_steps=float(warmup), decay_fraction=decay / (TOTAL - warmup), decay_type=kind)
    expected = peer("warmup_stable_decay", warmup, num_decay_steps=decay, decay_type=kind)
    # The root has no bound on its slope where the leg begins: a last bit of x there is 1e-8 of the factor.
    assert ours(config) == pytest.approx(expected[1:], abs=2e-8 if kind == "1-sqrt" else 1e-12)


def test_a_floor_of_wsd_is_min_lr_ratio() -> None:
    config = WsdSchedule(warmup_steps=0.0, decay_fraction=0.3, min_factor=0.1)
    options = {"num_decay_steps": 30, "decay_type": "1-sqrt", "min_lr_ratio": 0.1}
    assert ours(config) == pytest.approx(peer("warmup_stable_decay", 0, **options)[1:], abs=1e-12)


@pytest.mark.parametrize(("warmup", "timescale"), [(10, 10), (10, 40), (1, 5)])
def test_inverse_sqrt_is_that_of_transformers(warmup: int, timescale: int) -> None:
    config = InverseSqrtSchedule(warmup_steps=float(warmup), timescale=timescale / (TOTAL - warmup))
    # The last step of theirs is one of ours before the end: the same formula up to x = 1.
    assert ours(config) == pytest.approx(peer("inverse_sqrt", warmup, timescale=timescale)[1:], abs=1e-12)


@pytest.mark.parametrize(
    ("config", "make"),
    [
        (LinearSchedule, lambda o: LinearLR(o, 1.0, 0.0, TOTAL)),
        (partial(CosineSchedule, min_factor=0.2), lambda o: CosineAnnealingLR(o, TOTAL, eta_min=0.2)),
        (partial(PolynomialSchedule, power=3.0), lambda o: PolynomialLR(o, TOTAL, 3.0)),
    ],
    ids=["LinearLR", "CosineAnnealingLR", "PolynomialLR"],
)
def test_of_torch_one_call_earlier(config: Any, make: Any) -> None:
    assert ours(config(warmup_steps=0.0)) == pytest.approx(theirs(make)[1:], abs=1e-12)


@pytest.mark.parametrize("strategy", ["cos", "linear"])
@pytest.mark.parametrize("pct", [0.3, 0.5])
@pytest.mark.parametrize(("total", "div", "final"), [(10, 25.0, 1e4), (200, 10.0, 100.0)])
def test_onecycle_is_torchs(strategy: Any, pct: float, total: int, div: float, final: float) -> None:
    """Going down the same sequence without a shift; going up theirs begins at the very foot and ours a step
    above it, on the same curve.
    """
    config = OneCycleSchedule(pct_start=pct, div_factor=div, final_div_factor=final, anneal_strategy=strategy)
    options = {"pct_start": pct, "div_factor": div, "final_div_factor": final, "anneal_strategy": strategy}
    expected = theirs(lambda o: OneCycleLR(o, 1.0, total, cycle_momentum=False, **options), total - 1)
    found, schedule = ours(config, total), build_schedule(config)
    assert max(found) == 1.0
    top = round(pct * total) - 1
    assert found[top:] == pytest.approx(expected[top:], abs=1e-12)
    rise = [schedule(pct * step / (pct * total - 1)) for step in range(top + 1)]
    assert rise == pytest.approx(expected[: top + 1], abs=1e-12)


def test_the_golden_values_of_onecycle() -> None:
    values = [0.9505, 0.8117, 0.6113, 0.3887, 0.1883, 0.0495, 4e-6]
    assert ours(OneCycleSchedule(), 10)[3:] == pytest.approx(values, abs=5e-5)


def cosines(cycles: int) -> list[Piece]:
    return [Piece(until=(n + 1) / cycles, profile="cosine", start=1.0) for n in range(cycles)]


def test_cosine_with_restarts_is_a_schedule_of_pieces() -> None:
    config = PiecewiseSchedule(warmup_steps=0.0, pieces=cosines(3))  # 100 / 3: no step ends on a border
    assert ours(config) == pytest.approx(peer("cosine_with_restarts", 0, num_cycles=3)[1:], abs=1e-12)


def test_where_theirs_has_restarted_at_a_border_ours_has_landed() -> None:
    found = ours(PiecewiseSchedule(warmup_steps=0.0, pieces=cosines(4)))
    expected = peer("cosine_with_restarts", 0, num_cycles=4)[1:]
    borders = [24, 49, 74]
    assert [found[k] for k in borders] == pytest.approx([0.0] * 3, abs=1e-15)
    assert [expected[k] for k in borders] == [1.0] * 3
    rest = [k for k in range(TOTAL) if k not in borders]
    assert [found[k] for k in rest] == pytest.approx([expected[k] for k in rest], abs=1e-12)


def test_a_rising_piece_is_a_warm_up() -> None:
    pieces = [Piece(until=0.1, profile="linear", start=0.0, end=1.0), Piece(until=1.0, profile="cosine")]
    assert ours(PiecewiseSchedule(warmup_steps=0.0, pieces=pieces)) == pytest.approx(
        peer("cosine", 10)[1:], abs=1e-12
    )


def test_past_the_end_peers_rise_again_and_ours_does_not() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = theirs(lambda o: get_scheduler("cosine", o, 0, 10), 14)
    assert expected[-1] > 0.03
    schedule = build_schedule(CosineSchedule())
    assert [schedule(x) for x in (1.0, 1.1, 1.4, 2.0)] == [0.0] * 4


def test_warm_up_of_the_whole_budget_and_more() -> None:
    for warmup in (TOTAL, 2 * TOTAL):
        found = ours(LinearSchedule(warmup_steps=float(warmup)))
        expected = peer("linear", warmup)[1:]
        # Ours lands even so: the last step has the end of the profile, where theirs is still at its peak.
        assert found[:-1] == pytest.approx(expected[:-1], abs=1e-12)
        assert found[-1] == 0.0
        assert all(a <= b for a, b in itertools.pairwise(found[:-1]))
