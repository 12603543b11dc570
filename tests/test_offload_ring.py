"""The ring: what it moves, what it keeps, and what it does when the disk is slow, late or broken."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from shoestring.offload import offload_optimizer
from shoestring.offload.errors import OffloadError
from shoestring.offload.holder import Resident
from shoestring.offload.model import step_traffic
from shoestring.offload.ring import Ring
from shoestring.offload.segments import CUT, PAGE, STAMP, Segment, cut_into_segments
from shoestring.optimizers import AdamW
from torch import Tensor, nn

BYTES = PAGE


class Memory:
    """Transfers on a tensor, each in a thread of its own that takes its time: they end in any order."""

    def __init__(self, nbytes: int, *, slowest: float = 0.0, seed: int = 0) -> None:
        self.data = torch.zeros(nbytes, dtype=torch.uint8)
        self.bytes_read = self.bytes_written = 0
        self.calls: Counter[tuple[str, int]] = Counter()
        self.failing: str | None = None
        self.lost_writes = False
        self._slowest, self._random = slowest, random.Random(seed)
        self._lock = threading.Lock()

    def read(self, offset: int, into: Tensor) -> Later:
        def work() -> None:
            into.copy_(self.data[offset : offset + len(into)])

        return self._begin("read", offset, len(into), work)

    def write(self, offset: int, data: Tensor) -> Later:
        def work() -> None:
            if not self.lost_writes:
                self.data[offset : offset + len(data)] = data

        return self._begin("write", offset, len(data), work)

    def close(self) -> None:
        pass

    def _begin(self, verb: str, offset: int, nbytes: int, work: object) -> Later:
        with self._lock:
            self.calls[verb, offset] += 1
            self.bytes_read += nbytes * (verb == "read")
            self.bytes_written += nbytes * (verb == "write")
            delay = self._random.random() * self._slowest
        return Later(work, delay, verb == self.failing)


class Later:
    def __init__(self, work: object, delay: float, fails: bool) -> None:
        self.done = False
        self._error: OffloadError | None = None

        def run() -> None:
            time.sleep(delay)
            if fails:
                self._error = OffloadError("the disk failed")
            else:
                work()  # type: ignore[operator]
            self.done = True

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def wait(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error


def segments_of(count: int) -> list[Segment]:
    return [Segment(index, index * BYTES, BYTES, []) for index in range(count)]


def ring_of(count: int, buffers: int, memory: Memory) -> Ring:
    return Ring(segments_of(count), [torch.zeros(BYTES, dtype=torch.uint8) for _ in range(buffers)], memory)


def add(ring: Ring, index: int, amount: int) -> None:
    """To the number in a segment, which is zero before its first use: a buffer comes with what was in it."""
    with ring.using(index, changes=True) as data:
        number = data[STAMP : STAMP + 8].view(torch.int64)
        if index not in (started := vars(ring).setdefault("started_in_test", set())):
            number.zero_()
            started.add(index)
        number += amount


def go_through(ring: Ring, order: Sequence[int], following: Sequence[int], *, same_way: bool = False) -> None:
    """A pass that adds to the number in each segment."""
    ring.expect(order, following, same_way=same_way)
    for index in order:
        add(ring, index, index + 1)


def go_twice(ring: Ring, order: Sequence[int]) -> None:
    for _ in range(2):
        go_through(ring, order[::-1], order)
        go_through(ring, order, order[::-1])


def values(ring: Ring, count: int) -> list[int]:
    found = []
    for index in range(count):
        with ring.using(index, changes=False, expected=False) as data:
            found.append(int(data[STAMP : STAMP + 8].view(torch.int64)))
    return found


@pytest.mark.parametrize("slowest", [0.0, 0.004])
@pytest.mark.parametrize(("count", "buffers"), [(1, 3), (3, 3), (4, 3), (9, 4), (12, 7)])
@pytest.mark.parametrize("same_way", [False, True])
def test_every_segment_has_what_was_last_put_into_it(
    count: int, buffers: int, slowest: float, same_way: bool
) -> None:
    ring = ring_of(count, buffers, Memory(count * BYTES, slowest=slowest, seed=count))
    order = list(range(count))
    for number in range(6):
        this = order if same_way or number % 2 == 0 else order[::-1]
        go_through(ring, this, this if same_way else this[::-1], same_way=same_way)
    assert values(ring, count) == [6 * (index + 1) for index in range(count)]
    ring.close()


def test_orders_that_nobody_expected() -> None:
    rng = random.Random(1)
    ring = ring_of(8, 3, Memory(8 * BYTES, slowest=0.002))
    wanted = [0] * 8
    for _ in range(12):
        order = rng.sample(range(8), rng.randint(1, 8))
        told = rng.sample(range(8), rng.randint(1, 8))
        ring.expect(told, rng.sample(range(8), 5))
        for index in order:
            add(ring, index, 1)
            wanted[index] += 1
    assert values(ring, 8) == wanted
    ring.close()


@pytest.mark.parametrize(("count", "buffers"), [(9, 3), (9, 4), (20, 6)])
def test_a_pass_moves_all_segments_but_those_that_stay(count: int, buffers: int) -> None:
    memory = Memory(count * BYTES)
    ring = ring_of(count, buffers, memory)
    order = list(range(count))
    moved = []
    for number in range(8):
        before = memory.bytes_read, memory.bytes_written
        this = order[:: -1 if number % 2 else 1]
        go_through(ring, this, this[::-1])
        ring.wait()
        moved.append((memory.bytes_read - before[0], memory.bytes_written - before[1]))
    model = step_traffic([BYTES] * count, buffers)
    assert moved[0][0] == 0  # nothing is read that was never written
    assert set(moved[1:]) == {(int(model.read), int(model.written))}
    assert model.read == (count - buffers) * BYTES
    ring.close()


def test_with_a_fixed_direction_some_segments_stay_for_good() -> None:
    memory = Memory(12 * BYTES)
    ring = ring_of(12, 6, memory)
    order = list(range(12))
    for _ in range(3):
        go_through(ring, order, order, same_way=True)
        ring.wait()
    before = memory.calls.copy()
    go_through(ring, order, order, same_way=True)
    ring.wait()
    again = memory.calls - before
    unmoved = [index for index in order if not again["read", index * BYTES]]
    assert len(unmoved) >= 3
    ring.close()


def test_nothing_is_moved_where_all_fits() -> None:
    memory = Memory(5 * BYTES)
    ring = ring_of(5, 5, memory)
    for _ in range(4):
        go_through(ring, range(5), range(5))
    assert not memory.calls
    ring.close()


def test_what_is_read_ahead_is_read_while_another_is_used() -> None:
    """A pass over a slow disk takes about its slowest way, not the sum of computing and moving."""
    memory = Memory(10 * BYTES, slowest=0.0)
    ring = ring_of(10, 4, memory)
    order = list(range(10))
    go_through(ring, order, order[::-1])
    ring.expect(order[::-1], order)
    with ring.using(9, changes=True):
        pass  # its buffer is given up at once, for the first segment that is not there
    deadline = time.monotonic() + 5
    while not memory.calls["read", 5 * BYTES]:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    ring.close()


@pytest.mark.parametrize("verb", ["read", "write"])
def test_a_failing_disk_ends_the_pass_and_all_later_ones(verb: str) -> None:
    memory = Memory(9 * BYTES)
    ring = ring_of(9, 3, memory)
    order = list(range(9))
    go_through(ring, order, order[::-1])
    ring.wait()
    memory.failing = verb
    with pytest.raises(OffloadError, match="the disk failed"):
        go_twice(ring, order)
    memory.failing = None
    with pytest.raises(OffloadError, match="Resume from the last checkpoint"):
        go_through(ring, order, order[::-1])
    ring.close()


def test_a_write_that_never_reached_the_disk_is_noticed() -> None:
    memory = Memory(9 * BYTES)
    ring = ring_of(9, 3, memory)
    order = list(range(9))
    go_through(ring, order, order[::-1])
    ring.wait()
    memory.lost_writes = True
    with pytest.raises(OffloadError, match="the disk returned other bytes than were written"):
        go_twice(ring, order)
    ring.close()


def test_bytes_of_another_segment_are_noticed() -> None:
    memory = Memory(9 * BYTES)
    ring = ring_of(9, 3, memory)
    order = list(range(9))
    go_through(ring, order, order[::-1])
    ring.wait()
    memory.data = memory.data.view(9, BYTES).roll(1, 0).reshape(-1)
    with pytest.raises(OffloadError, match="came back as"):
        go_through(ring, order[::-1], order)
    ring.close()


def test_all_in_one_piece_of_memory() -> None:
    holder = Resident(segments_of(3), torch.zeros(3 * BYTES, dtype=torch.uint8))
    for _ in range(2):
        for index in range(3):
            with holder.using(index, changes=True) as data:
                data[STAMP : STAMP + 8].view(torch.int64).add_(index)
    with holder.using(2, changes=False) as data:
        assert int(data[STAMP : STAMP + 8].view(torch.int64)) == 4
    assert holder.traffic == (0, 0)


# Segments


def test_segments_cover_every_byte_of_state_once() -> None:
    shapes = [(3 * CUT + 5,), (100, 100), (7,), (2 * CUT,)]
    parameters = [
        (nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)), {"kind": "adamw"}) for shape in shapes
    ]
    optimizer = AdamW([p for p, _ in parameters], weights="master", state_bits=8)

    def layout(p: Tensor, group: object) -> dict[str, Tensor]:
        state = optimizer.fresh_state(torch.empty_like(p, device="meta"), optimizer.param_groups[0])
        return {key: value for key, value in state.items() if isinstance(value, Tensor)}

    segments = cut_into_segments(parameters, layout, lambda p, group: True, 2 << 20)
    assert [s.offset for s in segments] == [sum(t.nbytes for t in segments[:i]) for i in range(len(segments))]
    assert all(s.nbytes % PAGE == 0 and s.nbytes <= 2 << 20 for s in segments)
    for p, _ in parameters:
        own = layout(p, None)
        pieces = [piece for s in segments for piece in s.pieces if piece.parameter is p]
        for key, value in own.items():
            fields = [next(f for f in piece.fields if f.key == key) for piece in pieces]
            if key == "step":
                assert all(f.offset is None for f in fields)
                continue
            ends = [f.first + f.numel for f in fields]
            assert [f.first for f in fields] == [0, *ends[:-1]]
            assert ends[-1] == value.numel()
    for s in segments:
        spans = sorted((f.offset, f.offset + f.numel * f.dtype.itemsize) for p in s.pieces for f in p.moving)
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        assert all(start >= STAMP and end <= s.nbytes - STAMP for start, end in spans)


def test_bytes_on_the_disk_are_those_of_the_model(tmp_path: Path) -> None:
    """As the kernel counts them, over ten steps, within 1 %."""
    weight = nn.Parameter(torch.zeros(24 * CUT, dtype=torch.bfloat16))
    optimizer = AdamW([weight], weights="master")
    offloaded, _ = offload_optimizer(
        optimizer, tier="disk", folder=tmp_path, buffer_size=2 << 20, buffer_count=4, io="threads"
    )
    sizes = [segment.nbytes for segment in offloaded._segments]
    model = step_traffic(sizes, 4)

    def counted() -> tuple[int, int]:
        lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(lines["read_bytes"]), int(lines["write_bytes"])

    weight.grad = torch.ones_like(weight)
    offloaded.step()
    offloaded.wait()
    before, own = counted(), offloaded.traffic
    for _ in range(10):
        weight.grad = torch.ones_like(weight)
        offloaded.step()
        offloaded.wait()
    now, moved = counted(), offloaded.traffic
    assert moved[0] - own[0] == pytest.approx(10 * model.read, rel=0.01)
    assert moved[1] - own[1] == pytest.approx(10 * model.written, rel=0.01)
    assert now[0] - before[0] == pytest.approx(10 * model.read, rel=0.01)
    assert now[1] - before[1] == pytest.approx(10 * model.written, rel=0.01)
    offloaded.close()
