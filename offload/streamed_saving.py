"""Write a streamed model as a folder that plain transformers loads, one layer in memory at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .streamed_model import StreamedModel


def save_streamed(streamed: StreamedModel, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """config.json and safetensors files, one for each layer and one for the rest, in `dtype` or as they are.

    Memory beside the model's own: the weights of the largest layer, or of all that is in none. An adapter is
    merged before (see docs/streaming.md). ValueError: the model still has one.
    """
    model: Any = streamed.model
    if hasattr(model, "peft_config"):
        raise ValueError("the model has an adapter: merge it layer by layer and unload it first")
    folder.mkdir(parents=True, exist_ok=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    persistent = model.state_dict().keys()
    rest: dict[str, Tensor] = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    with streamed.mapped() as stored:
        rest |= {name: p.data for name, p in model.named_parameters() if p not in stored}
        count = len(streamed.layers) + 1
        where: dict[str, str] = {}
        total = 0
        for number in range(count):
            part = rest
            if number:
                layer = streamed.layers[number - 1]
                part = {names[id(p)]: stored[p] for p in layer.parameters}
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            total += _write(folder / file, part, dtype)
            where |= dict.fromkeys(part, file)
            part.clear()
        del stored
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    if dtype is not None:
        model.config.dtype = dtype
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _write(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype | None) -> int:
    """Bytes of the tensors in the file."""
    from safetensors.torch import save_file

    cast = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None, copy=True)
        for name, tensor in tensors.items()
    }
    save_file(cast, path, metadata={"format": "pt"})
    return sum(tensor.nbytes for tensor in cast.values())
