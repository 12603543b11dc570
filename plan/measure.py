"""The short measurement: two shallow copies of the model are really trained for a moment.

What a layer keeps for its backward pass, and how long it takes, depends on the architecture, the adapter,
fused operations, attention and the processor. Formulas for that are wrong by tens of percent
(fm-training-estimator, DeepSpeed #4527); running one and two layers at two lengths gives four points that a
line over layers and tokens goes through, because a decoder is a pile of equal layers.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..models.facts import ModelFacts
from ..ops import cross_entropy_sum
from ..ops.loss_heads import rows_of_chunk
from ..recipes import Recipe
from . import defaults
from .curves import Line, Polyline, line_through, plane_through
from .live_bytes import LiveBytes
from .measurement import Measurement, Setting
from .replica import VOCABULARY, build_replica

LAYERS = (1, 2)


@dataclass
class _Patience:
    """On a machine that is busy with other work the runs that only sharpen the timing are left out."""

    seconds: float
    started: float = field(default_factory=time.perf_counter)

    def left(self) -> bool:
        """Whether there is time for more than the least."""
        return time.perf_counter() - self.started < self.seconds


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
        patience = _Patience(defaults.MEASURE_SECONDS)
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
                points[layers, tokens] = _run_layers(model, device, setting, tokens, patience)
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
        head_held=4 * facts.vocab_size * facts.hidden_size if recipe.adapter is None and facts.tied else 0,
        head_seconds=head[1],
        head_forward_seconds=head[2],
        tokens=setting.tokens,
    )


def _precision(setting: Setting, device: torch.device) -> contextlib.AbstractContextManager[object]:
    if not setting.precision.autocast:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _run_layers(
    model: nn.Module, device: torch.device, setting: Setting, tokens: int, patience: _Patience
) -> _Point:
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    decoder = base.get_decoder()
    inputs = _inputs(setting, tokens, device)

    def forward() -> Tensor:
        with _precision(setting, device):
            hidden: Tensor = decoder(**inputs).last_hidden_state
        return hidden

    def both() -> None:
        hidden = forward()
        torch.autograd.backward(hidden, torch.ones_like(hidden))

    if tokens == setting.tokens[0]:
        both()  # gradients are there from now on, as in every micro-batch but a step's first
    saved = 0

    def watched() -> None:
        nonlocal saved
        hidden = forward()
        saved = live.now
        torch.autograd.backward(hidden, torch.ones_like(hidden))

    with LiveBytes(device) as live:
        seconds = _seconds(watched, device, 1)
        peak = live.peak
    forward_seconds = seconds / 3
    if patience.left():
        seconds = min(seconds, _seconds(both, device, setting.repeats))
        with torch.no_grad():
            forward_seconds = _seconds(forward, device, 1)
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
    positions = torch.cat([torch.arange(end - start) for start, end in pairwise(segments)])
    ids = torch.randint(VOCABULARY, (1, tokens), device=device)
    return {
        "input_ids": ids,
        "position_ids": positions[None].to(device),
        "segments": segments,
        "use_cache": False,
    }


def _run_head(
    recipe: Recipe, facts: ModelFacts, device: torch.device, setting: Setting
) -> tuple[Polyline, Line, Line]:
    """(peak bytes, seconds of both passes, seconds of the forward pass), over trained tokens.

    Measured at half a chunk of the loss, one, and two: from there only the hidden states grow (each about 4
    times: gathered, cast, its gradient, and that gradient put back among all positions). With a small
    vocabulary a chunk holds more tokens than any micro-batch; then the logits grow on as they did.
    """
    trained = recipe.adapter is None
    dtype = setting.precision.dtype
    block = torch.randn(1, facts.hidden_size, device=device).mul_(0.02).to(dtype)
    weight = block.repeat(facts.vocab_size, 1).requires_grad_(trained)
    if trained:
        weight.grad = torch.zeros_like(weight)
    chunk = max(2, rows_of_chunk(facts.vocab_size, device, trained))
    middle = min(chunk, max(setting.tokens))
    # one more than a chunk: from two chunks on a trained weight's gradient is summed in float32
    counts = (middle // 2, middle + (middle == chunk), 2 * middle)
    _head_point(facts, device, setting, weight, 1)  # warm
    points = [_head_point(facts, device, setting, weight, count) for count in counts]
    hidden_states = 4.0 * facts.hidden_size * dtype.itemsize
    still_growing = (points[2][0] - points[1][0]) / (counts[2] - counts[1])
    bytes_ = Polyline(
        tuple((float(count), point[0]) for count, point in zip(counts, points, strict=True)),
        hidden_states if middle == chunk else max(hidden_states, still_growing),
    )
    seconds, forward_seconds = (
        line_through(counts[0], points[0][k], counts[2], points[2][k]) for k in (1, 2)
    )
    return bytes_, seconds, forward_seconds


def _head_point(
    facts: ModelFacts, device: torch.device, setting: Setting, weight: Tensor, targets: int
) -> tuple[float, float, float]:
    tokens = max(targets, round(targets / max(setting.trained_share, 0.01)))
    source = torch.randn(tokens, facts.hidden_size, device=device).to(setting.precision.dtype)
    source.requires_grad_()
    places = torch.arange(targets, device=device)
    labels = torch.randint(facts.vocab_size, (targets,), device=device)

    def forward() -> Tensor:
        with _precision(setting, device):
            return cross_entropy_sum(source[places], weight, labels)

    with LiveBytes(device) as live:  # few and large operations: watching them costs no time worth mentioning
        seconds = _seconds(lambda: torch.autograd.backward(forward()), device, 1)
        peak = live.peak
    with torch.no_grad():
        forward_seconds = _seconds(forward, device, 1)
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
