"""One line for each decision of the plan: what decided it."""

from __future__ import annotations

from dataclasses import dataclass

from ..offload.placement import Placement
from ..recipes import PruningConfig, Recipe, pruning_span
from ..schedules.limits import Limits
from . import defaults, worth
from .budget import Spending
from .evaluations import EvalRows
from .fit import Candidate
from .grounds import Grounds
from .offload_writes import Writes
from .refusal import gigabytes
from .repetition import Repeats
from .seconds import Fixed
from .snapshots import snapshots_line


@dataclass(frozen=True)
class Decisions:
    """What else was decided or measured on the way."""

    limits: Limits
    repeats: Repeats
    fixed: Fixed
    placement: Placement
    writes: Writes
    snapshots: int


def explain(
    recipe: Recipe,
    grounds: Grounds,
    chosen: Candidate,
    spending: Spending,
    rows: EvalRows,
    decisions: Decisions,
) -> dict[str, str]:
    """Key of the plan -> reason. pruning, engine, filter, sources, objective, offload.* and disk_writes only
    where there is something to say.
    """
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
    elif chosen.recomputed or chosen.swapped:
        micro, layers = chosen.micro_tokens, grounds.around.facts.layers
        plain = grounds.work(0).train_seconds(micro, micro * grounds.data.trained_share)
        moved = chosen.recomputed + chosen.swapped
        ways = f", {chosen.swapped} of them swapped to host memory" if chosen.swapped else ""
        reasons["activation_checkpointing"] = (
            f"needed: the activations of {moved} of {layers} layers do not fit{ways}; "
            f"{chosen.seconds_per_token * micro / plain - 1:.0%} slower"
        )
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
        if recipe.objective.name == "dpo":
            reasons["learning_rate"] += f"; on pairs {defaults.DPO_RATE:g} of that"
    if recipe.pruning is not None:
        reasons["pruning"] = _pruning(recipe, recipe.pruning)
    if grounds.sizes.held is not None:
        reasons["engine"] = grounds.sizes.held.reason
    reasons |= _worth(recipe, grounds, chosen, spending, decisions)
    for placed in decisions.placement.parts:
        if placed.tier != "device" or getattr(recipe.offload, placed.part, None) not in (None, "device"):
            reasons[f"offload.{placed.part}"] = placed.why
    reasons["snapshots"] = snapshots_line(recipe, decisions.snapshots, grounds.around.world_size)
    if decisions.writes.state:
        reasons["disk_writes"] = decisions.writes.line
    guess = f" ({grounds.watts:.0f} W is a guess)" if spending.bound_by == "budget.energy" else ""
    reasons["finish"] = f"ends by {spending.bound_by}{guess}"
    return reasons


def _pruning(recipe: Recipe, pruning: PruningConfig) -> str:
    what = f"{pruning.name} removes {pruning.ratio:.0%} of the {pruning.ratio_of}"
    span = pruning_span(recipe)
    if span is None:
        return f"{what} before training, in seconds that come on top"
    rounds = f"{pruning.rounds} round{'s' if pruning.rounds > 1 else ''}"
    return f"{what} in {rounds} from {span[0]:.0%} to {span[1]:.0%} of the budget; planned without the gain"


def _worth(
    recipe: Recipe, grounds: Grounds, chosen: Candidate, spending: Spending, decisions: Decisions
) -> dict[str, str]:
    """Where the budget pays."""
    micro, repeats = chosen.micro_tokens, decisions.repeats
    lines = {
        "epochs": worth.epochs_line(recipe, repeats, decisions.limits, spending),
        "weight_decay": worth.decay_line(recipe, repeats),
        "filter": worth.filter_line(repeats),
        "sources": worth.sources_line(recipe, repeats),
        "objective": worth.objective_line(
            grounds.work_of(chosen),
            reference=grounds.sizes.reference,
            tokens=micro,
            targets=micro * grounds.data.trained_share,
            stored=worth.Stored(grounds.teacher_tokens, decisions.fixed.teacher, grounds.stored_bytes),
        ),
    }
    return {key: line for key, line in lines.items() if line is not None}
