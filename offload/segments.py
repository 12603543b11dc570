"""How an optimizer's state is cut into segments: what is read, updated and written together.

A segment is a run of bytes in the scratch file, a multiple of 4096 long: a stamp, the state of one piece
after the other (for AdamW with master weights p | m | v), and the stamp again. A piece is the state of one
parameter, or of a range of its elements where the rule goes element by element: then tensors larger than a
segment are cut. The stamp says which segment it is and how often it was written, so that bytes that come from
another place, or from an earlier write, are never taken for the state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..optimizers.moments import BLOCK, SMALLEST

PAGE = 4096
STAMP = 64
"""Bytes of a stamp, so that all tensors start at a multiple of a cache line."""
CUT = 1 << 17
"""Ranges of a cut tensor start at a multiple of so many elements.

Then every block of quantised state, every chunk of our AdamW and every vector of torch's fused one is the
same as in the whole tensor, and so is each bit of the result.
"""
RESIDENT_BYTES = 4096
"""Tensors of fewer bytes (step counters, scales) stay in memory."""
_CACHE_LINE = 64

Layout = Mapping[str, Tensor]
"""State of a parameter by key, on the meta device."""


@dataclass(frozen=True)
class Field:
    """A tensor of a piece's state. offset: bytes into its segment; None: it stays in memory.

    first: its place among the elements of the parameter's whole tensor, None where a cut leaves it whole.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int | None
    first: int | None

    @property
    def numel(self) -> int:
        """Elements."""
        return torch.Size(self.shape).numel()

    def view(self, buffer: Tensor) -> Tensor:
        """The tensor in `buffer`, the bytes (uint8) of the segment."""
        assert self.offset is not None
        end = self.offset + self.numel * self.dtype.itemsize
        return buffer[self.offset : end].view(self.dtype).view(self.shape)


@dataclass(eq=False)
class Piece:
    """State of a parameter, or of the elements `part` of it (flat); `resident` is what stays in memory.

    fields: of all tensors, in the order in which the optimizer makes them. started: whether there is state;
    before the first step there is none.
    """

    parameter: Tensor
    group: dict[str, Any]
    part: slice | None
    fields: tuple[Field, ...]
    resident: dict[str, Tensor] = field(default_factory=dict)
    started: bool = False

    @property
    def moving(self) -> Iterator[Field]:
        """Fields that lie in the segment."""
        return (field for field in self.fields if field.offset is not None)


@dataclass(eq=False)
class Segment:
    """Pieces that move together. offset: in the file; nbytes: a multiple of 4096."""

    index: int
    offset: int
    nbytes: int
    pieces: list[Piece]

    @property
    def started(self) -> bool:
        """Whether there is anything to read."""
        return any(piece.started for piece in self.pieces)


def cut_into_segments(
    parameters: Iterable[tuple[Tensor, dict[str, Any]]],
    layout: Callable[[Tensor, dict[str, Any]], Layout],
    can_cut: Callable[[Tensor, dict[str, Any]], bool],
    buffer_size: int,
) -> list[Segment]:
    """Segments of at most `buffer_size` bytes where the pieces allow it, in the order of `parameters`.

    parameters: with their groups. Those without state outside memory get a piece without fields.
    """
    segments: list[Segment] = []
    pieces: list[Piece] = []
    used, offset = STAMP, 0

    def close() -> None:
        nonlocal pieces, used, offset
        if pieces:
            nbytes = -(-(used + STAMP) // PAGE) * PAGE
            segments.append(Segment(len(segments), offset, nbytes, pieces))
            offset += nbytes
        pieces, used = [], STAMP

    for parameter, group in parameters:
        state = layout(parameter, group)
        for part in _parts(parameter, state, can_cut(parameter, group), buffer_size):
            placed, size = _place(parameter, part, state, used)
            if pieces and used + size + STAMP > buffer_size:
                close()
                placed, size = _place(parameter, part, state, used)
            pieces.append(Piece(parameter, group, part, placed))
            used += size
    close()
    return segments


def _parts(parameter: Tensor, state: Layout, cut: bool, buffer_size: int) -> list[slice | None]:
    each = sum(value.nbytes for value in state.values()) / max(1, parameter.numel())
    room = buffer_size - 2 * STAMP - _CACHE_LINE * len(state)
    most = int(room / each) // CUT * CUT if each else 0
    if not cut or each * parameter.numel() <= room:
        return [None]
    starts = list(range(0, parameter.numel(), max(CUT, most)))
    if len(starts) > 1 and parameter.numel() - starts[-1] < SMALLEST:
        # So small a tensor would have state of another kind than the whole one.
        starts[-1] -= CUT
        if starts[-1] == starts[-2]:
            del starts[-1]
    ends = [*starts[1:], parameter.numel()]
    return [slice(start, end) for start, end in zip(starts, ends, strict=True)]


def _place(parameter: Tensor, part: slice | None, state: Layout, start: int) -> tuple[tuple[Field, ...], int]:
    """Fields of a piece that begins `start` bytes into its segment, and the bytes they take."""
    fields: list[Field] = []
    at = start
    for key, value in state.items():
        piece, first = (value, 0) if part is None else _range_of(key, value, parameter, part)
        moves = first is not None and value.nbytes >= RESIDENT_BYTES
        fields.append(Field(key, value.dtype, tuple(piece.shape), at if moves else None, first))
        if moves:
            at += -(-piece.nbytes // _CACHE_LINE) * _CACHE_LINE
    return tuple(fields), at - start


def _range_of(key: str, value: Tensor, parameter: Tensor, part: slice) -> tuple[Tensor, int | None]:
    """What of a state tensor (flat) belongs to the elements `part` of its parameter, and where it begins."""
    numel = parameter.numel()
    if value.numel() == numel and value.dim() > 0:
        return value.reshape(-1)[part], part.start
    if key.endswith("_scale") and value.numel() == -(-numel // BLOCK):
        first = part.start // BLOCK
        return value.reshape(-1)[first : -(-part.stop // BLOCK)], first
    return value, None
