"""The placement of a plan: each part of the training state with its tier, its bytes and one line why."""

from __future__ import annotations

from ..offload.placement import Placed, Placement
from ..recipes import Recipe
from ..recipes.offload import Tier
from .fit import Candidate
from .grounds import Grounds
from .memory import Moved, Sizes
from .offload_writes import size_text
from .weights_code import choose_weights_code


def place(recipe: Recipe, grounds: Grounds, chosen: Candidate) -> Placement:
    """Where everything is in the way to run that was chosen, in bytes of one process."""
    sizes = grounds.sizes_on(chosen.tier)
    moved, on_device = sizes.moved, chosen.tier == "device"
    targets = int(chosen.worst_tokens * grounds.data.dense_share(chosen.worst_tokens))
    activations = sum(grounds.work(chosen.recomputed + chosen.swapped).memory(chosen.worst_tokens, targets))
    layers = grounds.around.facts.layers
    again = "kept for the backward pass"
    if chosen.recomputed:
        again = f"{chosen.recomputed} of {layers} layers computed again in the backward pass"
    parts = [
        _weights(recipe, grounds, chosen, sizes),
        Placed("gradients", "device", sizes.gradients, "the optimizer reads them there"),
        Placed(
            "optimizer",
            chosen.tier,
            sizes.optimizer if on_device else moved.elsewhere,
            optimizer_line(recipe, grounds, chosen),
        ),
        Placed("activations", "device", activations, _unmoved(recipe, grounds, "activations", again)),
    ]
    if chosen.swapped:
        line = f"activations of {chosen.swapped} of {layers} layers wait there for the backward pass"
        parts.append(Placed("swapped", "host", chosen.swapped_bytes, line))
    if moved.ring:
        tier: Tier = "device" if grounds.device.type == "cpu" else "host"
        parts.append(Placed("ring", tier, moved.ring, _ring_line(recipe, moved)))
    return Placement(tuple(parts))


def _weights(recipe: Recipe, grounds: Grounds, chosen: Candidate, sizes: Sizes) -> Placed:
    held = sizes.weights + sizes.adapter
    code = choose_weights_code(recipe, grounds, chosen)
    if sizes.weights_tier == "device":
        return Placed("weights", "device", held, _unmoved(recipe, grounds, "weights", "the passes need them"))
    line = f"offload.weights={sizes.weights_tier}; {size_text(held)} with two layers at a time on the device"
    if code.why:
        line += f"; on disk {code.why}"
    return Placed("weights", sizes.weights_tier, sizes.streamed, line, code.coded)


def optimizer_line(recipe: Recipe, grounds: Grounds, chosen: Candidate) -> str:
    """Why the optimizer's state is where it is, and what that costs in each step."""
    given, moved = recipe.offload.optimizer, grounds.sizes_on(chosen.tier).moved
    if chosen.tier == "device":
        if given == "host":
            return "host memory is the device of this machine: offload.optimizer=host changes nothing"
        return "fits" if given is None else f"offload.optimizer={given}"
    why = "does not fit the device" if given is None else f"offload.optimizer={given}"
    if chosen.tier == "host":
        return (
            f"{why}; {'the CPU updates it there' if moved.updated_on_host else 'it comes and goes each step'}"
        )
    if not moved.step.written:
        return f"{why}; all of it fits the buffers, so nothing moves"
    each_way = f"{why}; {size_text(moved.step.written)} each way in a step"
    rates = grounds.disk_rates
    seconds = moved.step.seconds(rates.mixed)
    return f"{each_way}, {seconds:.2g} s at {rates.mixed / 1e6:,.0f} MB/s, read and written together"


def _ring_line(recipe: Recipe, moved: Moved) -> str:
    own = f"; {size_text(moved.resident)} of small tensors beside it" if moved.resident > 1e6 else ""
    count = recipe.offload.buffer_count
    return f"at most {count} buffers of {recipe.offload.buffer_size.text} or the largest matrix{own}"


def _unmoved(recipe: Recipe, grounds: Grounds, part: str, usual: str) -> str:
    given = {"weights": recipe.offload.weights, "activations": recipe.offload.activations}[part]
    if given == "host" and grounds.device.type == "cpu":
        return f"host memory is the device of this machine: offload.{part}=host changes nothing"
    return usual
