"""The layout in memory against an independent reading of it, and every kind of damage to it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import struct
import subprocess
import sys
from collections.abc import Iterator

import pytest
import xxhash
from shoestring.checkpoint.errors import BrokenCheckpoint
from shoestring.checkpoint.memory import Memory
from shoestring.checkpoint.slot_writer import SlotWriter
from shoestring.checkpoint.slots import CONSTANT, Geometry, chunks, slot_bytes

MIB = 1 << 20
NAMES = {"model.safetensors": 5 * MIB + 3, "trainer.json": 11, "empty.bin": 0}


def content(name: str, generation: int) -> bytes:
    return random.Random(f"{name} {generation}").randbytes(NAMES[name])


def write(memory: Memory, generation: int, index: int | None = None, constant: str = "") -> int:
    with memory.claim() as claimed:
        assert claimed is not None
        index = claimed if index is None else index
        writer = SlotWriter(memory.view(), memory.geometry, index)
        for name in NAMES:
            writer.begin_file(name, NAMES[name])
            writer.write(content(name, generation))
        writer.publish(generation=generation, step=10 * generation, constant=constant)
    return index


@pytest.fixture
def memory() -> Iterator[Memory]:
    memory = Memory.create(Geometry(2, slot_bytes(NAMES)))
    write(memory, 1)
    write(memory, 2)
    yield memory
    memory.close()


def reference(data: bytes, start: int) -> tuple[dict[str, int], dict[str, bytes]]:
    """The layout, read once more from its description: header fields, and files by name."""
    page = 65536
    body, checksum = data[start : start + 64], data[start + 64 : start + 80]
    assert xxhash.xxh3_128(body).digest() == checksum
    magic, version, index, generation, step, length, text = struct.unpack("<8sIiQQQQ", body[:48])
    assert (magic, version) == (b"SHOESLOT", 1)
    region = data[start + page : start + page + length]
    digests = [
        xxhash.xxh3_128(region[first : first + 4194304]).digest() for first in range(0, length, 4194304)
    ]
    end = start + page + length
    table = data[end : end + text + 16 * len(digests)]
    assert table[text:] == b"".join(digests)
    assert xxhash.xxh3_128(table).digest() == body[48:]
    files = {}
    for name, (offset, count, _) in json.loads(table[:text])["files"].items():
        assert offset % 64 == 0
        files[name] = region[offset : offset + count]
    return {"index": index, "generation": generation, "step": step}, files


def test_the_bytes_are_those_of_the_description(memory: Memory) -> None:
    data = bytes(memory.view())
    assert len(data) == 65536 + 2 * memory.geometry.slot_bytes
    for index, generation in ((0, 1), (1, 2)):
        header, files = reference(data, 65536 + index * memory.geometry.slot_bytes)
        assert header == {"index": index, "generation": generation, "step": 10 * generation}
        assert files == {name: content(name, generation) for name in NAMES}


def test_what_is_read_is_what_was_written_in_any_range(memory: Memory) -> None:
    slot, _ = memory.read(1)
    for name, extent in slot.files.items():
        data = b"".join(map(bytes, chunks(memory.fd, slot, extent.offset, extent.offset + extent.bytes)))
        assert data == content(name, 2)
    whole = b"".join(map(bytes, chunks(memory.fd, slot)))
    rng = random.Random(0)
    for _ in range(30):
        first = rng.randrange(len(whole))
        last = rng.randrange(first, len(whole) + 1)
        assert b"".join(map(bytes, chunks(memory.fd, slot, first, last))) == whole[first:last]


def test_a_slot_of_the_size_computed_holds_its_files_and_no_more(memory: Memory) -> None:
    writer = SlotWriter(memory.view(), memory.geometry, 0)
    with pytest.raises(ValueError, match="does not fit into a slot"):
        writer.begin_file("model.safetensors", memory.geometry.slot_bytes)
    writer = SlotWriter(memory.view(), memory.geometry, 0)
    writer.begin_file("model.safetensors", 10)
    with pytest.raises(ValueError, match="do not fit into a slot"):
        writer.write(bytes(memory.geometry.slot_bytes))


def is_broken(memory: Memory, index: int = 1) -> bool:
    try:
        memory.read(index)
    except BrokenCheckpoint:
        return True
    return False


def places(memory: Memory) -> list[int]:
    """Offsets in the file of slot 1: header, table, and of its data every edge of a chunk and some more."""
    start = memory.geometry.start(1)
    header = memory.headers()[0]
    table = start + 65536 + header.data_bytes
    edges = [0, 1, 4 * MIB - 1, 4 * MIB, header.data_bytes - 1]
    edges += random.Random(1).sample(range(header.data_bytes), 60)
    return [
        *range(start, start + 80),
        *range(table, table + header.text_bytes + 32),
        *(start + 65536 + edge for edge in edges),
    ]


def test_every_flipped_bit_is_found(memory: Memory) -> None:
    assert not is_broken(memory)
    for place in places(memory):
        whole = os.pread(memory.fd, 1, place)
        bits = range(8) if place < memory.geometry.start(1) + 80 else [place % 8]
        for bit in bits:
            os.pwrite(memory.fd, bytes([whole[0] ^ 1 << bit]), place)
            assert is_broken(memory), (place, bit)
        os.pwrite(memory.fd, whole, place)
    assert not is_broken(memory)


def test_every_flipped_bit_of_the_first_page_is_found(memory: Memory) -> None:
    for place in range(56):
        whole = os.pread(memory.fd, 1, place)
        os.pwrite(memory.fd, bytes([whole[0] ^ 1 << place % 8]), place)
        with pytest.raises(BrokenCheckpoint):
            Memory.adopt(os.dup(memory.fd))
        os.pwrite(memory.fd, whole, place)
    assert Memory.adopt(os.dup(memory.fd)).geometry == memory.geometry


def test_chunks_slots_and_tables_of_another_place_or_generation_are_found(memory: Memory) -> None:
    size, first, second = memory.geometry.slot_bytes, memory.geometry.start(0), memory.geometry.start(1)
    view = memory.view()
    before = bytes(view)
    page = 65536
    tail = memory.headers()[0].data_bytes - 4 * MIB

    def swap(one: int, two: int, count: int) -> None:
        view[one : one + count], view[two : two + count] = (
            bytes(view[two : two + count]),
            bytes(view[one : one + count]),
        )

    swap(second + page, second + page + 4 * MIB, tail)  # chunks of one slot
    assert is_broken(memory)
    view[:] = before
    swap(first + page, second + page, 4 * MIB)  # the same chunk of two generations
    assert is_broken(memory, 0)
    assert is_broken(memory, 1)
    view[:] = before
    swap(first, second, size)  # whole slots
    assert memory.headers() == []
    view[:] = before
    swap(first, second, page)  # headers
    assert memory.headers() == []
    view[:] = before
    table = second + page + memory.headers()[0].data_bytes
    view[table : table + 200] = before[table - size : table - size + 200]
    assert is_broken(memory)
    view[:] = before
    view[second + page + page : second + 2 * page + page] = bytes(page)  # a page of zeros
    assert is_broken(memory)


def test_damage_of_the_newest_leaves_the_one_before(memory: Memory) -> None:
    view = memory.view()
    view[memory.geometry.start(1) + 65536 + 77] ^= 1
    lines: list[str] = []
    found = memory.newest(lines.append)
    assert found is not None
    assert found[0].header.generation == 1
    assert lines == [
        "the snapshot of step 20 in memory is skipped: chunk 0 of its data does not match its checksum"
    ]
    view[memory.geometry.start(0) + 5] ^= 1
    assert memory.newest(lines.append) is None


def test_a_constant_part_of_another_snapshot_is_found() -> None:
    memory = Memory.create(Geometry(2, slot_bytes(NAMES), slot_bytes({"base": 5})))
    writer = SlotWriter(memory.view(), memory.geometry, CONSTANT)
    writer.begin_file("base", 5, "00")
    writer.write(b"12345")
    identity = writer.publish(generation=1, step=0).table_digest.hex()
    index = write(memory, 1, constant=identity)
    _, constant = memory.read(index)
    assert constant is not None
    assert constant.files["base"].bytes == 5
    writer = SlotWriter(memory.view(), memory.geometry, CONSTANT)
    writer.begin_file("base", 5, "00")
    writer.write(b"12346")
    writer.publish(generation=1, step=0)
    with pytest.raises(BrokenCheckpoint, match="is not the one that it was taken with"):
        memory.read(index)
    memory.close()


def test_the_size_is_sealed_and_other_files_are_refused(memory: Memory) -> None:
    for size in (100, memory.geometry.total + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(memory.fd, size)
    for seal in (0, fcntl.F_SEAL_GROW, fcntl.F_SEAL_SHRINK):
        fd = os.memfd_create("other", os.MFD_ALLOW_SEALING)
        os.write(fd, bytes(memory.view()))
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seal)
        with pytest.raises(BrokenCheckpoint, match="not sealed"):
            Memory.adopt(fd)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    fd = os.memfd_create("cut", os.MFD_ALLOW_SEALING)
    os.write(fd, bytes(memory.view())[:-65536])
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    with pytest.raises(BrokenCheckpoint, match="does not describe a file of its size"):
        Memory.adopt(fd)
    with pytest.raises(BrokenCheckpoint, match="is not a memory file"):
        Memory.adopt(os.open(os.devnull, os.O_RDONLY))


def claimed(memory: Memory) -> int | None:
    with memory.claim() as index:
        return index


def test_the_newest_is_never_claimed_nor_one_that_is_read() -> None:
    memory = Memory.create(Geometry(3, slot_bytes(NAMES)))
    order = [write(memory, generation) for generation in range(1, 8)]
    assert order == [0, 1, 2, 0, 1, 2, 0]
    assert claimed(memory) == 1
    memory.pin(1)
    assert claimed(memory) == 2
    memory.discard(2)
    memory.unpin(1)
    assert claimed(memory) == 2, "an invalid one before the oldest"
    memory.pin(1)
    memory.pin(2)
    assert claimed(memory) is None
    memory.close()


def test_a_lock_of_another_process_keeps_a_slot_and_ends_with_it(memory: Memory) -> None:
    code = (
        "import fcntl, sys\n"
        "fd, start, size = map(int, sys.argv[1:])\n"
        "fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB, size, start)\n"
        "print('locked', flush=True)\n"
        "sys.stdin.read()\n"
    )
    place = [str(memory.fd), str(memory.geometry.start(0)), str(memory.geometry.slot_bytes)]
    with subprocess.Popen(
        [sys.executable, "-c", code, *place],
        pass_fds=[memory.fd],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        assert claimed(memory) is None
        assert memory.lock(0, exclusive=False)
        assert not memory.lock(0, exclusive=True)
        memory.unlock(0)
        other.kill()
        other.wait()
    assert claimed(memory) == 0


def test_every_page_is_reserved_at_once(memory: Memory) -> None:
    fresh = Memory.create(Geometry(2, 1 << 20))
    assert os.fstat(fresh.fd).st_blocks * 512 >= fresh.geometry.total
    fresh.close()


def test_a_system_that_gives_no_more_memory_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(os.listdir("/proc/self/fd"))

    def refuse(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OSError, match="No space left"):
        Memory.create(Geometry(2, 1 << 20))
    assert len(os.listdir("/proc/self/fd")) == before
