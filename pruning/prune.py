"""Prune a model in one call: calibrate, score, choose, update, remove."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from ..recipes.errors import UserError
from .amounts import Amounts, amounts_for, prunable_parameters
from .anatomy import Anatomy, read_anatomy
from .calibrate import calibrate
from .cfsp import cfsp_counts, cfsp_scores, cfsp_shares, cfsp_weighted_scores
from .cut import Cut, Scores, everything, highest, keep_counts, keep_uniform
from .flap import flap_compensation, flap_counts, flap_scores
from .foldgpt import foldgpt_blocks, learn_gates
from .magnitude import magnitude_scores
from .modegpt import leverage_scores
from .random_choice import random_blocks, random_scores
from .refit import RIDGE, refit_weight
from .remove import remove
from .shortgpt import shortgpt_blocks
from .statistics import BlockStats
from .wanda import wanda_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Method = Literal[
    "random", "magnitude", "wanda", "flap", "cfsp", "cfsp_weighted", "modegpt", "shortgpt", "foldgpt"
]
Widths = Literal["uniform", "per_layer"]
_PARTS: dict[str, tuple[str, ...]] = {
    "random": ("neurons", "groups", "blocks"),
    "magnitude": ("neurons", "groups"),
    "wanda": ("neurons", "groups"),
    "flap": ("neurons", "groups"),
    "cfsp": ("neurons",),
    "cfsp_weighted": ("neurons",),
    "modegpt": ("neurons",),
    "shortgpt": ("blocks",),
    "foldgpt": ("blocks",),
}
_UNEVEN = ("flap", "cfsp", "cfsp_weighted")


@dataclass(frozen=True)
class Pruned:
    """What was done: the cut, the parameters before and after, and a record for `save_pruned`."""

    cut: Cut
    before: int
    after: int
    record: Mapping[str, Any]

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
) -> Pruned:
    """Remove `ratio` of all parameters in place.

    `batches` are token ids [sequences, length] without padding; magnitude and random look at none unless
    `refit` or `compensate` does. `parts` are neurons, groups (of heads), both, or blocks; by default the
    first that the method judges. `refit` fits down_proj again to the neurons that stay (modegpt always does):
    8 · D² bytes and a second pass over the batches. `compensate` puts the removed channels' mean effect into
    biases (FLAP). Refitting looks at the uncentred activations, compensation at their mean: one or the other.
    `ridge` draws a refit towards slicing (refit.py).
    `gate_steps` is for foldgpt, `seed` for random; `device` is where blocks are calibrated (gates are
    learned where the model is).

    Raises:
        UserError: what is asked for does not go together, or does not fit the model.
    """
    chosen = _check(method, tuple(parts or _PARTS[method][:1]) if method in _PARTS else (), widths)
    _check_updates(method, chosen, refit=refit, compensate=compensate, ridge=ridge)
    anatomy = read_anatomy(model)
    before = anatomy.parameters
    amounts = amounts_for(anatomy, ratio, parts=chosen, multiple=multiple, compensate=compensate)
    digest = ""
    if chosen == ("blocks",):
        cut = _blocks(anatomy, batches, method, amounts.blocks, gate_steps, seed, device)
    elif method == "modegpt":
        cut = _modegpt(anatomy, batches, amounts.neurons, ridge, device)
    else:
        stats: list[BlockStats] = []
        if method not in ("random", "magnitude") or compensate:
            stats = list(calibrate(model, batches, device=device))
        scores = _scores(anatomy, stats, method, seed)
        digest = _digest([*scores.neurons, *scores.groups])
        cut = _choose(anatomy, scores, stats, chosen, amounts, ratio, method, widths, multiple)
        if compensate:
            down, o = flap_compensation(anatomy, stats, cut)
            cut = dataclasses.replace(cut, down_bias=down, o_bias=o)
        if refit:
            weights = refit_all(model, batches, cut, ridge=ridge, device=device)
            cut = dataclasses.replace(cut, down_weight=weights)
    remove(model, cut, optimizer=optimizer)
    after = read_anatomy(model).parameters
    record = {
        "method": method,
        "ratio_wanted": ratio,
        "ratio": 1 - after / before,
        "parameters_before": before,
        "parameters": after,
        "parts": list(chosen),
        "widths": widths,
        "multiple": multiple,
        "refit": refit or method == "modegpt",
        "ridge": ridge,
        "compensated": compensate,
        "seed": seed,
        "blocks": list(cut.blocks),
        "neurons": [kept.tolist() for kept in cut.neurons],
        "groups": [kept.tolist() for kept in cut.groups],
        "scores_sha256": digest,
        "calibration_sha256": _digest(batches),
        "calibration_tokens": sum(ids.numel() for ids in batches),
    }
    return Pruned(cut, before, after, record)


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
    anatomy: Anatomy, batches: Sequence[Tensor], keep: int, ridge: float, device: torch.device | None
) -> Cut:
    neurons, weights = [], {}
    for stats in calibrate(anatomy.model, batches, device=device, covariance=True):
        assert stats.covariance is not None  # asked for
        neurons.append(highest(leverage_scores(stats.covariance), keep))
        down = anatomy.blocks[stats.index].down.weight
        weights[stats.index] = refit_weight(down, stats.covariance, neurons[-1], ridge=ridge)
    return dataclasses.replace(everything(anatomy), neurons=tuple(neurons), down_weight=weights)


def _check(method: str, parts: tuple[str, ...], widths: str) -> tuple[str, ...]:
    if method not in _PARTS:
        raise UserError(f"pruning.method: {method} is not one of {', '.join(get_args(Method))}.")
    wrong = sorted(set(parts) - set(_PARTS[method]))
    if wrong:
        raise UserError(
            f"pruning.parts: {method} does not judge {', '.join(wrong)}; "
            f"allowed are {', '.join(_PARTS[method])}."
        )
    if widths not in get_args(Widths):
        raise UserError(f"pruning.widths: {widths} is not one of {', '.join(get_args(Widths))}.")
    if widths == "per_layer" and method not in _UNEVEN:
        raise UserError(
            f"pruning.widths: {method} has no rule for widths per layer; {', '.join(_UNEVEN)} have.\n"
            "  Use widths: uniform."
        )
    return tuple(sorted(set(parts)))


def _check_updates(
    method: str, parts: tuple[str, ...], *, refit: bool, compensate: bool, ridge: float
) -> None:
    if not 0 < ridge < float("inf"):
        raise UserError(
            f"pruning.ridge: {ridge} is not possible; allowed is a number above 0, such as {RIDGE}."
        )
    if refit and (compensate or "neurons" not in parts):
        raise UserError(
            "pruning.refit: it fits down_proj to fewer neurons, so parts needs neurons, and it already "
            "carries their mean.\n  Leave out refit or compensate."
        )
    if compensate and (parts == ("blocks",) or method == "modegpt"):
        raise UserError(
            f"pruning.compensate: {method} on {', '.join(parts)} leaves no channels' means to put into a "
            "bias.\n  Leave it out."
        )


def _digest(tensors: Sequence[Tensor]) -> str:
    """SHA-256 of shapes and values."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(str((tuple(tensor.shape), tensor.dtype)).encode())
        total.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()
