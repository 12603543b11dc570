"""A teacher's likeliest tokens at every trained position, in files that a later run finds again.

A folder below the data cache, named after teacher, rows, k and temperature, holds

    indices     uint16, or int32 for a larger vocabulary, [positions, k]
    log_probs   float16 [positions, k]      log softmax(logits / T) of these tokens
    log_rest    float16 [positions]         the same of all other tokens together, -inf where there are none
    done        uint8 [rows]                1 once the row's positions are in the other three
    store.json  the sizes

Log-probabilities are logits less their log-sum-exp; in float16 they have the most digits where the
probability is near one. A row is known by the hash of its tokens and mask, so it is found whichever part,
order or process asks. `done` is written when the data of its rows is on the disk: what a killed run had
finished stays.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from ..data import TokenRows, collate, eval_batches
from ..data.cache import default_cache_dir, key_of
from ..ops import TopTokens
from ..ops.distillation import TeacherPart
from ..recipes.errors import UserError

if TYPE_CHECKING:
    from .teacher import OnlineTeacher

_FORMAT = 1
_FLUSH_ROWS = 256
_ROOM = 1.05
"""Free space that is asked for, over what the files will take."""


@dataclass(frozen=True)
class Store:
    """The files, and where each row's positions are in them."""

    folder: Path
    rows: tuple[TokenRows, ...]
    top_k: int
    positions: int
    hashes: NDArray[np.uint64]
    """[rows], ascending; each content once."""
    starts: NDArray[np.int64]
    """[rows]; the first position of each."""
    kinds: dict[str, tuple[np.dtype[Any], tuple[int, ...]]]
    """File -> type and shape."""

    def path(self, name: str) -> Path:
        """One of the files."""
        return self.folder / name

    def map(self, name: str) -> NDArray[Any]:
        """A file's content, not read yet."""
        dtype, shape = self.kinds[name]
        mapped: NDArray[Any] = np.memmap(self.path(name), dtype=dtype, mode="r", shape=shape)
        return mapped

    def missing(self) -> int:
        """Rows that the teacher has not been asked about."""
        return int((self.map("done") == 0).sum())

    def place(self, tokens: NDArray[np.int32], trained: NDArray[np.bool_]) -> int:
        """The number of a row in this store. KeyError for a row that it was not made for."""
        wanted = np.uint64(row_hash(tokens, trained))
        found = int(np.searchsorted(self.hashes, wanted))
        if found == len(self.hashes) or self.hashes[found] != wanted:
            raise KeyError("the teacher was not asked about this row")
        return found


def row_hash(tokens: NDArray[np.int32], trained: NDArray[np.bool_]) -> int:
    """64 bits of a row's tokens and mask."""
    digest = xxhash.xxh3_64(np.ascontiguousarray(tokens).data)
    digest.update(np.packbits(trained).data)
    return digest.intdigest()


def open_store(
    rows: Sequence[TokenRows],
    *,
    teacher: str,
    vocabulary: int,
    top_k: int,
    temperature: float,
    cache_dir: Path | None = None,
) -> Store:
    """The store of this teacher for these rows; new or damaged files are made anew, with nothing done.

    Raises:
        UserError: the files cannot be made, or there is no room for them.

    """
    counts: dict[int, int] = {}
    for part in rows:
        for index in range(len(part)):
            tokens, trained = part.row(index)
            counts[row_hash(tokens, trained)] = int(trained.sum())
    hashes = np.array(sorted(counts), dtype=np.uint64)
    sizes = np.array([counts[int(value)] for value in hashes], dtype=np.int64)
    positions = int(sizes.sum())
    kinds: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
        "indices": (np.dtype(np.uint16 if vocabulary <= 2**16 else np.int32), (positions, top_k)),
        "log_probs": (np.dtype(np.float16), (positions, top_k)),
        "log_rest": (np.dtype(np.float16), (positions,)),
        "done": (np.dtype(np.uint8), (len(hashes),)),
    }
    identity = {
        "format": _FORMAT,
        "teacher": teacher,
        "vocabulary": vocabulary,
        "rows": xxhash.xxh3_128_hexdigest(hashes.data),
        "top_k": top_k,
        "temperature": temperature,
    }
    folder = (cache_dir or default_cache_dir()) / "teacher" / key_of(identity)
    starts = np.cumsum(sizes) - sizes
    store = Store(folder, tuple(rows), top_k, positions, hashes, starts, kinds)
    if not _whole(store, identity):
        _create(store, identity)
    return store


