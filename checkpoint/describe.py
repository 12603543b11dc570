"""What lies in a run directory, for `shoestring doctor`: each checkpoint, and what dead saves left."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .aside import PREFIX, is_abandoned
from .errors import BrokenCheckpoint, format_bytes
from .reading import candidates, verify
from .retention import BEST, best_name


@dataclass(frozen=True)
class CheckpointFacts:
    """One entry of a run directory. `problem`: None for a whole checkpoint. `bytes`: of the files there."""

    name: str
    step: int | None
    bytes: int
    is_best: bool
    problem: str | None

    def __str__(self) -> str:
        note = "whole" if self.problem is None else self.problem
        return f"{self.name}  {format_bytes(self.bytes)}  {note}{'  (best)' if self.is_best else ''}"


def describe_checkpoints(folder: Path) -> list[CheckpointFacts]:
    """All checkpoints, newest first, each verified; then what unfinished saves left. Changes nothing."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    best = best_name(folder)
    facts = [
        CheckpointFacts(path.name, step, _bytes(path), path.name == best, _problem(path))
        for step, path in candidates(folder)
    ]
    if best is not None and not any(fact.is_best for fact in facts):
        facts.append(CheckpointFacts(BEST, None, 0, True, f"points to {best}, which does not exist"))
    for path in sorted(folder.glob(f"{PREFIX}*")):
        state = (
            "left by a process that died; the next start clears it" if is_abandoned(path) else "being written"
        )
        facts.append(CheckpointFacts(path.name, None, _bytes(path), False, state))
    return facts


def _problem(path: Path) -> str | None:
    try:
        verify(path)
    except BrokenCheckpoint as error:
        return str(error)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def _bytes(path: Path) -> int:
    if path.is_symlink():
        return 0
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())
