"""Weights of a model's layers streamed from host memory or disk, for models larger than the device."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..recipes.errors import UserError
from .code_rate import cannot_decode
from .coded_layers import CodedLayers
from .layer_layout import lay_out, layer_names
from .layer_tier import open_tier
from .streamed_layer import streamed_forward
from .streamed_model import StreamedLayer, StreamedModel

_TYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def stream_layers(
    model: nn.Module,
    *,
    tier: Literal["host", "disk"],
    folder: Path | None = None,
    buffers: int = 2,
    io: Literal["threads", "io_uring"] | None = None,
    io_threads: int = 4,
    trainable: bool = False,
    coded: bool = False,
    read: Callable[[str], Tensor] | None = None,
) -> StreamedModel:
    """Move the weights of the model's layers to `tier`, from where each layer's come when it runs.

    trainable: all weights of the layers are streamed and written back when they changed; they are stepped
    inside the backward pass (`optimizers.in_backward`). Otherwise the frozen ones are streamed, and what is
    trained in the layers (adapters) stays in memory. A parameter that another layer, the embeddings or the
    head use too stays in memory. buffers: layers in memory at a time; with 3, a changed one is written while
    the next is read. coded: frozen bfloat16 layers lie on the disk in about 11 bits a weight, decoded while
    they are read (`coded_layers`); as they are where the C++ decoder is missing. read: a weight's values by
    its name, where the model has none yet. folder: of the scratch file, for "disk".

    A layer's inside is computed again in the backward pass, so activation checkpointing gains nothing.

    Raises UserError for weights that are not plain floating-point numbers (4 bits) and where there is no
    room, OffloadError where the disk fails.

        streamed = stream_layers(model, tier="disk", folder=Path("/ssd/scratch"))
    """
    chosen = _choose(model, trainable)
    places = lay_out([[(tuple(p.shape), p.dtype) for _, p in layer] for layer in chosen.values()])
    layers = {name: [p for _, p in layer] for name, layer in chosen.items()}
    device = next(iter(layers.values()))[0].device
    halves = any(torch.bfloat16 in place.dtypes for place in places)
    coded = coded and tier == "disk" and not trainable and halves
    lacks = cannot_decode() if coded else None
    opened = open_tier(
        places,
        device,
        tier=tier,
        folder=folder,
        buffers=buffers,
        io=io,
        io_threads=io_threads,
        coded=coded and lacks is None,
    )
    streamed = StreamedModel(model, layers, places, opened, frozen=not trainable)
    try:
        for layer, named in zip(streamed.layers, chosen.values(), strict=True):
            streamed.buffers.put(layer.index, (p.data if read is None else read(name) for name, p in named))
            layer.hide()
            layer.wrap(_forward(layer))
        streamed.buffers.flush()
    except BaseException:
        streamed.close()
        raise
    if isinstance(opened.store, CodedLayers):
        share = opened.store.share
        opened.lines.append(
            f"frozen layers on disk in {16 * share:.1f} of 16 bits a weight, decoded while they are read"
        )
    elif lacks is not None:
        opened.lines.append(f"frozen layers lie on disk as they are, not coded, since {lacks}")
    return streamed


def _forward(layer: StreamedLayer) -> Callable[..., Any]:
    @functools.wraps(layer.module.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return streamed_forward(layer, args, kwargs)

    return forward


def layer_parameters(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Each layer's module and its parameters, with their names in the model; shared ones are left out.

    Raises UserError where no layers are found.
    """
    everywhere = dict(model.named_parameters(remove_duplicate=False))
    uses = Counter(id(parameter) for parameter in everywhere.values())
    try:
        layers = layer_names(everywhere)
    except ValueError as error:
        raise UserError(f"offload.weights  nothing to stream layer by layer: {error}") from error
    return {
        module: [(name, everywhere[name]) for name in names if uses[id(everywhere[name])] == 1]
        for module, names in layers.items()
    }


def _choose(model: nn.Module, trainable: bool) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Of `layer_parameters` those that are streamed."""
    chosen = {}
    for module, parameters in layer_parameters(model).items():
        mine = [(name, p) for name, p in parameters if trainable or not p.requires_grad]
        for name, parameter in mine:
            plain = type(parameter) is nn.Parameter and type(parameter.data) is Tensor
            if not plain or parameter.dtype not in _TYPES:
                raise UserError(
                    f"offload.weights  {name} is held as {type(parameter).__name__} of {parameter.dtype}; "
                    "only plain bfloat16 and float32 weights are streamed.\n"
                    "                 Set model.load_in_4bit=false, or offload.weights=device"
                )
        if mine:
            chosen[module] = mine
    if not chosen:
        raise UserError(
            "offload.weights  no frozen weight is in the layers, so there is nothing to stream.\n"
            "                 For full tuning: stream_layers(..., trainable=True); or offload.weights=device"
        )
    return chosen
