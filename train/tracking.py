"""What a run says about itself: metrics.jsonl, events.jsonl, summary.json, and the outside trackers."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ..recipes.errors import UserError
from .rundir import RunDir, finite, open_plain, write_json, write_text
from .trackers import Trackers

METRIC_FIELDS = (
    "step", "seconds", "tokens", "progress", "loss", "learning_rate", "grad_norm", "tokens_per_second",
    "host_bytes", "device_bytes", "watts",
)  # fmt: skip


@dataclass
class Summary:
    """summary.json: the whole result in one object. What could not be measured is None, never guessed."""

    stop_reason: str | None = None
    steps: int | None = None
    tokens: int | None = None
    trained_tokens: int | None = None
    seconds: float | None = None
    budget: dict[str, dict[str, float]] | None = None
    final_progress: float | None = None
    final_learning_rate: float | None = None
    train_loss: float | None = None
    eval_loss_before: float | None = None
    eval_loss: float | None = None
    best_eval_loss: float | None = None
    tokens_per_second: float | None = None
    peak_device_bytes: int | None = None
    peak_host_bytes: int | None = None
    predicted_device_bytes: int | None = None
    predicted_host_bytes: int | None = None
    optimizer_state_bytes: int | None = None
    disk_bytes_written: int | None = None
    energy_joules: float | None = None
    energy_source: str | None = None
    cost: float | None = None
    resumed_from: str | None = None
    final_path: str | None = None
    legs: int | None = None
    """Budgets that the run was given one after the other: one, and one more with each `shoestring extend`."""

    def write(self, path: Path) -> None:
        """Write summary.json, whole or not at all."""
        write_json(path, self)


class MetricsLog:
    """metrics.jsonl: one JSON object a line, each handed to the system at once.

    `after_step` is the step that the run resumes from: later records, which will come again, are dropped, so
    that no step stands in the file twice. That waits for the first new record: until then they alone tell the
    next resume how much time was spent after the checkpoint, should this one be killed. 0 begins an empty
    file.
    """

    def __init__(self, path: Path, after_step: int = 0) -> None:
        self._path, self._after_step = path, after_step
        self._file: TextIO | None = None
        if not after_step:
            self._open()

    def write(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """One record with every field of METRIC_FIELDS (None where not given), other figures after them."""
        line = finite({**dict.fromkeys(METRIC_FIELDS), **record})
        self._open().write(json.dumps(line, allow_nan=False) + "\n")
        return dict(line)

    def close(self) -> None:
        """No record can be written afterwards."""
        self._open().close()

    def _open(self) -> TextIO:
        if self._file is None:
            after = self._after_step
            kept = (
                [record for record in read_jsonl(self._path) if record.get("step", 0) <= after]
                if after
                else []
            )
            write_text(self._path, "".join(json.dumps(record) + "\n" for record in kept))
            self._file = open(self._path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed by close()
        return self._file


class EventsLog:
    """events.jsonl: start, resume, eval, samples, save, export, warning, stop and why; only ever added to.

    `seconds` gives the run's time: seconds since its start, earlier parts of a resumed run included.
    """

    def __init__(self, path: Path, seconds: Callable[[], float]) -> None:
        self._seconds = seconds
        try:
            descriptor = open_plain(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        except OSError as error:
            raise UserError(
                f"{path} cannot be added to: {error.strerror}.\n"
                "  Move it away, or choose another folder: output_dir=runs/NAME"
            ) from None
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        self._file = open(descriptor, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed by close()
        if torn:  # a kill in mid-write: end that line, so that the next event does not stick to it
            self._file.write("\n")

    def write(self, event: str, *, step: int | None = None, **fields: Any) -> dict[str, Any]:
        """One event; timed ones carry `kind` (load, eval, samples, save, export, report) and `duration`."""
        line = finite({"event": event, "seconds": round(self._seconds(), 3), "step": step, **fields})
        self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False, default=str) + "\n")
        return dict(line)

    def close(self) -> None:
        """To the disk, then no event can be written."""
        os.fsync(self._file.fileno())
        self._file.close()


class Tracking:
    """The one thing that the loop tells its news to: both files, and the outside trackers.

    Raises UserError at once when a tracker's library is missing. With `active` False (every process but the
    first) nothing is written and nothing is opened.
    """

    def __init__(
        self,
        run_dir: RunDir,
        *,
        seconds: Callable[[], float],
        after_step: int = 0,
        trackers: Trackers | None = None,
        active: bool = True,
    ) -> None:
        self._metrics = MetricsLog(run_dir.metrics, after_step) if active else None
        self._events = EventsLog(run_dir.events, seconds) if active else None
        self._trackers = trackers if active else None
        self._step = after_step

    def metrics(self, record: Mapping[str, Any]) -> None:
        """One log line: to metrics.jsonl, and to the trackers under train/."""
        if self._metrics is None:
            return
        line = self._metrics.write(record)
        self._step = int(line["step"])
        self._forward("train", line, self._step)

    def event(self, name: str, *, step: int | None = None, **fields: Any) -> None:
        """One event; the figures of an "eval" also go to the trackers, under eval/."""
        if self._events is None:
            return
        line = self._events.write(name, step=self._step if step is None else step, **fields)
        if name == "eval":
            self._forward("eval", line, int(line["step"]))

    @contextlib.contextmanager
    def timed(self, kind: str, **fields: Any) -> Iterator[dict[str, Any]]:
        """An event named `kind` with the block's duration; the block may add fields to the yielded dict."""
        more: dict[str, Any] = dict(fields)
        began = time.monotonic()
        yield more
        self.event(kind, **{"kind": kind, "duration": round(time.monotonic() - began, 3), **more})

    def state_dict(self) -> dict[str, Any]:
        """The trackers' run ids, for the checkpoint."""
        return {} if self._trackers is None else self._trackers.state_dict()

    def finish(self, summary: Summary | None = None) -> None:
        """Hand the summary to the trackers and close everything."""
        if self._trackers is not None:
            self._report(self._trackers.finish({} if summary is None else vars(summary)))
            self._trackers = None
        if self._events is not None and self._metrics is not None:
            self._events.close()
            self._metrics.close()
            self._events = self._metrics = None

    def _forward(self, group: str, line: Mapping[str, Any], step: int) -> None:
        if self._trackers is None:
            return
        skip = ("event", "kind", "step", "seconds")
        figures = {
            f"{group}/{key}": value
            for key, value in line.items()
            if key not in skip and isinstance(value, int | float) and not isinstance(value, bool)
        }
        self._report(self._trackers.log(figures, step))

    def _report(self, failures: list[str]) -> None:
        for text in failures:
            if self._events is not None:
                self._events.write("warning", step=self._step, text=text)


def read_jsonl(path: Path, at_most: int | None = None) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file in order; a missing file is an empty one.

    A line torn by a kill is left out. With `at_most`, a longer file is thinned evenly; its last line is kept.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    if at_most is not None and len(lines) > at_most:
        stride = -(-len(lines) // at_most)
        lines = lines[: len(lines) - 1 : stride] + lines[-1:]
    found = []
    for line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append(value)
    return found
