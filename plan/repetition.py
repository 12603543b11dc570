"""What rows are worth that a run sees again, and what follows from it. Pure arithmetic.

The law is that of Muennighoff et al. (arXiv:2305.16264): U distinct tokens seen E times teach as much as

    U · (1 + R* · (1 - exp(-R / R*))),   R = E - 1,   R* = 15.39

fresh ones. It was fitted to pre-training on web text. That it holds for a fine-tune is an assumption of ours:
it gives the order of magnitude, not two digits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import exp, log

from ..optimizers import rate_over_adamw
from .facts import DataFacts

R_STAR = 15.387756
"""Repetitions after which a token teaches 1/e of a fresh one: R_D* of arXiv:2305.16264, section 5."""
FEW_EPOCHS = 4.0
"""Up to here repeated rows are almost as good as fresh ones (arXiv:2305.16264, abstract)."""
MANY_EPOCHS = 16.0
"""Where the decay has its highest value. Ours: about 1 + R*."""
USUAL_DECAY = 0.01
DATA_BOUND = 30.0
"""How many times the usual decay is best when data and not compute is short (arXiv:2509.14786)."""
ADAPTER_SHARE = 0.1
"""Of an adapter's decay in that of whole weights. Ours: its rate is ten times as high, and rate · decay is
what pulls."""
MOST_SHRINKAGE = 0.1
"""Largest rate · decay · steps for weights that were trained before. Ours: without gradients they would lose
about this share of themselves."""


def effective_epochs(epochs: float) -> float:
    """What `epochs` passes are worth in passes over fresh rows; below one each pass is worth itself."""
    if epochs <= 1.0:
        return epochs
    return 1.0 + R_STAR * (1.0 - exp(-(epochs - 1.0) / R_STAR))


def worth_of_next(epochs: float) -> float:
    """Worth of a further token after `epochs` passes, of a fresh one's: the derivative, exp(-R / R*)."""
    return exp(-max(0.0, epochs - 1.0) / R_STAR)


def epochs_until_worth(worth: float) -> float:
    """Passes after which a further one is worth less than `worth`, in (0, 1]: 11.7 for a half."""
    return 1.0 - R_STAR * log(worth)


def filter_break_even(epochs: float, kept: float) -> float:
    """How many times the mean row a kept one must be worth, where a filter keeps the share `kept` of them.

    The same budget sees the kept rows `epochs / kept` times (arXiv:2404.07177: how strict a filter pays
    depends on the compute). That worth multiplies the law is ours.
    """
    return effective_epochs(epochs) / (kept * effective_epochs(epochs / kept))


def weight_decay_for(epochs: float, *, adapter: bool, optimizer: str, rate: float, steps: int) -> float:
    """Decoupled weight decay for rows seen `epochs` times, to two digits. The formula is ours.

    Zero up to 4 epochs, then in a straight line to 30 times the usual 0.01 at 16. For an adapter to a tenth
    of that: it acts on the adapter only, that is, towards the model it started from, and at a higher rate.
    What pulls is rate · decay, so an optimizer that wants a multiple of AdamW's rate gets that much less.
    Weights of a trained model are pulled to zero, away from what they know; hence the bound.
    """
    strength = min(max((epochs - FEW_EPOCHS) / (MANY_EPOCHS - FEW_EPOCHS), 0.0), 1.0)
    decay = strength * DATA_BOUND * USUAL_DECAY / rate_over_adamw(optimizer)
    decay = decay * ADAPTER_SHARE if adapter else min(decay, MOST_SHRINKAGE / (rate * max(steps, 1)))
    return float(f"{decay:.1e}")


@dataclass(frozen=True)
class SourceUse:
    """One source in a run. number: its place in data.train; tokens: of its rows once; passes: over each."""

    number: int
    tokens: int
    weight: float
    passes: float


@dataclass(frozen=True)
class Repeats:
    """How often a run sees each of its rows."""

    sources: tuple[SourceUse, ...]

    @property
    def distinct(self) -> int:
        """Tokens of all rows, once each."""
        return sum(source.tokens for source in self.sources)

    @property
    def epochs(self) -> float:
        """Tokens seen over distinct tokens."""
        return self._sum(lambda passes: passes) / max(1, self.distinct)

    @property
    def effective(self) -> float:
        """What these epochs are worth in epochs of fresh rows."""
        return self._sum(effective_epochs) / max(1, self.distinct)

    @property
    def next_worth(self) -> float:
        """Worth of the next token, of a fresh one's; sources are drawn as often as before."""
        drawn = self._sum(lambda passes: passes)
        return self._sum(lambda passes: passes * worth_of_next(passes)) / drawn if drawn else 1.0

    def scaled(self, share: float) -> Repeats:
        """The same after `share` of the training."""
        return Repeats(tuple(replace(source, passes=share * source.passes) for source in self.sources))

    def share_worth(self, worth: float) -> float:
        """The share of the training that gives `worth`, in (0, 1], of all that it gives."""
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (
                (middle, high) if self.scaled(middle).effective < worth * self.effective else (low, middle)
            )
        return high

    def _sum(self, value: Callable[[float], float]) -> float:
        return sum(source.tokens * value(source.passes) for source in self.sources)


def repeats_of(data: DataFacts, tokens: float) -> Repeats:
    """How often `tokens` tokens of training see the rows of each source."""
    epochs = tokens / max(1, data.tokens)
    return Repeats(
        tuple(SourceUse(number, held, weight, epochs * weight) for number, held, weight in data.by_source())
    )


def worn_source(sources: Sequence[SourceUse]) -> tuple[SourceUse, float, float] | None:
    """The source whose rows come far more often than the others': (it, passes of the others, better weight).

    Far more often is ours: beyond 4 passes, where the others have a quarter of them or fewer. With the better
    weight the same tokens see its rows 4 times. None where there is no such source.
    """
    worst = max(sources, key=lambda source: source.passes, default=None)
    if worst is None or worst.passes <= FEW_EPOCHS:
        return None
    others = [source for source in sources if source is not worst]
    held = sum(source.tokens for source in others)
    if not held:
        return None
    passes = sum(source.tokens * source.passes for source in others) / held
    if passes > worst.passes / 4:
        return None
    # Seen is the sum of tokens · passes. At 4 passes of this source the rest is for the others, whose weights
    # stay: 4 / weight = (seen - 4 · tokens) / sum of (tokens · weight).
    seen = sum(source.tokens * source.passes for source in sources)
    weighed = sum(source.tokens * source.weight for source in others)
    weight = FEW_EPOCHS * weighed / (seen - FEW_EPOCHS * worst.tokens)
    return worst, passes, float(f"{weight:.2g}")
