"""Every profile against its equation, its mean, fixed points; wrong constants must be seen.

The references below are written from the papers' equations and share no code with the package.
"""

from __future__ import annotations

import itertools
import math
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from shoestring.schedules import power_hold
from shoestring.schedules import profiles as p
from shoestring.schedules.legs import build_leg, exponential, inverse, one_minus_sqrt, with_last_leg, wsd
from shoestring.schedules.periodic import Span, piecewise, wsd_s

Curve = Callable[[float], float]
GRID = [i / 1000 for i in range(1001)]


# --- the equations


def ref_rex(x: float, d: float = 0.5) -> float:
    return (1 - x) / (1 - d + d * (1 - x))


def ref_uba(x: float, phi: float = 1.0) -> float:
    if x == 1.0:
        return 0.0
    return 1 / (1 + phi / 2 * math.tan(math.pi * x / 2) ** 2)


def ref_wsd(x: float, fraction: float, leg: Curve) -> float:
    return 1.0 if x <= 1 - fraction else leg((x - 1 + fraction) / fraction)


def ref_onecycle(x: float, pct: float, div: float, final: float, waves: bool) -> float:
    """From a to b a share u of the way, on a line or on half a cosine."""

    def way(a: float, b: float, u: float) -> float:
        return b + (a - b) / 2 * (1 + math.cos(math.pi * u)) if waves else a + (b - a) * u

    if x <= pct:
        return way(1 / div, 1.0, x / pct)
    return way(1.0, 1 / div / final, (x - pct) / (1 - pct))


REFERENCES: dict[str, tuple[Curve, Curve, float]] = {
    # name: ours, the equation, mean
    "constant": (p.constant, lambda x: 1.0, 1.0),
    "linear": (p.linear, lambda x: 1 - x, 1 / 2),
    "cosine": (p.cosine, lambda x: math.cos(math.pi * x / 2) ** 2, 1 / 2),
    "polynomial 2": (partial(p.polynomial, power=2.0), lambda x: (1 - x) ** 2, 1 / 3),
    "polynomial 0.5": (partial(p.polynomial, power=0.5), lambda x: math.sqrt(1 - x), 2 / 3),
    "rex": (p.rex, ref_rex, 2 * (1 - math.log(2))),
    "rex 0.9": (partial(p.rex, d=0.9), lambda x: ref_rex(x, 0.9), 1 / 0.9 + 0.1 / 0.81 * math.log(0.1)),
    "uba": (p.uba, ref_uba, 1 / (1 + math.sqrt(1 / 2))),
    "uba 0.5": (partial(p.uba, phi=0.5), lambda x: ref_uba(x, 0.5), 1 / (1 + math.sqrt(0.25))),
    "uba 5": (partial(p.uba, phi=5.0), lambda x: ref_uba(x, 5.0), 1 / (1 + math.sqrt(2.5))),
    "mirror_cosine": (p.mirror_cosine, lambda x: 2 - 2 * x - math.cos(math.pi * x / 2) ** 2, 1 / 2),
    "square": (p.square, lambda x: (1 - x) * (1 + x), 2 / 3),
    "1-sqrt": (one_minus_sqrt, lambda x: 1 - x**0.5, 1 / 3),
    "inverse": (inverse, lambda x: 1 / (1 + 9 * x), math.log(10) / 9),
    "inverse 0.5": (partial(inverse, to=0.5), lambda x: 1 / (1 + x), math.log(2)),
    "exponential": (exponential, lambda x: math.exp(-x * math.log(10)), 0.9 / math.log(10)),
    "exponential 0.5": (partial(exponential, to=0.5), lambda x: 2.0**-x, 0.5 / math.log(2)),
    "wsd": (wsd, lambda x: ref_wsd(x, 0.2, lambda u: 1 - u**0.5), 1 - 0.2 * 2 / 3),
    "wsd linear": (
        partial(wsd, decay_fraction=0.5, leg=p.linear),
        lambda x: ref_wsd(x, 0.5, lambda u: 1 - u),
        0.75,
    ),
    "wsd whole": (partial(wsd, decay_fraction=1.0, leg=p.cosine), p.cosine, 0.5),
    "inverse_sqrt": (
        partial(p.inverse_sqrt, timescale=0.1),
        lambda x: 1 / math.sqrt((x + 0.1) / 0.1),
        2 * math.sqrt(0.1) * (math.sqrt(1.1) - math.sqrt(0.1)),
    ),
    "inverse_sqrt with a leg": (
        partial(
            with_last_leg, profile=partial(p.inverse_sqrt, timescale=0.1), decay_fraction=0.4, leg=p.linear
        ),
        lambda x: (0.1 / (0.1 + min(x, 0.6))) ** 0.5 * min(1.0, (1 - x) / 0.4),
        2 * math.sqrt(0.1) * (math.sqrt(0.7) - math.sqrt(0.1)) + 0.2 * math.sqrt(1 / 7),
    ),
    "power": (
        partial(p.power, hold=0.1),
        lambda x: min(1.0, (0.1 / x) ** 0.51) if x else 1.0,
        0.1 + (0.1**0.51 - 0.1) / 0.49,
    ),
    "power b=-2": (
        partial(p.power, hold=0.25, b=-2.0),
        lambda x: min(1.0, 0.0625 / x**2) if x else 1.0,
        0.25 + (0.25**2 - 0.25) / -1,
    ),
    "onecycle": (
        p.one_cycle,
        lambda x: ref_onecycle(x, 0.3, 25, 1e4, True),
        0.3 * (1 + 1 / 25) / 2 + 0.7 * (1 + 4e-6) / 2,
    ),
    "onecycle lines": (
        partial(p.one_cycle, pct_start=0.5, div_factor=4, final_div_factor=2, anneal=p.linear),
        lambda x: ref_onecycle(x, 0.5, 4, 2, False),
        0.5 * 1.25 / 2 + 0.5 * 1.125 / 2,
    ),
    "wsd_s": (
        partial(wsd_s, ends=(0.25, 1.0), decay_fraction=0.5, leg=p.linear),
        lambda x: ref_wsd(4 * x if x <= 0.25 else (x - 0.25) / 0.75, 0.5, lambda u: 1 - u),
        0.75,
    ),
    "piecewise": (
        partial(
            piecewise,
            spans=(
                Span(0.2, p.linear, 0.0, 0.8),
                Span(0.6, p.constant, 0.8, 0.8),
                Span(1, p.square, 0.8, 0.1),
            ),
        ),
        lambda x: 4 * x if x <= 0.2 else 0.8 if x <= 0.6 else 0.1 + 0.7 * (1 - ((x - 0.6) / 0.4) ** 2),
        0.2 * 0.4 + 0.4 * 0.8 + 0.4 * (0.1 + 0.7 * 2 / 3),
    ),
}
FALLING = [name for name in REFERENCES if not name.startswith(("onecycle", "wsd_s", "piecewise"))]
TO_ZERO = [
    *("linear", "cosine", "polynomial 2", "polynomial 0.5", "rex", "rex 0.9", "uba", "uba 0.5", "uba 5"),
    *("mirror_cosine", "square", "1-sqrt", "wsd", "wsd linear", "inverse_sqrt with a leg", "wsd_s"),
]


