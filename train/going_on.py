"""What a run goes on from: its newest checkpoint on the disk, or a snapshot of a later step."""

from __future__ import annotations

from collections.abc import Callable

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from ..checkpoint import Checkpoint, ShardedSnapshot, Snapshot, newest
from ..recipes.errors import UserError
from .parts import Saved
from .rundir import RunDir
from .shards import ALONE, Shards
from .snapshot_state import NAME, SnapshotState


def newest_state(
    run_dir: RunDir,
    accelerator: Accelerator,
    own: Snapshot | None,
    shards: Shards,
    state: SnapshotState,
    warn: Callable[[str], None],
) -> Saved | None:
    """The newest whole state; with several processes the main one chooses, and the others open the same.

    own: what this process's keeper held. UserError: checkpoints are there, none is whole, and there is no
    snapshot either.
    """
    if accelerator.num_processes > 1:
        if accelerator.is_main_process:
            state.sweep()  # of a process alone, whose scratch file several cannot take over
        accelerator.wait_for_everyone()
        later = _chosen_together(run_dir, accelerator, shards, warn)
    else:
        later = [own] if own is not None else []
        sharded = shards.newest() if run_dir.holds_run() else None
        later += [sharded] if sharded is not None else []
    later.sort(key=lambda snapshot: snapshot.step)
    opened: Saved | None = None
    while opened is None:
        found, broken = _on_disk(run_dir, warn)
        last: Saved | None = found
        if later and (found is None or later[-1].step > found.step):
            last = later.pop()
        if last is None:
            break
        opened = last if isinstance(last, ShardedSnapshot) else state.open(last)
    state.sweep()
    if not isinstance(opened, ShardedSnapshot):
        shards.done()
    if broken is not None:
        if opened is None:
            raise broken
        warn(f"{str(broken).splitlines()[0]}  The snapshot in memory is used")
    return opened


def _on_disk(run_dir: RunDir, warn: Callable[[str], None]) -> tuple[Checkpoint | None, UserError | None]:
    try:
        return newest(run_dir.path, warn) if run_dir.holds_run() else None, None
    except UserError as error:
        return None, error


def _chosen_together(
    run_dir: RunDir, accelerator: Accelerator, shards: Shards, warn: Callable[[str], None]
) -> list[Snapshot | ShardedSnapshot]:
    """The newest snapshot in shards, or of a single process; none where a checkpoint is as new."""
    choice: list[str | None] = [None]
    opened: Snapshot | ShardedSnapshot | None = None
    if accelerator.is_main_process and run_dir.holds_run():
        found, _ = _on_disk(run_dir, warn)
        least = -1 if found is None else found.step
        sharded, alone = shards.newest(), _without_scratch(shards, warn)
        if alone is not None and alone.step > max(least, -1 if sharded is None else sharded.step):
            choice, opened = [ALONE], alone
        elif sharded is not None and sharded.step > least:
            choice, opened = [sharded.snapshot], sharded
    broadcast_object_list(choice)
    (name,) = choice
    if name is None:
        return []
    if not accelerator.is_main_process:
        opened = _without_scratch(shards, warn) if name == ALONE else shards.newest(name)
    everywhere = gather_object([opened is not None])
    if opened is not None and all(everywhere):
        return [opened]
    warn("the newest snapshot cannot be read by all processes: they go on from the disk")
    return []


def _without_scratch(shards: Shards, warn: Callable[[str], None]) -> Snapshot | None:
    """What a single process has left, unless a part of it lies in that process's scratch file."""
    alone = shards.alone()
    if alone is not None and f"{NAME}.json" in alone.files:
        warn(f"{alone.name} is skipped: its optimizer state is in a file that one process can take over")
        return None
    return alone
