"""On which memory node a range of addresses gets its pages: mbind(2), before the pages are touched.

A node without processors is a memory expander (CXL): several times slower for an optimizer that reads and
writes all of its state (arXiv:2507.03305), so "local" leaves it out and "interleave" says that it is in.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Policy = Literal["default", "local", "interleave"]

_SYSTEM = Path("/sys/devices/system/node")
_MBIND = {"x86_64": 237, "aarch64": 235}  # numbers of the system call
_BIND, _INTERLEAVE = 2, 3  # MPOL_* of linux/mempolicy.h


@dataclass(frozen=True)
class Node:
    """A memory node: its number, the processors beside it, its bytes in all and free."""

    number: int
    cpus: frozenset[int]
    nbytes: int
    free: int


def nodes(system: Path = _SYSTEM) -> list[Node]:
    """The nodes of this machine that have memory, by number; empty where the kernel does not tell."""
    numbers = sorted(int(path.name[4:]) for path in system.glob("node[0-9]*") if path.name[4:].isdigit())
    found = [_node(number, system / f"node{number}") for number in numbers]
    return [node for node in found if node.nbytes]


def _node(number: int, folder: Path) -> Node:
    text = (folder / "meminfo").read_text()
    kilobytes = dict(re.findall(r"(MemTotal|MemFree):\s+(\d+) kB", text))
    total, free = (int(kilobytes.get(name, 0)) << 10 for name in ("MemTotal", "MemFree"))
    return Node(number, parse_list((folder / "cpulist").read_text()), total, free)


def parse_list(text: str) -> frozenset[int]:
    """The numbers in the kernel's list format: "0-3,8" is 0, 1, 2, 3, 8."""
    numbers: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            numbers.update(range(int(first), int(last or first) + 1))
    return frozenset(numbers)


def chosen(policy: Policy, nbytes: int, nodes: Sequence[Node], cpus: frozenset[int]) -> tuple[list[int], str]:
    """The nodes for nbytes used by a process on `cpus`, and a line on why; none: leave it to the kernel."""
    if len(nodes) < 2:
        return [], f"offload.numa_policy={policy}: this machine has one memory node, so nothing is bound"
    if policy == "interleave":
        slow = [str(node.number) for node in nodes if not node.cpus]
        also = f"; of these {', '.join(slow)} without processors (CXL), which is slower" if slow else ""
        numbers = [node.number for node in nodes]
        return numbers, f"buffers are spread over memory nodes {_listed(numbers)}{also}"
    computing = [node for node in nodes if node.cpus & cpus]
    if not computing:
        return [], "offload.numa_policy=local: no memory node has this process's processors; nothing is bound"
    nearest = max(computing, key=lambda node: (len(node.cpus & cpus), -node.number))
    if nearest.free >= nbytes:
        return [nearest.number], f"buffers are on memory node {nearest.number}, beside the processors in use"
    beside = [node.number for node in nodes if node.cpus]
    return beside, (
        f"memory node {nearest.number} has {nearest.free:,} bytes free, buffers need {nbytes:,}: "
        f"they may lie on nodes {_listed(beside)}"
    )


def bind(address: int, nbytes: int, policy: Policy, nodes: Sequence[Node]) -> list[str]:
    """Bind the pages of [address, address + nbytes), still untouched, by `policy`; lines on what was done.

    "default" leaves it to the kernel and says nothing. A refusal of the kernel is a line, no error: the
    memory is usable all the same.
    """
    if policy == "default":
        return []
    numbers, line = chosen(policy, nbytes, nodes, frozenset(os.sched_getaffinity(0)))
    if not numbers:
        return [line]
    refused = mbind(address, nbytes, _INTERLEAVE if policy == "interleave" else _BIND, numbers)
    return [line if refused is None else f"offload.numa_policy={policy} is not in force: {refused}"]


def mbind(address: int, nbytes: int, mode: int, numbers: Sequence[int]) -> str | None:
    """The system call; None when it succeeded, else why not."""
    call = _MBIND.get(platform.machine())
    if call is None:
        return f"not known how to bind memory on {platform.machine()}"
    words = max(numbers) // 64 + 1
    mask = (ctypes.c_uint64 * words)()
    for number in numbers:
        mask[number // 64] |= 1 << number % 64
    libc = ctypes.CDLL(None, use_errno=True)
    # The kernel takes one bit less than it is told (mbind(2), maxnode).
    answer = libc.syscall(
        ctypes.c_long(call),
        ctypes.c_void_p(address),
        ctypes.c_ulong(nbytes),
        ctypes.c_long(mode),
        mask,
        ctypes.c_ulong(words * 64 + 1),
        ctypes.c_ulong(0),
    )
    return None if answer == 0 else f"mbind: {os.strerror(ctypes.get_errno())}"


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
