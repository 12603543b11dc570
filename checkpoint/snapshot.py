"""Snapshots in memory from any PyTorch loop: started between two steps, copied while the next one computes.

    with Snapshotter(run_dir) as snapshots:
        found = snapshots.newest()                      of a trainer that was killed in this directory
        for step in ...:
            loss.backward()                             the copy of the last snapshot goes on meanwhile
            snapshots.wait()                            before anything changes what is being copied
            optimizer.step()
            snapshots.begin(step, tensors=..., json=...)

An optimizer that steps inside the backward pass leaves no time in which the weights stand still: call `wait`
before the backward pass then.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from ..recipes.errors import UserError
from .contents import (
    Contents,
    Copier,
    Group,
    constant_in,
    contents,
    file_digests,
    touch,
    write_constant,
    write_contents,
)
from .keeper_settings import KeeperSettings
from .keeping import Keeping
from .memory import Memory
from .room import Room, free_memory, take_memory
from .slot_writer import SlotWriter, nothing
from .slots import CONSTANT, MOST_SLOTS, Geometry, Header, pages, slot_bytes
from .snapshot_reading import Snapshot, newest_snapshot

_TEXT_GROWTH = 64 << 10  # bytes by which the texts (clock, data position) may grow before new memory is taken

_PUBLISHING = 0.05  # seconds


@dataclass(frozen=True)
class Prepared:
    """A snapshot that has its slot; begun by `Snapshotter.start`, or given up by `abandon`."""

    step: int
    what: Contents
    memory: Memory
    index: int
    claim: ExitStack

    def abandon(self) -> None:
        """Give the slot back."""
        self.claim.close()


class Finish(Protocol):
    """What is added to a snapshot when its tensors are copied, in the background, before it counts."""

    def sizes(self) -> Mapping[str, int]:
        """Bytes of each file, at most."""
        ...

    def write(self, writer: SlotWriter) -> None:
        """Add the files."""
        ...


class Snapshotter:
    """Snapshots of one trainer, held by the keeper of `run_dir`.

    Leaving the `with` block by an exception counts as the trainer's death, leaving it otherwise as its end.

    `last`: header of the newest one published here. `taken`, `skipped`: how many were, and how many were not
    because the one before was being copied or no slot was free. `copy_seconds`: of the last one, in the
    background. `waited_seconds`: of training that `wait` has cost in all.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        slots: int = 2,
        constant: Mapping[str, Group] | None = None,
        settings: KeeperSettings | None = None,
        warn: Callable[[str], None] = print,
        room: Callable[[], Room] = free_memory,
        finish: Finish | None = None,
        at: Callable[[str], None] = nothing,
    ) -> None:
        """Finds or starts the keeper. Memory is taken by `reserve`, or by the first `begin`.

        slots: two are enough to be safe; with a third one, snapshots go on while one is written to the disk.
        constant: parts as in `begin` that never change: stored once, known again by their checksum.
        room: tells how much memory is free. finish: adds to each snapshot.
        at: told each point of the protocol (slot_writer.POINTS).
        UserError: another trainer is at work in this directory, or no keeper can be started.
        """
        if not 2 <= slots <= MOST_SLOTS:
            raise UserError(f"slots={slots}: must be 2 to {MOST_SLOTS}.")
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self.last: Header | None = None
        self.taken = self.skipped = 0
        self.copy_seconds = self.waited_seconds = 0.0
        self._slots, self._room, self._warn, self._at = slots, room, warn, at
        self._finish = finish
        self._constant = contents(constant or {}, {})
        self._constant_identity = ""
        self._copier = Copier()
        self._keeping = Keeping(run_dir, settings or KeeperSettings(), warn)
        self._memory = self._keeping.memory
        self._held = self._memory is not None
        self._generation = 0
        if self._memory is not None:
            self._generation = max((header.generation for header in self._memory.headers()), default=0)
        self._fits_constant = False
        self._jobs: queue.SimpleQueue[Prepared | None] = queue.SimpleQueue()
        self._copied, self._done = threading.Event(), threading.Event()
        self._copied.set()
        self._done.set()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="snapshots", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self.close()
        else:
            self.leave()

    @property
    def keeper_pid(self) -> int:
        """Process id of the keeper; 0 while there is none."""
        return self._keeping.keeper_pid

    @property
    def persisted_step(self) -> int:
        """Step of the newest checkpoint that the keeper has written to the disk; -1 before the first."""
        return self._keeping.persisted_step

    def newest(self) -> Snapshot | None:
        """What the keeper held when this started, or what was taken since: the newest that verifies."""
        memory = self._keeping.memory
        return None if memory is None else newest_snapshot(memory, self._warn)

    def forget(self) -> None:
        """A fresh start: the keeper drops what it holds."""
        self.flush()
        held = self._keeping.memory
        self._keeping.forget()
        for memory in (held, self._memory):
            if memory is not None:
                memory.close()
        self._memory, self._held, self.last = None, False, None

    def reserve(
        self,
        *,
        tensors: Mapping[str, Group],
        json: Mapping[str, Any],
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        """Take the memory for snapshots of this size now, at one or some seconds a GB, once.

        Shapes and dtypes count: meta tensors do. `begin` does the same when it has to.

        UserError with the numbers when the machine or the control group has not so much.
        """
        self._reserve(contents(tensors, json, files))

    def begin(
        self,
        step: int,
        *,
        tensors: Mapping[str, Group],
        json: Mapping[str, Any],
        files: Mapping[str, bytes] | None = None,
    ) -> bool:
        """Start the snapshot of `step` and return at once; False when it is skipped.

        tensors, json: as for `save`. The tensors must not change before `wait` has returned; json and files
        (further files by name, as PEFT's configuration) are taken now. Raises what went wrong with the one
        before, TypeError or ValueError for what cannot be stored, UserError where memory is short.
        """
        prepared = self.prepare(step, contents(tensors, json, files))
        if prepared is None:
            return False
        self.start(prepared)
        return True

    @property
    def busy(self) -> bool:
        """Whether the one before is not published yet. One that is copied is about to be: worth a moment."""
        return not self._done.wait(_PUBLISHING if self._copied.is_set() else 0.0)

    def fits(self, what: Contents, *, most: int) -> bool:
        """Whether there is memory for a snapshot of these files, none of whose data exceed `most` bytes."""
        return self._memory is not None and what.data_bytes <= most

    def prepare(self, step: int, what: Contents) -> Prepared | None:
        """The first half of `begin`: a slot for the snapshot; None when it is skipped."""
        self.raise_failure()
        if self.busy:
            self.skipped += 1
            return None
        memory = self._reserve(what)
        claim = ExitStack()
        index = claim.enter_context(memory.claim())
        if index is None:
            claim.close()
            self.skipped += 1
            return None
        return Prepared(step, what, memory, index, claim)

    def start(self, prepared: Prepared) -> None:
        """The second half of `begin`."""
        self._copier.mark(prepared.what)
        self._copied.clear()
        self._done.clear()
        self._jobs.put(prepared)

    def wait(self) -> None:
        """Return when the tensors may change. Raises what went wrong with the copy."""
        began = time.perf_counter()
        self._copied.wait()
        self.waited_seconds += time.perf_counter() - began
        self.raise_failure()

    def flush(self) -> None:
        """Return when the snapshot that was begun is published. Raises what went wrong with it."""
        self._done.wait()
        self.raise_failure()

    def close(self) -> None:
        """The training has ended: the keeper ends, its memory is gone. Raises a failure not yet told."""
        self._end(self._keeping.goodbye)
        self.raise_failure()

    def leave(self) -> None:
        """Leave as if killed: the keeper writes the newest snapshot to the disk, keeps it for the lease."""
        self._end(self._keeping.leave)

    def _end(self, part: Callable[[], None]) -> None:
        self._done.wait()
        self._jobs.put(None)
        self._thread.join()
        part()
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def raise_failure(self) -> None:
        """Raise, once, what went wrong in the background."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    # Memory

    def _reserve(self, what: Contents) -> Memory:
        sizes = what.sizes | (dict(self._finish.sizes()) if self._finish is not None else {})
        needed = slot_bytes(sizes)
        if self._memory is not None and self._fits(self._memory, needed):
            return self._memory
        growth = _TEXT_GROWTH + sum(sizes[name] for name in what.texts)
        constant = slot_bytes(self._constant.sizes) if self._constant.groups else 0
        geometry = Geometry(self._slots, needed + pages(growth), constant)
        self.flush()
        memory = take_memory(geometry, self._room())
        touch(memory.view())
        if constant:
            digests = file_digests(self._constant)
            self._copier.mark(self._constant)
            writer = SlotWriter(memory.view(), geometry, CONSTANT, self._at)
            write_constant(writer, self._constant, self._copier, digests)
            self._constant_identity = writer.publish(generation=1, step=0).table_digest.hex()
        # What the keeper holds stays with it until the new memory has a whole snapshot.
        self._memory, self._held, self._fits_constant = memory, False, True
        return memory

    def _fits(self, memory: Memory, needed: int) -> bool:
        if memory.geometry.slot_bytes < needed or memory.geometry.slots < self._slots:
            return False
        if not self._fits_constant and self._constant.groups:
            identity = constant_in(memory, self._constant)
            if identity is None:
                return False
            self._constant_identity = identity
        self._fits_constant = True
        return True

    # The thread

    def _work(self) -> None:
        while self._next():
            pass

    def _next(self) -> bool:
        # In a function of its own: a job that is done must not keep its tensors alive.
        job = self._jobs.get()
        if job is None:
            return False
        try:
            with job.claim:
                self._take(job)
        except BaseException as error:
            self._failure = error
        finally:
            self._copied.set()
            self._done.set()
        return True

    def _take(self, job: Prepared) -> None:
        began = time.perf_counter()
        writer = SlotWriter(job.memory.view(), job.memory.geometry, job.index, self._at)
        write_contents(writer, job.what, self._copier)
        self._copied.set()
        self.copy_seconds = time.perf_counter() - began
        if self._finish is not None:
            self._finish.write(writer)
        generation = self._generation + 1
        header = writer.publish(generation=generation, step=job.step, constant=self._constant_identity)
        self._generation = generation
        if not self._held:
            old = self._keeping.memory
            self._keeping.hold(job.memory)
            self._held = True
            if old is not None and old is not job.memory:
                old.close()
        self.last = header
        self.taken += 1
