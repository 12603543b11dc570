"""Where the weights of each layer lie: together, so that a layer is one long read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..optimizers.blocks import find_blocks
from .arena import PAGE

# What torch's own allocator aligns to: the same weights at another alignment can give other last bits.
_ALIGNMENT = 64
_STAMP = 64  # bytes at both ends of a layer for its number and how often it was written
_MODULE_LISTS = frozenset({"layers", "layer", "h", "blocks", "block"})


@dataclass(frozen=True)
class Place:
    """A layer in the store: `nbytes` from `offset` on, both multiples of 4,096."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    starts: tuple[int, ...]
    """Of each weight, in bytes from the layer's own beginning."""
    offset: int
    nbytes: int

    def views(self, memory: Tensor) -> list[Tensor]:
        """The weights in `memory`, the layer's bytes (uint8 [nbytes]), in place."""
        return [
            memory[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for shape, dtype, start in zip(self.shapes, self.dtypes, self.starts, strict=True)
        ]

    def stamp(self, memory: Tensor, layer: int, written: int) -> None:
        """Write the layer's number and how often it was written at both ends of its bytes."""
        stamp = torch.tensor([layer, written], dtype=torch.int64)
        for end in self._ends(memory):
            end.copy_(stamp)

    def stamps(self, memory: Tensor) -> list[list[int]]:
        """What `stamp` wrote, at the first and the last byte."""
        return [end.tolist() for end in self._ends(memory)]

    def _ends(self, memory: Tensor) -> list[Tensor]:
        return [memory[start : start + 16].view(torch.int64) for start in (0, self.nbytes - _STAMP)]


def lay_out(layers: Iterable[Sequence[tuple[tuple[int, ...], torch.dtype]]]) -> list[Place]:
    """Places of layers, each given as the shapes and types of its weights, one after the other."""
    places = []
    offset = 0
    for weights in layers:
        starts = []
        end = _STAMP
        for shape, dtype in weights:
            starts.append(end)
            end += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        nbytes = -(-(end + _STAMP) // PAGE) * PAGE
        shapes = tuple(tuple(shape) for shape, _ in weights)
        places.append(Place(shapes, tuple(dtype for _, dtype in weights), tuple(starts), offset, nbytes))
        offset += nbytes
    return places


def layer_names(names: Iterable[str]) -> dict[str, list[str]]:
    """Each decoder layer's module and the names of the parameters in it, from the input to the output.

    `model.layers.0` -> [`model.layers.0.self_attn.q_proj.weight`, ...]. ValueError: no layers there.
    """
    return {_module_of(layer[0]): list(layer) for layer in find_blocks(names).layers}


def _module_of(name: str) -> str:
    parts = name.split(".")
    for count in range(1, len(parts)):
        if parts[count].isdigit() and parts[count - 1] in _MODULE_LISTS:
            return ".".join(parts[: count + 1])
    raise ValueError(f"{name} is in no layer")


@dataclass(frozen=True)
class StreamedBytes:
    """What streaming takes: `buffers` and `kept` in memory, `store` on the tier where the layers lie.

    kept: weights outside the layers: embeddings, head, final norm.
    """

    buffers: int
    kept: int
    store: int

    @property
    def memory(self) -> int:
        """Bytes of weights in memory."""
        return self.buffers + self.kept


def predicted_bytes(
    shapes: Iterable[tuple[str, tuple[int, ...]]], *, itemsize: int, buffers: int = 2
) -> StreamedBytes:
    """Bytes of a model whose parameters have these names and shapes, as `ModelFacts.parameter_shapes` does.

    itemsize: bytes of an element. Exact: what `stream_layers` and `load_streamed` then allocate.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes}
    dtype = {1: torch.uint8, 2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[itemsize]
    layers = layer_names(sizes)
    places = lay_out([[((sizes[name],), dtype) for name in names] for names in layers.values()])
    inside = {name for names in layers.values() for name in names}
    return StreamedBytes(
        buffers=buffers * max(place.nbytes for place in places),
        kept=itemsize * sum(size for name, size in sizes.items() if name not in inside),
        store=sum(place.nbytes for place in places),
    )
