"""Prune a model in one call: calibrate, score, choose, update, remove."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .amounts import Amounts, amounts_for, prunable_parameters
from .anatomy import Anatomy, read_anatomy
from .asked import JUDGED, Method, RatioOf, Widths, check_method, check_target, check_updates
from .calibrate import calibrate
from .cfsp import cfsp_counts, cfsp_scores, cfsp_shares, cfsp_weighted_scores
from .cut import Cut, Scores, Values, everything, highest, keep_counts, keep_uniform
from .flap import flap_compensation, flap_counts, flap_scores
from .foldgpt import foldgpt_blocks, learn_gates
from .head_amounts import HEAD_PARTS, HeadAmounts, head_amounts_for
from .latency import Latency, Times, amounts_for_latency, compare_forwards, measure_times
from .magnitude import magnitude_scores
from .modegpt import leverage_scores
from .modegpt_heads import kept_pairs, value_factors
from .random_choice import random_blocks, random_scores
from .record import describe, digest
from .refit import RIDGE, refit_weight
from .remove import remove
from .shortgpt import shortgpt_blocks
from .statistics import BlockStats
from .wanda import wanda_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Pruned:
    """What was done: the cut, the parameters before and after, and a record for `save_pruned`.

    `latency` is there when the ratio was one of the forward time.
    """

    cut: Cut
    before: int
    after: int
    record: Mapping[str, Any]
    latency: Latency | None = None

    @property
    def ratio(self) -> float:
        """The share of all parameters that left, exactly."""
        return 1 - self.after / self.before


def prune(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    *,
    method: Method,
    ratio: float,
    parts: Collection[str] | None = None,
    widths: Widths = "uniform",
    multiple: int = 1,
    refit: bool = False,
    ridge: float = RIDGE,
    compensate: bool = False,
    gate_steps: int = 100,
    seed: int = 0,
    device: torch.device | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    ratio_of: RatioOf = "parameters",
    latency_tokens: int = 1,
    times: Times | None = None,
) -> Pruned:
    """Remove `ratio` of all parameters, or of the forward time, in place.

    `batches` are token ids [sequences, length] without padding; magnitude and random look at none unless
    `refit` or `compensate` does. `parts` are neurons, groups (of heads), both, or blocks; of modegpt neurons,
    queries (rotary pairs of q and k) and values (of v and o) in any union; by default the first that the
    method judges. `refit` fits down_proj again to the neurons that stay (modegpt always does):
    8 · D² bytes and a second pass over the batches. `compensate` puts the removed channels' mean effect into
    biases (FLAP). Refitting looks at the uncentred activations, compensation at their mean: one or the other.
    `ridge` draws a refit towards slicing (refit.py).
    `gate_steps` is for foldgpt, `seed` for random; `device` is where blocks are calibrated (gates are
    learned where the model is).

    With `ratio_of` latency the time of a forward of `latency_tokens` tokens is measured where the model is,
    at some widths (latency.py), and once more before and after with a copy of the model; with `times` it is
    what these say, and nothing is measured. Widths per layer then leave as many parameters as even ones.

    Raises:
        UserError: what is asked for does not go together, or does not fit the model.
    """
    chosen = check_method(method, tuple(parts or JUDGED[method][:1]) if method in JUDGED else (), widths)
    check_updates(method, chosen, refit=refit, compensate=compensate, ridge=ridge)
    anatomy = read_anatomy(model)
    check_target(ratio_of, chosen, anatomy.family, tokens=latency_tokens, timed=times is not None)
    before, latency, original = anatomy.parameters, None, None
    amounts: Amounts | HeadAmounts
    if ratio_of == "latency":
        rules: dict[str, Any] = {"parts": chosen, "multiple": multiple}
        clock = times or measure_times(anatomy, tokens=latency_tokens, **rules)
        rules["compensate"] = compensate
        amounts, latency = amounts_for_latency(anatomy, ratio, clock, tokens=latency_tokens, **rules)
        original = None if times is not None else copy.deepcopy(model)
    elif set(chosen) & set(HEAD_PARTS):
        amounts = head_amounts_for(anatomy, ratio, parts=chosen, multiple=multiple)
    else:
        amounts = amounts_for(anatomy, ratio, parts=chosen, multiple=multiple, compensate=compensate)
    scores_digest = ""
    if chosen == ("blocks",):
        assert isinstance(amounts, Amounts)
        cut = _blocks(anatomy, batches, method, amounts.blocks, gate_steps, seed, device)
    elif method == "modegpt":
        cut = _modegpt(anatomy, batches, amounts, ridge, device)
    else:
        assert isinstance(amounts, Amounts)
        stats: list[BlockStats] = []
        if method not in ("random", "magnitude") or compensate:
            stats = list(calibrate(model, batches, device=device))
        scores = _scores(anatomy, stats, method, seed)
        scores_digest = digest([*scores.neurons, *scores.groups])
        share = amounts.ratio if latency is not None else ratio
        cut = _choose(anatomy, scores, stats, chosen, amounts, share, method, widths, multiple)
        if compensate:
            down, o = flap_compensation(anatomy, stats, cut)
            cut = dataclasses.replace(cut, down_bias=down, o_bias=o)
        if refit:
            weights = refit_all(model, batches, cut, ridge=ridge, device=device)
            cut = dataclasses.replace(cut, down_weight=weights)
    remove(model, cut, optimizer=optimizer)
    after = read_anatomy(model).parameters
    if latency is not None and original is not None:
        seconds = compare_forwards([original, model], latency_tokens)
        latency = dataclasses.replace(latency, measured_before=seconds[0], measured_after=seconds[1])
    asked = {
        "method": method,
        "ratio_wanted": ratio,
        "ratio_of": ratio_of,
        "parts": list(chosen),
        "widths": widths,
        "multiple": multiple,
        "refit": refit or (method == "modegpt" and "neurons" in chosen),
        "ridge": ridge,
        "compensated": compensate,
        "seed": seed,
        "scores_sha256": scores_digest,
    }
    return Pruned(cut, before, after, describe(asked, cut, before, after, batches, latency), latency)


def refit_all(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    cut: Cut,
    *,
    ridge: float = RIDGE,
    device: torch.device | None = None,
) -> dict[int, Tensor]:
    """The least-squares down_proj [d, kept] of each block that stays and loses neurons, before the removal.

    One pass over the batches; one block's covariance at a time.
    """
    anatomy = read_anatomy(model)
    weights = {}
    for stats in calibrate(model, batches, device=device, covariance=True):
        block, kept = anatomy.blocks[stats.index], cut.neurons[stats.index]
        if stats.covariance is not None and stats.index in cut.blocks and len(kept) < block.neurons:
            weights[stats.index] = refit_weight(block.down.weight, stats.covariance, kept, ridge=ridge)
    return weights


def _scores(anatomy: Anatomy, stats: Sequence[BlockStats], method: str, seed: int) -> Scores:
    match method:
        case "random":
            return random_scores(anatomy, seed)
        case "magnitude":
            return magnitude_scores(anatomy)
        case "wanda":
            return wanda_scores(anatomy, stats)
        case "flap":
            return flap_scores(anatomy, stats)
        case "cfsp":
            return cfsp_scores(anatomy, stats)
        case _:
            return cfsp_weighted_scores(anatomy, stats)


def _choose(
    anatomy: Anatomy,
    scores: Scores,
    stats: Sequence[BlockStats],
    parts: tuple[str, ...],
    amounts: Amounts,
    ratio: float,
    method: str,
    widths: str,
    multiple: int,
) -> Cut:
    scores = Scores(scores.neurons if "neurons" in parts else (), scores.groups if "groups" in parts else ())
    if widths == "uniform":
        return keep_uniform(anatomy, scores, amounts.neurons, amounts.groups)
    share = ratio * anatomy.parameters / prunable_parameters(anatomy, parts)
    groups = [block.groups for block in anatomy.blocks] if scores.groups else []
    if method == "flap":
        neurons, groups = flap_counts(anatomy, scores, share, parts)
        neurons, groups = neurons if scores.neurons else [], groups if scores.groups else []
    else:
        shares = cfsp_shares([seen.angular for seen in stats], share)
        neurons = cfsp_counts(anatomy.blocks[0].neurons, shares, multiple=multiple)
    return keep_counts(anatomy, scores, neurons, groups)


def _blocks(
    anatomy: Anatomy,
    batches: Sequence[Tensor],
    method: str,
    keep: int,
    gate_steps: int,
    seed: int,
    device: torch.device | None,
) -> Cut:
    match method:
        case "random":
            blocks = random_blocks(anatomy, keep, seed)
        case "shortgpt":
            blocks = shortgpt_blocks(list(calibrate(anatomy.model, batches, device=device)), keep)
        case _:
            blocks = foldgpt_blocks(learn_gates(anatomy.model, batches, steps=gate_steps), keep)
    return dataclasses.replace(everything(anatomy), blocks=blocks)


def _modegpt(
    anatomy: Anatomy,
    batches: Sequence[Tensor],
    amounts: Amounts | HeadAmounts,
    ridge: float,
    device: torch.device | None,
) -> Cut:
    """Types I, II and III, each where its width falls; one pass over the batches."""
    first = anatomy.blocks[0]
    pairs, values = first.query_dim // 2, first.value_dim
    if isinstance(amounts, HeadAmounts):
        pairs, values = amounts.pairs, amounts.values
    whole = everything(anatomy)
    neurons = list(whole.neurons)
    weights: dict[int, Tensor] = {}
    kept: dict[int, Tensor] = {}
    factors: dict[int, Values] = {}
    fewer = amounts.neurons < first.neurons
    heads = pairs < first.query_dim // 2 or values < first.value_dim
    for stats in calibrate(anatomy.model, batches, device=device, covariance=fewer, heads=heads):
        index, block = stats.index, anatomy.blocks[stats.index]
        if stats.covariance is not None:
            neurons[index] = highest(leverage_scores(stats.covariance), amounts.neurons)
            down = block.down.weight
            weights[index] = refit_weight(down, stats.covariance, neurons[index], ridge=ridge)
        if stats.heads is not None and pairs < block.query_dim // 2:
            kept[index] = kept_pairs(block, stats.heads, pairs)
        if stats.heads is not None and values < block.value_dim:
            factors[index] = value_factors(block, stats.heads, values)
    return Cut(tuple(neurons), whole.groups, whole.blocks, down_weight=weights, pairs=kept, values=factors)
