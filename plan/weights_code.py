"""Whether frozen layers on disk are coded there: only where a step is quicker for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..offload.code_rate import CodeRate, cannot_decode
from ..offload.coded_layers import PART
from ..offload.layer_buffers import THREADS
from ..recipes import Recipe
from ..recipes.errors import UserError, in_columns
from ..recipes.offload import Tier

if TYPE_CHECKING:
    from .fit import Candidate
    from .grounds import Grounds

_WORTH = 0.95
"""Of the time as they are, at most, to be worth it: rates are measured to some percent."""


@dataclass(frozen=True)
class WeightsCode:
    """What was decided; why: for the plan's line about the weights, empty where there is nothing to say."""

    coded: bool
    why: str = ""


def choose_weights_code(recipe: Recipe, grounds: Grounds, chosen: Candidate) -> WeightsCode:
    """How frozen layers lie on disk."""
    asked = recipe.offload.weights_code
    if _why_never(recipe, grounds.weights_tier, grounds.precision.weights) is not None:
        return WeightsCode(False)
    if asked == "raw":
        return WeightsCode(False, "as they are (offload.weights_code=raw)")
    if asked == "lossless":
        lacks = cannot_decode()
        if lacks is not None:
            return WeightsCode(False, f"as they are, since {lacks}")
        return WeightsCode(True, "coded (offload.weights_code=lossless)")
    found = grounds.around.machine.decoding
    if found is None:
        return WeightsCode(False, "as they are, since nothing here decodes them quickly")
    work, micro = grounds.work_of(chosen), chosen.micro_tokens
    compute = work.measured.micro_seconds(work.layers, micro, micro * grounds.data.trained_share)
    bytes_read = 2 * grounds.sizes.streamed
    return decide(
        found,
        compute=compute,
        reading=work.streaming[1],
        bytes_read=bytes_read,
        shared=grounds.device.type == "cpu",
    )


def decide(rate: CodeRate, *, compute: float, reading: float, bytes_read: int, shared: bool) -> WeightsCode:
    """By seconds of a micro-batch, forward and backward: its computing, and reading its layers as they are.

    as they are    max(compute, reading)
    coded          max(compute, share · reading, decoding); where the cores that decode are those that compute
                   (shared) max(compute + decoding, share · reading): products wait for their slowest core
    """
    decoding = bytes_read / rate.bytes_per_second
    plain = max(compute, reading)
    coded = max(compute + decoding if shared else max(compute, decoding), rate.share * reading)
    bits = f"{16 * rate.share:.1f} of 16 bits"
    if coded <= _WORTH * plain:
        return WeightsCode(True, f"in about {bits} there, {plain / coded:.1f} times as quick")
    if reading <= compute:
        why = "reading them is hidden behind computing"
    elif shared and compute + decoding > _WORTH * plain:
        why = f"decoding would take {decoding:.2g} s of the cores that compute"
    else:
        why = f"decoding would take {decoding:.2g} s, reading takes {reading:.2g} s"
    return WeightsCode(False, f"as they are, not in {bits}: {why}")


def decoding_bytes(recipe: Recipe, weights_tier: Tier, weights: str) -> int:
    """Host memory that decoding may take, beside the buffers. weights: their type.

    UserError: the recipe asks for the code where nothing can be coded.
    """
    asked, reason = recipe.offload.weights_code, _why_never(recipe, weights_tier, weights)
    if reason is not None and asked == "lossless":
        raise UserError(in_columns([("offload.weights_code", f"lossless was given, but {reason}")]))
    return 0 if asked == "raw" or reason is not None else THREADS * PART


def _why_never(recipe: Recipe, weights_tier: Tier, weights: str) -> str | None:
    """What of the recipe leaves nothing to code, and what to set in its place."""
    other = "Set that, or leave this out: offload.weights_code=auto"
    if weights_tier != "disk":
        return f"only layers on disk are coded: offload.weights=disk.\n{other}"
    if recipe.adapter is None:
        return f"only frozen layers are coded, and all are trained: adapter=lora.\n{other}"
    if weights != "bfloat16":
        return f"only bfloat16 weights are coded, not {weights}: model.dtype=bfloat16.\n{other}"
    return None
