"""Load a model straight into the store of its layers, so that it is never in memory as a whole."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..recipes.errors import UserError
from .streamed_model import StreamedModel, away
from .streamed_weights import layer_parameters, stream_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_KEY = "model.model_name_or_path"
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def load_streamed(
    config: PretrainedConfig,
    read: Callable[[str], Tensor],
    *,
    dtype: torch.dtype,
    tier: Literal["host", "disk"],
    device: torch.device | str = "cpu",
    folder: Path | None = None,
    buffers: int = 2,
    io: Literal["threads", "io_uring"] | None = None,
    io_threads: int = 4,
    trainable: bool = False,
    coded: bool = False,
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
) -> StreamedModel:
    """The causal language model of `config` with its layers on `tier`; in evaluation mode, like a loaded one.

    read: a parameter's values by its name, one at a time: `safetensors_reader(folder)`, or for a GGUF file
    `models.weight_reader(facts)`. In memory are one tensor that was read, the buffers, and what is in no
    layer. Without `trainable` no weight asks for a gradient. Other arguments: see `stream_layers`.

    Raises UserError where the weights do not fit the configuration.
    """
    model = _empty_model(config, dtype, attn_implementation, trust_remote_code)
    inside = {name for layer in layer_parameters(model).values() for name, _ in layer}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}

    def checked(name: str) -> Tensor:
        value = read(name)
        if tuple(value.shape) != shapes[name]:
            raise UserError(
                f"{_KEY}: {name} has shape {list(value.shape)}, config.json says {list(shapes[name])}.\n"
                "  Weights and config.json are of different models. Fetch the model again."
            )
        return value

    device = torch.device(device)
    new = {
        id(parameter): nn.Parameter(
            away(shapes[name], parameter.dtype, device)
            if name in inside
            else checked(name).to(device, parameter.dtype, copy=True),
            requires_grad=trainable,
        )
        for name, parameter in model.named_parameters()
    }
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:  # tied ones stay tied: they were one and become one
                module._parameters[name] = new[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    model.train(False)
    return stream_layers(
        model,
        tier=tier,
        folder=folder,
        buffers=buffers,
        io=io,
        io_threads=io_threads,
        trainable=trainable,
        coded=coded,
        read=checked,
    )


def safetensors_reader(folder: Path) -> Callable[[str], Tensor]:
    """A function from a parameter's name to its values in the safetensors files of `folder`.

    Raises UserError: no such files, or no such tensor in them.
    """
    if (folder / _INDEX).is_file():
        files: dict[str, str] = json.loads((folder / _INDEX).read_text("utf-8"))["weight_map"]
    elif (folder / _SINGLE).is_file():
        from safetensors import safe_open

        with safe_open(folder / _SINGLE, framework="pt") as file:
            files = dict.fromkeys(file.keys(), _SINGLE)
    else:
        raise UserError(
            f"{_KEY}: {folder} holds no safetensors files, and only from such can weights be streamed.\n"
            "  Load the model once and save_pretrained it, or set offload.weights=device"
        )

    def read(name: str) -> Tensor:
        from safetensors import safe_open

        if name not in files:
            raise UserError(
                f"{_KEY}: the weights in {folder} lack {name}, or hold it under another name.\n"
                "  Load the model once and save_pretrained it, or set offload.weights=device"
            )
        # opened for each tensor: the mapping of a whole file would stay in memory as it is read
        with safe_open(folder / files[name], framework="pt") as file:
            value: Tensor = file.get_tensor(name)
        return value

    return read


def _empty_model(
    config: PretrainedConfig, dtype: torch.dtype, attn_implementation: str, trust_remote_code: bool
) -> PreTrainedModel:
    """The model with parameters on the meta device and buffers (rotary frequencies) as they are."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM  # untyped in transformers
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = auto.from_config(
            copy.deepcopy(config),  # which from_config writes into
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )
    model.tie_weights()  # the context made another parameter of each that was tied
    kept = getattr(model, "_keep_in_fp32_modules_strict", None)
    if kept and dtype != torch.float32:
        raise UserError(
            f"offload.weights  {config.model_type} keeps {', '.join(sorted(kept))} in float32, which "
            "streaming does not.\n"
            "                 Set model.dtype=float32, or offload.weights=device"
        )
    return model
