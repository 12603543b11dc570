"""What the plan must know of the data: how many rows, how long, how much of each is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from ..data.rows import TokenRows

Counts = npt.NDArray[np.int64]
Shares = npt.NDArray[np.float64]


@dataclass(frozen=True)
class DataFacts:
    """Token counts of the training and held-out rows, in file order.

    lengths, trained: int64 [rows]; trained[i] <= lengths[i] counts the targets of the loss in row i.
    seen: float64 [rows], how often an epoch shows the row (the weight of its source).
    """

    lengths: Counts
    trained: Counts
    seen: Shares
    eval_lengths: Counts
    eval_trained: Counts

    @property
    def rows(self) -> int:
        """Training rows."""
        return len(self.lengths)

    @property
    def eval_rows(self) -> int:
        """Held-out rows."""
        return len(self.eval_lengths)

    @property
    def tokens(self) -> int:
        """Tokens of one epoch."""
        return int((self.lengths * self.seen).sum())

    @property
    def eval_tokens(self) -> int:
        """Tokens of one whole evaluation."""
        return int(self.eval_lengths.sum())

    @property
    def mean_length(self) -> float:
        """Mean tokens of a training row."""
        return float(self.lengths.mean()) if self.rows else 0.0

    @property
    def typical_length(self) -> float:
        """Length of the row that a random token is in: what attention's cost for a token grows with."""
        return float((self.lengths**2).sum() / max(1, self.lengths.sum()))

    @property
    def longest(self) -> int:
        """Tokens of the longest row, training or held out."""
        return int(max(self.lengths.max(initial=0), self.eval_lengths.max(initial=0)))

    @property
    def trained_share(self) -> float:
        """Trained tokens / tokens over the training rows."""
        return float((self.trained * self.seen).sum() / max(1.0, float((self.lengths * self.seen).sum())))

    def longer_than(self, length: int) -> int:
        """Training rows above `length` tokens."""
        return int((self.lengths > length).sum())

    def dense_share(self, tokens: int) -> float:
        """Trained share to expect in the densest micro-batch of `tokens` tokens.

        The mean share is exceeded when rows with long answers meet. Rows are drawn at random, so the share
        of a micro-batch of m rows spreads by the rows' spread over sqrt(m); three deviations bound a run's
        worst.
        """
        if self.rows == 0:
            return 1.0
        shares = self.trained / np.maximum(1, self.lengths)
        rows_in_batch = max(1.0, tokens / max(1.0, self.mean_length))
        return float(min(1.0, self.trained_share + 3.0 * float(shares.std()) / rows_in_batch**0.5))

    def clipped(self, max_length: int) -> DataFacts:
        """The same rows cut to `max_length` tokens; trained tokens shrink in proportion."""

        def cut(lengths: Counts, trained: Counts) -> tuple[Counts, Counts]:
            short = np.minimum(lengths, max_length)
            return short, (trained * short) // np.maximum(1, lengths)

        return DataFacts(
            *cut(self.lengths, self.trained), self.seen, *cut(self.eval_lengths, self.eval_trained)
        )


def data_facts(train: TokenRows, held_out: TokenRows) -> DataFacts:
    """Facts of prepared rows; `held_out` may have none."""
    return DataFacts(
        lengths=np.asarray(train.lengths, dtype=np.int64),
        trained=np.asarray(train.trained_counts, dtype=np.int64),
        seen=np.asarray(train.weights, dtype=np.float64)[np.asarray(train.source)],
        eval_lengths=np.asarray(held_out.lengths, dtype=np.int64),
        eval_trained=np.asarray(held_out.trained_counts, dtype=np.int64),
    )
