"""Ranks of LoRA by how much each decoder layer does, at the number of parameters of one rank for all.

A layer that hardly turns its input needs little adapting: layer l of score s_l gets the rank r s_l / mean(s),
rounded so that the sum of all parameters stays what it was, and at least 1. Two scores of a layer's input x
and output y, over tokens:

    block_influence    mean of 1 - cos(x, y)          ShortGPT, arXiv:2403.03853
    angular_distance   mean of arccos(cos(x, y)) / pi CFSP, arXiv:2409.13199

CFSP shares the capacity of its recovery adapters out by importance and states no rule; the rule here is ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..offload.activations import decoder_layers
from ..recipes.errors import UserError

if TYPE_CHECKING:
    from peft import LoraConfig

Score = Literal["block_influence", "angular_distance"]


@torch.no_grad()
def layer_scores(model: Any, batches: Sequence[Mapping[str, Tensor]], score: Score) -> list[float]:
    """The score of each decoder layer over the tokens of `batches`, in one forward pass without gradients.

    batches: input_ids [B, L] and attention_mask, whose zeros are left out. Sums are in float64.

    Raises:
        UserError: no batches, or the model's decoder is no plain list of layers.
    """
    if not batches:
        raise UserError(
            f"adapter.rank_allocation: {score} looks at training rows first, and there are none.   Use "
            "uniform in its place"
        )
    try:
        layers = decoder_layers(model)
    except ValueError as error:
        raise UserError(
            f"adapter.rank_allocation: {score} needs one list of decoder layers: {error}.   Use uniform"
        ) from None
    sums = [torch.zeros((), dtype=torch.float64) for _ in layers]
    kept: list[Tensor | None] = [None]
    tokens = 0

    def hook(place: int) -> Any:
        def measure(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            after = output[0] if isinstance(output, tuple) else output
            values = turned(before.double(), after.double(), score)
            mask = kept[0]
            sums[place] += (values if mask is None else values[mask.bool()]).sum().cpu()

        return measure

    hooks = [layer.register_forward_hook(hook(i), with_kwargs=True) for i, layer in enumerate(layers)]
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            mask = batch.get("attention_mask")
            kept[0] = mask
            tokens += batch["input_ids"].numel() if mask is None else int(mask.sum())
            model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False)
    finally:
        for one in hooks:
            one.remove()
        model.train(was_training)
    return [float(total / max(tokens, 1)) for total in sums]


def turned(before: Tensor, after: Tensor, score: Score) -> Tensor:
    """How far each vector of `after` [..., d] is turned from that of `before`, [...]."""
    cosine = nn.functional.cosine_similarity(before, after, dim=-1, eps=1e-30).clamp(-1, 1)
    return 1 - cosine if score == "block_influence" else cosine.arccos() / torch.pi


def share_out(scores: Sequence[float], costs: Sequence[int], r: int) -> list[int]:
    """A rank of at least 1 for each layer, near r * score / mean, with the parameters of rank r everywhere.

    costs: parameters of one rank in each layer. The mean is weighted by them. Ranks are rounded down and
    what is left goes to the largest remainders; with unequal costs a part of one rank may be left over.
    """
    if not sum(scores) > 0:
        return [r] * len(scores)
    budget = r * sum(costs)
    ranks = [1] * len(scores)
    wanted = [0.0] * len(scores)
    free = set(range(len(scores)))
    while True:  # layers that would get less than 1 take 1, and the others share what is left
        left = budget - sum(costs[i] for i in range(len(scores)) if i not in free)
        total = sum(scores[i] * costs[i] for i in free)
        for i in free:
            wanted[i] = left * scores[i] / total
        low = {i for i in free if wanted[i] < 1}
        if not low:
            break
        free -= low
    for i in free:
        ranks[i] = int(wanted[i])
    spare = budget - sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
    # by remainder; of equal ones, the first layer
    for i in sorted(free, key=lambda i: (ranks[i] - wanted[i], i)):
        if costs[i] <= spare:
            ranks[i] += 1
            spare -= costs[i]
    return ranks


def allocate(
    config: LoraConfig,
    model: Any,
    targeted: Sequence[str],
    batches: Sequence[Mapping[str, Tensor]],
    score: Score,
) -> list[int]:
    """Set `rank_pattern` and `alpha_pattern` of `config` by the scores of the layers; the ranks.

    The scale of each update stays: alpha / r, or alpha / sqrt(r) with rsLoRA. Adapted modules outside the
    decoder layers keep `r`. targeted: full names of the modules that get an adapter.
    """
    scores = layer_scores(model, batches, score)
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    prefixes = [names[id(layer)] for layer in decoder_layers(model)]
    costs = [sum(_cost(modules[name]) for name in targeted if name.startswith(f"{p}.")) for p in prefixes]
    chosen = [i for i, cost in enumerate(costs) if cost]
    ranks = share_out([scores[i] for i in chosen], [costs[i] for i in chosen], config.r)
    scale = 0.5 if config.use_rslora else 1.0
    patterns = {rf"{re.escape(prefixes[i])}\..*": rank for i, rank in zip(chosen, ranks, strict=True)}
    config.rank_pattern = {name: rank for name, rank in patterns.items() if rank != config.r}
    config.alpha_pattern = {
        name: config.lora_alpha * (rank / config.r) ** scale for name, rank in config.rank_pattern.items()
    }
    return ranks


def _cost(module: Any) -> int:
    """Parameters of one rank of LoRA on a linear layer; a 4-bit one says its shape as a plain one does."""
    if isinstance(module, nn.Linear):
        return module.in_features + module.out_features
    return sum(int(size) for size in module.weight.shape)
