"""Tokenised rows: flat arrays, memory-mapped when they come from disk.

A row is a sample. A pair of answers to one prompt is one row too: prompt and chosen answer, then prompt and
rejected answer; `second` says where the latter starts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ARRAYS = ("tokens", "trained", "offsets", "trained_counts", "source")
PAIR_ARRAYS = (*ARRAYS, "second")


@dataclass(frozen=True)
class TokenRows:
    """Rows of tokens, one after the other. A row is one sample, or one pair."""

    tokens: NDArray[np.int32]
    """[N]"""
    trained: NDArray[np.bool_]
    """[N]; `trained[i]`: token i is a target of the loss. Never true for the first token of a sequence."""
    offsets: NDArray[np.int64]
    """[rows + 1]; row r is [offsets[r], offsets[r + 1])."""
    trained_counts: NDArray[np.int32]
    """[rows]; how many tokens of each row are trained."""
    source: NDArray[np.int32]
    """[rows]; index of the source that each row came from."""
    weights: tuple[float, ...] = (1.0,)
    """For each source: how often its rows are seen in an epoch."""
    folder: Path | None = None
    """Where the arrays are mapped from."""
    name: str = ""
    second: NDArray[np.int32] | None = None
    """[rows]; where the row's second (rejected) sequence starts, in tokens from the row's start. None: every
    row is a single sequence.
    """

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """[rows]; tokens in each row."""
        return np.diff(self.offsets).astype(np.int32)

    def sizes(self, *, packed: bool) -> NDArray[np.int32]:
        """[rows]; tokens that each row takes up in a micro-batch.

        Padded, a pair is two rows as wide as its longer sequence.
        """
        if packed or self.second is None:
            return self.lengths
        longer: NDArray[np.int32] = np.maximum(self.second, self.lengths - self.second)
        return 2 * longer

    def row(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """(tokens, trained) of one row."""
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        return self.tokens[start:end], self.trained[start:end]

    def sequences(self, index: int) -> list[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
        """(tokens, trained) of each sequence of one row: one, or the chosen and the rejected of a pair."""
        tokens, trained = self.row(index)
        if self.second is None:
            return [(tokens, trained)]
        cut = int(self.second[index])
        return [(tokens[:cut], trained[:cut]), (tokens[cut:], trained[cut:])]

    def part(self, start: int, stop: int) -> "TokenRows":
        """Rows [start, stop) as a view: nothing is copied."""
        return TokenRows(
            self.tokens,
            self.trained,
            self.offsets[start : stop + 1],
            self.trained_counts[start:stop],
            self.source[start:stop],
            self.weights,
            second=None if self.second is None else self.second[start:stop],
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Rows on disk travel to another process as a path, not as their content."""
        if self.folder is not None:
            return map_rows, (self.folder, self.name, self.weights)
        return TokenRows, (*(getattr(self, name) for name in ARRAYS), self.weights, None, "", self.second)


def make_rows(
    tokens: Sequence[NDArray[np.int32]],
    trained: Sequence[NDArray[np.bool_]],
    source: Sequence[int] | None = None,
    weights: tuple[float, ...] = (1.0,),
    second: Sequence[int] | None = None,
) -> TokenRows:
    """Rows from one array of tokens and one mask each; for pairs also where each second sequence starts."""
    lengths = np.fromiter((len(row) for row in tokens), dtype=np.int64, count=len(tokens))
    return TokenRows(
        tokens=np.concatenate(tokens, dtype=np.int32) if tokens else np.zeros(0, np.int32),
        trained=np.concatenate(trained, dtype=np.bool_) if trained else np.zeros(0, np.bool_),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        trained_counts=np.fromiter((row.sum() for row in trained), dtype=np.int32, count=len(trained)),
        source=np.zeros(len(tokens), np.int32) if source is None else np.asarray(source, dtype=np.int32),
        weights=weights,
        second=None if second is None else np.asarray(second, dtype=np.int32),
    )


def write_rows(rows: TokenRows, folder: Path, name: str) -> None:
    """Write the arrays as `folder/name-*.npy`."""
    for array in ARRAYS if rows.second is None else PAIR_ARRAYS:
        np.save(folder / f"{name}-{array}.npy", getattr(rows, array))


def map_rows(folder: Path, name: str, weights: tuple[float, ...]) -> TokenRows:
    """Open arrays written by `write_rows` without reading them."""

    def load(array: str) -> NDArray[Any]:
        path = folder / f"{name}-{array}.npy"
        mapped: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        return mapped

    pairs = (folder / f"{name}-second.npy").exists()
    arrays = {array: load(array) for array in (PAIR_ARRAYS if pairs else ARRAYS)}
    return TokenRows(**arrays, weights=weights, folder=folder, name=name)
