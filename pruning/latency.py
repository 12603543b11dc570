"""How many neurons, groups or blocks must go for a share of the forward time to go.

The time of a forward of one sequence is measured with the model's own layers at some widths, and read off
between them in straight lines. What neurons and groups save is added up. `tokens` says what is timed: 1 is a
step of decoding without a past, N reads a prompt of N tokens; the logits of the last token are computed.
"""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..recipes.errors import UserError
from .amounts import Amounts, check_request
from .anatomy import Anatomy
from .forms import check_biases, groups_that_save

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# (neurons, groups) of every layer and the layers that stay -> seconds of one forward
Times = Callable[[int, int, int], float]
# Shares of the neurons and groups that are timed, in sixteenths.
_GRID = (16, 12, 8, 4, 1)
TURNS = 7


@dataclass(frozen=True)
class Latency:
    """Seconds of one forward of `tokens` tokens: as the times say, and as measured after the removal.

    Measured are the medians of turns that alternate between the model before and after; None where the times
    were given by hand.
    """

    tokens: int
    before: float
    predicted: float
    measured_before: float | None = None
    measured_after: float | None = None

    @property
    def ratio(self) -> float:
        """The share of the time that the times say has left."""
        return 1 - self.predicted / self.before


def amounts_for_latency(
    anatomy: Anatomy,
    ratio: float,
    times: Times,
    *,
    parts: Collection[str] = ("neurons",),
    multiple: int = 1,
    compensate: bool = False,
    tokens: int = 1,
) -> tuple[Amounts, Latency]:
    """The numbers to keep so that `times` fall by `ratio`, and what they say before and after.

    Parts and rounding are those of `amounts_for`: neurons are the most that reach the ratio, groups alone and
    blocks the nearest to it. With both, of all widths that reach it those are taken whose kept shares are
    nearest to each other.

    Raises:
        UserError: as `amounts_for`; or the parts do not reach the ratio at any width.
    """
    check_request(anatomy, ratio, parts, "the forward time")
    if compensate:
        check_biases(anatomy, down="neurons" in parts, o="groups" in parts)
    first, layers = anatomy.blocks[0], len(anatomy.blocks)
    before = times(first.neurons, first.groups, layers)
    target = before * (1 - ratio)
    savable = groups_that_save(anatomy, down=compensate and "neurons" in parts, o=compensate)
    widths = range(first.neurons - first.neurons % multiple, 0, -multiple)
    fewer = [groups for groups in savable if groups < first.groups]
    best: tuple[int, int, int] | None
    match tuple(sorted(set(parts))):
        case ("blocks",):
            best = _nearest([(first.neurons, first.groups, n) for n in range(1, layers)], times, target)
        case ("groups",):
            best = _nearest([(first.neurons, n, layers) for n in fewer], times, target)
        case ("neurons",):
            best = _reaching(widths, first.groups, layers, times, target)
        case _:
            found = [_reaching(widths, n, layers, times, target) for n in savable]
            reach = [each for each in found if each is not None]
            best = min(
                reach, key=lambda kept: abs(kept[0] / first.neurons - kept[1] / first.groups), default=None
            )
    if best is None:
        raise UserError(
            _too_much(ratio, parts, times, before, (first.neurons, first.groups, layers), multiple)
        )
    neurons, groups, blocks = best
    gone = (first.neurons - neurons) * layers * first.neuron_parameters
    gone += (first.groups - groups) * layers * first.group_parameters + (layers - blocks) * first.parameters
    left = anatomy.parameters - gone
    amounts = Amounts(neurons, groups, blocks, left, gone / anatomy.parameters)
    return amounts, Latency(tokens, before, times(*best))


