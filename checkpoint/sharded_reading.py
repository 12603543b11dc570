"""A snapshot of several processes, put together again, by any number of processes that see all shards.

Each process has a folder RUN/shards/<rank>-of-<ranks> with a keeper of its own, which holds its shard in
memory and writes it there when the process has died. A shard is taken from where it is whole, memory first.
One that is nowhere is computed from the parity that the others hold (parity.py). Only shards of one and the
same snapshot are put together: they carry its random name.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from . import strict_json
from .errors import BrokenCheckpoint
from .files import open_inside
from .looking import look
from .parity import Runs, rebuild
from .pieces import JoinedTensor, Part
from .reading import verify
from .slots import CHUNK, chunk_count, digest
from .snapshot_reading import Snapshot, views_in
from .whole import candidates

SHARDS = "shards"
PIECES, TABLES, STRIPE = "pieces.json", "tables.json", "parity.bin"
MOST_RANKS = 4096
_NAME = re.compile(r"(\d{4})-of-(\d{4})")
Warn = Callable[[str], None]


def shard_folder(run_dir: Path, rank: int, ranks: int) -> Path:
    """Where process `rank` of `ranks` keeps its shard."""
    return Path(run_dir) / SHARDS / f"{rank:04d}-of-{ranks:04d}"


def shard_folders(run_dir: Path) -> dict[int, dict[int, Path]]:
    """Those there are: by number of processes, then by rank. Links are not followed."""
    root = Path(run_dir) / SHARDS
    found: dict[int, dict[int, Path]] = {}
    if root.is_symlink() or not root.is_dir():
        return found
    for path in sorted(root.iterdir()):
        name = _NAME.fullmatch(path.name)
        if name is None or path.is_symlink() or not path.is_dir():
            continue
        rank, ranks = int(name[1]), int(name[2])
        if rank < ranks <= MOST_RANKS:
            found.setdefault(ranks, {})[rank] = path
    return found


@dataclass(frozen=True)
class _Shard:
    """A shard of which every byte verified. `snapshot`: the random name of what it is a part of."""

    files: Mapping[str, memoryview]
    snapshot: str
    ranks: int
    pieces: Mapping[str, Mapping[str, tuple[int, tuple[int, ...]]]]
    where: str

    def json(self, name: str) -> Any:
        file = f"{name}.json"
        return strict_json.loads(bytes(self.files[file]), name=file)


class ShardedSnapshot:
    """What several processes saved at one step, read as one whole: the names are those of a checkpoint.

    `close` it when its tensors have been read: until then the memory that they lie in is not written again.
    """

    def __init__(self, step: int, shards: Mapping[int, _Shard], held: ExitStack) -> None:
        self.step, self.ranks = step, len(shards)
        self._shards = [shards[rank] for rank in sorted(shards)]
        self._held = held

    @property
    def name(self) -> str:
        """What it is called to a person."""
        where = sorted({shard.where for shard in self._shards}, reverse=True)
        return f"snapshot-{self.step:06d} of {self.ranks} processes ({', '.join(where)})"

    @property
    def snapshot(self) -> str:
        """Its random name."""
        return self._shards[0].snapshot

    @property
    def bytes(self) -> int:
        """Bytes of all shards."""
        return sum(len(data) for shard in self._shards for data in shard.files.values())

    def open_tensors(self, name: str) -> dict[str, JoinedTensor]:
        """The tensors saved under `name`, read when and as far as they are asked for. KeyError without such.

        BrokenCheckpoint when the pieces do not make whole tensors.
        """
        parts: dict[str, list[Part]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        found = False
        for shard in self._shards:
            data = shard.files.get(f"{name}.safetensors")
            if data is None:
                continue
            found = True
            for key, view in views_in(data).items():
                first, shape = shard.pieces[name][key]
                parts.setdefault(key, []).append(Part(view, first))
                if shapes.setdefault(key, shape) != shape:
                    raise BrokenCheckpoint(f"the processes disagree about the shape of {key}")
        if not found:
            raise KeyError(f"the snapshot of step {self.step} has no {name}")
        return {key: JoinedTensor(key, shapes[key], parts[key]) for key in parts}

    def tensors(self, name: str) -> dict[str, Tensor]:
        """As `open_tensors`, whole and in memory of their own."""
        opened = self.open_tensors(name)
        return {key: value.read(0, value.shape.numel()).view(value.shape) for key, value in opened.items()}

    def json(self, name: str) -> Any:
        """The value saved under `name`: by the first process that did. KeyError when none did."""
        for shard in self._shards:
            if f"{name}.json" in shard.files:
                return shard.json(name)
        raise KeyError(f"the snapshot of step {self.step} has no {name}.json")

    def jsons(self, name: str) -> list[Any]:
        """What each process saved under `name`, in their order."""
        return [shard.json(name) for shard in self._shards]

    def close(self) -> None:
        """Let go of the memory."""
        self._shards = []
        self._held.close()


def newest_sharded(run_dir: Path, warn: Warn, *, only: str | None = None) -> ShardedSnapshot | None:
    """The whole snapshot of the highest step, None where there is none. `warn` is told what is skipped.

    only: of this random name, as another process has chosen it.
    """
    found: list[tuple[int, int, dict[int, list[_Source]]]] = []
    held = ExitStack()
    for ranks, folders in shard_folders(run_dir).items():
        by_step: dict[int, dict[int, list[_Source]]] = {}
        for rank, folder in folders.items():
            for source in [*_in_memory(folder, warn, held), *_on_disk(folder)]:
                by_step.setdefault(source.step, {}).setdefault(rank, []).append(source)
        found += [(step, ranks, sources) for step, sources in by_step.items()]
    for step, ranks, sources in sorted(found, key=lambda entry: entry[:2], reverse=True):
        try:
            shards = _assembled(ranks, sources, only)
        except BrokenCheckpoint as error:
            if only is None:
                warn(f"the snapshot of step {step} of {ranks} processes is skipped: {error}")
            continue
        return ShardedSnapshot(step, shards, held)
    held.close()
    return None


@dataclass(frozen=True)
class _Source:
    """Where a shard may be. `open` verifies all of it: BrokenCheckpoint."""

    step: int
    where: str
    open: Callable[[], Mapping[str, memoryview]]


def _in_memory(folder: Path, warn: Warn, held: ExitStack) -> list[_Source]:
    memory = look(folder, warn)
    if memory is None:
        return []
    held.callback(memory.close)

    def opening(index: int) -> Callable[[], Mapping[str, memoryview]]:
        def opened() -> Mapping[str, memoryview]:
            if not memory.lock(index, exclusive=False):
                raise BrokenCheckpoint("it is being written")
            snapshot = Snapshot(memory, *memory.read(index))
            return {name: snapshot.file(name) for name in snapshot.files}

        return opened

    return [_Source(header.step, "memory", opening(header.index)) for header in memory.headers()]


def _on_disk(folder: Path) -> list[_Source]:
    def opening(path: Path) -> Callable[[], Mapping[str, memoryview]]:
        def opened() -> Mapping[str, memoryview]:
            try:
                manifest = verify(path).manifest
                return {name: _mapped(path, name) for name in manifest.files}
            except FileNotFoundError as error:
                raise BrokenCheckpoint(f"{path.name} went away") from error

        return opened

    return [_Source(step, "disk", opening(path)) for step, path in candidates(folder)]


def _mapped(folder: Path, name: str) -> memoryview:
    with open_inside(folder, name) as fd:
        empty = os.fstat(fd).st_size == 0  # which no system maps
        return memoryview(b"" if empty else mmap.mmap(fd, 0, access=mmap.ACCESS_COPY))


def _assembled(ranks: int, sources: Mapping[int, list[_Source]], only: str | None) -> dict[int, _Shard]:
    """All shards of one snapshot. BrokenCheckpoint says what is missing."""
    sets: dict[str, dict[int, _Shard]] = {}
    problems: list[str] = []
    for rank, places in sources.items():
        for source in places:
            try:
                shard = _shard(source.open(), source.where)
            except BrokenCheckpoint as error:
                problems.append(f"process {rank}, {source.where}: {error}")
                continue
            if shard.ranks == ranks:
                sets.setdefault(shard.snapshot, {}).setdefault(rank, shard)
    for name in sorted(sets, key=lambda name: -len(sets[name])):
        if only is not None and name != only:
            continue
        shards = sets[name]
        missing = sorted(set(range(ranks)) - shards.keys())
        if len(missing) == 1 and ranks > 1:
            try:
                shards[missing[0]] = _computed(missing[0], ranks, shards)
            except BrokenCheckpoint as error:
                problems.append(f"process {missing[0]}: {error}")
                continue
        elif missing:
            listed = ", ".join(str(rank) for rank in missing)
            problems.append(f"nothing is left of processes {listed}, and only one can be computed again")
            continue
        return shards
    raise BrokenCheckpoint("; ".join(problems) or "it is another one")


def _shard(files: Mapping[str, memoryview], where: str) -> _Shard:
    if PIECES not in files:
        raise BrokenCheckpoint(f"it has no {PIECES}")
    match strict_json.loads(bytes(files[PIECES]), name=PIECES):
        case {"snapshot": str(snapshot), "ranks": int(ranks), "pieces": dict(given)}:
            pieces = {
                file: {name: (int(first), tuple(shape)) for name, (first, shape) in named.items()}
                for file, named in given.items()
            }
            return _Shard(files, snapshot, ranks, pieces, where)
    raise BrokenCheckpoint(f"{PIECES} is not one")


def _computed(lost: int, ranks: int, shards: Mapping[int, _Shard]) -> _Shard:
    """The shard of a process that is lost, checked by its own checksums, which all others keep."""
    if any(not {TABLES, STRIPE} <= shard.files.keys() for shard in shards.values()):
        raise BrokenCheckpoint("there is no parity")
    tables = next(iter(shards.values())).json("tables")
    data = {rank: _runs(shard, tables[rank]) for rank, shard in shards.items()}
    stripes = {rank: np.frombuffer(shard.files[STRIPE], np.uint8) for rank, shard in shards.items()}
    table = tables[lost]
    try:
        found = rebuild(lost, int(table["bytes"]), data, stripes)
    except ValueError as error:
        raise BrokenCheckpoint(str(error)) from None
    view = memoryview(found.data)
    digests = bytes.fromhex(table["digests"])
    for number in range(chunk_count(len(found))):
        if digest(view[number * CHUNK : (number + 1) * CHUNK]) != digests[number * 16 : (number + 1) * 16]:
            raise BrokenCheckpoint("what the parity gives does not match its checksums")
    files = {name: view[start : start + size] for name, (start, size) in table["files"].items()}
    return _shard(files, "computed from parity")


def _runs(shard: _Shard, table: Mapping[str, Any]) -> Runs:
    """The bytes of a shard as they lay in its slot when the parity was made."""
    runs = []
    for name, (start, size) in table["files"].items():
        data = shard.files.get(name)
        if data is None or len(data) != size:
            raise BrokenCheckpoint(f"{name} of another process is not the one that the parity was made of")
        runs.append((int(start), np.frombuffer(data, np.uint8)))
    return runs
