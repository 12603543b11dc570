"""Attention windows in llama.cpp's terms: a period of layers for Gemma 2 and 3, else a shorter context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from ..recipes.errors import UserError

_PERIOD: Final = {"gemma2": 2, "gemma3": 6}  # what llama.cpp takes where the file does not say


@dataclass(frozen=True)
class Windows:
    """The context that the file states, settings without the architecture's prefix, and what to tell."""

    context: int
    settings: dict[str, int]
    notes: tuple[str, ...] = ()


def attention_windows(architecture: str, config: Any, layers: int) -> Windows:
    """Where layers see a window of tokens only.

    In llama.cpp the last of each `period` layers sees everything, for Gemma 2 and 3; other architectures have
    no windows, and within a context no longer than the window there is no difference.

    Raises:
        UserError: a Gemma 3 whose windows have no period, since its two kinds of layers rotate differently.
    """
    context = int(config.max_position_embeddings)
    window = int(getattr(config, "sliding_window", None) or 0)
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    local = [window > 0 and name == "sliding_attention" for name in types[:layers]]
    if architecture not in _PERIOD:
        return _shortened(context, window, architecture) if any(local) else Windows(context, {})
    if not any(local):
        # llama.cpp stops when a window is stated and no layer has it; Gemma 2 has one in any case
        wide = {"attention.sliding_window": context, "attention.sliding_window_pattern": layers + 1}
        return Windows(context, wide if architecture == "gemma2" else {})
    period = _period(local, _PERIOD[architecture])
    if period is None and architecture == "gemma2":
        return _shortened(context, window, architecture)
    if period is None:
        raise UserError(
            "gguf: the layers with an attention window do not recur regularly, and llama.cpp knows one "
            f"period for gemma3: {''.join('w' if flag else 'F' for flag in local)} (w a window, F full).\n"
            "  Remove blocks in whole periods, or prune neurons and groups of heads instead."
        )
    settings = {"attention.sliding_window": window}
    if period == _PERIOD[architecture]:
        return Windows(context, settings)
    settings["attention.sliding_window_pattern"] = period
    note = (
        f"one of {period} layers sees all tokens; versions of llama.cpp that do not read "
        f"{architecture}.attention.sliding_window_pattern compute with {_PERIOD[architecture]}"
    )
    return Windows(context, settings, (note,))


def _period(local: list[bool], usual: int) -> int | None:
    periods: list[int] = [usual, *range(2, len(local) + 2)]
    for period in periods:
        if all(flag == (index % period < period - 1) for index, flag in enumerate(local)):
            return period
    return None


def _shortened(context: int, window: int, architecture: str) -> Windows:
    """A context no longer than the window, which Gemma 2 has to be told of."""
    told = {"attention.sliding_window": window} if architecture == "gemma2" else {}
    if context <= window:
        return Windows(context, told)
    note = (
        f"the context is given as {window} of {context} tokens: llama.cpp has no such windows for "
        f"{architecture}, and up to the window there is no difference"
    )
    return Windows(window, told, (note,))
