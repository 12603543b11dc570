"""What a run writes to disk: the prediction, the wear of the drive, and the refusals by space and by wear."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from math import ceil, floor
from pathlib import Path

from ..offload.model import USUAL_ENDURANCE, run_traffic, wear
from ..offload.scratch import require_space
from ..recipes import Recipe
from ..recipes.errors import BudgetError, in_columns
from .budget import Spending
from .limits import existing_parent
from .machine import Machine
from .memory import Sizes
from .offload import scratch_folder
from .refusal import disk_too_small, gigabytes
from .sizes import checkpoint_bytes


@dataclass(frozen=True)
class Writes:
    """Bytes that a run of `steps` steps writes. files: checkpoints, export, logits. state: in all steps."""

    files: int
    state: int
    steps: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.files + self.state

    @property
    def line(self) -> str:
        """The prediction and what it does to a drive."""
        worn = wear(self.total)
        share = f"{100 * worn.share:.2g} %" if worn.share < 0.1 else f"{worn.share:.0%}"
        each = size_text(self.state / max(1, self.steps))
        return (
            f"{each} of training state in each of {self.steps:,} steps, files {size_text(self.files)}; "
            f"{share} of the {size_text(USUAL_ENDURANCE)} that a usual drive of 1 TB is rated for"
        )


def predict_writes(
    recipe: Recipe, sizes: Sizes, spending: Spending, *, files: int, world_size: int
) -> Writes:
    """Writes of all processes, each with its own optimizer. Streamed layers are written once, trained ones
    again in each step.
    """
    steps = spending.timeline.steps
    state = run_traffic(sizes.moved.step, steps=steps).written if sizes.moved.tier == "disk" else 0.0
    if sizes.weights_tier == "disk":
        files += world_size * sizes.streamed
        state += steps * sizes.streamed if recipe.adapter is None else 0.0
    return Writes(files, int(world_size * state), steps)


def scratch_bytes(sizes: Sizes) -> int:
    """Of the scratch files of one process."""
    state = sizes.moved.elsewhere if sizes.moved.tier == "disk" else 0
    return state + (sizes.streamed if sizes.weights_tier == "disk" else 0)


def missing_for_second_places(recipe: Recipe, sizes: Sizes) -> int:
    """Bytes that the disk lacks for state that has two places there, beside checkpoints and export.

    0 where there is enough, or no state on disk.
    """
    if sizes.moved.tier != "disk":
        return 0
    needed = 2 * sizes.moved.elsewhere
    own, output = existing_parent(scratch_folder(recipe)), existing_parent(Path(recipe.output_dir))
    free = shutil.disk_usage(own).free
    if os.stat(own).st_dev == os.stat(output).st_dev:
        kept = recipe.checkpoint.keep + 1 + int(recipe.checkpoint.keep_best)
        needed += kept * checkpoint_bytes(sizes) + sizes.merged + sizes.exported + sizes.adapter
        free = min(free, int(recipe.budget.disk or free))
    return max(0, needed - free)


def check_writes(recipe: Recipe, writes: Writes, *, batch_tokens: int, epoch_tokens: int) -> None:
    """BudgetError where a run writes more than `offload.max_disk_writes`, with what would write less."""
    most = recipe.offload.max_disk_writes
    if most is None or writes.total <= most:
        return
    ways = [f"offload.max_disk_writes={size_text(_rounded_up(writes.total)).replace(' ', '')}"]
    room = most - writes.files
    steps = floor(room * writes.steps / writes.state) if writes.state and room > 0 else 0
    if steps:
        ways.append(f"fewer steps: budget.steps={steps}")
        larger = ceil(batch_tokens * writes.steps / steps / 64) * 64
        if recipe.train.per_device_train_batch_size is None and larger <= epoch_tokens:
            ways.append(f"larger ones: train.batch_tokens={larger}")
        if getattr(recipe.optimizer, "state_bits", 8) == 32:
            ways.append("less state: optimizer.state_bits=8")
    else:
        ways.append("fewer files: checkpoint.every=100%")
    state = f"{size_text(writes.state)} of training state in {writes.steps:,} steps and "
    raise BudgetError(
        in_columns(
            [
                (
                    "offload.max_disk_writes",
                    f"the run would write {size_text(writes.total)}, and {most.text} is allowed: "
                    f"{state if writes.state else ''}{size_text(writes.files)} of checkpoints and export",
                ),
                ("give", "; or ".join(ways)),
            ]
        )
    )


def check_disk(
    recipe: Recipe, machine: Machine, *, checkpoint: int, kept: int, final: int, stored: int, scratch: int
) -> None:
    """BudgetError where what is kept does not fit the disk, scratch files with it. All in bytes.

    checkpoint, kept: of one, and how many. stored: logits of a teacher. UserError: scratch files are on
    another disk, which has not so much room.
    """
    folder = scratch_folder(recipe)
    if scratch and recipe.offload.disk_path is not None:
        own, other = existing_parent(folder), existing_parent(Path(machine.output_dir))
        if os.stat(own).st_dev != os.stat(other).st_dev:
            require_space(folder, scratch)
            scratch = 0
    free = min(int(recipe.budget.disk or machine.disk_bytes), machine.disk_bytes)
    needed = kept * checkpoint + final + stored + scratch
    if needed > free:
        raise disk_too_small(
            needed,
            free,
            checkpoint=checkpoint,
            kept=kept,
            final=final,
            stored=stored,
            scratch=scratch,
            folder=machine.output_dir,
        )


def size_text(size: float) -> str:
    """1.23 TB, or as `gigabytes` below one."""
    return f"{size / 1e12:.3g} TB" if size >= 0.9995e12 else gigabytes(size)


def _rounded_up(size: int) -> int:
    """To two digits, so that the amount can be typed and is enough."""
    unit: int = 10 ** max(0, len(str(size)) - 2)
    return -(-size // unit) * unit
