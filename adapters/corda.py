"""CorDA (arXiv:2406.05223): a start from the weights as the data use them.

With C the second moments of a layer's inputs, W C = U S Vᵀ, so that W = U S (Vᵀ C⁻¹) is a sum in the order of
what the rows make of it. The adapter takes the first r terms (ipm) or the last r (kpm) out of the base
weight: B = U √S, A = √S Vᵀ C⁻¹, each divided by the root of LoRA's scale. C is damped by a hundredth of its
mean diagonal, and divided by that, which shares the size out between A and B and leaves B A as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..recipes.errors import UserError
from .starts import lora_layers

_DAMPING = 0.01
_ADAPTER = "default"


@torch.no_grad()
def start_corda(model: nn.Module, method: str, batches: Sequence[Mapping[str, Tensor]] | None) -> None:
    """Start the LoRA layers of `model`, which must be no change yet, by CorDA; the base weights change.

    method: "ipm" or "kpm". batches: input_ids [B, L], with attention_mask [B, L] where rows are padded; what
    is padding does not count. The moments of all layers are in memory at once, in float32: in² numbers for
    each. A decomposition in float64 follows, one layer after another.

    Raises:
        UserError: there are no rows, a rank is larger than a matrix, or a layer is an embedding.
    """
    if not batches:
        raise UserError(
            "adapter.init_lora_weights: corda looks at training rows first, and there are none.   Use true "
            "in its place"
        )
    layers = list(lora_layers(model))
    for name, layer in layers:
        if _ADAPTER not in layer.lora_A:
            raise UserError(
                f"adapter.init_lora_weights: corda is for linear layers, and {name} is an embedding.\n"
                "  Leave it out of adapter.target_modules, or use init_lora_weights: true"
            )
        most = min(layer.get_base_layer().weight.shape)
        if layer.r[_ADAPTER] > most:
            raise UserError(
                f"adapter.r: corda starts from {layer.r[_ADAPTER]} directions of each matrix, and {name} "
                f"has {most}.\n  adapter.r={most}, or init_lora_weights: true"
            )
    moments = _second_moments(model, layers, batches)
    for (_, layer), moment in zip(layers, moments, strict=True):
        base, scale = layer.get_base_layer(), layer.scaling[_ADAPTER]
        turned = layer.fan_in_fan_out
        weight = base.weight.T if turned else base.weight
        a, b = corda_factors(weight, moment, layer.r[_ADAPTER], method)
        layer.lora_A[_ADAPTER].weight.copy_(a / scale**0.5)
        layer.lora_B[_ADAPTER].weight.copy_(b / scale**0.5)
        left = weight.float() - scale * (layer.lora_B[_ADAPTER].weight @ layer.lora_A[_ADAPTER].weight)
        base.weight.copy_(left.T if turned else left)


def corda_factors(weight: Tensor, moment: Tensor, rank: int, method: str) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank], float64, of `weight` [out, in] for second moments [in, in]."""
    moment = moment.double()
    size = moment.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    damped = moment / size + _DAMPING * torch.eye(len(moment), dtype=torch.float64, device=moment.device)
    u, s, vt = torch.linalg.svd(weight.double() @ damped, full_matrices=False)
    first = 0 if method == "ipm" else len(s) - rank
    terms = slice(first, first + rank)
    root = s[terms].sqrt()
    a = torch.linalg.solve(damped, vt[terms].T * root).T  # C is symmetric
    return a, u[:, terms] * root


def _second_moments(
    model: nn.Module, layers: Sequence[tuple[str, Any]], batches: Sequence[Mapping[str, Tensor]]
) -> list[Tensor]:
    """Sum of xᵀx over the tokens that each layer sees, float32 [in, in]."""
    found: dict[int, Tensor] = {}
    seen: list[Tensor] = []  # which tokens of the running batch are none of the padding

    def look(index: int, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        tokens = inputs[0][seen[0]].float()
        product = tokens.T @ tokens
        found[index] = found[index] + product if index in found else product

    handles = [
        layer.get_base_layer().register_forward_pre_hook(partial(look, index))
        for index, (_, layer) in enumerate(layers)
    ]
    training = model.training
    model.eval()
    try:
        for batch in batches:
            mask = batch.get("attention_mask")
            seen[:] = [torch.ones_like(batch["input_ids"]).bool() if mask is None else mask.bool()]
            model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return [found[index] for index in range(len(layers))]
