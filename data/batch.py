"""Rows -> the tensors of one micro-batch, with only the positions that the loss looks at listed as
targets.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .rows import TokenRows

_Rows = Sequence[tuple[NDArray[np.int32], NDArray[np.bool_]]]


@dataclass
class Batch:
    """One micro-batch. Packed: [1, T], rows one after the other. Padded: [B, L], padding on the right.

    A pair stands as two sequences, the chosen one first: two segments, or two rows of the rectangle.
    """

    input_ids: Tensor
    """int64"""
    position_ids: Tensor
    """int64, like `input_ids`; starts again at 0 with each row."""
    segments: tuple[int, ...] | None
    """Packed: boundaries of the rows (0, n1, n1 + n2, ..., T); padded: None."""
    attention_mask: Tensor | None
    """Padded: int64 [B, L], 1 for real tokens; packed: None."""
    targets: Tensor
    """int64 [n]; flat positions whose next token is trained: `hidden.view(-1, H)[targets]`."""
    labels: Tensor
    """int64 [n]; those next tokens."""
    rows: list[int]
    n_tokens: int
    """Real tokens: padding is not counted."""
    pairs: int = 0
    """Pairs among `rows`: all of them or, for single sequences, none."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """What an objective's own collate adds; it moves to the device with the rest."""

    def sequence_of_target(self) -> Tensor:
        """int64 [n]; the sequence that each target is in. Those of pair p are 2 p (chosen) and 2 p + 1."""
        if self.segments is None:
            return self.targets // self.input_ids.shape[1]
        ends = torch.tensor(self.segments[1:], device=self.targets.device)
        return torch.searchsorted(ends, self.targets, right=True)

    def last_positions(self) -> Tensor:
        """int64 [sequences]; the flat position of the last token of each sequence."""
        if self.segments is not None:
            return torch.tensor(self.segments[1:], device=self.targets.device) - 1
        assert self.attention_mask is not None
        rows, width = self.attention_mask.shape
        starts = torch.arange(rows, device=self.attention_mask.device) * width
        return starts + self.attention_mask.sum(dim=1) - 1

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """The same batch with its tensors on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory; torch's DataLoader calls this."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            input_ids=function(self.input_ids),
            position_ids=function(self.position_ids),
            attention_mask=None if self.attention_mask is None else function(self.attention_mask),
            targets=function(self.targets),
            labels=function(self.labels),
            extra={name: function(tensor) for name, tensor in self.extra.items()},
        )


def collate(rows: TokenRows, indices: Sequence[int], *, packed: bool) -> Batch:
    """Build one micro-batch.

    No indices (a process without rows in a step that has fewer rows than processes) give one token without a
    target, so that every process runs the model equally often: its loss is an empty sum.
    """
    if not indices:
        return _one_token(rows, packed)
    parts = [sequence for index in indices for sequence in rows.sequences(index)]
    batch = _packed(parts, list(indices)) if packed else _padded(parts, list(indices))
    return batch if rows.second is None else replace(batch, pairs=len(indices))


def _packed(parts: _Rows, indices: list[int]) -> Batch:
    lengths = [len(tokens) for tokens, _ in parts]
    ids = np.concatenate([tokens for tokens, _ in parts]).astype(np.int64)
    segments = np.concatenate([[0], np.cumsum(lengths)])
    trained = np.concatenate([mask for _, mask in parts])
    trained[segments[:-1]] = False  # a row's last token says nothing about the next row's first
    targets = np.flatnonzero(trained) - 1
    positions = np.concatenate([np.arange(length) for length in lengths])
    return Batch(
        input_ids=torch.from_numpy(ids)[None],
        position_ids=torch.from_numpy(positions)[None],
        segments=tuple(segments.tolist()),
        attention_mask=None,
        targets=torch.from_numpy(targets),
        labels=torch.from_numpy(ids[targets + 1]),
        rows=indices,
        n_tokens=len(ids),
    )


def _padded(parts: _Rows, indices: list[int]) -> Batch:
    lengths = np.array([len(tokens) for tokens, _ in parts])
    longest = int(lengths.max())
    # What stands in the padding is never looked at; padding is known by the mask, not by an id.
    ids = np.zeros((len(parts), longest), dtype=np.int64)
    trained = np.zeros((len(parts), longest), dtype=np.bool_)
    for number, (tokens, mask) in enumerate(parts):
        ids[number, : len(tokens)] = tokens
        trained[number, : len(tokens)] = mask
    trained[:, 0] = False
    targets = np.flatnonzero(trained) - 1
    return Batch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.arange(longest).repeat(len(parts), 1),
        segments=None,
        attention_mask=torch.from_numpy((np.arange(longest) < lengths[:, None]).astype(np.int64)),
        targets=torch.from_numpy(targets),
        labels=torch.from_numpy(ids.reshape(-1)[targets + 1]),
        rows=indices,
        n_tokens=int(lengths.sum()),
    )


def _one_token(rows: TokenRows, packed: bool) -> Batch:
    none = torch.zeros(0, dtype=torch.int64)
    return Batch(
        input_ids=torch.tensor([[int(rows.tokens[0])]]),
        position_ids=torch.zeros((1, 1), dtype=torch.int64),
        segments=(0, 1) if packed else None,
        attention_mask=None if packed else torch.ones((1, 1), dtype=torch.int64),
        targets=none,
        labels=none.clone(),
        rows=[],
        n_tokens=0,
    )
