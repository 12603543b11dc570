"""A wrong constant must fail: each rule is run again with one number or operation changed.

The source of an algorithm is changed in one place and executed as a module of its own; the comparison with
its float64 reference, which the rule as written passes, must then fail. So the references see every constant.
"""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from optimizer_references import WoodburyHistory, adamw, apollo, cosmos, frugal, galore, muon, soap
from shoestring.optimizers.frugal import _seed, columns_of
from test_optimizers_rules import near, problem, train

SHAPE = (24, 16)


def mutant(module: str, old: str, new: str, room: str = "optimizers") -> types.ModuleType:
    """`shoestring.<room>.<module>` with `old` replaced by `new`, which must occur."""
    original = importlib.import_module(f"shoestring.{room}.{module}")
    assert original.__file__ is not None
    source = Path(original.__file__).read_text(encoding="utf-8")
    assert old in source, f"{module}.py has no {old!r} any more: change this test with it"
    made = types.ModuleType(original.__name__)
    made.__package__ = original.__package__
    made.__file__ = original.__file__
    exec(compile(source.replace(old, new), original.__file__, "exec"), made.__dict__)
    return made


def check_adamw(kind: Any) -> None:
    w, grads = problem(SHAPE)
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
    p = torch.nn.Parameter(w.clone())
    optimizer = kind([p], **options, state_bits=32)
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
    near(p.detach(), adamw(w, grads, **options), w, 1e-9)


def check_apollo(kind: Any) -> None:
    w, grads = problem(SHAPE)
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
    given = {"scale": 3.0, "scale_front": False}
    ours, optimizer = train(kind, w, grads, rank=4, update_proj_gap=7, **given, **options)
    group = optimizer.param_groups[0]
    projections = [optimizer.projection(0, SHAPE, group, t, w).clone() for t in range(1, len(grads) + 1)]
    # by the definition, not by the optimizer: P of N(0, 1 / r)
    assert float(projections[0].std()) == pytest.approx(0.5, rel=0.25)
    reference = apollo(w, grads, projections, per_channel=True, gamma=1.01, **given, **options)
    near(ours, reference, w, 1e-9)


def check_galore(kind: Any) -> None:
    w, grads = problem(SHAPE)
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1, "rank": 5, "scale": 0.5}
    how = {"projection": "svd", "moments_on_refresh": "keep", "stagger": False}
    ours, _ = train(kind, w, grads[:6], update_proj_gap=6, **how, **options)
    near(ours, galore(w, grads[:6], update_proj_gap=6, **options), w, 1e-8)


def check_natural(kind: Any) -> None:
    w, grads = problem(SHAPE)
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1, "rank": 3, "scale": 0.5}
    how = {"projection": "svd", "moments_on_refresh": "keep", "stagger": False}
    ours, _ = train(kind, w, grads[:12], update_proj_gap=12, history=4, damping=0.3, **how, **options)
    reference = galore(w, grads[:12], update_proj_gap=12, preconditioner=WoodburyHistory(4, 0.3), **options)
    near(ours, reference, w, 1e-8)


