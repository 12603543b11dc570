"""One forward pass over calibration tokens, block by block, that gathers what the methods score by.

The hidden states of all batches lie on the host, one block at a time is on the device. Host: tokens · d
values of the model's type (replaced in place, block after block), and of each block that the caller keeps
16 · (D + G·g·h) bytes, with `covariance` 8 · D² more, with `heads` 8 · G·h · (h + g + 1) more. Device: one
block, one batch's activations inside it, some copies of 4096 rows of D in float64, and that block's
statistics. The blocks' masks and rotations are kept once for each shape of batch.

All blocks see what the unpruned model computes: every method here decides before anything is removed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..recipes.errors import UserError
from .anatomy import Anatomy, Block, read_anatomy
from .head_sums import HeadSums
from .statistics import ROWS, BlockStats, Channels

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HOST = torch.device("cpu")


def calibrate(
    model: PreTrainedModel,
    batches: Iterable[Tensor],
    *,
    device: torch.device | None = None,
    covariance: bool = False,
    heads: bool = False,
) -> Iterator[BlockStats]:
    """Statistics of one block after the other, first to last.

    `batches` are token ids, int64 [sequences, length] without padding. `device` computes, by default the one
    that the model is on; each block comes back to where it was. With `covariance`, take each block's
    statistics and let go of them before the next: 8 · D² bytes each. `heads` adds what modegpt_heads.py asks
    about q, k and v.

    Raises:
        UserError: no batches, or the model's blocks do not call their projections as modules.
    """
    anatomy = read_anatomy(model)
    hidden, arguments, sequences = _enter(anatomy, list(batches), device)
    for index, block in enumerate(anatomy.blocks):
        arguments_here = {shape: given[index] for shape, given in arguments.items()}
        yield _run_block(block, index, hidden, arguments_here, sequences, device, covariance, heads)


@torch.no_grad()
def _enter(
    anatomy: Anatomy, batches: Sequence[Tensor], device: torch.device | None
) -> tuple[list[Tensor], dict[tuple[int, ...], list[dict[str, Any]]], int]:
    """Hidden states before the first block, on the host, and what the model hands to each block.

    The model's own forward is run with blocks that return their input: embedding, scale, masks and rotations
    are then those of the installed transformers, whatever the family.
    """
    if not batches or any(ids.ndim != 2 or ids.numel() == 0 for ids in batches):
        shapes = [tuple(ids.shape) for ids in batches]
        raise UserError(
            f"pruning: calibration needs batches of token ids [sequences, length], given were {shapes}.\n"
            "  Give at least one sequence; 128 sequences of 1024 tokens are usual."
        )
    hidden = []
    arguments: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    where = next(anatomy.base.embed_tokens.parameters()).device
    for ids in batches:
        with _recording(anatomy.blocks) as (states, given):
            anatomy.base(input_ids=ids.to(where), use_cache=False)
        hidden.append(states[0].to(HOST))
        if tuple(ids.shape) not in arguments:
            arguments[tuple(ids.shape)] = [_moved(each, device or where) for each in given]
    return hidden, arguments, sum(len(ids) for ids in batches)


@contextmanager
def _recording(blocks: Sequence[Block]) -> Iterator[tuple[list[Tensor], list[dict[str, Any]]]]:
    """Blocks that note what they are given and return their input."""
    states: list[Tensor] = []
    given: list[dict[str, Any]] = []

    def forward(hidden_states: Tensor, **arguments: Any) -> Tensor:
        if not states:
            states.append(hidden_states)
        given.append(arguments)
        return hidden_states

    for block in blocks:
        block.layer.forward = forward
    try:
        yield states, given
    finally:
        for block in blocks:
            del block.layer.forward


@torch.no_grad()
def _run_block(
    block: Block,
    index: int,
    hidden: list[Tensor],
    arguments: dict[tuple[int, ...], dict[str, Any]],
    sequences: int,
    device: torch.device | None,
    covariance: bool,
    with_heads: bool,
) -> BlockStats:
    """Replace `hidden` by the block's outputs; what was seen on the way."""
    home = block.down.weight.device
    place = device or home
    was_training = block.layer.training
    block.layer.to(place).eval()
    seen: dict[str, Tensor] = {}
    hooks = [
        linear.register_forward_pre_hook(_note(seen, name))
        for name, linear in (("mlp", block.down), ("attention", block.o))
    ]
    mlp, attention = (Channels.empty(linear.in_features, place) for linear in (block.down, block.o))
    heads = HeadSums(block, place) if with_heads else None
    gram = (
        torch.zeros(block.neurons, block.neurons, dtype=torch.float64, device=place) if covariance else None
    )
    angles = influence = torch.zeros((), dtype=torch.float64, device=place)
    try:
        for number, before in enumerate(hidden):
            x = before.to(place)
            y = block.layer(x, **arguments[tuple(before.shape[:2])])
            if set(seen) != {"mlp", "attention"}:
                raise UserError(
                    f"pruning: layer {index} computes without calling down_proj or o_proj.\n"
                    "  Calibrate the plain model, before use_fused and other replacements."
                )
            inside = seen.pop("mlp").flatten(0, -2)
            mlp.add(inside)
            attention.add(seen.pop("attention").flatten(0, -2))
            if gram is not None:
                for rows in torch.split(inside, ROWS):
                    gram.addmm_(rows.double().t(), rows.double())
            cosine = nn.functional.cosine_similarity(x.double(), y.double(), dim=-1).clamp(-1.0, 1.0)
            angles = angles + cosine.arccos().sum() / torch.pi
            influence = influence + (1 - cosine).sum()
            hidden[number] = y.to(HOST)
    finally:
        for hook in [*hooks, *(heads.hooks if heads is not None else ())]:
            hook.remove()
        block.layer.to(home).train(was_training)
    tokens = mlp.count
    return BlockStats(
        index,
        sequences,
        mlp.to(HOST),
        attention.to(HOST),
        float(angles) / tokens,
        float(influence) / tokens,
        None if gram is None else gram.to(HOST),
        None if heads is None else heads.result(),
    )


def _note(seen: dict[str, Tensor], name: str) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[name] = inputs[0]

    return hook


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors inside dicts and tuples on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(each, device) for key, each in value.items()}
    if isinstance(value, tuple):
        return tuple(_moved(each, device) for each in value)
    return value
