"""One line for each decision of the plan: what decided it."""

from __future__ import annotations

from ..recipes import Recipe
from .budget import Spending
from .evaluations import EvalRows
from .fit import Candidate
from .grounds import Grounds
from .refusal import gigabytes


def explain(
    recipe: Recipe, grounds: Grounds, chosen: Candidate, spending: Spending, rows: EvalRows
) -> dict[str, str]:
    """Key of the plan -> reason."""
    limits = grounds.around.limits
    on_device = bool(chosen.footprint.device)
    needed = chosen.footprint.device_total if on_device else chosen.footprint.host_total
    limit, source = (limits.device, limits.device_source) if on_device else (limits.host, limits.host_source)
    reasons = {
        "memory": f"peak in {max(chosen.footprint.phases, key=lambda name: chosen.footprint.phases[name])}; "
        f"{gigabytes(limit)} {source}",
        "dtype": grounds.precision.reason,
        "packed": grounds.layout.packed_reason,
        "max_length": grounds.layout.max_length_reason,
        "batch_tokens": spending.batch_reason,
        "eval_rows": rows.reason,
    }
    if grounds.micro_rows is not None:
        reasons["micro_tokens"] = f"{grounds.micro_rows} rows, the longest together: as given by the recipe"
    elif chosen.worst_tokens > chosen.micro_tokens:
        reasons["micro_tokens"] = f"a row of {chosen.worst_tokens} tokens is a micro-batch of its own"
    else:
        speed = f"{1e6 * chosen.seconds_per_token:.0f} µs a token"
        reasons["micro_tokens"] = f"enough for full speed, and fits; {speed}"
    wanted = recipe.train.activation_checkpointing
    if wanted is not None:
        reasons["activation_checkpointing"] = f"train.activation_checkpointing={str(wanted).lower()}"
    elif recipe.train.wta_crs_ratio is not None:
        reasons["activation_checkpointing"] = "train.wta_crs_ratio excludes it"
    elif chosen.checkpointing:
        reasons["activation_checkpointing"] = "needed: the activations do not fit; about a third slower"
    else:
        reasons["activation_checkpointing"] = f"not needed: {gigabytes(needed)} of {gigabytes(limit)}"
    if recipe.optimizer.learning_rate is not None:
        reasons["learning_rate"] = "optimizer.learning_rate"
    else:
        what = "adapter" if recipe.adapter is not None else "whole model"
        steps = spending.timeline.steps
        reasons["learning_rate"] = (
            f"{what} of {grounds.around.facts.parameters / 1e6:.0f}M parameters, batches of "
            f"{spending.step.tokens} tokens, {steps} steps"
        )
    reasons["finish"] = f"ends by {spending.bound_by}"
    return reasons
