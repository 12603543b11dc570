"""What a person reads when the budget cannot hold the run."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..recipes.errors import BudgetError, ShoestringError, UserError, in_columns
from .durations import Durations
from .limits import Limits

FEW_STEPS = 20
"""The budget that we propose has room for this many steps: fewer hardly train."""


def no_step_fits(
    limits: Limits,
    name: str,
    *,
    seconds: float,
    step: float,
    tokens: int,
    durations: Durations,
    reserve: float,
) -> BudgetError:
    """The first step of the run does not fit: what is spent, what a step takes, what is kept, what would
    do.
    """
    if name == "tokens":
        text = (
            f"given {limits.tokens}, but the first step alone has {tokens} tokens\n"
            f"Give more, e.g. budget.tokens={tokens * FEW_STEPS}, or a smaller train.batch_tokens"
        )
        return BudgetError(in_columns([("budget.tokens", text)]))
    needed = seconds + reserve + (FEW_STEPS * step if step else 0.5 * (seconds + reserve))
    spent = _by_kind(durations.totals) or "start of the process"
    kept = _by_kind({kind: durations.expected(kind) for kind in durations.guess})
    takes = f"; a step takes about {step:.1f} s" if step else ""
    text = (
        f"given {_amount(limits, name)}: no step can be made and landed in it\n"
        f"{seconds:.0f} s are gone before the first step ({spent}){takes}\n"
        f"{reserve:.0f} s are kept for what follows the last one ({kept or 'nothing'})\n"
        f"Give about {_proposal(limits, name, needed, seconds)} or more"
    )
    return BudgetError(in_columns([(f"budget.{name}", text)]))


def already_spent(
    limits: Limits, used: Mapping[str, float | int | None], *, resumed: bool
) -> BudgetError | None:
    """The run used more than it is given now; None when it did not. resumed: it is about to go on."""
    given = limits.amounts()
    for name, amount in used.items():
        limit = given[name]
        if limit is not None and amount is not None and amount > limit * (1 + 1e-9):
            unit = {"time": " s", "energy": " J"}.get(name, "")
            then = "Give more than that to go on, or start again with --fresh" if resumed else "It lands now"
            text = f"given {_amount(limits, name)}, but this run has already used {amount:.6g}{unit}\n{then}"
            return BudgetError(in_columns([(f"budget.{name}", text)]))
    return None


def energy_unknown(limits: Limits, joules: float | None) -> ShoestringError | None:
    """Energy is limited, but an earlier process of the run did not measure what it used."""
    if limits.joules is None or joules is not None:
        return None
    return UserError(
        "budget.energy  an earlier process of this run could not measure its energy, so what is left is "
        "not known   Use budget.time instead, or start again with --fresh"
    )


def _by_kind(seconds: Mapping[str, float]) -> str:
    parts = sorted(seconds.items(), key=lambda item: -item[1])
    return ", ".join(f"{kind} {amount:.0f} s" for kind, amount in parts[:4] if amount >= 0.5)


def _amount(limits: Limits, name: str) -> str:
    amounts = {
        "time": f"{limits.seconds or 0:.6g} s",
        "cost": f"{limits.cost or 0:.6g} at {limits.price_per_hour or 0:.6g} an hour",
        "energy": f"{limits.joules or 0:.6g} J",
        "tokens": f"{limits.tokens}",
        "steps": f"{limits.steps}",
        "epochs": f"{limits.epochs or 0:.6g}",
    }
    return amounts[name]


def _proposal(limits: Limits, name: str, needed: float, seconds: float) -> str:
    if name == "cost":
        return f"{math.ceil(needed / 3600.0 * (limits.price_per_hour or 0.0) * 1000) / 1000:g}"
    if name == "energy":
        return f"{needed / max(seconds, 1.0):.1f} times what start-up used"
    return f"budget.time={math.ceil(needed / 10.0) * 10}s"