def check_frugal(kind: Any) -> None:
    w, grads = problem(SHAPE)
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
    rule = {"state_free": "sign_sgd", "state_free_scale": 0.5, "update_proj_gap": 6}
    ours, _ = train(kind, w, grads, density=0.3, **rule, **options)
    masks = []
    for step in range(len(grads)):
        mask = torch.zeros(SHAPE, dtype=torch.bool)
        for span in columns_of(SHAPE[1], 4, _seed(0, step // 6, 0)):
            mask[:, span] = True
        masks.append(mask)
    near(ours, frugal(w, grads, masks, **rule, **options), w, 1e-9)


def check_muon(kind: Any) -> None:
    w, grads = problem(SHAPE)
    options = {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "ns_steps": 5, "weight_decay": 0.1}
    for adjust in ("match_rms_adamw", "original"):
        ours, _ = train(kind, w, grads, adjust_lr=adjust, **options)
        near(ours, muon(w, grads, adjust_lr=adjust, **options), w, 1e-9)


def check_soap(kind: Any) -> None:
    w, grads = problem((16, 16))
    options = {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}
    how = {"precondition_frequency": 4, "max_precond_dim": 16}
    ours, _ = train(kind, w, grads, stagger=False, **how, **options)
    near(ours, soap(w, grads, **how, **options), w, 1e-7)


def check_cosmos(kind: Any) -> None:
    w, grads = problem(SHAPE)
    options = {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 0.1}
    how = {"rank": 4, "gamma": 0.3, "lr_ratio": 0.2, "nesterov": True}
    fresh = kind([torch.nn.Parameter(w.clone())], **how, **options)
    state: dict[str, Any] = {}
    fresh.new_state(state, w.unsqueeze(0), fresh.param_groups[0])
    ours, _ = train(kind, w, grads, **how, **options)
    near(ours, cosmos(w, grads, state["basis"][0], **how, **options), w, 1e-9)


CHECKS = {
    "APOLLO": ("apollo", check_apollo),
    "GaLore": ("galore", check_galore),
    "NaturalGaLore": ("natural_galore", check_natural),
    "FRUGAL": ("frugal", check_frugal),
    "Muon": ("muon", check_muon),
    "SOAP": ("soap", check_soap),
    "COSMOS": ("cosmos", check_cosmos),
}

MUTATIONS = [
    ("APOLLO", "sqrt(1 - beta2**step) / (1 - beta1**step)", "sqrt(1 - beta2**step)"),
    ("APOLLO", 'corrected *= 1 - rate * group["weight_decay"]', "corrected *= 1"),
    ("APOLLO", "root = sqrt(", "root = ("),
    ("GaLore", 'factor = -rate * group["scale"]', "factor = -rate"),
    ("GaLore", 'factor *= 1 - rate * group["weight_decay"]', "factor *= 1"),
    ("GaLore", "sqrt(1 - beta2**step)", "(1 - beta2**step)"),
    ("NaturalGaLore", "gram + damping * eye", "gram + 2 * damping * eye"),
    ("NaturalGaLore", ".mul_(damping)", ".mul_(1.0)"),
    ("NaturalGaLore", "place = (step - 1) % state", "place = 0 % state"),
    ("FRUGAL", 'free, held = -rate * group["state_free_scale"], -rate', "free, held = -rate, -rate"),
    ("FRUGAL", "rest.sign()", "rest.sign().neg()"),
    ("FRUGAL", "count = since + 1", "count = since + 2"),
    ("Muon", "3.4445, -4.7750, 2.0315", "3.4445, -4.7750, 2.0300"),
    ("Muon", "3.4445, -4.7750, 2.0315", "3.4440, -4.7750, 2.0315"),
    ("Muon", "3.4445, -4.7750, 2.0315", "3.4445, -4.7700, 2.0315"),
    ("Muon", "0.2 * sqrt(max(m, n))", "0.2 * sqrt(min(m, n))"),
    ("Muon", "sqrt(max(1.0, m / n))", "sqrt(max(1.0, n / m))"),
    ("Muon", 'momentum.lerp_(exact, 1 - group["momentum"])', "momentum.lerp_(exact, 1.0)"),
    ("SOAP", "1 - beta2 ** (step - 1)", "1 - beta2 ** step"),
    ("SOAP", "lerp_(outer.to(state[side].dtype), 1 - beta)", "lerp_(outer.to(state[side].dtype), 0.5)"),
    ("SOAP", "exp_avg = overlap @ exp_avg", "exp_avg = exp_avg"),
    ("SOAP", "descending=True", "descending=False"),
    ("COSMOS", "momentum.mul_(beta1).add_(exact)", "momentum.mul_(beta1).add_(exact, alpha=1 - beta1)"),
    ("COSMOS", "(1 + beta1 * b1)", "(1 + b1)"),
    ("COSMOS", "beta * (basis @ share) + (1 - beta) * seen", "basis @ share + seen"),
    ("COSMOS", "gamma * sqrt(m * n)", "sqrt(m * n)"),
    ("COSMOS", "exp_avg_sq / b2", "exp_avg_sq"),
    ("COSMOS", "range(3 if first else 1)", "range(2 if first else 1)"),
]


@pytest.mark.parametrize("name", CHECKS)
def test_the_rule_as_written_passes(name: str) -> None:
    module, check = CHECKS[name]
    check(getattr(sys.modules[f"shoestring.optimizers.{module}"], name))


@pytest.mark.parametrize(("name", "old", "new"), MUTATIONS)
def test_a_changed_rule_fails(name: str, old: str, new: str) -> None:
    module, check = CHECKS[name]
    with pytest.raises(AssertionError):
        check(getattr(mutant(module, old, new), name))


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("APOLLO", "exp_avg.lerp_(projected, 1 - betas[0])", "exp_avg.lerp_(projected, betas[0])"),
        ("APOLLO", "value=1 - betas[1])", "value=1.0)"),
        ("APOLLO", "exp_avg_sq.sqrt().add_(eps)", "exp_avg_sq.add(eps).sqrt()"),
        ("APOLLO", "shrink = limit / torch.clamp", "shrink = 1.0 / torch.clamp"),
        ("APOLLO", "factors * shrink, now * shrink", "factors * shrink, now"),
        ("APOLLO", "factors = scaled / (raw", "factors = scaled * (raw"),
        ("GaLore", "exp_avg.lerp_(projected, 1 - betas[0])", "exp_avg.lerp_(projected, 1 - betas[1])"),
        ("GaLore", "exp_avg_sq.sqrt().add_(eps)", "exp_avg_sq.sqrt().add_(2 * eps)"),
    ],
)
def test_a_changed_step_between_the_products_fails(
    name: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shoestring.ops import low_rank

    module, check = CHECKS[name]
    made = mutant("low_rank_torch", old, new, room="ops")
    for function in ("channel_factors", "moved_step"):
        monkeypatch.setattr(low_rank, function, getattr(made, function))
    with pytest.raises(AssertionError):
        check(getattr(sys.modules[f"shoestring.optimizers.{module}"], name))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("exp_avg.lerp_(grad, 1 - betas[0])", "exp_avg.lerp_(grad, 1 - betas[1])"),
        ("value=1 - betas[1])", "value=betas[1])"),
        ("(1 - betas[1] ** step) ** -0.5)", "1.0)"),
        (".mul_(1 / (1 - betas[0] ** step))", ".mul_(1.0)"),
    ],
)
def test_a_changed_adamw_fails(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule in chunks: torch's fused one is not ours to change."""
    from shoestring.ops import quantised_step as chunks
    from shoestring.optimizers import AdamW
    from shoestring.optimizers import adamw as rule

    monkeypatch.setattr(rule, "_is_quick", lambda *_: False)
    check_adamw(AdamW)
    monkeypatch.setattr(chunks, "adamw_update", mutant("adamw", old, new, room="ops").adamw_update)
    with pytest.raises(AssertionError):
        check_adamw(AdamW)
