"""The process that holds snapshots and outlives the trainer: `python -m shoestring.checkpoint.keeper RUN`.

It imports no torch and maps nothing: it holds a descriptor, and reads a slot by chunks when it goes to disk.

    trainer attached          answers; writes the newest snapshot to RUN every `persist_every` seconds
    trainer said goodbye      ends at once, and the memory with it
    trainer died              writes the newest snapshot to RUN unless an equal or newer checkpoint is whole
                              there, keeps the memory for `lease` seconds for the next trainer, ends
    SIGTERM                   writes the newest snapshot likewise, ends

A trainer is dead when its process is (pidfd) or its connection has closed: a worker that it forked may hold
the connection open, and a stopped trainer is not a dead one. What went wrong is told to the trainer with the
next answer, and to standard error, which is RUN/keeper.log.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue

from .errors import BrokenCheckpoint
from .memory import Memory
from .messages import Garbled, Kind, Message, peer, receive, send
from .persisting import Persister
from .rendezvous import Listening, listen

FIRST_TRAINER = 30.0  # seconds that a new keeper waits for whoever started it
_RETRY = (2.0, 5.0, 15.0, 60.0)  # seconds between tries to write after the trainer's death
_HANDSHAKE = 1.0


class Keeper:
    """One trainer at a time, one memory, one writer to the disk."""

    def __init__(self, run_dir: Path, listening: Listening) -> None:
        self._listening = listening
        # While it is open its inode is nobody else's: a directory made anew in its place is told from it.
        self._run_dir, self._home = run_dir, os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._selector.register(listening.socket, selectors.EVENT_READ, self._arrival)
        self._wake_here, self._wake_there = socket.socketpair()
        for end in (self._wake_here, self._wake_there):
            end.setblocking(False)
        self._selector.register(self._wake_here, selectors.EVENT_READ, self._woken)
        signal.set_wakeup_fd(self._wake_there.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._told_to_end)
        self._persister = Persister(run_dir, say, self._write_ended)
        self._ended_writes: SimpleQueue[bool] = SimpleQueue()  # put by the writing thread
        self._memory: Memory | None = None
        self._trainer: tuple[socket.socket, int, int] | None = None  # connection, pid, pidfd
        self._settings = Message(Kind.HOLD)
        self._told = ""  # the failure that the trainer knows of
        self._ends_at: float | None = time.monotonic() + FIRST_TRAINER
        self._writes_at: float | None = None
        self._failures = 0
        self._ending = False

    def run(self) -> None:
        """Until there is nothing more to keep."""
        self._loop()
        if not self._ending and self._memory is not None:
            lost = "; what was in it is not on the disk" if self._persister.failure else ""
            say(f"ends, and the memory with it{lost}")

    def _loop(self) -> None:
        while not self._ending:
            now = time.monotonic()
            if self._writes_at is not None and now >= self._writes_at and not self._persister.busy:
                self._write()
            due = [moment for moment in (self._ends_at, self._writes_at) if moment is not None]
            if self._ends_at is not None and now >= self._ends_at and not self._persister.busy:
                break
            # While one is being written its end wakes us.
            timeout = None if self._persister.busy or not due else max(0.0, min(due) - now)
            for key, _ in self._selector.select(timeout):
                key.data()

    # What happens

    def _arrival(self) -> None:
        connection, _ = self._listening.socket.accept()
        pid, uid = peer(connection)
        connection.settimeout(_HANDSHAKE)
        try:
            if uid != os.getuid():
                raise Garbled(f"a connection of user {uid}")
            message, fd = receive(connection)
            if fd is not None:
                os.close(fd)
            if message.kind is Kind.LOOK:
                self._look_at_home()
                send(connection, Message(Kind.WELCOME), self._memory.fd if self._memory else None)
                connection.close()
                return
            if message.kind is not Kind.HELLO:
                raise Garbled(f"{message.kind.name} before HELLO")
            if self._trainer is not None and not _is_dead(self._trainer[2]):
                send(connection, Message(Kind.BUSY, pid=self._trainer[1]))
                connection.close()
                return
            self._trainer_died()
            self._look_at_home()
            pidfd = os.pidfd_open(pid)
            send(connection, self._status(Kind.WELCOME), self._memory.fd if self._memory else None)
        except (Garbled, EOFError, OSError) as error:
            say(f"a connection is refused: {error or 'closed before it said anything'}")
            connection.close()
            return
        self._trainer = (connection, pid, pidfd)
        self._ends_at = None
        self._selector.register(connection, selectors.EVENT_READ, partial(self._message, connection))
        self._selector.register(pidfd, selectors.EVENT_READ, partial(self._process_ended, pidfd))

    def _message(self, connection: socket.socket) -> None:
        if self._trainer is None or self._trainer[0] is not connection:
            return  # an event of the same round has closed it
        try:
            message, fd = receive(connection)
            if fd is not None and message.kind is not Kind.HOLD:
                os.close(fd)
            match message.kind:
                case Kind.BEAT:
                    answer = self._status(Kind.STATUS)
                case Kind.HOLD:
                    answer = self._hold(message, fd)
                case Kind.FORGET:
                    self._drop()
                    answer = Message(Kind.DONE)
                case Kind.GOODBYE:
                    self._ending = True
                    self._drop()
                    answer = Message(Kind.DONE)
                case other:
                    raise Garbled(f"{other.name} from a trainer")
            send(connection, answer)
        except Garbled as error:
            say(f"the trainer's connection is closed: {error}")
            self._trainer_died()
        except (EOFError, OSError):
            self._trainer_died()

    def _process_ended(self, pidfd: int) -> None:
        if self._trainer is not None and self._trainer[2] == pidfd and _is_dead(pidfd):
            self._trainer_died()

    def _trainer_died(self) -> None:
        if self._trainer is None:
            return
        connection, pid, pidfd = self._trainer
        self._selector.unregister(connection)
        self._selector.unregister(pidfd)
        connection.close()
        os.close(pidfd)
        self._trainer = None
        if self._memory is None:
            self._ends_at = time.monotonic()
            return
        say(f"the trainer (process {pid}) is gone; the memory is kept for {self._settings.lease:.0f} s")
        self._ends_at = time.monotonic() + self._settings.lease
        self._writes_at = time.monotonic()
        self._failures = 0

    def _told_to_end(self, *_: object) -> None:
        self._ends_at = time.monotonic()
        self._writes_at = time.monotonic()

    def _woken(self) -> None:
        """By a signal, or because a write has ended."""
        self._wake_here.recv(4096)
        if self._ended_writes.empty():
            return
        failed = self._ended_writes.get()
        if failed and self._memory is not None and self._trainer is None and self._ends_at is not None:
            wait = _RETRY[min(self._failures, len(_RETRY) - 1)]
            self._failures += 1
            self._writes_at = min(time.monotonic() + wait, self._ends_at)
            if self._ends_at <= time.monotonic():
                self._writes_at = None

    # What it does

    def _hold(self, message: Message, fd: int | None) -> Message:
        if fd is not None:
            try:
                memory = Memory.adopt(fd)
            except BrokenCheckpoint as error:
                return Message(Kind.REFUSED, str(error))
            self._drop()
            self._memory = memory
        if self._memory is None:
            return Message(Kind.REFUSED, "there is no memory to hold")
        self._settings = message
        self._schedule()
        return Message(Kind.DONE)

    def _drop(self) -> None:
        if self._memory is not None:
            if not self._persister.stop(5.0):
                os._exit(0 if self._ending else 1)  # a disk that hangs: nothing more can be done here
            self._memory.close()
            self._memory = None
        self._persister.persisted = (0, -1)
        self._writes_at = None

    def _look_at_home(self) -> None:
        """A snapshot of a run whose directory was deleted is nobody's, whatever is in its place now."""
        try:
            same = os.path.samestat(os.fstat(self._home), os.stat(self._run_dir))
        except FileNotFoundError:
            same = False
        if not same and self._memory is not None:
            say("the run directory was deleted: so is the memory")
            self._drop()
            if self._trainer is None and self._ends_at is not None:
                self._ends_at = time.monotonic()
        if not same and self._run_dir.is_dir():
            os.close(self._home)
            self._home = os.open(self._run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def _write(self) -> None:
        self._look_at_home()
        if self._memory is None:
            self._writes_at = None
            return
        living = self._trainer is not None
        self._persister.start(self._memory, self._settings.persist_rate if living else 0.0, look=not living)
        if self._trainer is not None:
            self._schedule()
        else:
            self._writes_at = None

    def _schedule(self) -> None:
        every = self._settings.persist_every
        self._writes_at = time.monotonic() + every if every else None

    def _status(self, kind: Kind) -> Message:
        failure = self._persister.failure
        # Once each: the next one that is the same is no news.
        news = failure if kind is Kind.WELCOME or failure != self._told else ""
        self._told = failure
        generation, step = self._persister.persisted
        return Message(kind, news, pid=os.getpid(), step=step, generation=generation)

    def _write_ended(self) -> None:
        self._ended_writes.put(bool(self._persister.failure))
        with suppress(BlockingIOError):  # full of such bytes: it will wake
            self._wake_there.send(b"\0")


def say(line: str) -> None:
    """One line to standard error."""
    with suppress(OSError):  # the disk of the log is full or gone: there is nobody else to tell
        print(time.strftime("%Y-%m-%d %H:%M:%S"), line, file=sys.stderr, flush=True)


def _is_dead(pidfd: int) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(pidfd, selectors.EVENT_READ)
        return bool(selector.select(0))


def main(arguments: list[str]) -> int:
    """Returns 0 when its work is done, 3 when the directory has a keeper already."""
    (run_dir,) = arguments
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.umask(0o077)
    listening = listen(Path(run_dir))
    print("ready" if listening else "taken", flush=True)
    if listening is None:
        return 3
    # Whoever started it waits for the end of this pipe.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
    try:
        Keeper(Path(run_dir), listening).run()
    finally:
        listening.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
