"""Which of several runs will end better, told from their first steps.

Finding (arXiv:2412.13337, full SFT of 3 to 7 billion parameters): among runs on the same data the one with
the lower gradient norm and the higher loss early on ends better. It contradicts stopping by the training
loss, so nothing uses it unless asked to. How early, and by how much, was not published: window and medians
are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from statistics import median
from typing import Any

from ..recipes.errors import UserError, in_columns

Record = Mapping[str, Any]
SAME_BATCH = 0.1
"""Batches that differ by less are the same: rows do not fill each step equally. Ours."""


@dataclass(frozen=True)
class Judgement:
    """What the early steps say of one run; the first in the list promises most.

    run: its place among those given. tokens: at which all were compared. grad_norm (rescaled where that was
    asked for) and loss: medians over the window, nan where a step's was not finite. confirmed: its loss is
    also above the median of the others', which counts only for a run whose norm is below theirs.
    """

    run: int
    tokens: int
    grad_norm: float
    loss: float
    confirmed: bool
    reason: str


def rank_by_early_signals(
    runs: Sequence[Sequence[Record]], window: int, *, rescale: bool = False
) -> list[Judgement]:
    """Runs from the most to the least promising, compared over the last `window` tokens that all have seen.

    runs: of each the records of its steps, {"step", "tokens", "loss", "grad_norm"} with tokens counted from
    the start. The caller sees to it that data, order and model are the same. rescale: compare runs with
    different batches by norm · sqrt(batch / smallest batch), since noise in a mean gradient falls as the root
    of the batch. That rule is ours; where the gradient is mostly signal it says too much.

    Raises UserError: runs with different batches without `rescale`; a run without a step in the window.
    """
    kept = [[r for r in run if r.get("grad_norm") is not None and r.get("loss") is not None] for run in runs]
    for number, run in enumerate(kept):
        if not run:
            raise _no_steps(number, 0, window)
    if not kept:
        return []
    end = min(int(run[-1]["tokens"]) for run in kept)
    batches = [_batch(run) for run in kept]
    if max(batches) > (1 + SAME_BATCH) * min(batches) and not rescale:
        raise UserError(
            in_columns(
                [
                    (
                        "early signals",
                        f"the runs' batches differ ({min(batches):,.0f} to {max(batches):,.0f} tokens a "
                        "step), and a larger batch has a smaller norm by itself.",
                    ),
                    ("", "Set train.batch_tokens to one value for all, or compare by held-out loss"),
                ]
            )
        )
    norms, losses = [], []
    for number, (run, batch) in enumerate(zip(kept, batches, strict=True)):
        inside = [r for r in run if end - window < int(r["tokens"]) <= end]
        if not inside:
            raise _no_steps(number, end, window)
        factor = sqrt(batch / min(batches)) if rescale else 1.0
        norms.append(factor * _median([float(r["grad_norm"]) for r in inside]))
        losses.append(_median([float(r["loss"]) for r in inside]))
    order = sorted(
        range(len(kept)), key=lambda k: (not isfinite(norms[k]), norms[k] if isfinite(norms[k]) else 0.0)
    )
    return [_judge(number, end, norms, losses) for number in order]


def _judge(number: int, tokens: int, norms: list[float], losses: list[float]) -> Judgement:
    norm, loss = norms[number], losses[number]
    others = [k for k in range(len(norms)) if k != number and isfinite(norms[k]) and isfinite(losses[k])]
    confirmed = False
    if not (isfinite(norm) and isfinite(loss)):
        reason = "a step was not finite"
    elif not others:
        reason = "no other run to compare with"
    else:
        usual_norm = median(norms[k] for k in others)
        usual_loss = median(losses[k] for k in others)
        lower, higher = norm < usual_norm, loss > usual_loss
        confirmed = lower and higher
        reason = (
            f"gradient norm {norm:.3g}, {'below' if lower else 'not below'} the others' {usual_norm:.3g}; "
            f"loss {loss:.3g}, {'above' if higher else 'not above'} theirs, {usual_loss:.3g}"
        )
        if higher and not lower:
            reason += ": a higher loss alone is no good sign"
    return Judgement(number, tokens, norm, loss, confirmed, reason)


def _batch(run: Sequence[Record]) -> float:
    """Tokens of a step, the mean from the first record to the last (from zero where there is one record)."""
    first, last = run[0], run[-1]
    steps = int(last["step"]) - int(first["step"])
    if steps <= 0:
        return float(last["tokens"]) / max(1, int(last["step"]))
    return (float(last["tokens"]) - float(first["tokens"])) / steps


def _median(values: list[float]) -> float:
    return median(values) if all(isfinite(value) for value in values) else float("nan")


def _no_steps(number: int, end: int, window: int) -> UserError:
    return UserError(
        in_columns(
            [
                (
                    "early signals",
                    f"run {number} has no step with loss and gradient norm in the last {window:,} of {end:,} "
                    "tokens that all runs have seen.",
                ),
                ("", "Give more steps before the comparison, or a larger window"),
            ]
        )
    )
