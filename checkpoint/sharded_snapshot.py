"""Snapshots in memory of a training in several processes: each keeps its shard, and parity of the others'.

    with ShardedSnapshotter(run_dir) as snapshots:             after init_process_group, in every process
        for step in ...:
            loss.backward()
            snapshots.wait()
            optimizer.step()
            snapshots.begin(step, pieces=..., json=...)        in every process, with its own pieces

All take a snapshot, or none does: `begin` asks them. The next one begins when all have published the last, so
that whatever moment they are killed at, there is one that all of them have. What was saved is read by
`newest_sharded`, by any number of processes.
"""

from __future__ import annotations

import json as json_text
import secrets
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..recipes.errors import ShoestringError, UserError
from .contents import Contents, contents
from .keeper_settings import KeeperSettings
from .parity import block_held_by, stripe_bytes
from .pieces import Pieces, describe
from .room import Room, free_memory
from .sharded_reading import PIECES, STRIPE, TABLES, shard_folder
from .slot_writer import SlotWriter, nothing
from .slots import CHUNK, chunk_count
from .snapshot import Snapshotter

_PATIENCE = timedelta(seconds=120)  # for another process, before it is taken for dead
_GROWTH = 128 << 10  # bytes by which a shard may grow before new memory is taken
_AT_ONCE = CHUNK
_READY, _SMALL, _BUSY, _FAILED = range(4)


class ShardedSnapshotter:
    """As Snapshotter, for every process of `torch.distributed`'s default group, or for a single one.

    parity: what one process loses is computed from what the others hold, for 1 / (n - 1) of the bytes more
    and an exchange of all of them, in the background.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        parity: bool = True,
        settings: KeeperSettings | None = None,
        warn: Callable[[str], None] = print,
        room: Callable[[], Room] = free_memory,
        at: Callable[[str], None] = nothing,
    ) -> None:
        """To be made in all processes at once. UserError: in all of them when one has no keeper."""
        several = dist.is_initialized() and dist.get_world_size() > 1
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        # Two groups, since one thread's exchange must not wait for the other's.
        self._asking = dist.new_group(backend="gloo", timeout=_PATIENCE) if several else None
        exchanging = dist.new_group(backend="gloo", timeout=_PATIENCE) if several else None
        self._parity = Parity(exchanging, self.rank, self.ranks) if several and parity else None
        self._session = int(self._ask(secrets.randbits(62))[0, 0])
        self._own: Snapshotter | None = None
        self._failure: Exception | None = None
        folder = shard_folder(run_dir, self.rank, self.ranks)
        failure: Exception | None = None
        try:
            self._own = Snapshotter(
                folder, settings=settings, warn=warn, room=room, finish=self._parity, at=at
            )
        except (ShoestringError, OSError) as error:
            failure = error
        self._all(failure)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self.close()
        else:
            self.leave()

    @property
    def own(self) -> Snapshotter:
        """This process's part."""
        assert self._own is not None
        return self._own

    @property
    def taken(self) -> int:
        """See Snapshotter."""
        return self.own.taken

    @property
    def skipped(self) -> int:
        """See Snapshotter."""
        return self.own.skipped

    @property
    def copy_seconds(self) -> float:
        """See Snapshotter."""
        return self.own.copy_seconds

    @property
    def waited_seconds(self) -> float:
        """See Snapshotter."""
        return self.own.waited_seconds

    def begin(self, step: int, *, pieces: Pieces, json: Mapping[str, Any]) -> bool:
        """Start the snapshot of `step` in all processes and return; False when all skip it.

        pieces: by file and name, what this process has of each tensor; together those of all processes must
        make whole tensors. They must not change before `wait` has returned. json: what differs between
        processes, as their generators' state, is read by `ShardedSnapshot.jsons`.

        Raises, in all processes, what went wrong in one of them.
        """
        what, state, failure = self._look(step, pieces, json)
        known = 0 if self._parity is None else self._parity.most
        answers = self._ask(state, 0 if what is None else what.data_bytes, known)
        if self._off(answers[:, 0], failure):
            self.own.skipped += 1
            return False
        assert what is not None
        if self._parity is not None and (_SMALL in answers[:, 0] or bool((answers[:, 2] != known).any())):
            self._parity.most = int(answers[:, 1].max()) + _GROWTH
        prepared = None
        try:
            prepared = self.own.prepare(step, what)
        except (ShoestringError, OSError) as error:
            failure = error
        claims = self._ask(_FAILED if failure else _BUSY if prepared is None else _READY)[:, 0]
        if prepared is not None and bool((claims == _READY).all()):
            self.own.start(prepared)
            return True
        if prepared is not None:
            prepared.abandon()
        self._off(claims, failure)
        return False

    def _look(
        self, step: int, pieces: Pieces, json: Mapping[str, Any]
    ) -> tuple[Contents | None, int, Exception | None]:
        """What is to be saved here, whether it can be, and why not."""
        failure, self._failure = self._failure, None
        named = {"snapshot": f"{self._session:x}-{step}", "ranks": self.ranks, "pieces": describe(pieces)}
        tensors = {
            file: {name: piece.data for name, piece in group.items()} for file, group in pieces.items()
        }
        try:
            if failure is not None:
                raise failure
            self.own.raise_failure()
            what = contents(tensors, {PIECES.removesuffix(".json"): named, **json})
        except (ShoestringError, OSError, TypeError, ValueError) as error:
            return None, _FAILED, error
        if self.own.busy:
            return what, _BUSY, None
        small = self._parity is not None and not self.own.fits(what, most=self._parity.most)
        return what, _SMALL if small else _READY, None

    def _off(self, states: Tensor, failure: Exception | None) -> bool:
        """Whether all skip this one. Raises, in all processes, when one has failed."""
        if _FAILED in states:
            self._all(failure)
        return _BUSY in states

    def wait(self) -> None:
        """Return when the tensors may change. What went wrong with the copy is raised by the next `begin`, in
        all processes.
        """
        try:
            self.own.wait()
        except (ShoestringError, OSError) as error:
            self._failure = error

    def flush(self) -> None:
        """Return when this process's part is published."""
        self.own.flush()

    def forget(self) -> None:
        """A fresh start: the keepers drop what they hold."""
        self.own.forget()

    def close(self) -> None:
        """The training has ended: the keepers end, and their memory is gone."""
        self.own.close()

    def leave(self) -> None:
        """Leave as if killed."""
        self.own.leave()

    def _ask(self, *mine: int) -> Tensor:
        """What each process says, a row each."""
        row = torch.tensor([mine], dtype=torch.int64)
        if self._asking is None:
            return row
        rows = [torch.empty_like(row) for _ in range(self.ranks)]
        try:
            dist.all_gather(rows, row, group=self._asking)
        except RuntimeError as error:
            raise ShoestringError(f"another process does not answer: {str(error).splitlines()[0]}") from error
        return torch.cat(rows)

    def _all(self, failure: Exception | None) -> None:
        """Raise in every process when one has failed; its own failure where it is its own."""
        failed = self._ask(int(failure is not None))[:, 0].nonzero()[:, 0].tolist()
        if failure is not None:
            raise failure
        if failed:
            listed = ", ".join(str(rank) for rank in failed)
            raise UserError(f"process {listed} could not take its part of the snapshot; see what it says.")


