"""The arena: exact bytes, aligned buffers, one registration; and which memory node its pages are on."""

from __future__ import annotations

import gc
import mmap
import os
import platform
import re
import resource
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from shoestring.offload import numa
from shoestring.offload.arena import Arena, pin_refusal
from shoestring.offload.numa import Node

PAGE = 4096
MIB = 1 << 20


def resident(address: int, nbytes: int) -> int:
    """Resident bytes of the mappings that [address, address + nbytes) lies in, from the kernel's own list."""
    total = 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) < address + nbytes and address < int(span[2], 16)
        elif inside and (size := re.match(r"Rss:\s+(\d+) kB", line)):
            total += int(size[1]) << 10
    return total


def forked(call: Callable[[], str]) -> str:
    """What `call` returns in a child process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, call().encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, encoding="utf-8") as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return text


@pytest.mark.parametrize("nbytes", [PAGE, 3 * MIB + PAGE, 48 * MIB, 100 * MIB + 12345])
def test_it_takes_the_bytes_asked_for_and_no_more(nbytes: int) -> None:
    """129.5 MiB become 256 in an allocator of powers of two; here the last page is the only rounding."""
    with Arena(nbytes) as arena:
        assert arena.nbytes == -(-nbytes // PAGE) * PAGE
        assert resident(arena.address, arena.nbytes) == arena.nbytes
        assert arena.address % (2 * MIB) == 0
        assert arena.lines == []


def test_buffers_follow_one_another() -> None:
    lengths = (1, PAGE, PAGE + 1, 0, 10)
    with Arena(16 * PAGE) as arena:
        taken = [arena.take(nbytes) for nbytes in lengths]
        starts = [0, PAGE, 2 * PAGE, 4 * PAGE, 4 * PAGE]
        for tensor, nbytes, start in zip(taken, lengths, starts, strict=True):
            assert tensor.dtype == torch.uint8
            assert tensor.shape == (nbytes,)
            if nbytes:
                assert tensor.data_ptr() == arena.address + start
        for value, tensor in enumerate(taken):
            tensor.fill_(value + 1)
        for value, tensor in enumerate(taken):
            assert (tensor == value + 1).all()
        rest = arena.take(11 * PAGE)
        assert (rest == 0).all()
        with pytest.raises(ValueError, match=f"1 bytes do not fit: 0 of {16 * PAGE} are left"):
            arena.take(1)


def test_a_buffer_that_does_not_fit() -> None:
    with Arena(2 * PAGE) as arena:
        arena.take(PAGE)
        for nbytes in (PAGE + 1, -1):
            with pytest.raises(ValueError, match=f"do not fit: {PAGE} of {2 * PAGE} are left"):
                arena.take(nbytes)
        arena.take(PAGE)
    with pytest.raises(ValueError, match="closed"):
        arena.take(1)
    with pytest.raises(ValueError, match="at least one byte"):
        Arena(0)


def test_memory_goes_back_when_the_last_buffer_goes() -> None:
    """Not before: a tensor never points at memory that is gone."""
    process = psutil.Process()
    arena = Arena(64 * MIB)
    tensor = arena.take(64 * MIB)
    full = process.memory_info().rss
    arena.close()
    arena.close()
    tensor.fill_(3)
    assert int(tensor[-1]) == 3
    assert process.memory_info().rss > full - 8 * MIB
    del tensor
    gc.collect()
    assert process.memory_info().rss < full - 56 * MIB


def test_no_growth_over_many_arenas() -> None:
    process = psutil.Process()
    for _ in range(20):
        Arena(8 * MIB).close()
    before = process.memory_info().rss
    for _ in range(200):
        Arena(8 * MIB).close()
    assert process.memory_info().rss - before < MIB


def test_a_forked_process_does_not_inherit_it() -> None:
    """Else each page that is written while a data loader lives would be there twice."""
    with Arena(4 * MIB) as arena:
        assert resident(arena.address, arena.nbytes) == 4 * MIB
        assert forked(lambda: str(resident(arena.address, arena.nbytes))) == "0"
        arena.take(4 * MIB).fill_(1)


# Pinned memory


class Cuda:
    """Stands for the CUDA runtime: records calls, answers `code` to a registration."""

    def __init__(self, code: int) -> None:
        self.code = code
        self.calls: list[tuple[object, ...]] = []

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.calls.append(("register", address, nbytes, flags))
        return self.code

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append(("unregister", address, resident(address, PAGE) > 0))
        return 0


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Cuda]:
    def make(code: int) -> Cuda:
        fake = Cuda(code)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
        return fake

    return make


@pytest.mark.parametrize("ending", ["close", "drop"])
def test_one_registration_of_the_whole_and_its_end(cuda: Callable[[int], Cuda], ending: str) -> None:
    fake = cuda(0)
    arena = Arena(5 * MIB + 1, pin=True)
    address = arena.address
    assert arena.pinned
    assert arena.lines == []
    for _ in range(4):
        arena.take(MIB)
    assert fake.calls == [("register", address, 5 * MIB + PAGE, 0)]
    if ending == "close":
        arena.close()
        arena.close()
        assert not arena.pinned
    del arena
    gc.collect()
    assert fake.calls[1:] == [("unregister", address, True)]


def test_a_registration_that_is_refused(cuda: Callable[[int], Cuda], monkeypatch: pytest.MonkeyPatch) -> None:
    cleared: list[bool] = []
    monkeypatch.setattr("shoestring.offload.arena._clear_last_error", lambda: cleared.append(True))
    fake = cuda(2)
    arena = Arena(MIB, pin=True)
    assert cleared == [True]
    assert not arena.pinned
    (line,) = arena.lines
    assert line.startswith("buffers are not pinned")
    arena.take(MIB)
    arena.close()
    assert len(fake.calls) == 1


def test_pinned_only_where_there_is_cuda() -> None:
    with Arena(MIB, pin=True) as arena:
        assert arena.pinned == torch.cuda.is_available()
        assert arena.take(PAGE).is_pinned() == arena.pinned
        assert arena.pinned or arena.lines == ["buffers are not pinned: there is no CUDA device"]


def test_the_limit_on_locked_memory_is_named() -> None:
    def under_a_limit() -> str:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
        return "\n".join(pin_refusal(nbytes, 2) for nbytes in (1 << 20, 65536))

    low, enough = forked(under_a_limit).splitlines()
    assert "1,048,576 bytes are more than may be locked (65,536)" in low
    assert "`ulimit -l 1024`" in low
    assert "ulimit" not in enough
    assert enough.endswith("cudaHostRegister of 65,536 bytes answered 2")


def test_an_unlimited_process_is_not_told_to_raise_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    assert "ulimit" not in pin_refusal(1 << 40, 2)


# Memory nodes

GIB = 1 << 30
TWO = [Node(0, frozenset({0, 1}), 8 * GIB, 4 * GIB), Node(1, frozenset({2, 3}), 8 * GIB, 6 * GIB)]
CXL = Node(2, frozenset(), 32 * GIB, 31 * GIB)


def test_nodes_are_read_from_the_system(tmp_path: Path) -> None:
    for number, cpus, total, free in ((0, "0-1,4\n", 100, 50), (2, "\n", 300, 299), (10, "2-3\n", 0, 0)):
        folder = tmp_path / f"node{number}"
        folder.mkdir()
        (folder / "cpulist").write_text(cpus)
        (folder / "meminfo").write_text(
            f"Node {number} MemTotal:       {total} kB\nNode {number} MemFree:        {free} kB\n"
            f"Node {number} MemUsed:        {total - free} kB\n"
        )
    (tmp_path / "power").mkdir()
    assert numa.nodes(tmp_path) == [
        Node(0, frozenset({0, 1, 4}), 100 << 10, 50 << 10),
        Node(2, frozenset(), 300 << 10, 299 << 10),
    ]
    assert numa.nodes(tmp_path / "none") == []


def test_the_nodes_of_this_machine_add_up() -> None:
    found = numa.nodes()
    if not found:  # then only because the kernel does not tell
        assert not list(Path("/sys/devices/system/node").glob("node[0-9]*"))
        return
    total = sum(node.nbytes for node in found)
    # Less on a virtual machine whose memory has grown since its start: its nodes do not count what was added.
    assert 0 < total < 1.02 * psutil.virtual_memory().total
    assert all(0 < node.free <= node.nbytes for node in found)


@pytest.mark.parametrize(
    ("cpus", "nbytes", "numbers", "text"),
    [
        ({0}, GIB, [0], "on memory node 0"),
        ({1, 2, 3}, GIB, [1], "on memory node 1"),
        ({0, 1, 2, 3}, GIB, [0], "on memory node 0"),
        ({0}, 5 * GIB, [0, 1], "node 0 has 4,294,967,296 bytes free, buffers need 5,368,709,120"),
        ({9}, GIB, [], "nothing is bound"),
    ],
)
def test_local_is_beside_the_processors_and_never_on_cxl(
    cpus: set[int], nbytes: int, numbers: list[int], text: str
) -> None:
    found, line = numa.chosen("local", nbytes, [*TWO, CXL], frozenset(cpus))
    assert found == numbers
    assert text in line
    assert CXL.number not in found


def test_interleave_is_over_all_and_names_those_without_processors() -> None:
    assert numa.chosen("interleave", GIB, TWO, frozenset({0})) == (
        [0, 1],
        "buffers are spread over memory nodes 0, 1",
    )
    found, line = numa.chosen("interleave", GIB, [*TWO, CXL], frozenset({0}))
    assert found == [0, 1, 2]
    assert "of these 2 without processors (CXL), which is slower" in line


@pytest.mark.parametrize("policy", ["local", "interleave"])
def test_one_node_is_left_alone_and_said(policy: numa.Policy) -> None:
    numbers, line = numa.chosen(policy, GIB, TWO[:1], frozenset({0}))
    assert numbers == []
    assert line == f"offload.numa_policy={policy}: this machine has one memory node, so nothing is bound"


def test_an_arena_says_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numa, "nodes", lambda: TWO[:1])
    with Arena(MIB, numa_policy="local") as arena:
        assert arena.lines == [
            "offload.numa_policy=local: this machine has one memory node, so nothing is bound"
        ]


def test_an_arena_is_bound_before_it_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = SimpleNamespace(resident=-1, nbytes=0)

    def mbind(address: int, nbytes: int, mode: int, numbers: list[int]) -> str | None:
        seen.resident, seen.nbytes = resident(address, nbytes), nbytes
        return "mbind: Invalid argument"

    monkeypatch.setattr(numa, "nodes", lambda: TWO)
    monkeypatch.setattr(numa, "mbind", mbind)
    with Arena(4 * MIB, numa_policy="interleave") as arena:
        assert arena.lines == ["offload.numa_policy=interleave is not in force: mbind: Invalid argument"]
        assert arena.take(MIB).sum() == 0
    assert (seen.resident, seen.nbytes) == (0, 4 * MIB)


@pytest.mark.skipif(platform.machine() not in numa._MBIND, reason="number of mbind not known here")
def test_the_system_call_binds() -> None:
    space = mmap.mmap(-1, 4 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = torch.frombuffer(space, dtype=torch.uint8).data_ptr()
    refused = numa.mbind(address, 2 * MIB, 3, [0])
    if refused and "implemented" in refused:
        return  # a kernel without memory policies, and the answer says so
    assert refused is None
    policies = Path("/proc/self/numa_maps")
    if policies.exists():
        (line,) = (one for one in policies.read_text().splitlines() if one.startswith(f"{address:08x} "))
        assert line.split()[1] == "interleave:0"
    assert numa.mbind(address, 2 * MIB, 2, [63]) == "mbind: Invalid argument"


def test_lists_of_the_kernel() -> None:
    assert numa.parse_list("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11}
    assert numa.parse_list("\n") == frozenset()
