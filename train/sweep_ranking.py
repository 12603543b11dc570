"""Which trial is better: by held-out loss, or by the signs of its first steps."""

from __future__ import annotations

from collections.abc import Sequence

from .sweep_grid import Job
from .sweep_state import Trial
from .tracking import read_jsonl

HELD_OUT_LOSS = "held_out_loss"
EARLY_SIGNALS = "early_signals"
RULES = (HELD_OUT_LOSS, EARLY_SIGNALS)


def best_first(trials: Sequence[Trial], job: Job, *, by: str) -> list[Trial]:
    """The trials that stand at the same pause; equal ones in the order of the grid.

    by: HELD_OUT_LOSS, or EARLY_SIGNALS: the median gradient norm over the later half of the tokens seen
    (arXiv:2412.13337, see docs/spending.md).
    """
    if by == HELD_OUT_LOSS or len(trials) < 2:
        return sorted(trials, key=_loss)
    from ..plan.early_signals import rank_by_early_signals

    seen = min(trial.legs[-1].tokens for trial in trials)
    logs = [read_jsonl(job.folder(trial.name) / "metrics.jsonl") for trial in trials]
    return [trials[judgement.run] for judgement in rank_by_early_signals(logs, max(1, seen // 2))]


def furthest_first(trials: Sequence[Trial]) -> list[Trial]:
    """By how far they came, then by held-out loss."""
    return sorted(trials, key=lambda trial: (-len(trial.legs), _loss(trial)))


def _loss(trial: Trial) -> float:
    loss = trial.legs[-1].loss if trial.legs else None
    return float("inf") if loss is None else loss
