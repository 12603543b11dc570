"""The order of training: (seed, step) -> rows, by arithmetic alone. Nothing is remembered, so nothing is
restored.

**Epochs.** Each source is an endless sequence of its rows: permutation after permutation, each a function of
(seed, source, pass). An epoch takes the next `round(weight * rows)` of every source and shuffles them
together by (seed, epoch). With weight 1 each row comes once an epoch; with 0.3, 30 % of them come, and other
ones the next time until all have; with 2 each comes twice.

**Steps.** With `batch_rows` step i is the rows [i * batch_rows, (i + 1) * batch_rows) of the epochs written
one after the other: it may span two epochs, or more when the data is smaller than a batch. With
`batch_tokens` an epoch is cut into the number of steps that comes nearest to that many tokens each, at equal
shares of its tokens: steps never span epochs, and there is no short last one. The rows of a step do not
depend on the number of processes or on the size of micro-batches, and long rows are as likely in any step as
in any other: lengths matter only inside a step.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..recipes.errors import UserError
from .micro_batches import costliest, split_rows
from .rows import TokenRows

_EPOCHS_KEPT = 2
"""Permutations in memory: a step needs that of its epoch, and of the next when it spans two."""


@dataclass(frozen=True)
class Step:
    """The rows of one optimizer step."""

    index: int
    epoch: float
    """Epochs completed when this step is done."""
    micro_batches: list[list[int]]
    """Rows of each; rank r of w takes `[r::w]`. `[]` only where the rows do not go round, see
    `split_rows`.
    """
    tokens: int
    trained_tokens: int
    """Targets of the loss in the whole step, over all ranks: what the summed loss is divided by."""
    rows: int


class Order:
    """Which rows are seen in which step. Steps go on for ever; `steps_per_epoch` says how long an epoch
    is.
    """

    def __init__(
        self,
        rows: TokenRows,
        *,
        seed: int,
        batch_tokens: int | None = None,
        batch_rows: int | None = None,
        micro_tokens: int | None = None,
        micro_rows: int | None = None,
        world_size: int = 1,
        packed: bool,
    ) -> None:
        """Exactly one of `batch_tokens` and `batch_rows` is given; `micro_*` limit one micro-batch, None does
        not.

        Raises:
            UserError: no rows.

        """
        if (batch_tokens is None) == (batch_rows is None):
            raise ValueError("give batch_tokens or batch_rows, not both")
        if len(rows) == 0:
            raise UserError("data.train: there are no rows to train on")
        self._seed = seed
        self._lengths = rows.lengths
        self._sizes = rows.sizes(packed=packed)
        self._trained = np.asarray(rows.trained_counts)
        self.packed = packed
        self._micro_tokens, self._micro_rows, self._world_size = micro_tokens, micro_rows, world_size
        source = np.asarray(rows.source)
        self._members = [np.flatnonzero(source == number) for number in range(len(rows.weights))]
        self._shares = [
            max(1, round(weight * len(members))) if len(members) else 0
            for weight, members in zip(rows.weights, self._members, strict=True)
        ]
        self.rows_per_epoch = sum(self._shares)
        self.tokens_per_epoch = sum(
            share * float(self._lengths[members].mean())
            for share, members in zip(self._shares, self._members, strict=True)
            if share
        )
        """Mean over epochs (they differ only with weights that are not whole numbers)."""
        self._batch_rows = batch_rows
        self._batch_tokens = batch_tokens
        if batch_rows is not None:
            steps = -(-self.rows_per_epoch // batch_rows)
        else:
            assert batch_tokens is not None
            steps = min(self.rows_per_epoch, max(1, round(self.tokens_per_epoch / batch_tokens)))
        self.steps_per_epoch: int = steps
        self._epochs: OrderedDict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = OrderedDict()

    def step(self, index: int) -> Step:
        """Step `index`, counted from 0; needs no earlier one."""
        if index < 0:
            raise ValueError(f"step {index}")
        if self._batch_rows is None:
            epoch, part = divmod(index, self.steps_per_epoch)
            rows, cuts = self._epoch(epoch)
            chosen = rows[cuts[part] : cuts[part + 1]]
            return self._make(index, epoch + (part + 1) / self.steps_per_epoch, chosen)
        start = index * self._batch_rows
        pieces, missing = [], self._batch_rows
        while missing:
            epoch, position = divmod(start, self.rows_per_epoch)
            piece = self._epoch(epoch)[0][position : position + missing]
            pieces.append(piece)
            start, missing = start + len(piece), missing - len(piece)
        return self._make(index, start / self.rows_per_epoch, np.concatenate(pieces))

    def longest_step(self) -> Step:
        """The worst case, for the first probe: for each rank the most costly micro-batch that any step may
        hold.

        Twice, if steps have more than one: the second one finds the gradients of the first in memory. It
        belongs to no epoch (`index` is -1).
        """
        longest = int(self._sizes.max())
        if self._batch_rows is not None:
            step_tokens = float(self._batch_rows) * longest
        else:
            padding = float((self._sizes / np.maximum(1, self._lengths)).max())
            step_tokens = padding * self.tokens_per_epoch / self.steps_per_epoch + longest
        share = 1 if self._micro_tokens or self._micro_rows else self._world_size
        worst = costliest(
            self._sizes,
            packed=self.packed,
            capacity=min(self._micro_tokens or math.inf, step_tokens / share),
            most=min(self._micro_rows or math.inf, -(-(self._batch_rows or self.rows_per_epoch) // share)),
        ).tolist()
        times = 2 if len(self.step(0).micro_batches) > self._world_size else 1
        copies = self._world_size * times
        return Step(
            index=-1,
            epoch=0.0,
            micro_batches=[list(worst) for _ in range(copies)],
            tokens=copies * int(self._lengths[worst].sum(dtype=np.int64)),
            trained_tokens=copies * int(self._trained[worst].sum(dtype=np.int64)),
            rows=copies * len(worst),
        )

    def _make(self, index: int, epoch: float, chosen: NDArray[np.int64]) -> Step:
        lengths = self._lengths[chosen]
        batches = split_rows(
            self._sizes[chosen].tolist(),
            packed=self.packed,
            micro_tokens=self._micro_tokens,
            micro_rows=self._micro_rows,
            multiple=self._world_size,
        )
        rows = chosen.tolist()
        return Step(
            index=index,
            epoch=epoch,
            micro_batches=[[rows[k] for k in batch] for batch in batches],
            tokens=int(lengths.sum(dtype=np.int64)),
            trained_tokens=int(self._trained[chosen].sum(dtype=np.int64)),
            rows=len(rows),
        )

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(rows of the epoch in order, where each step starts in them)."""
        if epoch in self._epochs:
            self._epochs.move_to_end(epoch)
            return self._epochs[epoch]
        parts = [
            _slice_of_passes(members, epoch * share, share, self._seed, number)
            for number, (members, share) in enumerate(zip(self._members, self._shares, strict=True))
            if share
        ]
        rows = np.concatenate(parts)
        rows = rows[permutation(len(rows), self._seed, -1, epoch)]
        result = rows, self._cuts(rows)
        self._epochs[epoch] = result
        if len(self._epochs) > _EPOCHS_KEPT:
            self._epochs.popitem(last=False)
        return result

    def _cuts(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """[steps + 1]; equal shares of the tokens, a row belonging to the step that its middle falls in, none
        empty.
        """
        if self._batch_rows is not None:
            return np.zeros(0, np.int64)
        steps = self.steps_per_epoch
        lengths = self._lengths[rows].astype(np.int64)
        ends = np.cumsum(lengths)
        cuts = np.searchsorted(ends - lengths / 2, np.arange(1, steps) * (ends[-1] / steps))
        # A row longer than a step would leave the next ones without rows.
        numbers = np.arange(1, steps)
        cuts = np.maximum.accumulate(np.maximum(cuts - numbers, 0)) + numbers
        cuts = np.minimum(cuts, len(rows) - steps + numbers)
        return np.concatenate([[0], cuts, [len(rows)]]).astype(np.int64)


def _slice_of_passes(
    members: NDArray[np.int64], start: int, count: int, seed: int, source: int
) -> NDArray[np.int64]:
    """Entries [start, start + count) of the endless sequence of permutations of one source."""
    pieces = []
    while count:
        number, position = divmod(start, len(members))
        piece = members[permutation(len(members), seed, source, number)[position : position + count]]
        pieces.append(piece)
        start, count = start + len(piece), count - len(piece)
    return np.concatenate(pieces)


def permutation(count: int, seed: int, stream: int, number: int) -> NDArray[np.int64]:
    """A permutation of range(count), a pure function of three integers.

    Sorts by SplitMix64 hashes (Steele, Lea, Flood 2014, doi:10.1145/2660193.2660195): NumPy's own generators
    may change between its versions, and a resumed run must not.
    """
    key = np.array([seed & (2**64 - 1), stream & (2**64 - 1), number], dtype=np.uint64)
    mixed = np.uint64(0)
    for part in key:
        mixed = _mix(np.array([mixed ^ part], dtype=np.uint64))[0]
    return np.argsort(_mix(np.arange(count, dtype=np.uint64) ^ mixed), kind="stable").astype(np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def eval_batches(
    rows: TokenRows, *, micro_tokens: int | None, packed: bool, micro_rows: int | None = None
) -> list[list[int]]:
    """All rows once, in micro-batches of at most `micro_tokens`, the most costly first."""
    if len(rows) == 0:
        return []
    sizes = rows.sizes(packed=packed).tolist()
    return split_rows(sizes, packed=packed, micro_tokens=micro_tokens, micro_rows=micro_rows)