@pytest.mark.parametrize("name", REFERENCES)
def test_a_profile_is_its_equation(name: str) -> None:
    ours, equation, _ = REFERENCES[name]
    assert [ours(x) for x in GRID] == pytest.approx([equation(x) for x in GRID], abs=1e-12)


@pytest.mark.parametrize("name", REFERENCES)
def test_the_mean_of_a_profile_is_its_closed_form(name: str) -> None:
    ours, _, mean = REFERENCES[name]
    n = 50_000
    assert sum(ours((i + 0.5) / n) for i in range(n)) / n == pytest.approx(mean, abs=1e-4)


@pytest.mark.parametrize("name", FALLING)
def test_a_decay_starts_at_one_and_never_rises(name: str) -> None:
    values = [REFERENCES[name][0](x) for x in GRID]
    assert values[0] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(values))


@pytest.mark.parametrize("name", TO_ZERO)
def test_a_decay_ends_at_zero(name: str) -> None:
    assert REFERENCES[name][0](1.0) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("fraction", [i / 97 for i in range(1, 97)])
@pytest.mark.parametrize("kind", ["linear", "cosine", "1-sqrt", "inverse", "exponential"])
def test_a_leg_ends_exactly_where_it_should_whatever_its_length(kind: Any, fraction: float) -> None:
    end = {"inverse": 0.1, "exponential": 0.1}.get(kind, 0.0)
    assert wsd(1.0, fraction, build_leg(kind)) == pytest.approx(end, abs=1e-16)
    assert with_last_leg(1.0, p.constant, fraction, build_leg(kind)) == pytest.approx(end, abs=1e-16)


