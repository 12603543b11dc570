"""Reading what a keeper holds without being its trainer, and ending a keeper that nobody needs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from .errors import BrokenCheckpoint
from .memory import Memory
from .messages import Garbled, Kind, Message, peer, receive, send
from .rendezvous import Unsafe, connect

PATIENCE = 10.0  # seconds for an answer


def look(run_dir: Path, warn: Callable[[str], None]) -> Memory | None:
    """The memory that the keeper of `run_dir` holds, None where there is none.

    For reading: lock a slot (`Memory.lock`, shared) while it is read, since its trainer may be at work. When
    it is closed, so are all locks that this process has on that memory: a trainer closes it before its own
    snapshots begin.
    """
    try:
        connection = connect(run_dir, PATIENCE)
        if connection is None:
            return None
        with connection:
            _, uid = peer(connection)
            if uid != os.getuid():
                raise Unsafe(f"the keeper's socket belongs to user {uid}")
            send(connection, Message(Kind.LOOK))
            _, fd = receive(connection)
            return None if fd is None else Memory.adopt(fd)
    except (OSError, Garbled, EOFError, Unsafe, BrokenCheckpoint) as error:
        warn(f"{run_dir}: what is kept in memory cannot be read: {error or 'the connection was closed'}")
        return None


def dismiss(run_dir: Path) -> bool:
    """End the keeper of `run_dir`, and its memory; False when there is none, or it has a trainer."""
    try:
        connection = connect(run_dir, PATIENCE)
        if connection is None:
            return False
        with connection:
            send(connection, Message(Kind.HELLO))
            answer, fd = receive(connection)
            if fd is not None:
                os.close(fd)
            if answer.kind is not Kind.WELCOME:
                return False
            send(connection, Message(Kind.GOODBYE))
            receive(connection)
            return True
    except (OSError, Garbled, EOFError, Unsafe):
        return False  # it is ending, or is not ours to end
