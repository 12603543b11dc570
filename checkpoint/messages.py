"""What trainer and keeper say to each other: messages of one fixed size, a descriptor with some of them.

Over a SOCK_SEQPACKET unix socket, which keeps messages apart. Nothing is ever parsed but these fields.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from dataclasses import dataclass
from enum import IntEnum

_MAGIC = b"SHK1"  # with the version of the protocol
_MESSAGE = struct.Struct("<4sBxHiqqddd400s")
_TEXT = 400


class Kind(IntEnum):
    """Who says it, and what else counts in the message."""

    HELLO = 1  # trainer, first
    WELCOME = 2  # keeper: pid, `step` last persisted (-1: none), `text` of a failure; the memory, if any
    BUSY = 3  # keeper: `pid` of the trainer that it already has
    HOLD = 4  # trainer: lease, persist_every, persist_rate; the memory, unless the keeper has it already
    DONE = 5  # keeper: to HOLD and FORGET
    REFUSED = 6  # keeper: `text` says why
    BEAT = 7  # trainer
    STATUS = 8  # keeper: as WELCOME, without a descriptor
    FORGET = 9  # trainer: the memory is worth nothing
    GOODBYE = 10  # trainer: finished, nothing is to be kept
    LOOK = 11  # somebody who only reads, first: answered by WELCOME, then the connection is closed


@dataclass(frozen=True)
class Message:
    """One message. Seconds, and bytes a second; 0 for persist_every and persist_rate is none."""

    kind: Kind
    text: str = ""
    pid: int = 0
    step: int = -1
    generation: int = 0
    lease: float = 0.0
    persist_every: float = 0.0
    persist_rate: float = 0.0


class Garbled(Exception):
    """What arrived is no message of this protocol's version."""


def send(connection: socket.socket, message: Message, fd: int | None = None) -> None:
    """OSError (TimeoutError too) when the other side is gone or does not take it."""
    text = message.text.encode()[:_TEXT].decode(errors="ignore").encode()
    data = _MESSAGE.pack(
        _MAGIC,
        message.kind,
        len(text),
        message.pid,
        message.step,
        message.generation,
        message.lease,
        message.persist_every,
        message.persist_rate,
        text,
    )
    rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
    connection.sendmsg([data], rights, socket.MSG_NOSIGNAL)


def receive(connection: socket.socket) -> tuple[Message, int | None]:
    """The next message, and the descriptor that came with it, now the caller's.

    EOFError when the other side has closed, Garbled, OSError (TimeoutError too).
    """
    space = socket.CMSG_SPACE(array.array("i", [0]).itemsize)
    data, ancillary, flags, _ = connection.recvmsg(_MESSAGE.size + 1, space, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    try:
        if not data:
            raise EOFError
        message = _decode(data)
        if len(fds) > 1 or flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
            raise Garbled("more descriptors than a message has")
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return message, fds[0] if fds else None


def peer(connection: socket.socket) -> tuple[int, int]:
    """(pid, uid) of the other side, as the kernel knows them."""
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


def _decode(data: bytes) -> Message:
    if len(data) != _MESSAGE.size:
        raise Garbled(f"a message of {len(data)} bytes")
    magic, kind, length, pid, step, generation, lease, every, rate, text = _MESSAGE.unpack(data)
    if magic != _MAGIC or kind not in set(Kind) or length > _TEXT:
        raise Garbled("not a message of this version")
    words = text[:length].decode(errors="replace")
    return Message(Kind(kind), words, pid, step, generation, lease, every, rate)