@pytest.mark.parametrize(
    ("curve", "values"),
    [
        (p.linear, [0.75, 0.5, 0.25, 0.1]),
        (p.cosine, [0.8536, 0.5, 0.1464, 0.0245]),
        (partial(p.polynomial, power=2.0), [0.5625, 0.25, 0.0625, 0.01]),
        (p.rex, [0.8571, 0.6667, 0.4, 0.1818]),
        (partial(p.rex, d=0.9), [0.9677, 0.9091, 0.7692, 0.5263]),
        (partial(p.uba, phi=0.5), [0.9589, 0.8, 0.407, 0.0912]),
        (p.uba, [0.921, 0.6667, 0.2555, 0.0478]),
        (partial(p.uba, phi=5.0), [0.6998, 0.2857, 0.0642, 0.0099]),
        (one_minus_sqrt, [0.5, 0.2929, 0.134, 0.0513]),
        (inverse, [0.3077, 0.1818, 0.129, 0.1099]),
        (p.square, [0.9375, 0.75, 0.4375, 0.19]),
    ],
    ids=["linear", "cosine", "poly", "rex", "rex 9", "uba .5", "uba", "uba 5", "1-sqrt", "inverse", "square"],
)
def test_values_at_fixed_points(curve: Curve, values: list[float]) -> None:
    assert [curve(x) for x in (0.25, 0.5, 0.75, 0.9)] == pytest.approx(values, abs=5e-5)


# --- UBA


def test_uba_with_phi_two_is_the_cosine() -> None:
    assert [p.uba(x, 2.0) for x in GRID] == pytest.approx([p.cosine(x) for x in GRID], abs=1e-15)


@pytest.mark.parametrize(
    ("phi", "half"), [(0.25, 0.784), (0.5, 0.705), (1.0, 0.608), (2.0, 0.5), (5.0, 0.359), (10.0, 0.268)]
)
def test_where_uba_has_fallen_by_half(phi: float, half: float) -> None:
    assert 2 / math.pi * math.atan(math.sqrt(2 / phi)) == pytest.approx(half, abs=5e-4)
    assert p.uba(2 / math.pi * math.atan(math.sqrt(2 / phi)), phi) == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize("phi", [0.1, 1.0, 8.0])
def test_the_end_of_uba_is_a_parabola(phi: float) -> None:
    assert p.uba(1 - 1e-4, phi) == pytest.approx(math.pi**2 / (2 * phi) * 1e-8, rel=1e-5)


@pytest.mark.parametrize("kappa", [1.5, 4.0, 30.0])
@pytest.mark.parametrize("steps", [1, 2, 5, 12])
def test_uba_is_the_best_of_all_step_sequences_on_a_quadratic(kappa: float, steps: int) -> None:
    """Gradient descent on h w^2 / 2 for the worst h in [1, kappa]: uba(2 kappa), scaled to the steps that
    suit the two curvatures, reaches the Chebyshev bound 1 / T_n((kappa + 1) / (kappa - 1)).
    """
    low, high = 1.0, kappa

    def rate(x: float) -> float:  # the affine map from uba's [0, 1] to [1 / high, 1 / low]
        return 1 / high + (1 / low - 1 / high) * p.uba(x, 2 * kappa)

    def worst(rates: list[float]) -> float:
        curvatures = [low + (high - low) * i / 2000 for i in range(2001)]
        return max(abs(math.prod(1 - r * h for r in rates)) for h in curvatures)

    found = worst([rate((2 * t + 1) / (2 * steps)) for t in range(steps)])
    bound = 1 / math.cosh(steps * math.acosh((kappa + 1) / (kappa - 1)))
    assert found == pytest.approx(bound, rel=1e-9)
    for other in (p.linear, p.cosine, p.rex):
        rates = [1 / high + (1 / low - 1 / high) * other((2 * t + 1) / (2 * steps)) for t in range(steps)]
        assert worst(rates) >= bound * (1 - 1e-9)
    assert worst([rate((2 * t + 1) / (2 * steps)) * 1.05 for t in range(steps)]) > bound * 1.01


# --- power's hold


def test_the_hold_of_power_is_where_its_rate_falls_below_the_peak() -> None:
    """min(peak, beta a n^b) with the paper's constants, walked along n."""
    peak, beta, tokens = 0.02, 128, 4e9
    hold = power_hold(peak, batch_sequences=beta, tokens=tokens)
    assert hold == pytest.approx(5.8e8 / tokens, rel=0.01)
    for n in (1e8, hold * tokens * 0.999, hold * tokens * 1.001, 2e9, 4e9):
        assert peak * p.power(n / tokens, hold) == pytest.approx(min(peak, beta * 4.6 * n**-0.51), rel=1e-9)


def test_a_small_rate_is_held_throughout() -> None:
    assert power_hold(1e-4, batch_sequences=128, tokens=1e9) == 1.0


# --- periods and pieces


def test_a_period_lands_at_its_end_and_the_next_begins_at_the_peak() -> None:
    ends = tuple((n + 1) / 3 for n in range(3))
    curve = partial(wsd_s, ends=ends)
    assert [curve(k / 300) for k in (100, 200, 300)] == [0.0, 0.0, 0.0]
    assert [curve(k / 300) for k in (0, 101, 201)] == [1.0, 1.0, 1.0]