def measure_times(
    anatomy: Anatomy, *, parts: Collection[str], tokens: int = 1, multiple: int = 1, turns: int = TURNS
) -> Times:
    """Time the model where it is, at full size and at some widths of each part; medians of `turns`.

    In each turn every width has one forward, after one that is not timed. Takes about
    2 · turns · (1 + 4 for each part) forwards; beside the model a copy of down_proj, or of o_proj, of all
    layers. A wider layer counts as at least as slow as a narrower one. Weights are as before.
    """
    first, layers = anatomy.blocks[0], len(anatomy.blocks)
    full = (first.neurons, first.groups, layers)
    curves: dict[str, list[tuple[int, int, int]]] = {}
    if "neurons" in parts:
        counts = {max(1, first.neurons * share // 16 // multiple * multiple) for share in _GRID[1:]}
        curves["neurons"] = [full, *((n, first.groups, layers) for n in counts)]
    if "groups" in parts:
        counts = {max(1, first.groups * share // 16) for share in _GRID[1:]}
        curves["groups"] = [full, *((first.neurons, n, layers) for n in counts)]
    if "blocks" in parts:
        counts = {max(1, layers // 2), 1}
        curves["blocks"] = [full, *((first.neurons, first.groups, n) for n in counts)]
    sizes = sorted({size for curve in curves.values() for size in curve})
    seen: dict[tuple[int, int, int], list[float]] = {size: [] for size in sizes}
    ids = _ids(anatomy.model, tokens)
    with _evaluating(anatomy.model):
        for turn in range(turns):
            for size in sizes if turn % 2 else reversed(sizes):
                with narrowed(anatomy, size):
                    _forward(anatomy.model, ids)
                    seen[size].append(_forward(anatomy.model, ids))
    medians = {size: statistics.median(values) for size, values in seen.items()}
    place = {"neurons": 0, "groups": 1, "blocks": 2}
    lines = {
        place[part]: _line([(size[place[part]], medians[size]) for size in curve])
        for part, curve in curves.items()
    }
    whole = {index: line(full[index]) for index, line in lines.items()}

    def seconds(neurons: int, groups: int, blocks: int) -> float:
        kept = (neurons, groups, blocks)
        saved = sum(whole[index] - line(kept[index]) for index, line in lines.items())
        return max(whole.values()) - saved

    return seconds


def compare_forwards(models: Sequence[PreTrainedModel], tokens: int, *, turns: int = TURNS) -> list[float]:
    """Median seconds of a forward of each model, in alternating turns after one that is not timed."""
    seen: list[list[float]] = [[] for _ in models]
    for turn in range(turns + 1):
        order = list(range(len(models)))
        for index in order if turn % 2 else reversed(order):
            model = models[index]
            with _evaluating(model):
                took = _forward(model, _ids(model, tokens))
            if turn:
                seen[index].append(took)
    return [statistics.median(values) for values in seen]


@contextmanager
def narrowed(anatomy: Anatomy, size: tuple[int, int, int]) -> Iterator[None]:
    """The model with its first neurons, groups and blocks alone, which take the time of any others."""
    neurons, groups, blocks = size
    saved: list[tuple[Any, str, Any]] = [(anatomy.base, "layers", anatomy.base.layers)]
    for block in anatomy.blocks:
        queries, outputs = groups * block.heads_per_group * block.query_dim, groups * block.group_width
        for linear, dim, width in (
            (block.gate, 0, neurons), (block.up, 0, neurons), (block.down, 1, neurons),
            (block.q, 0, queries), (block.k, 0, groups * block.query_dim),
            (block.v, 0, groups * block.value_dim), (block.o, 1, outputs),
        ):  # fmt: skip
            saved += [(linear, "weight", linear.weight), (linear, "bias", linear.bias)]
            linear.weight = _first(linear.weight, dim, width)
            if dim == 0 and linear.bias is not None:
                linear.bias = _first(linear.bias, 0, width)
        if block.pairs is not None:
            attention: Any = block.layer.self_attn
            saved.append((attention, "rotary_pairs", attention.rotary_pairs))
            attention.rotary_pairs = attention.rotary_pairs[:groups]
    anatomy.base.layers = anatomy.base.layers[:blocks]
    try:
        yield
    finally:
        for home, name, value in saved:
            setattr(home, name, value)


def _first(weight: torch.Tensor, dim: int, width: int) -> nn.Parameter:
    return nn.Parameter(weight.detach().narrow(dim, 0, width).contiguous(), requires_grad=False)


def _line(points: Sequence[tuple[int, float]]) -> Callable[[int], float]:
    """Straight lines between points made ascending; outside them the nearest point's value."""
    ordered = sorted(points)
    xs = [x for x, _ in ordered]
    ys = list(accumulate((y for _, y in ordered), max))

    def read(x: int) -> float:
        right = bisect_right(xs, x)
        if right in (0, len(xs)):
            return ys[min(right, len(xs) - 1)]
        share = (x - xs[right - 1]) / (xs[right] - xs[right - 1])
        return ys[right - 1] + share * (ys[right] - ys[right - 1])

    return read


def _reaching(
    widths: Sequence[int], groups: int, layers: int, times: Times, target: float
) -> tuple[int, int, int] | None:
    return next(((n, groups, layers) for n in widths if times(n, groups, layers) <= target), None)


def _nearest(
    sizes: Sequence[tuple[int, int, int]], times: Times, target: float
) -> tuple[int, int, int] | None:
    """Of ascending sizes the one whose time is nearest to the target; none where all stay above it."""
    if not sizes or times(*sizes[0]) > target:
        return None
    return min(sizes, key=lambda size: abs(times(*size) - target))


def _too_much(
    ratio: float,
    parts: Collection[str],
    times: Times,
    before: float,
    full: tuple[int, int, int],
    multiple: int,
) -> str:
    least = (
        multiple if "neurons" in parts else full[0],
        1 if "groups" in parts else full[1],
        1 if "blocks" in parts else full[2],
    )
    return (
        f"pruning.ratio: {ratio} of the forward time cannot leave with {', '.join(sorted(parts))}: at the "
        f"smallest widths {times(*least):.4g} of {before:.4g} seconds are left.\n"
        f"  At most {max(0.0, 1 - times(*least) / before):.3f} can; use a smaller ratio or more parts."
    )


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.train(False)
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _ids(model: Any, tokens: int) -> torch.Tensor:
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(tokens, device=device) % int(model.config.vocab_size)
    return ids[None]


def _forward(model: Any, ids: torch.Tensor) -> float:
    on_gpu = ids.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(ids.device)
    began = perf_counter()
    model(input_ids=ids, use_cache=False, logits_to_keep=1)
    if on_gpu:
        torch.cuda.synchronize(ids.device)
    return perf_counter() - began
