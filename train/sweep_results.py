"""What a trial's run directory says after a leg: its figures, why it failed, and what can be deleted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .rundir import CHECKPOINT, RunDir
from .sweep_process import LOG, last_lines
from .tracking import read_jsonl

PAUSED = "paused.json"
_WHOLE = 1e-9
_WORDS = {2: "refused", 3: "does not fit", 4: "diverged"}


@dataclass(frozen=True)
class Result:
    """Where a trial stands. seconds: of its own clock. finished: it landed, and can go no further."""

    progress: float
    loss: float | None
    step: int
    tokens: int
    seconds: float
    finished: bool


def read_result(folder: Path, until: float) -> Result | None:
    """The trial at its pause at `until`, or finished; None when it is at neither."""
    summary = _object(folder / "summary.json")
    if summary:
        return Result(
            float(summary["final_progress"]),
            summary["eval_loss"],
            int(summary["steps"]),
            int(summary["tokens"]),
            float(summary["seconds"]),
            True,
        )
    paused = _object(folder / PAUSED)
    if until < 1.0 and paused and float(paused["progress"]) >= until - _WHOLE:
        return Result(
            float(paused["progress"]),
            paused["eval_loss"],
            int(paused["step"]),
            int(paused["tokens"]),
            float(paused["seconds"]),
            False,
        )
    return None


def run_clock(folder: Path) -> float:
    """Seconds that a process which resumes the trial counts as used: of its newest checkpoint, or its log."""
    saved = 0.0
    for path in sorted(folder.glob(f"{CHECKPOINT}*/trainer.json"))[-1:]:
        saved = float(json.loads(path.read_text(encoding="utf-8"))["clock"]["seconds"])
    records = read_jsonl(folder / "metrics.jsonl")
    return max(saved, float(records[-1]["seconds"])) if records else saved


def done_so_far(folder: Path) -> tuple[int, int]:
    """(steps, tokens) of the trial by its log."""
    records = read_jsonl(folder / "metrics.jsonl")
    return (int(records[-1]["step"]), int(records[-1]["tokens"])) if records else (0, 0)


def start_and_end(
    folder: Path, *, step: int, tokens: int, clock: float, seconds: float
) -> tuple[float, float] | None:
    """Of a leg that took `seconds`: before its first step began, and after its last one ended.

    step, tokens, clock: where the trial stood before. None when the log has no step of the leg.
    """
    records = [record for record in read_jsonl(folder / "metrics.jsonl") if record["step"] > step]
    if not records or not records[0].get("tokens_per_second"):
        return None
    first, last = records[0], records[-1]
    training = (first["tokens"] - tokens) / first["tokens_per_second"]
    return max(0.0, first["seconds"] - training - clock), max(0.0, seconds - (last["seconds"] - clock))


def why_failed(folder: Path, code: int) -> str:
    """A few words for the table."""
    if code < 0:
        return f"killed by signal {-code}"
    word = _WORDS.get(code, f"ended with code {code}")
    if code == 4:
        marks = [e for e in read_jsonl(folder / "events.jsonl") if e.get("event") == "diverged"]
        return f"{word} at step {marks[-1]['step']}" if marks else word
    said = last_lines(folder, most=1)
    return f"{word}: {said[0][:120]}" if said else word


def drop_checkpoints(folder: Path) -> None:
    """Free the disk of a trial that is out; its figures and its report stay."""
    for path in folder.glob(f"{CHECKPOINT}*"):
        shutil.rmtree(path)
    (folder / "best").unlink(missing_ok=True)


def has_checkpoint(folder: Path) -> bool:
    """Whether a trial that is out could still go on."""
    return any(folder.glob(f"{CHECKPOINT}*"))


def clear_trial(folder: Path) -> None:
    """Delete what a trial's runs wrote, and the folder when nothing else is in it."""
    if not folder.is_dir():
        return
    run = RunDir(folder)
    with run.lock():
        run.clear()
        for name in (LOG, PAUSED, ".lock"):
            (folder / name).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def _object(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}  # not there; run files are written whole or not at all
    return value if isinstance(value, dict) else {}
