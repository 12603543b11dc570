"""FoldGPT (Liu et al., arXiv 2407.00928): a learned gate for each block; neighbours share.

The abstract fixes the idea, not its numbers. Here block l becomes x + g_l · (block(x) − x) with g_l = 1 at
first; the gates alone are trained, together, on the tokens' cross entropy + penalty · mean |g|: a gate falls
when the loss can do without its block, given the other gates. Sharing copies the linear weights of the first
block of a group into the others and leaves each its norms. Plain files hold the copies: it saves bytes only
for a loader that knows of the sharing, and it needs training afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..ops.cross_entropy import cross_entropy_sum
from ..recipes.errors import UserError
from .anatomy import Anatomy, read_anatomy
from .shortgpt import highest_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def learn_gates(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    *,
    steps: int,
    rate: float = 0.02,
    penalty: float = 1.0,
) -> list[float]:
    """Gates of the blocks after `steps` of Adam over `batches` (ids [sequences, length]) in turn.

    The whole model is on its device; a step keeps the activations of one batch. Weights, what
    of them is trained, and the model's mode are as before.

    Raises:
        UserError: no batch has two tokens to predict from.
    """
    anatomy = read_anatomy(model)
    if not batches or any(ids.shape[1] < 2 for ids in batches):
        raise UserError(
            "pruning: gates are learned from sequences of at least two tokens; a batch has fewer."
        )
    device = anatomy.base.embed_tokens.weight.device
    gates = torch.ones(len(anatomy.blocks), dtype=torch.float32, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([gates], lr=rate)
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = model.training
    hooks = [
        block.layer.register_forward_hook(_gated(gates, index)) for index, block in enumerate(anatomy.blocks)
    ]
    model.requires_grad_(False)
    model.train(False)
    try:
        with torch.enable_grad():
            for step in range(steps):
                optimizer.zero_grad()
                loss = _loss(anatomy, batches[step % len(batches)].to(device))
                (loss + penalty * gates.abs().mean()).backward()  # type: ignore[no-untyped-call]  # torch's
                optimizer.step()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, trained in wanted:
            parameter.requires_grad_(trained)
        model.train(training)
    learned: list[float] = gates.detach().tolist()
    return learned


def foldgpt_blocks(gates: Sequence[float], keep: int) -> tuple[int, ...]:
    """The `keep` blocks of largest |gate|, ascending."""
    return highest_blocks([abs(gate) for gate in gates], keep)


@torch.no_grad()
def share_blocks(model: PreTrainedModel, size: int) -> list[tuple[int, ...]]:
    """Give every `size` adjacent blocks the linear weights and biases of their first; norms stay. The groups.

    Materialised: each block keeps tensors of its own. Blocks have equal shapes.

    Raises:
        UserError: size below 2, or blocks of different shapes.
    """
    anatomy = read_anatomy(model)
    layers = len(anatomy.blocks)
    if not 2 <= size <= layers:
        raise UserError(f"pruning: {size} blocks cannot share weights; allowed is 2 to {layers}.")
    groups = [tuple(range(start, min(start + size, layers))) for start in range(0, layers, size)]
    for first, *others in groups:
        source = _linears(anatomy.blocks[first].layer)
        for other in others:
            for linear, target in zip(source, _linears(anatomy.blocks[other].layer), strict=True):
                if linear.weight.shape != target.weight.shape:
                    raise UserError(f"pruning: blocks {first} and {other} differ in shape and cannot share.")
                target.load_state_dict(linear.state_dict())
    return groups


def _linears(layer: nn.Module) -> list[nn.Linear]:
    return [module for module in layer.modules() if isinstance(module, nn.Linear)]


def _gated(gates: Tensor, index: int) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return inputs[0] + gates[index].to(output.dtype) * (output - inputs[0])

    return hook


def _loss(anatomy: Anatomy, ids: Tensor) -> Tensor:
    """Mean cross entropy of the next tokens."""
    model: Any = anatomy.model
    head, config = model.lm_head, model.config
    hidden = anatomy.base(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    labels = ids[:, 1:].flatten()
    softcap = getattr(config, "final_logit_softcapping", None)
    return cross_entropy_sum(hidden, head.weight, labels, bias=head.bias, softcap=softcap) / len(labels)
