"""State frozen where it lies on the disk: it stays as it was, and anything else is refused."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from shoestring.checkpoint import load_optimizer_state, optimizer_state
from shoestring.offload import OffloadedOptimizer, offload_optimizer
from shoestring.offload.direct_file import DirectFile
from shoestring.offload.errors import OffloadError
from shoestring.offload.frozen import Frozen, Written
from shoestring.offload.frozen_reading import FrozenState, open_frozen
from shoestring.offload.ring import Ring
from shoestring.offload.scratch import adopt, open_scratch, sweep
from shoestring.offload.stored import Stored
from test_offload_optimizer import MAKERS, assert_equal_states, copies, parameters, run
from test_offload_ring import BYTES, Memory, add, segments_of
from torch import Tensor, nn

KIB = 1024
Named = list[tuple[str, nn.Parameter]]


# The ring


def ring_with_shadow(count: int, buffers: int, memory: Memory, grown: list[int]) -> Ring:
    memory_buffers = [torch.zeros(BYTES, dtype=torch.uint8) for _ in range(buffers)]
    return Ring(segments_of(count), memory_buffers, memory, lambda: grown.append(1))


def in_the_file(memory: Memory, frozen: Frozen) -> list[bytes]:
    """The bytes that it names, once they are all written; as a reader finds them, by extents alone."""
    Written(frozen.writes).read(0, 1)
    found = []
    for index, extent in enumerate(frozen.extents):
        assert extent is not None
        data = memory.data[extent.offset : extent.offset + extent.nbytes]
        stamps = [data[:16].view(torch.int64).tolist(), data[-64:-48].view(torch.int64).tolist()]
        assert stamps == [[index, extent.writes]] * 2
        assert xxhash.xxh3_64_intdigest(data.numpy().tobytes()) == extent.checksum
        found.append(data[64:72].numpy().tobytes())
    return found


@pytest.mark.parametrize("slowest", [0.0, 0.002])
@pytest.mark.parametrize(("count", "buffers"), [(3, 3), (8, 3), (9, 5)])
def test_what_is_frozen_stays_until_the_next_one_is_published(
    count: int, buffers: int, slowest: float
) -> None:
    """Against copies of the numbers that were in the segments at each moment."""
    rng, grown = random.Random(count), list[int]()
    memory = Memory(2 * count * BYTES, slowest=slowest, seed=count)
    ring = ring_with_shadow(count, buffers, memory, grown)
    numbers = [0] * count
    for index in range(count):
        add(ring, index, 0)
    published: tuple[Frozen, list[bytes]] | None = None
    for _ in range(25):
        order = rng.sample(range(count), rng.randint(1, count))
        ring.expect(order, order[::-1])
        for index in order:
            add(ring, index, 1)
            numbers[index] += 1
            if published is not None and rng.random() < 0.3:
                assert in_the_file(memory, published[0]) == published[1]
        if rng.random() < 0.6:
            frozen = ring.freeze()
            wanted = [number.to_bytes(8, "little") for number in numbers]
            assert in_the_file(memory, frozen) == wanted
            if published is not None:
                assert in_the_file(memory, published[0]) == published[1]
            if rng.random() < 0.7:
                ring.release()
                published = frozen, wanted
            else:
                ring.thaw()
    assert published is not None
    ring.wait()
    assert in_the_file(memory, published[0]) == published[1]
    assert grown == [1]
    ring.close()


def test_without_snapshots_there_is_one_place(tmp_path: Path) -> None:
    memory = Memory(8 * BYTES)  # a second place would be outside
    ring = Ring(segments_of(8), [torch.zeros(BYTES, dtype=torch.uint8) for _ in range(3)], memory)
    for _ in range(4):
        for index in range(8):
            add(ring, index, 1)
    with pytest.raises(ValueError, match="not made for it"):
        ring.freeze()
    ring.close()


def test_writes_wait_for_the_snapshot_to_be_published() -> None:
    ring = ring_with_shadow(5, 3, Memory(2 * 5 * BYTES), [])
    add_one = partial(add, ring, amount=1)
    for turn in range(2):
        for index in range(5):
            add_one(index)
        ring.freeze()
        if turn == 0:
            ring.release()
    with pytest.raises(RuntimeError, match="frozen again"):
        ring.freeze()
    with pytest.raises(RuntimeError, match="before the frozen state is released"):
        list(map(add_one, range(5)))
    ring.close()


def test_a_frozen_state_whose_write_failed_is_never_whole() -> None:
    memory = Memory(2 * 5 * BYTES)
    ring = ring_with_shadow(5, 3, memory, [])
    for index in range(5):
        add(ring, index, 1)
    ring.wait()
    memory.failing = "write"
    frozen = ring.freeze()
    with pytest.raises(OffloadError, match="the disk failed"):
        Written(frozen.writes).read(0, 1)
    ring.close()


def test_no_room_for_second_places_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = DirectFile(tmp_path / "state", 5 * BYTES)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OffloadError, match="ENOSPC"):
            file.grow(10 * BYTES)
    assert file.nbytes == file.path.stat().st_size == 5 * BYTES
    file.grow(10 * BYTES)
    assert file.nbytes == file.path.stat().st_size == 10 * BYTES
    file.close()


# An optimizer's state


def on_disk(name: str, named: Named, folder: Path) -> OffloadedOptimizer:
    return offload_optimizer(
        MAKERS[name](named),
        tier="disk",
        folder=folder,
        buffer_size=64 * KIB,
        buffer_count=3,
        io="threads",
        snapshots=True,
    )[0]


class Taken:
    """A snapshot as a reader has it: weights, the state in memory, and texts that went through JSON."""

    def __init__(self, optimizer: OffloadedOptimizer, named: Named) -> None:
        assert optimizer.shadow is not None
        tensors, settings = optimizer_state(optimizer, named)
        here, written, text = optimizer.shadow.freeze(tensors)
        written["written"].read(0, 1)
        optimizer.shadow.release()
        self.weights = copies(named)
        self.here = {key: value.clone() for key, value in here.items() if isinstance(value, Tensor)}
        assert len(self.here) == len(here)
        self.settings, self.text = json.loads(json.dumps([settings, text]))

    def load(self, name: str, folder: Path) -> tuple[OffloadedOptimizer, FrozenState]:
        state = open_frozen(self.text)
        resumed = on_disk(name, self.weights, folder)
        load_optimizer_state(resumed, self.weights, {**self.here, **state.tensors}, self.settings)
        return resumed, state


@pytest.mark.parametrize("name", ["torch adamw", "adamw 8 bits master", "apollo", "soap"])
def test_it_goes_on_to_the_bit_from_what_was_frozen(name: str, tmp_path: Path) -> None:
    own = parameters(torch.float32)
    others = copies(own)
    memory, disk = MAKERS[name](own), on_disk(name, others, tmp_path)
    assert disk.shadow is not None
    disk.shadow.keep(tmp_path, os.getpid())
    for step in range(6):
        run(others, disk, range(step, step + 1))
        taken = Taken(disk, others)
    run(others, disk, range(6, 9))  # what comes later is written beside it
    disk.close()

    resumed, state = taken.load(name, tmp_path)
    assert state.tensors  # most of it was on the disk
    assert sum(value.nbytes for value in taken.here.values()) < 64 * KIB
    state.close()
    state.scratch.drop()
    run(own, memory, range(9))
    run(taken.weights, resumed, range(6, 9))
    assert_equal_states(memory, own, resumed, taken.weights)
    resumed.close()
    assert list(tmp_path.iterdir()) == []


def test_frozen_state_is_read_by_ranges(tmp_path: Path) -> None:
    named = parameters(torch.float32)
    optimizer = on_disk("adamw", named, tmp_path)
    assert optimizer.shadow is not None
    optimizer.shadow.keep(tmp_path, os.getpid())
    run(named, optimizer, range(3))
    tensors, _ = optimizer_state(optimizer, named)
    before = {k: v.read(0, v.shape.numel()) for k, v in tensors.items() if isinstance(v, Stored)}
    taken = Taken(optimizer, named)
    optimizer.close()
    state = open_frozen(taken.text)
    assert state.tensors.keys() == before.keys()
    rng = random.Random(0)
    for key, tensor in state.tensors.items():
        assert tensor.nbytes == before[key].nbytes
        for _ in range(5):
            first = rng.randrange(tensor.shape.numel())
            count = rng.randint(1, tensor.shape.numel() - first)
            assert torch.equal(tensor.read(first, count), before[key][first : first + count])
    state.close()
    state.scratch.drop()


def first_place(taken: Taken) -> tuple[int, int]:
    offset, nbytes, _, _ = taken.text["segments"][1]
    return offset, nbytes


def flipped(path: Path, taken: Taken, _: Taken) -> None:
    offset, _ = first_place(taken)
    with path.open("r+b") as file:
        file.seek(offset + 100)
        byte = file.read(1)
        file.seek(offset + 100)
        file.write(bytes([byte[0] ^ 1]))


def rolled_back(path: Path, taken: Taken, older: Taken) -> None:
    """As if its last write had been lost: the bytes of the snapshot before."""
    offset, nbytes = first_place(taken)
    with path.open("r+b") as file:
        file.seek(first_place(older)[0])
        bytes_before = file.read(nbytes)
        file.seek(offset)
        file.write(bytes_before)


def cut(path: Path, taken: Taken, _: Taken) -> None:
    os.truncate(path, 4 * BYTES)


def replaced(path: Path, taken: Taken, _: Taken) -> None:
    data = path.read_bytes()
    path.rename(path.with_name("old"))
    path.write_bytes(data)


def gone(path: Path, taken: Taken, _: Taken) -> None:
    path.unlink()


def later_format(path: Path, taken: Taken, _: Taken) -> None:
    taken.text["format"] = 2


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (flipped, r"segment 1 of its state on disk is damaged"),
        (rolled_back, r"segment 1 of its state on disk is of another moment: \(segment, write\) \(1, \d+\)"),
        (cut, r"ends at"),
        (replaced, r"another file"),
        (gone, r"is gone"),
        (later_format, r"has format 2, this version reads 1"),
    ],
)
def test_other_bytes_are_refused(
    harm: Callable[[Path, Taken, Taken], None], said: str, tmp_path: Path
) -> None:
    named = parameters(torch.float32)
    optimizer = on_disk("adamw", named, tmp_path)
    assert optimizer.shadow is not None
    optimizer.shadow.keep(tmp_path, os.getpid())
    run(named, optimizer, range(4))
    older = Taken(optimizer, named)
    run(named, optimizer, range(4, 6))
    taken = Taken(optimizer, named)
    optimizer.close()
    path = Path(taken.text["file"])
    harm(path, taken, older)
    with pytest.raises(OffloadError, match=said):
        open_frozen(taken.text)
    assert path.parent.is_dir()  # and nothing holds it: it can be swept
    assert sweep(tmp_path, run=tmp_path) == (path.parent,)


def test_a_state_of_two_moments_is_refused(tmp_path: Path) -> None:
    """F23: after two more snapshots the file holds nothing of the first, and says so."""
    named = parameters(torch.float32)
    optimizer = on_disk("adamw", named, tmp_path)
    assert optimizer.shadow is not None
    optimizer.shadow.keep(tmp_path, os.getpid())
    all_taken = []
    for step in range(4, 8):
        run(named, optimizer, range(step, step + 1))
        all_taken.append(Taken(optimizer, named))
    optimizer.close()
    for taken in all_taken[:-2]:  # nothing was written since the last, so the one before it is still whole
        with pytest.raises(OffloadError, match="another moment"):
            open_frozen(taken.text)
    state = open_frozen(all_taken[-1].text)
    state.close()
    state.scratch.drop()


def test_what_is_read_leaves_room_for_the_next_file(tmp_path: Path) -> None:
    named = parameters(torch.float32)
    optimizer = on_disk("adamw", named, tmp_path)
    assert optimizer.shadow is not None
    optimizer.shadow.keep(tmp_path, os.getpid())
    run(named, optimizer, range(4))
    taken = Taken(optimizer, named)
    optimizer.close()
    path = Path(taken.text["file"])
    before = path.stat()
    state = open_frozen(taken.text)
    named_bytes = sum(place[1] for place in taken.text["segments"] if place)
    after = path.stat()
    assert after.st_size == before.st_size
    assert 512 * after.st_blocks <= 1.1 * named_bytes + 64 * KIB < 512 * before.st_blocks
    state.close()
    state.scratch.drop()


# The folder


def test_a_kept_folder_outlives_its_process_and_not_its_keeper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoestring.offload.scratch._PATIENCE", 0.05)
    keeper = subprocess.Popen(["sleep", "60"])
    scratch_folder, run_dir = tmp_path / "scratch", tmp_path / "run"
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            scratch = open_scratch(scratch_folder)
            (scratch.path / "state").write_bytes(b"x")
            scratch.keep(run_dir, keeper.pid)
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (kept,) = scratch_folder.iterdir()
    assert sweep(scratch_folder) == ()
    assert sweep(scratch_folder, run=tmp_path / "another") == ()
    assert sweep(scratch_folder, run=run_dir, but=kept) == ()
    taken_over = adopt(kept)
    with pytest.raises(OffloadError, match="another process uses"):
        adopt(kept)
    keeper.kill()
    keeper.wait()
    assert sweep(scratch_folder, run=run_dir) == ()  # we live
    taken_over.close()
    assert (kept / "state").read_bytes() == b"x"
    assert sweep(scratch_folder) == (kept,)


def test_a_kept_folder_goes_when_its_run_starts_again(tmp_path: Path) -> None:
    scratch = open_scratch(tmp_path)
    scratch.keep(tmp_path / "run", os.getpid())
    scratch.close()
    assert scratch.path.is_dir()
    assert sweep(tmp_path) == ()
    assert sweep(tmp_path, run=tmp_path / "run") == (scratch.path,)


def test_a_folder_that_is_dropped_goes_before_or_after_it_is_closed(tmp_path: Path) -> None:
    for closes_first in (True, False):
        scratch = open_scratch(tmp_path)
        scratch.keep(tmp_path / "run", os.getpid())
        if closes_first:
            scratch.close()
        scratch.drop()
        assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_none_of_ours_is_not_adopted(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(OffloadError, match="no scratch folder"):
        adopt(tmp_path / "mine")
    with pytest.raises(OffloadError, match="is gone"):
        adopt(tmp_path / "shoestring-1-2")
