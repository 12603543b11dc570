"""The tier on which layers lie, and the buffers in front of it, made together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .arena import Arena
from .code_rate import decoding_threads
from .coded_layers import PART, CodedLayers
from .direct_file import DirectFile
from .layer_buffers import THREADS, LayerBuffers
from .layer_layout import Place
from .layer_store import Copier, DiskLayers, HostLayers, LayerStore
from .mapped_file import mapped_file
from .scratch import open_scratch, require_space
from .transfers import open_transfers


@dataclass
class LayerTier:
    """Store and buffers; `held` is the file or the memory that the store is. `lines` say how."""

    places: Sequence[Place]
    buffers: LayerBuffers
    store: LayerStore
    held: DirectFile | Tensor
    lines: list[str]
    undo: ExitStack

    @contextmanager
    def mapped(self, *, writable: bool) -> Iterator[Tensor]:
        """Inside, all bytes of the store (uint8), none of them in memory of its own; nothing else may use it.

        writable: changes are stored. Layers that are coded in the file are written as they are before.
        """
        self._uncode()
        self.buffers.flush()
        if isinstance(self.held, Tensor):
            yield self.held
        else:
            with mapped_file(self.held, writable=writable) as whole:
                yield whole
        if writable:
            self.buffers.forget()

    def _uncode(self) -> None:
        if isinstance(self.store, CodedLayers):
            for layer, place in enumerate(self.places):
                if self.store.is_coded(place.offset):
                    with self.buffers.using(layer, changes=True) as use:
                        use.changed = True

    def close(self) -> None:
        """Let go of all, and delete the scratch file; again does nothing."""
        self.undo.close()


def open_tier(
    places: Sequence[Place],
    device: torch.device,
    *,
    tier: Literal["host", "disk"],
    folder: Path | None,
    buffers: int,
    io: Literal["threads", "io_uring"] | None,
    io_threads: int,
    coded: bool = False,
) -> LayerTier:
    """Room for layers at these places, with buffers on `device`. UserError: there is none on the disk.

    coded: layers with bfloat16 weights are coded on the disk, see `CodedLayers`. Of what fails nothing is
    left.
    """
    total, largest = sum(place.nbytes for place in places), max(place.nbytes for place in places)
    pin = device.type == "cuda"
    lines = [
        f"weights of {len(places)} layers on {tier}: {total / 1e6:,.0f} MB, streamed through {buffers} "
        f"buffers of {largest / 1e6:,.1f} MB"
    ]
    with ExitStack() as undo:

        def in_host(count: int, nbytes: int) -> list[Tensor]:
            arena = undo.enter_context(Arena(count * nbytes, pin=pin))
            lines.extend(arena.lines)
            return [arena.take(nbytes) for _ in range(count)]

        store: LayerStore
        held: DirectFile | Tensor
        if tier == "disk":
            if folder is None:
                raise ValueError("tier='disk' needs a folder")
            require_space(folder, total)
            scratch = undo.enter_context(open_scratch(folder))
            held = undo.enter_context(DirectFile(scratch.path / "weights", total))
            transfers, line = open_transfers(held, io=io, threads=io_threads)
            undo.callback(transfers.close)
            lines += [*held.lines, line]
            staging, copier = in_host(THREADS, largest) if pin else [], Copier(device)
            store = DiskLayers(transfers, staging, copier)
            if coded:
                store = CodedLayers(
                    transfers,
                    staging,
                    copier,
                    path=held.path,
                    coded=[place.offset for place in places if torch.bfloat16 in place.dtypes],
                    spare=in_host(THREADS, PART),
                    threads=decoding_threads(device.type),
                )
        else:
            [held] = in_host(1, total)
            store = HostLayers(held, Copier(device))
        memory = (
            in_host(buffers, largest)
            if not pin
            else torch.empty((buffers, largest), dtype=torch.uint8, device=device).unbind()
        )
        front = LayerBuffers(places, memory, store)
        undo.callback(front.close)
        return LayerTier(places, front, store, held, lines, undo.pop_all())
