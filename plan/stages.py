"""One run of several plans: what it needs at most, and why each was decided as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .plan import Plan


def largest(plans: Sequence[Plan]) -> dict[str, dict[str, int]]:
    """`Plan.memory` of stages that follow one another in one process: the largest peak of each tier."""
    return {
        tier: max((plan.memory[tier] for plan in plans), key=lambda parts: parts.get("total", 0))
        for tier in ("device", "host")
    }


def largest_phases(plans: Sequence[Plan]) -> dict[str, int]:
    """`Plan.phases` of such stages: each phase is as large as in the stage where it is largest."""
    names = dict.fromkeys(name for plan in plans for name in plan.phases)
    return {name: max(plan.phases.get(name, 0) for plan in plans) for name in names}


def joined_reasons(plans: Mapping[str, Plan]) -> dict[str, str]:
    """Reasons of plans by the name of their stage: one that all share stands once, others say whose."""
    found: dict[str, str] = {}
    for key in dict.fromkeys(key for plan in plans.values() for key in plan.reasons):
        lines = {name: plan.reasons[key] for name, plan in plans.items() if key in plan.reasons}
        if len(lines) == len(plans) and len(set(lines.values())) == 1:
            found[key] = next(iter(lines.values()))
        else:
            found |= {f"{name}.{key}": line for name, line in lines.items()}
    return found
