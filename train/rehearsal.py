"""Memory that is too small shows before the first step, and says what takes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..checkpoint import random_state, set_random_state
from ..plan.refusal import gigabytes, parts_text
from ..recipes.errors import BudgetError, in_columns
from .parts import Run


def rehearse(run: Run) -> None:
    """Forward and backward of the worst step that the data can give, and nothing of it kept.

    Otherwise the row that does not fit may come hours after the start. For GPUs, whose memory has a hard
    end; on a CPU it would cost a step of the budget, and the plan's limit leaves room.
    """
    run.screen.status("trying the longest step")
    boundary = random_state()
    stage, accelerator = run.stage, run.accelerator
    order = stage.order
    worst = order.longest_step()
    mine = worst.micro_batches[accelerator.process_index :: accelerator.num_processes]
    run.engine.loss_module.train()
    batches = [stage.objective.collate(stage.data.train, rows, packed=order.packed) for rows in mine]
    with run.engine.rehearsal():
        run.engine.forward_backward(batches, stage.count(worst), interrupted=lambda: False)
    run.engine.optimizer.zero_grad(set_to_none=True)
    set_random_state(boundary)


@contextmanager
def memory_explained(run: Run) -> Iterator[None]:
    """Turn the GPU's out-of-memory error into one that says what was planned and which key to change.

    Raises BudgetError in its place; the last checkpoint stands.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise _too_little(run) from error


def _too_little(run: Run) -> BudgetError:
    plan, used = run.plan, run.memory.peak_device_bytes or 0
    longest = min(plan.longest_row, plan.max_length)
    parts = {name: size for name, size in plan.memory["device"].items() if name != "total"}
    limit = plan.memory_limits.get("device")
    if not plan.activation_checkpointing and run.recipe.train.wta_crs_ratio is None:
        change = "train.activation_checkpointing=true"
    elif plan.micro_tokens > longest:
        change = f"train.gradient_accumulation_steps={2 * plan.accumulation}"
    else:
        change = f"data.max_length={longest // 2}"
    rows = [
        (
            "out of memory",
            f"at step {run.state.step + 1}, with {gigabytes(used)} taken"
            + (f" of {gigabytes(limit)} GPU memory" if limit else ""),
        ),
        ("", f"the plan had {gigabytes(sum(parts.values()))}: {parts_text(parts)}"),
        ("", "Is another program on this GPU? It came or grew after the plan was made."),
        ("", f"Otherwise: {change}, and the same command"),
    ]
    return BudgetError(in_columns(rows))
