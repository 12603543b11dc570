"""From an adapted model back to a plain one, and how close two models' logits are."""

from __future__ import annotations

import importlib
import math
import warnings
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_COMPARED_TOGETHER = 1 << 20  # logits whose probabilities are in memory together: 4 MB a float32 copy

# Largest mean divergence (nats), smallest share of equal top tokens after one rounding of the merged weights.
# SmolLM2-135M in bfloat16 gave 0.0025 to 0.004 and 0.92 or more on 60 tokens.
_TOLERANCE = {torch.float32: (1e-5, 0.99), torch.bfloat16: (1e-2, 0.85), torch.float16: (1e-3, 0.95)}


@torch.no_grad()
def merge_in_place(model: Any) -> PreTrainedModel:
    """The adapter added into the weights, and the plain transformers model that was inside.

    Each layer is merged in float32 and rounded once to its own type. A 4-bit base is dequantised first (to
    the type it computed in, so the merge starts from what the adapter saw) and stays so: rounding back to 4
    bits would lose the update. PiSSA and its like are safe: their changed base and the adapter add up to the
    trained model.

    Raises:
        ValueError: merged weights are not finite.
    """
    if not hasattr(model, "peft_config"):
        plain: PreTrainedModel = model
        return plain

    inner = model.get_base_model()
    dtype = _compute_dtype(inner)
    if getattr(inner, "is_quantized", False):
        _dequantise(inner, dtype)
    merge_layers(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        merged: PreTrainedModel = model.merge_and_unload()
    for parameter in merged.parameters():  # modules_to_save were trained in float32
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(True)
    return merged


@torch.no_grad()
def merge_layers(module: torch.nn.Module) -> None:
    """Merge the PEFT layers inside `module` that are not merged yet, each in float32 and rounded once."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        if layer.merged:
            continue
        base = layer.get_base_layer()
        tensors = [tensor for tensor in (base.weight, getattr(base, "bias", None)) if tensor is not None]
        stored = [tensor.data for tensor in tensors]
        for tensor in tensors:
            tensor.data = tensor.data.float()
        _plain_merge(type(layer))(layer, safe_merge=True)
        merged = [tensor for tensor in (base.weight, getattr(base, "bias", None)) if tensor is not None]
        for tensor, place in zip(merged, stored, strict=True):
            # Where it was: a new place for each takes the model's size again, and leaves as much in holes.
            tensor.data = place.copy_(tensor.data)


def _plain_merge(kind: type[Any]) -> Any:
    """The merge of a layer whose base has ordinary weights.

    After dequantising, a PEFT layer made for bitsandbytes holds an ordinary linear one, and its own merge
    would look for packed weights; that of the same method's plain layer is right. What counts is the class
    that has the merge: the layer's own may be a fused one that is made from it.
    """
    home = next(one for one in kind.__mro__ if "merge" in vars(one)).__module__
    if home.endswith(".bnb"):
        return importlib.import_module(home.removesuffix("bnb") + "layer").Linear.merge
    return kind.merge


def _compute_dtype(model: Any) -> torch.dtype:
    """The type of the frozen weights that are not quantised."""
    quantization = getattr(model.config, "quantization_config", None)
    if quantization is not None:
        dtype: torch.dtype = quantization.bnb_4bit_compute_dtype
        return dtype
    counts: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            counts[parameter.dtype] += parameter.numel()
    return counts.most_common(1)[0][0]


def _dequantise(model: Any, dtype: torch.dtype) -> None:
    """bitsandbytes' layers become plain ones, and nothing says any more that the model was quantised."""
    from transformers.utils import logging

    logging_untyped: Any = logging
    level = logging_untyped.get_verbosity()
    logging_untyped.set_verbosity_error()  # it warns of the type that is asked for here
    try:
        model.dequantize(dtype=dtype)
    finally:
        logging_untyped.set_verbosity(level)
    for module in model.modules():  # PEFT's layers remember how to unpack what is packed no more
        if getattr(module, "quantization_backend", None) is not None:
            module.quantization_backend = None


@torch.no_grad()
def compare_logits(
    a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype | None = None
) -> dict[str, float | bool]:
    """How far logits `b` are from `a`, both [..., vocabulary].

    Returns max_abs, mean_kl (nats, of softmax(a) from softmax(b)), top1_agreement (share of positions where
    b's top token is a's, or in a within a tenth of that one's probability), the tolerances for `dtype`
    (the type that the weights were rounded to; default: of `a`), and `within_tolerance`: mean_kl and
    top1_agreement both inside theirs.
    """
    kl_limit, agreement_limit = _TOLERANCE[dtype or a.dtype]
    vocabulary = a.shape[-1]
    rows = max(1, _COMPARED_TOGETHER // vocabulary)
    first, second = a.reshape(-1, vocabulary), b.reshape(-1, vocabulary)
    starts = range(0, len(first), rows)
    found = [_compare(first[start : start + rows], second[start : start + rows]) for start in starts]
    divergence, agrees, apart = (torch.cat(parts) for parts in zip(*found, strict=True))
    mean_kl, agreement = float(divergence.mean()), float(agrees.float().mean())
    return {
        "max_abs": float(apart.max()),
        "mean_kl": mean_kl,
        "top1_agreement": agreement,
        "mean_kl_tolerance": kl_limit,
        "top1_tolerance": agreement_limit,
        "within_tolerance": mean_kl <= kl_limit and agreement >= agreement_limit,
    }


def _compare(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of [n, vocabulary] logits, [n] each: divergence, whether the top token agrees, largest difference."""
    first, second = a.float(), b.float()
    log_p, log_q = first.log_softmax(-1), second.log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    # Where two words are about as likely, rounding decides which is first: that is no disagreement.
    chosen = log_p.gather(-1, second.argmax(-1, keepdim=True)).squeeze(-1)
    return divergence, chosen >= log_p.amax(-1) + math.log(0.9), (first - second).abs().amax(-1)
