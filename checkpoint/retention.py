"""Which checkpoints stay: the newest whole ones, the best one, and any that are protected by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path

from ..recipes.errors import UserError
from .aside import aside, remove
from .errors import BrokenCheckpoint, housekeeping
from .files import sync_directory
from .manifest import read_manifest
from .reading import Checkpoint, candidates, step_of, verify

BEST = "best"


def prune(folder: Path, *, keep: int, protect: Collection[str] = ()) -> list[Path]:
    """Delete checkpoints older than the `keep` newest whole ones; returns what was deleted.

    Whole means verified now, by reading: a damaged newer one is no reason to delete an older good one. The
    names in `protect` and the target of `best` stay. A directory whose manifest cannot be read is never
    deleted.
    """
    if keep < 1:
        raise ValueError(f"at least one checkpoint must be kept, not {keep}")
    folder = Path(folder)
    spared = {*protect, best_name(folder)}
    found = list(candidates(folder))
    if len(found) <= keep:
        return []
    whole = 0
    deleted = []
    for _, path in found:
        if whole < keep:
            whole += _is(path, verify)
        elif path.name not in spared and _is(path, read_manifest):
            with housekeeping(folder, f"{path.name} cannot be deleted"), aside(folder) as private:
                remove(private, path)
            deleted.append(path)
    return deleted


def set_best(folder: Path, checkpoint: Checkpoint | Path) -> None:
    """Let folder/best point to `checkpoint`, atomically. UserError when `best` is something of the user's."""
    folder = Path(folder)
    path = checkpoint.path if isinstance(checkpoint, Checkpoint) else Path(checkpoint)
    if step_of(path.name) is None or not (folder / path.name).is_dir():
        raise ValueError(f"{path} is no checkpoint in {folder}")
    link = folder / BEST
    if os.path.lexists(link) and not link.is_symlink():
        raise UserError(
            f"{link}: is not the link that shoestring keeps there.  Move it away, or set another output_dir."
        )
    with housekeeping(folder, f"{BEST} cannot be set to {path.name}"), aside(folder) as private:
        os.symlink(path.name, private / BEST)
        os.replace(private / BEST, link)
        sync_directory(folder)


def best_name(folder: Path) -> str | None:
    """The name that folder/best points to, None where there is no such link or it leaves the folder."""
    try:
        target = os.readlink(Path(folder) / BEST)
    except OSError:
        return None  # absent, or not a link
    return target if step_of(target) is not None else None


def best(folder: Path, on_broken: Callable[[str], None]) -> Checkpoint | None:
    """The verified checkpoint behind `best`; None, with a line to `on_broken`, when it is not whole."""
    name = best_name(folder)
    if name is None:
        return None
    try:
        return verify(Path(folder) / name)
    except (BrokenCheckpoint, FileNotFoundError) as error:
        reason = error if isinstance(error, BrokenCheckpoint) else "does not exist"
        on_broken(f"{BEST} ({name}) is skipped: {reason}")
        return None


def _is(path: Path, check: Callable[[Path], object]) -> bool:
    try:
        check(path)
    except (BrokenCheckpoint, FileNotFoundError):
        return False
    return True
