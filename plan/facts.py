"""What the plan must know of the data: how many rows, how long, how much of each is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    source: int64 [rows], which entry of data.train each training row came from; None is one for all.
    first, eval_first: of pairs, int64 [rows], tokens of a row's first sequence (prompt and chosen answer; the
    second has the rest); None where a row is one sequence. Lengths are then of both sequences together.
    """

    lengths: Counts
    trained: Counts
    seen: Shares
    eval_lengths: Counts
    eval_trained: Counts
    source: Counts | None = None
    first: Counts | None = None
    eval_first: Counts | None = None

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
    def sequences(self) -> Counts:
        """Lengths of the sequences that training attends within: the rows, or two for each pair."""
        return _sequences(self.lengths, self.first)

    @property
    def typical_length(self) -> float:
        """Length of the sequence that a random token is in: what attention's cost for a token grows with."""
        sequences = self.sequences
        return float((sequences**2).sum() / max(1, sequences.sum()))

    @property
    def longest(self) -> int:
        """Tokens of the longest row, training or held out, both sequences of a pair together."""
        return int(max(self.lengths.max(initial=0), self.eval_lengths.max(initial=0)))

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest sequence, training or held out: what max_length and the model's end bound."""
        held_out = _sequences(self.eval_lengths, self.eval_first)
        return int(max(self.sequences.max(initial=0), held_out.max(initial=0)))

    @property
    def padded_row(self) -> int:
        """Tokens that the longest row takes in a padded batch: a pair is two as long as its longer."""
        return self.longest_sequence * (1 if self.first is None else 2)

    @property
    def trained_share(self) -> float:
        """Trained tokens / tokens over the training rows."""
        return float((self.trained * self.seen).sum() / max(1.0, float((self.lengths * self.seen).sum())))

    def by_source(self) -> list[tuple[int, int, float]]:
        """(number, tokens of its rows once each, weight) of every source that has rows."""
        source = np.zeros(self.rows, np.int64) if self.source is None else self.source
        found = []
        for number in np.unique(source):
            members = source == number
            found.append((int(number), int(self.lengths[members].sum()), float(self.seen[members][0])))
        return found

    def longer_than(self, length: int) -> int:
        """Training rows with a sequence above `length` tokens."""
        if self.first is None:
            return int((self.lengths > length).sum())
        return int((np.maximum(self.first, self.lengths - self.first) > length).sum())

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
        """The same rows with each sequence cut to `max_length` tokens.

        Trained tokens of a row shrink in proportion. Those of a pair stay as far as they can: its prompt is
        what is cut.
        """
        if self.first is None:
            lengths, trained = _cut(self.lengths, self.trained, max_length)
            held, held_trained = _cut(self.eval_lengths, self.eval_trained, max_length)
            return replace(
                self, lengths=lengths, trained=trained, eval_lengths=held, eval_trained=held_trained
            )
        lengths, first, trained = _cut_pairs(self.lengths, self.first, self.trained, max_length)
        eval_first = np.zeros(0, np.int64) if self.eval_first is None else self.eval_first
        held, held_first, held_trained = _cut_pairs(
            self.eval_lengths, eval_first, self.eval_trained, max_length
        )
        return replace(
            self,
            lengths=lengths,
            first=first,
            trained=trained,
            eval_lengths=held,
            eval_first=held_first,
            eval_trained=held_trained,
        )


def data_facts(train: TokenRows, held_out: TokenRows) -> DataFacts:
    """Facts of prepared rows; `held_out` may have none."""
    source = np.asarray(train.source, dtype=np.int64)
    return DataFacts(
        lengths=np.asarray(train.lengths, dtype=np.int64),
        trained=np.asarray(train.trained_counts, dtype=np.int64),
        seen=np.asarray(train.weights, dtype=np.float64)[source],
        eval_lengths=np.asarray(held_out.lengths, dtype=np.int64),
        eval_trained=np.asarray(held_out.trained_counts, dtype=np.int64),
        source=source,
        first=_first(train),
        eval_first=_first(held_out),
    )


def _first(rows: TokenRows) -> Counts | None:
    return None if rows.second is None else np.asarray(rows.second, dtype=np.int64)


def _sequences(lengths: Counts, first: Counts | None) -> Counts:
    return lengths if first is None else np.concatenate([first, lengths - first])


def _cut(lengths: Counts, trained: Counts, most: int) -> tuple[Counts, Counts]:
    short = np.minimum(lengths, most)
    return short, (trained * short) // np.maximum(1, lengths)


def _cut_pairs(lengths: Counts, first: Counts, trained: Counts, most: int) -> tuple[Counts, Counts, Counts]:
    chosen, rejected = np.minimum(first, most), np.minimum(lengths - first, most)
    return chosen + rejected, chosen, np.minimum(trained, chosen + rejected)