class Parity:
    """`Finish`: after the own shard, the tables of all, and the stripe that this process holds."""

    def __init__(self, group: dist.ProcessGroup | None, rank: int, ranks: int) -> None:
        self._group, self._rank, self._ranks = group, rank, ranks
        self.most = 0
        """Bytes that a shard may have in any process."""

    def sizes(self) -> dict[str, int]:
        """See Finish."""
        tables = self._ranks * (8_192 + 40 * chunk_count(self.most))
        return {TABLES: tables, STRIPE: stripe_bytes(self.most, self._ranks)}

    def write(self, writer: SlotWriter) -> None:
        """See Finish. ShoestringError when another process cannot be reached."""
        files = {name: [extent.offset, extent.bytes] for name, extent in writer.files.items()}
        data = np.frombuffer(writer.data, np.uint8)
        table = {"files": files, "bytes": len(data), "digests": writer.digests.hex()}
        try:
            tables = self._gathered(table)
            text = json_text.dumps(tables).encode()
            writer.begin_file(TABLES, len(text))
            writer.write(text)
            writer.begin_file(STRIPE, stripe_bytes(self.most, self._ranks))
            self._exchange(writer, data)
        except RuntimeError as error:
            raise ShoestringError(
                f"the processes cannot exchange parity: {str(error).splitlines()[0]}"
            ) from error

    def _gathered(self, table: Mapping[str, Any]) -> list[Any]:
        """Of all processes, as JSON: torch's own gathering of objects would unpickle them."""
        text = torch.frombuffer(bytearray(json_text.dumps(table).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self._ranks)]
        dist.all_gather(sizes, torch.tensor([len(text)]), group=self._group)
        most = int(max(sizes))
        padded = torch.zeros(most, dtype=torch.uint8)
        padded[: len(text)] = text
        texts = [torch.empty_like(padded) for _ in range(self._ranks)]
        dist.all_gather(texts, padded, group=self._group)
        return [
            json_text.loads(bytes(each[: int(size)].numpy())) for each, size in zip(texts, sizes, strict=True)
        ]

    def _exchange(self, writer: SlotWriter, data: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """Every process gets the exclusive or of one block of each other one."""
        length = stripe_bytes(self.most, self._ranks)
        buffer = torch.empty(min(_AT_ONCE, length), dtype=torch.uint8)
        for done in range(0, length, len(buffer)):
            part = buffer[: min(len(buffer), length - done)]
            for holder in range(self._ranks):
                part.zero_()
                if holder != self._rank:
                    start = block_held_by(holder, self._rank) * length + done
                    mine = data[start : start + len(part)]
                    part.numpy()[: len(mine)] = mine
                dist.reduce(part.view(torch.int64), holder, op=dist.ReduceOp.BXOR, group=self._group)
                if holder == self._rank:
                    writer.write(part.numpy().data)
