"""Weights out of a GGUF file, dequantised row block by row block straight into the wanted type.

Why not transformers' loader alone: it keeps whole tensors in float32 while it converts, parses the token
lists again, and leaves a model that cannot be saved. Architectures whose tensors are stored as they are (or
with the rows of q and k permuted, as `llama` is) are read here with the `gguf` package; all others go through
transformers.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from .gguf_header import GGUFHeader, TensorEntry, tensor_bytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

DIRECT: Final = frozenset({"llama", "qwen2", "qwen3"})
_BLOCK_ELEMENTS: Final = 1 << 21  # dequantised at a time: 8 MB of float32


def read_tensor(header: GGUFHeader, entry: TensorEntry, dtype: torch.dtype) -> torch.Tensor:
    """One tensor of the file in `dtype`, in the file's own row order."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    columns, rows = entry.shape[-1], math.prod(entry.shape[:-1])
    raw = np.memmap(
        header.path, np.uint8, "r", header.data_offset + entry.offset, (rows, tensor_bytes(entry) // rows)
    )
    kind = GGMLQuantizationType(entry.type_id)
    result = torch.empty(rows, columns, dtype=dtype)
    step = max(1, _BLOCK_ELEMENTS // columns)
    for begin in range(0, rows, step):
        values = dequantize(np.asarray(raw[begin : begin + step]), kind)
        # float32 tensors come back as a view of the read-only file, which torch would warn of
        result[begin : begin + step].copy_(
            torch.from_numpy(values if values.flags.writeable else values.copy())
        )
    return result.reshape(entry.shape)


def tensor_names(header: GGUFHeader, skeleton: PreTrainedModel) -> dict[str, str]:
    """transformers' parameter name -> tensor name in the file; parameters tied to another one are left out.

    Raises:
        ValueError: a parameter has no tensor in the file, or one of another shape.
    """
    import gguf

    architecture = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[header.architecture]
    name_map = gguf.get_tensor_name_map(architecture, skeleton.config.get_text_config().num_hidden_layers)
    names = {}
    for name, parameter in skeleton.named_parameters():
        stored = name_map.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored not in header.tensors:
            raise ValueError(f"{header.path} has no tensor for {name}")
        if header.tensors[stored].shape != tuple(parameter.shape):
            raise ValueError(
                f"{stored} has shape {header.tensors[stored].shape}, the model wants {parameter.shape}"
            )
        names[name] = stored
    return names


def read_parameter(
    header: GGUFHeader, names: dict[str, str], config: PretrainedConfig, name: str, dtype: torch.dtype
) -> torch.Tensor:
    """One parameter under its transformers name, rows in transformers' order."""
    value = read_tensor(header, header.tensors[names[name]], dtype)
    if header.architecture == "llama":
        if ".q_proj." in name:
            return _halves_together(value, config.num_attention_heads)
        if ".k_proj." in name:
            return _halves_together(value, config.num_key_value_heads)
    return value


def _halves_together(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rotary pairs (0, 1), (2, 3) of each head back to transformers' order (0, d/2), (1, d/2 + 1)."""
    rows = weight.shape[0] // heads
    return weight.reshape(heads, rows // 2, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def read_state(header: GGUFHeader, skeleton: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All parameters of `skeleton` in `dtype`; peak memory is the result and a few megabytes.

    Raises:
        ValueError: the file's tensors do not fill the model exactly.
    """
    if header.architecture not in DIRECT:
        return _through_transformers(header, skeleton, dtype)
    names = tensor_names(header, skeleton)
    workers = max(
        1, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    )
    with ThreadPoolExecutor(workers) as pool:
        values = pool.map(lambda name: read_parameter(header, names, skeleton.config, name, dtype), names)
        return dict(zip(names, values, strict=True))


def _through_transformers(
    header: GGUFHeader, skeleton: PreTrainedModel, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    from transformers import GgufConfig

    # its progress bar goes to stderr with no switch to turn it off
    with contextlib.redirect_stderr(io.StringIO()):
        loaded = type(skeleton).from_pretrained(
            header.path.parent,
            gguf_file=header.path.name,
            config=skeleton.config,
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),
        )
    wanted = {name for name, _ in skeleton.named_parameters()}
    state = {name: value for name, value in loaded.state_dict().items() if name in wanted}
    if missing := sorted(wanted - set(state)):
        raise ValueError(f"{header.path} has no tensor for {missing[0]}")
    return state
