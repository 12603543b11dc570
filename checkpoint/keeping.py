"""The trainer's side of the keeper: start it or find it, hand the memory over, notice when it is gone.

Nothing here ever holds the trainer up: all that waits, waits with a limit, and after the start in a thread of
its own. A keeper that dies or does not answer costs one warning; a new one is started and gets the memory,
which the trainer still has.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ..recipes.errors import ShoestringError, UserError
from .errors import BrokenCheckpoint
from .keeper_process import LOG, memory_of, remove_empty_log, start_keeper, wait_readable
from .keeper_settings import KeeperSettings
from .memory import Memory
from .messages import Garbled, Kind, Message, peer, receive, send
from .rendezvous import Unsafe, connect

TAKEOVER = 10.0  # seconds for a killed trainer to be gone altogether: it may have much memory to give back
_RETRY_AT_MOST = 60.0  # seconds between tries to start one again


class Keeping:
    """A connection to the keeper of `run_dir` that mends itself. `memory`: what the keeper held, or None.

    Raises UserError when another trainer has it, or none can be started.
    """

    def __init__(self, run_dir: Path, settings: KeeperSettings, warn: Callable[[str], None]) -> None:
        self.memory: Memory | None = None
        self.persisted_step = -1  # newest that the keeper has written, as far as we were told
        self._run_dir, self._settings, self._warn = Path(os.path.realpath(run_dir)), settings, warn
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._pid, self._pidfd = 0, -1
        self._trouble = ""  # why the last try to start another failed
        self._exchange = threading.Lock()
        self._closed = threading.Event()
        self._owner = os.getpid()
        try:
            self.memory, has_it = self._attach()
            if self.memory is not None:
                self._hand_over(None if has_it else self.memory)
        except (OSError, Garbled, EOFError, Unsafe) as error:
            raise UserError(
                f"{run_dir}: the process that keeps snapshots in memory cannot be reached: "
                f"{error or 'it closed the connection'}.\n"
                f"What it said is in {self._run_dir / LOG}. End it: pkill -f 'checkpoint.keeper {run_dir}'; "
                "or train without snapshots in memory."
            ) from error
        self._beating = threading.Thread(target=self._beat, name="keeper heartbeat", daemon=True)
        self._beating.start()
        _LIVING.add(self)

    @property
    def keeper_pid(self) -> int:
        """Process id of the keeper; 0 while there is none."""
        return self._pid if self._connection is not None else 0

    def hold(self, memory: Memory) -> None:
        """Let the keeper hold `memory` from now on. One it had before is dropped.

        Raises ShoestringError when it refuses.
        """
        with self._exchange:
            self.memory = memory
            if self._connection is not None:
                try:
                    self._hand_over(memory)
                except (OSError, Garbled, EOFError) as error:
                    self._lost(error)

    def forget(self) -> None:
        """The keeper drops what it holds: a fresh start."""
        with self._exchange:
            self.memory = None
            try:
                self._ask(Message(Kind.FORGET))
            except (OSError, Garbled, EOFError) as error:
                self._lost(error)  # and the memory with it, which is what was wanted

    def goodbye(self) -> None:
        """The training is finished: the keeper ends at once, and its memory is gone."""
        self._leave(Message(Kind.GOODBYE))

    def leave(self) -> None:
        """As if this process died: the keeper writes the newest snapshot to the disk, keeps the memory."""
        self._leave(None)

    def _leave(self, last: Message | None) -> None:
        if os.getpid() != self._owner or self._closed.is_set():
            return
        self._closed.set()
        with self._exchange:
            try:
                if last is not None and self._connection is not None:
                    self._ask(last)
            except (OSError, Garbled, EOFError):
                self._kill()  # it does not listen, and nothing of it is wanted
            self._disconnect()
        self._beating.join(self._settings.patience)
        if last is not None:
            self._reap()
            remove_empty_log(self._run_dir)

    # Heartbeat

    def _beat(self) -> None:
        wait = self._settings.heartbeat
        while not self._closed.wait(wait):
            with self._exchange:
                if self._closed.is_set():
                    return
                if self._connection is not None:
                    wait = self._look()
                else:
                    again = self._attach_again()
                    wait = self._settings.heartbeat if again else min(2 * max(wait, 0.5), _RETRY_AT_MOST)

    def _look(self) -> float:
        """Seconds until the next look."""
        try:
            self._heard(self._ask(Message(Kind.BEAT)))
        except (OSError, Garbled, EOFError) as error:
            self._lost(error)
            return 0.0
        return self._settings.heartbeat

    def _lost(self, error: Exception) -> None:
        """One warning; the next round of the heartbeat starts another."""
        what = "does not answer" if isinstance(error, TimeoutError) else "has died"
        self._kill()
        self._disconnect()
        self._reap()
        self._warn(
            f"the process that keeps snapshots in memory {what}: another one is started. Training goes on; "
            "until then a crash costs what came after the last checkpoint on the disk"
        )

    def _attach_again(self) -> bool:
        """Whether there is a keeper again that has the memory; what prevents it is told once."""
        try:
            found, _ = self._attach()
            if found is not None:
                found.close()  # what counts is ours
            if self.memory is not None:
                self._hand_over(self.memory)
        except (OSError, Garbled, EOFError, Unsafe, ShoestringError) as error:
            self._disconnect()
            self._reap()
            if str(error) != self._trouble:
                self._trouble = str(error)
                self._warn(f"no process keeps snapshots in memory, it is tried again: {error}")
            return False
        self._trouble = ""
        return True

    # Conversation

    def _attach(self) -> tuple[Memory | None, bool]:
        """Connect, start one where there is none; returns what was kept, and whether this keeper has it."""
        until = time.monotonic() + TAKEOVER
        late: Exception
        taken: Memory | None = None  # from a keeper that did not answer
        while True:
            try:
                self._connect()
                answer, fd = self._hello()
                if answer.kind is Kind.WELCOME:
                    break
                late = UserError(
                    f"{self._run_dir}: process {answer.pid} is training in this directory.\n"
                    "Wait for it to finish or end it; or set another output_dir."
                )
            except TimeoutError:
                if self._pidfd < 0:
                    raise
                taken = self._take_from_stopped() or taken
                continue
            except (ConnectionError, EOFError, ProcessLookupError) as error:
                late = error  # one that is just ending
            too_late = time.monotonic() > until
            self._disconnect()
            if too_late:
                raise late
            time.sleep(0.05)
        self._heard(answer)
        found = None if fd is None else self._adopt(fd)
        return (found, True) if found is not None else (taken, False)

    def _connect(self) -> None:
        connection = connect(self._run_dir, self._settings.patience) or self._start()
        self._connection = connection
        pid, uid = peer(connection)
        if uid != os.getuid():
            raise Unsafe(f"the keeper's socket belongs to user {uid}")
        self._pid, self._pidfd = pid, os.pidfd_open(pid)

    def _adopt(self, fd: int) -> Memory | None:
        try:
            return Memory.adopt(fd)
        except BrokenCheckpoint as error:
            self._warn(f"the memory that the keeper holds cannot be used: {error}")
            return None

    def _take_from_stopped(self) -> Memory | None:
        """A keeper that does not answer holds what we want: its memory is taken, then it is killed."""
        self._warn("the process that keeps snapshots in memory does not answer: another one is started")
        fd = memory_of(self._pid)
        memory = None if fd is None else self._adopt(fd)
        self._kill()
        self._disconnect()
        return memory

    def _hello(self) -> tuple[Message, int | None]:
        assert self._connection is not None
        try:
            send(self._connection, Message(Kind.HELLO))
            return receive(self._connection)
        except TimeoutError:
            # Stopped, perhaps; it has what we want, so it is not killed before it was asked again.
            signal.pidfd_send_signal(self._pidfd, signal.SIGCONT)
            return receive(self._connection)

    def _hand_over(self, memory: Memory | None) -> None:
        """KeeperSettings, and the memory unless the keeper has it already."""
        every, rate = self._settings.persist_every, self._settings.persist_rate
        message = Message(Kind.HOLD, lease=self._settings.lease, persist_every=every, persist_rate=rate)
        answer = self._ask(message, memory.fd if memory is not None else None)
        if answer.kind is not Kind.DONE:
            raise ShoestringError(f"the keeper refuses the memory: {answer.text}")

    def _ask(self, message: Message, fd: int | None = None) -> Message:
        if self._connection is None:
            raise EOFError
        send(self._connection, message, fd)
        answer, extra = receive(self._connection)
        if extra is not None:
            os.close(extra)
        return answer

    def _heard(self, status: Message) -> None:
        self.persisted_step = max(self.persisted_step, status.step)
        if status.text:
            self._warn(f"the newest snapshot could not be written to the disk: {status.text}")

    # The process

    def _start(self) -> socket.socket:
        self._process = start_keeper(self._run_dir)
        connection = connect(self._run_dir, self._settings.patience)
        if connection is None:
            raise ConnectionError("a new keeper cannot be found at its socket")
        return connection

    def _kill(self) -> None:
        if self._pidfd >= 0:
            with suppress(ProcessLookupError):  # it has ended by itself
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            wait_readable(self._pidfd, self._settings.patience)

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def _reap(self) -> None:
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):  # a disk that hangs keeps even a killed process
                self._process.wait(self._settings.patience)
                self._process = None


_LIVING: weakref.WeakSet[Keeping] = weakref.WeakSet()


def _in_forked_child() -> None:
    """A worker must not hold the connection open, or the memory, when the trainer is dead."""
    for keeping in _LIVING:
        keeping._disconnect()
        if keeping.memory is not None:
            keeping.memory.close()


os.register_at_fork(after_in_child=_in_forked_child)
