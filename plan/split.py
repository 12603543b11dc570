"""One budget over supervised rows and pairs of answers. Pure arithmetic.

Findings (arXiv:2502.11284): with fewer than a thousand labelled examples all of them best go to SFT; above,
a growing share of preferences; and SFT must never be left out. The curve in between is ours, and so is that
examples count only as far as the budget sees them once: of 7,599 that a budget saw 176 of, a split by their
number spent all but an eighth on pairs, and lost a quarter of a nat of held-out loss for nothing
(benchmarks/preferences.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..recipes.errors import UserError, in_columns

FEW_EXAMPLES = 1000
LEAST_SFT = 0.1
MOST_PAIR_EPOCHS = 2.0
"""Passes over the pairs within the budget. Ours: more of them raise the margins and not the accuracy."""


@dataclass(frozen=True)
class Split:
    """share: of the budget for SFT, the rest is for preferences. warning: where a given share is against the
    findings.
    """

    share: float
    reason: str
    warning: str | None = None


def choose_split(
    sft_rows: int,
    pairs: int,
    pair_tokens: int,
    tokens_in_budget: float,
    given: float | None,
    *,
    sft_tokens: int = 0,
) -> Split:
    """The share of SFT for a budget that buys `tokens_in_budget` tokens.

    pair_tokens, sft_tokens: of all pairs and all rows, once; where the rows' are given, examples that the
    budget never comes to do not count. UserError: a given share outside (0, 1].
    """
    examples = sft_rows + pairs
    known = f"{examples:,} examples"
    if sft_tokens and tokens_in_budget < sft_tokens + pair_tokens:
        examples = int(examples * tokens_in_budget / (sft_tokens + pair_tokens))
        known = f"the budget sees about {examples:,} of {known}"
    if given is not None:
        return _take(given, examples, pairs, pair_tokens, tokens_in_budget)
    if pairs == 0:
        return Split(1.0, "there are no pairs: all of the budget for sft")
    if examples < FEW_EXAMPLES:
        return Split(
            1.0,
            f"{known}, fewer than {FEW_EXAMPLES:,}: all of the budget for sft (arXiv:2502.11284)",
        )
    share = min(max(FEW_EXAMPLES / examples, LEAST_SFT), 1.0)
    reason = f"{known}: {share:.0%} for sft, and less the more there are, at least {LEAST_SFT:.0%}"
    most = MOST_PAIR_EPOCHS * pair_tokens
    if (1.0 - share) * tokens_in_budget > most:
        share = 1.0 - most / tokens_in_budget
        reason = (
            f"{share:.0%} for sft: the rest is {MOST_PAIR_EPOCHS:g} passes over the {pairs:,} pairs, and "
            "further ones would teach little"
        )
    return Split(share, reason)


def _take(given: float, examples: int, pairs: int, pair_tokens: int, tokens_in_budget: float) -> Split:
    if not 0.0 < given <= 1.0:
        why = (
            "without sft a base model finds no start on pairs (arXiv:2502.11284)"
            if given == 0
            else "it is a share of the budget"
        )
        raise UserError(
            in_columns(
                [
                    (
                        "objective.split",
                        f"{given:g} was given; allowed: above 0, at most 1: {why}.\n"
                        f"For example objective.split={LEAST_SFT:g}, or objective.split=auto",
                    )
                ]
            )
        )
    warning = None
    passes = (1.0 - given) * tokens_in_budget / max(1, pair_tokens)
    if examples < FEW_EXAMPLES and given < 1.0:
        warning = (
            f"objective.split={given:g} with {examples:,} examples: below {FEW_EXAMPLES:,} all of the budget "
            "for sft was better (arXiv:2502.11284)"
        )
    elif pairs and given == 1.0 and examples >= FEW_EXAMPLES:
        warning = (
            f"objective.split=1 with {examples:,} examples: above {FEW_EXAMPLES:,} a share of preferences "
            "was better (arXiv:2502.11284)"
        )
    elif pairs and given < 1.0 and passes > MOST_PAIR_EPOCHS:
        warning = (
            f"objective.split={given:g} sees each of the {pairs:,} pairs {passes:.1f} times; beyond "
            f"{MOST_PAIR_EPOCHS:g} they teach little"
        )
    return Split(given, f"objective.split={given:g}", warning)
