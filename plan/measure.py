"""The short measurement: two shallow copies of the model are really trained for a moment.

What a layer keeps for its backward pass, and how long it takes, depends on the architecture, the adapter, fused
operations, attention and the processor. Formulas for that are wrong by tens of percent (fm-training-estimator,
DeepSpeed #4527); running one and two layers at two lengths gives four points that a line over layers and tokens
goes through, because a decoder is a pile of equal layers.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.facts import ModelFacts
from ..ops import cross_entropy_sum
from ..recipes import Recipe
from .curves import Line, line_through, plane_through
from .live_bytes import LiveBytes
from .measurement import Measurement, Setting
from .replica import VOCABULARY, build_replica

LAYERS = (1, 2)
# Words of the output head that are measured at most: its cost is a straight line in them.
_HEAD_WORDS = 65_536


@dataclass(frozen=True)
class _Point:
    saved: float
    peak: float
    seconds: float
    forward_seconds: float


def measure(recipe: Recipe, facts: ModelFacts, device: torch.device, setting: Setting) -> Measurement:
    """Run the shallow copies on `device`. Leaves nothing allocated; random generators are as before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        points: dict[tuple[int, int], _Point] = {}
        for layers in LAYERS:
            model = build_replica(
                recipe,
                facts,
                layers,
                device=device,
                dtype=setting.precision.dtype,
                packed=setting.packed,
                checkpointing=setting.checkpointing,
            )
            for tokens in setting.tokens:
                points[layers, tokens] = _run_layers(model, device, setting, tokens)
            del model
        head = _run_head(recipe, facts, device, setting)
    if device.type == "cuda":
        torch.cuda.empty_cache()

    def plane(name: str) -> Any:
        return plane_through(lambda lay, tok: getattr(points[lay, tok], name), LAYERS, setting.tokens)

    return Measurement(
        saved=plane("saved"),
        peak=plane("peak"),
        seconds=plane("seconds"),
        forward_seconds=plane("forward_seconds"),
        head_peak=head[0],
        head_seconds=head[1],
        head_forward_seconds=head[2],
        tokens=setting.tokens,
    )


def _precision(setting: Setting, device: torch.device) -> contextlib.AbstractContextManager[object]:
    if not setting.precision.autocast:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _run_layers(model: nn.Module, device: torch.device, setting: Setting, tokens: int) -> _Point:
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    decoder = base.get_decoder()
    inputs = _inputs(setting, tokens, device)

    def forward() -> Tensor:
        with _precision(setting, device):
            hidden: Tensor = decoder(**inputs).last_hidden_state
        return hidden

    def both() -> None:
        hidden = forward()
        hidden.backward(torch.ones_like(hidden))

    both()  # gradients are there from now on, as in every micro-batch but a step's first
    with LiveBytes(device) as live:
        hidden = forward()
        saved = live.now
        hidden.backward(torch.ones_like(hidden))
        del hidden
        peak = live.peak
    seconds = _seconds(both, device, setting.repeats)
    with torch.no_grad():
        forward_seconds = _seconds(forward, device, 1)
    model.zero_grad(set_to_none=True)
    return _Point(saved, peak, seconds, forward_seconds)


def _inputs(setting: Setting, tokens: int, device: torch.device) -> dict[str, Any]:
    """One packed sequence of rows of `row_length`, or a padded batch of them, `tokens` tokens in all."""
    length = min(tokens, setting.row_length)
    if not setting.packed:
        rows = max(1, tokens // length)
        ids = torch.randint(VOCABULARY, (rows, length), device=device)
        positions = torch.arange(length, device=device).expand(rows, -1)
        mask = torch.ones_like(ids)
        mask[:, -1] = 0  # a mask that masks something: the code may skip one that does not
        return {"input_ids": ids, "position_ids": positions, "attention_mask": mask, "use_cache": False}
    segments = (*range(0, tokens, length), tokens)
    positions = torch.cat([torch.arange(b - a) for a, b in zip(segments, segments[1:], strict=False)])
    ids = torch.randint(VOCABULARY, (1, tokens), device=device)
    return {
        "input_ids": ids,
        "position_ids": positions[None].to(device),
        "segments": segments,
        "use_cache": False,
    }


def _run_head(
    recipe: Recipe, facts: ModelFacts, device: torch.device, setting: Setting
) -> tuple[Line, Line, Line]:
    """(peak bytes, seconds of both passes, seconds of the forward pass) over the number of trained tokens."""
    words = min(facts.vocab_size, _HEAD_WORDS)
    trained = recipe.adapter is None
    dtype = setting.precision.dtype
    block = torch.randn(1, facts.hidden_size, device=device).mul_(0.02).to(dtype)
    weight = block.repeat(words, 1).requires_grad_(trained)
    if trained:
        weight.grad = torch.zeros_like(weight)
    whole = facts.vocab_size / words
    points = []
    for tokens in setting.tokens:
        targets = max(1, int(tokens * setting.trained_share))
        source = torch.randn(tokens, facts.hidden_size, device=device).to(dtype).requires_grad_()
        places = torch.arange(targets, device=device)
        labels = torch.randint(words, (targets,), device=device)

        def forward(source: Tensor = source, places: Tensor = places, labels: Tensor = labels) -> Tensor:
            with _precision(setting, device):
                return cross_entropy_sum(source[places], weight, labels)

        def both() -> None:
            forward().backward()  # noqa: B023 - called within this turn of the loop

        both()
        with LiveBytes(device) as live:
            both()
            peak = live.peak
        with torch.no_grad():
            forward_seconds = _seconds(forward, device, 1)
        points.append((targets, peak, _seconds(both, device, 1), forward_seconds))
    (few, *first), (many, *second) = points
    if many == few:  # one trained token at both lengths: no slope to see
        few = 0
    lines = [line_through(few, a, many, b) for a, b in zip(first, second, strict=True)]
    peak, seconds, forward_seconds = (Line(li.constant * whole, li.per_unit * whole) for li in lines)
    return peak, seconds, forward_seconds


def _seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The fastest of `repeats` calls: other work on the machine only ever adds time."""
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best