def _bytes(store: Store, name: str) -> int:
    dtype, shape = store.kinds[name]
    return dtype.itemsize * int(np.prod(shape, dtype=np.int64))


def _whole(store: Store, identity: dict[str, Any]) -> bool:
    """Whether the files are there with the sizes that they must have."""
    try:
        said = json.loads(store.path("store.json").read_text(encoding="utf-8"))
        return said == identity and all(
            store.path(name).stat().st_size == _bytes(store, name) for name in store.kinds
        )
    except (OSError, ValueError):
        return False


def _create(store: Store, identity: dict[str, Any]) -> None:
    wanted = sum(_bytes(store, name) for name in store.kinds)
    try:
        shutil.rmtree(store.folder, ignore_errors=True)
        store.folder.mkdir(parents=True)
        free = shutil.disk_usage(store.folder).free
        if free < _ROOM * wanted:
            raise _no_room(store, f"{free / 1e9:.1f} GB are free")
        for name in store.kinds:
            with store.path(name).open("wb") as file:
                file.truncate(_bytes(store, name))
        store.path("store.json").write_text(json.dumps(identity), encoding="utf-8")
    except OSError as error:
        raise _no_room(store, error.strerror or str(error)) from error


def _no_room(store: Store, why: str) -> UserError:
    wanted = sum(_bytes(store, name) for name in store.kinds)
    return UserError(
        f"objective.teacher_logits: stored needs {wanted / 1e9:.1f} GB in {store.folder.parent} "
        f"({store.positions:,} trained tokens with {store.top_k} each): {why}.\n"
        "  A smaller objective.top_k, another place by the variable XDG_CACHE_HOME, or "
        "objective.teacher_logits=online"
    )


@torch.no_grad()
def fill(
    store: Store,
    teacher: OnlineTeacher,
    *,
    device: torch.device,
    packed: bool,
    micro_tokens: int,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Ask the teacher about every row that is not done; what is finished stays when this is stopped.

    Raises:
        UserError: the disk is full.

    """
    done = np.array(store.map("done"))
    waiting: list[int] = []
    files = {name: os.open(store.path(name), os.O_RDWR) for name in store.kinds}

    def keep() -> None:
        for name in ("indices", "log_probs", "log_rest"):
            os.fsync(files[name])
        done[waiting] = 1
        _write(files["done"], 0, done)
        os.fsync(files["done"])
        waiting.clear()
        if progress is not None:
            progress(int(done.sum()), len(done))

    try:
        for part in store.rows:
            for indices in eval_batches(part, micro_tokens=micro_tokens, packed=packed):
                places = [store.place(*part.row(index)) for index in indices]
                if done[places].all():
                    continue
                batch = collate(part, indices, packed=packed).to(device)
                found = _ask(teacher.at(batch), len(batch.labels))
                first = 0
                for place, index in zip(places, indices, strict=True):
                    count = int(part.trained_counts[index])
                    _write_row(store, files, int(store.starts[place]), found[first : first + count])
                    first += count
                waiting += places
                if len(waiting) >= _FLUSH_ROWS:
                    keep()
        keep()
    except OSError as error:
        raise _no_room(store, error.strerror or str(error)) from error
    finally:
        for descriptor in files.values():
            os.close(descriptor)


def _ask(target: TeacherPart, positions: int) -> TopTokens:
    parts = [target(slice(start, start + 256)) for start in range(0, positions, 256)]
    tops = [part for part in parts if isinstance(part, TopTokens)]
    return TopTokens(
        torch.cat([top.indices for top in tops]).cpu(),
        torch.cat([top.log_probs for top in tops]).float().cpu(),
        torch.cat([top.log_rest for top in tops]).float().cpu(),
    )


def _write_row(store: Store, files: dict[str, int], start: int, found: TopTokens) -> None:
    for name, values in (
        ("indices", found.indices),
        ("log_probs", found.log_probs),
        ("log_rest", found.log_rest),
    ):
        dtype, shape = store.kinds[name]
        width = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
        if name == "log_probs":  # float16 ends at -65504, and behind it is minus infinity
            values = values.clamp(min=-6e4)
        _write(files[name], start * width, values.numpy().astype(dtype))


def _write(descriptor: int, offset: int, values: NDArray[Any]) -> None:
    """Not through a memory map, where a full disk would end the process without a word."""
    content = memoryview(values.tobytes())
    while content:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written
