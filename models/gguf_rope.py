"""Rotary embeddings in llama.cpp's terms: base, scaling rule, or a divisor for each frequency."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..recipes.errors import UserError
from .gguf_config import llama3_divisors


@dataclass(frozen=True)
class Rope:
    """Settings without the architecture's prefix; `divisors` [head_dim / 2] of the frequencies, or None."""

    settings: dict[str, int | float | bool | str]
    divisors: np.ndarray[tuple[int], np.dtype[np.float64]] | None = None


def rope_of(architecture: str, config: Any, head_dim: int) -> Rope:
    """What the config's `rope_parameters` come to.

    Raises:
        UserError: a rule that llama.cpp does not know, or not for this architecture.
    """
    given: dict[str, Any] = dict(config.rope_parameters)
    settings: dict[str, int | float | bool | str] = {"rope.dimension_count": head_dim}
    if any(isinstance(value, dict) for value in given.values()):
        local = dict(given.get("sliding_attention") or {})
        given = dict(given.get("full_attention") or local)
        if architecture == "gemma3" and local:
            if local.get("rope_type", "default") != "default":
                raise _unknown(architecture, f"{local['rope_type']} in sliding layers")
            settings["rope.freq_base_swa"] = float(local["rope_theta"])
        elif local and local != given:
            raise _unknown(architecture, "two rules in one model")
    settings["rope.freq_base"] = float(given["rope_theta"])
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise _unknown(architecture, f"partial_rotary_factor {given['partial_rotary_factor']}")
    rule = str(given.get("rope_type", "default"))
    if rule == "default":
        return Rope(settings)
    if rule == "linear":
        return Rope(settings | {"rope.scaling.type": "linear", "rope.scaling.factor": float(given["factor"])})
    if rule == "llama3" and architecture in ("llama", "deci"):
        return Rope(settings, llama3_divisors(given, head_dim // 2))
    if rule == "yarn":
        return Rope(settings | _yarn(architecture, config, given))
    raise _unknown(architecture, rule)


def _yarn(architecture: str, config: Any, given: dict[str, Any]) -> dict[str, int | float | bool | str]:
    """YaRN (arXiv 2309.00071) with the attention factor that both sides compute, 0.1 · ln(factor) + 1."""
    for key in ("attention_factor", "mscale", "mscale_all_dim"):
        if given.get(key) is not None:
            raise _unknown(architecture, f"yarn with {key}")
    if given.get("truncate") is False:
        raise _unknown(architecture, "yarn with truncate false")
    if (given.get("beta_fast") or 32) != 32 or (given.get("beta_slow") or 1) != 1:
        raise _unknown(architecture, "yarn with other than beta_fast 32 and beta_slow 1")
    original = given.get("original_max_position_embeddings") or config.max_position_embeddings
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(given["factor"]),
        "rope.scaling.original_context_length": int(original),
    }


def _unknown(architecture: str, rule: str) -> UserError:
    return UserError(
        f"gguf: llama.cpp has no rotary scaling like this for {architecture}: {rule}.\n"
        "  Known: default, linear, yarn with its default factors, and llama3 for Llama."
    )
