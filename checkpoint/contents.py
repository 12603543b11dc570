"""What goes into a snapshot, and how it is copied: by chunks, each checksummed while it is in the cache."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from ..offload.stored import Stored
from ..offload.stored import chunks as stored_chunks
from . import strict_json
from .errors import BrokenCheckpoint
from .memory import Memory
from .slot_writer import PIECE, SlotWriter
from .slots import ALIGN, CHUNK, chunks
from .store import part_name
from .tensors import encode_header, ordered_names, tensor_chunks

Group = Mapping[str, Tensor | Stored]


@dataclass(frozen=True)
class Contents:
    """Files by name: texts as they are, groups of tensors with the header of each."""

    texts: Mapping[str, bytes]
    groups: Mapping[str, Group]
    headers: Mapping[str, bytes]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        sizes = {name: len(text) for name, text in self.texts.items()}
        for name, group in self.groups.items():
            sizes[name] = len(self.headers[name]) + sum(tensor.nbytes for tensor in group.values())
        return sizes

    @property
    def data_bytes(self) -> int:
        """Bytes of all files as they lie in a slot."""
        return sum(-(-count // ALIGN) * ALIGN for count in self.sizes.values())


def contents(
    tensors: Mapping[str, Group], json: Mapping[str, Any], files: Mapping[str, bytes] | None = None
) -> Contents:
    """Texts and headers are made now; tensors are only named. TypeError or ValueError as for `save`."""
    texts = {part_name(name, ".json"): strict_json.dumps(json[name], name=name) for name in json}
    for name, data in (files or {}).items():
        if part_name(name, "") in texts:
            raise ValueError(f"{name} is given twice")
        texts[name] = data
    groups = {part_name(name, ".safetensors"): tensors[name] for name in tensors}
    if twice := texts.keys() & groups.keys():
        raise ValueError(f"{min(twice)} is given twice")
    return Contents(texts, groups, {name: encode_header(group) for name, group in groups.items()})


def write_contents(writer: SlotWriter, given: Contents, copier: Copier) -> None:
    """Copy everything into a slot; the tensors are read where they lie."""
    sizes = given.sizes
    for name, text in given.texts.items():
        writer.begin_file(name, sizes[name])
        writer.write(text)
    for name, group in given.groups.items():
        writer.begin_file(name, sizes[name])
        _write_group(writer, given.headers[name], group, copier)


def write_constant(writer: SlotWriter, given: Contents, copier: Copier, digests: Mapping[str, str]) -> None:
    """As `write_contents`, with each file's own checksum, by which it is known again."""
    for name, group in given.groups.items():
        writer.begin_file(name, given.sizes[name], digests[name])
        _write_group(writer, given.headers[name], group, copier)


def file_digests(given: Contents) -> dict[str, str]:
    """xxh3-128 in hex of each file of tensors, as its bytes would be; nothing is copied."""
    result = {}
    for name, group in given.groups.items():
        state = xxhash.xxh3_128(given.headers[name])
        for data in tensor_chunks(group):
            if len(data):
                state.update(data)
        result[name] = state.hexdigest()
    return result


def constant_in(memory: Memory, given: Contents) -> str | None:
    """The identity of the constant part in `memory`; None unless it is `given`, in every byte."""
    found = memory.constant()
    if found is None:
        return None
    if {name: extent.xxh3_128 for name, extent in found.files.items()} != file_digests(given):
        return None
    try:
        for _ in chunks(memory.fd, found):
            pass
    except BrokenCheckpoint:
        return None
    return found.identity


def touch(memory: memoryview) -> None:
    """Read a byte of each page, so that the first snapshot is as quick as all others.

    The system zeroes a page when it is first used, which takes far longer than a copy. By numpy, which lets
    other threads run meanwhile; mmap's own way (MAP_POPULATE) would not.
    """
    np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE].max()


def _write_group(writer: SlotWriter, header: bytes, group: Group, copier: Copier) -> None:
    writer.write(header)
    for name in ordered_names(group):
        copier.copy(writer, group[name])


class Copier:
    """Copies tensors into slots, from any device. `mark` is called by the trainer, `copy` by the thread.

    From a CUDA device through two pinned buffers of one chunk, on a stream of its own that starts after what
    the trainer had queued when it called `mark`.
    """

    def __init__(self) -> None:
        self._ready: dict[torch.device, torch.cuda.Event] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._staging: list[Tensor] = []

    def mark(self, given: Contents) -> None:
        """Note the moment, on each device, after which the tensors are what is to be copied."""
        devices = {
            tensor.device
            for group in given.groups.values()
            for tensor in group.values()
            if isinstance(tensor, Tensor) and tensor.device.type == "cuda"
        }
        self._ready = {device: torch.cuda.current_stream(device).record_event() for device in devices}

    def copy(self, writer: SlotWriter, given: Tensor | Stored) -> None:
        """All bytes of one tensor, in the order of its elements."""
        if isinstance(given, Stored):
            for part in stored_chunks(given):
                _copy_flat(writer, part)
            return
        tensor = given.detach()
        if tensor.nbytes == 0:
            return
        if tensor.device.type == "cuda":
            self._copy_cuda(writer, tensor)
        elif tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg():
            _copy_flat(writer, tensor.reshape(-1))
        else:
            room = writer.room(tensor.nbytes)
            torch.frombuffer(room, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)
            writer.advance(tensor.nbytes)

    def _copy_cuda(self, writer: SlotWriter, tensor: Tensor) -> None:
        device = tensor.device
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch
        if not self._staging:
            self._staging = [torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        stream = self._streams[device]
        with torch.cuda.stream(stream):
            stream.wait_event(self._ready[device])
            source = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
            waiting: tuple[Tensor, torch.cuda.Event] | None = None
            for number, (first, count) in enumerate(_pieces(CHUNK, CHUNK, len(source))):
                staged = self._staging[number % 2][:count]
                staged.copy_(source[first : first + count], non_blocking=True)
                event = stream.record_event()
                if waiting is not None:
                    _land(writer, *waiting)
                waiting = (staged, event)
            if waiting is not None:
                _land(writer, *waiting)


def _copy_flat(writer: SlotWriter, flat: Tensor) -> None:
    source = flat.view(torch.uint8).numpy()
    for first, count in _pieces(writer.until_piece, PIECE, len(source)):
        # numpy copies without the interpreter's lock, and in this thread alone: a team of OpenMP threads here
        # would take the cores from the training.
        np.copyto(np.frombuffer(writer.room(count), np.uint8), source[first : first + count])
        writer.advance(count)


def _land(writer: SlotWriter, staged: Tensor, event: torch.cuda.Event) -> None:
    event.synchronize()
    np.copyto(np.frombuffer(writer.room(len(staged)), np.uint8), staged.numpy())
    writer.advance(len(staged))


def _pieces(start: int, size: int, total: int) -> Iterator[tuple[int, int]]:
    """(first, count) of `total` bytes: `start` of them, then `size` each."""
    first, count = 0, min(start, total)
    while count:
        yield first, count
        first += count
        count = min(size, total - first)