def test_pieces_meet() -> None:
    curve = REFERENCES["piecewise"][0]
    steps = [abs(curve(a) - curve(b)) for a, b in itertools.pairwise(GRID)]
    assert max(steps) <= 0.004 + 1e-12


# --- wrong constants


def mutant(module: str, old: str, new: str) -> dict[str, Any]:
    """Names of `shoestring.schedules.<module>` with `old` replaced by `new`; `old` must occur once."""
    path = Path(p.__file__).with_name(f"{module}.py")
    source = path.read_text(encoding="utf-8")
    assert source.count(old) == 1, (
        f"{module}.py has {old!r} {source.count(old)} times: change this test with it"
    )
    made = types.ModuleType(f"{p.__package__}.{module}")
    made.__package__ = p.__package__
    exec(compile(source.replace(old, new), str(path), "exec"), made.__dict__)
    return made.__dict__


@pytest.mark.parametrize(
    ("module", "function", "reference", "old", "new"),
    [
        ("profiles", "linear", "linear", "return 1.0 - x\n", "return 1.0 - 0.99 * x\n"),
        ("profiles", "cosine", "cosine", "0.5 * (1.0 + math.cos(math.pi * x))", "math.cos(math.pi / 2 * x)"),
        ("profiles", "polynomial", "polynomial 2", "** power)", "** (power + 0.01))"),
        ("profiles", "rex", "rex", "d: float = 0.5)", "d: float = 0.9)"),
        ("profiles", "rex", "rex 0.9", "(1.0 - d) + d * z", "1.0 - d * x * x"),
        ("profiles", "uba", "uba", "phi: float = 1.0)", "phi: float = 2.0)"),
        ("profiles", "uba", "uba 5", "0.5 * phi + (1.0", "phi + (1.0"),
        ("profiles", "uba", "uba 0.5", "1.0 - 0.5 * phi) * u", "1.0 - phi) * u"),
        ("profiles", "mirror_cosine", "mirror_cosine", "2.0 * (1.0 - x) -", "1.9 * (1.0 - x) -"),
        ("profiles", "square", "square", "1.0 - x * x", "(1.0 - x) ** 2"),
        ("profiles", "inverse_sqrt", "inverse_sqrt", "math.sqrt(timescale /", "(timescale /"),
        ("profiles", "power", "power", "hold: float, b: float = -0.51) -> float", "hold, b=-0.5) -> float"),
        ("profiles", "power", "power b=-2", "x <= hold", "x <= hold / 2"),
        ("profiles", "one_cycle", "onecycle", "div_factor: float = 25.0,", "div_factor: float = 24.0,"),
        ("profiles", "one_cycle", "onecycle", "pct_start: float = 0.3,", "pct_start: float = 0.25,"),
        (
            "profiles",
            "one_cycle",
            "onecycle",
            "final_div_factor: float = 1e4",
            "final_div_factor: float = 1e2",
        ),
        ("profiles", "one_cycle", "onecycle lines", "end = low / final", "end = 1.0 / final"),
        ("legs", "one_minus_sqrt", "1-sqrt", "math.sqrt(x)", "x ** 0.51"),
        ("legs", "inverse", "inverse", "DECAY_TO = 0.1", "DECAY_TO = 0.09"),
        ("legs", "inverse", "inverse 0.5", "1.0 - x) + x / to", "1.0 - x) + x * x / to"),
        ("legs", "exponential", "exponential 0.5", "to**x", "1 - (1 - to) * x"),
        ("legs", "wsd", "wsd", "decay_fraction: float = 0.2", "decay_fraction: float = 0.1"),
        ("legs", "wsd", "wsd", "leg: Profile = one_minus_sqrt", "leg: Profile = linear"),
        ("legs", "with_last_leg", "inverse_sqrt with a leg", "profile(start) * leg", "leg"),
        ("periodic", "wsd_s", "wsd_s", "(x - begin) / (ends[index] - begin)", "(x - begin) / (1.0 - begin)"),
        ("periodic", "piecewise", "piecewise", "span.end + (span", "(span"),
    ],
)
def test_a_wrong_constant_is_seen(module: str, function: str, reference: str, old: str, new: str) -> None:
    ours, equation, _ = REFERENCES[reference]
    options = ours.keywords if isinstance(ours, partial) else {}
    wrong = partial(mutant(module, old, new)[function], **options)
    right = partial(mutant(module, old, old)[function], **options)
    wanted = [equation(x) for x in GRID]
    assert [right(x) for x in GRID] == pytest.approx(wanted, abs=1e-12)
    assert [wrong(x) for x in GRID] != pytest.approx(wanted, abs=1e-12)
