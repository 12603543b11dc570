"""Types of tensors in a GGUF file, and the way of a parameter's rows into them, some megabytes at a time.

Matrices get the wanted type, vectors (norms, biases) float32. With 4 or 5 bits the embedding and the head are
stored as q8_0, since every token goes through both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from ..recipes.errors import UserError
from .gguf_arch import Placed

QUANTIZATIONS: Final = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
    "q5_1": "MOSTLY_Q5_1",
    "q5_0": "MOSTLY_Q5_0",
    "q4_1": "MOSTLY_Q4_1",
    "q4_0": "MOSTLY_Q4_0",
}
"""What the package gguf can compute, and its LlamaFileType. llama.cpp makes K-quants of an f16 file."""
_KEPT_FINER: Final = ("token_embd.weight", "output.weight")
_BLOCK_ELEMENTS: Final = 1 << 21  # converted at a time: 8 MB of float32
_LARGEST_HALF: Final = 65504.0


def check_quantization(quantize: str) -> None:
    """Refuse a type that cannot be written.

    Raises:
        UserError: with what is allowed, and how K-quants are made.
    """
    if quantize in QUANTIZATIONS:
        return
    hint = ""
    if "_k" in quantize.lower() or quantize.lower().startswith("iq"):
        hint = f"\n  llama.cpp makes it of an f16 file: llama-quantize model-f16.gguf model.gguf {quantize}"
    elif quantize.lower() in QUANTIZATIONS:
        hint = f"   Did you mean {quantize.lower()} ?"
    raise UserError(f"--quantize {quantize} is unknown.  Allowed: {', '.join(QUANTIZATIONS)}{hint}")


def type_of(tensor: Placed, quantize: str) -> Any:
    """A GGMLQuantizationType."""
    import gguf

    if len(tensor.shape) < 2:
        quantize = "f32"
    elif quantize[:2] in ("q4", "q5") and tensor.name in _KEPT_FINER:
        quantize = "q8_0"
    return gguf.GGMLQuantizationType[quantize.upper()]


def block_size(kind: Any) -> int:
    """Numbers that are quantised together, of a GGMLQuantizationType."""
    import gguf

    return int(gguf.GGML_QUANT_SIZES[kind][0])


def check_widths(tensors: Sequence[Placed], quantize: str) -> None:
    """Refuse rows that blocks of the type `quantize` do not fill.

    Raises:
        UserError: naming the first such tensor, its width and the fix.
    """
    for tensor in tensors:
        block = block_size(type_of(tensor, quantize))
        if tensor.shape[-1] % block:
            raise UserError(
                f"gguf: {quantize} stores blocks of {block} numbers, and rows of {tensor.name} "
                f"({tensor.source}) have {tensor.shape[-1]}.\n"
                f"  Prune with multiple={block}, or write f16, bf16 or f32: --quantize f16"
            )


def write_tensor(writer: Any, file: Any, tensor: Placed, weight: Tensor, quantize: str) -> float:
    """Write one tensor; its relative error."""
    from gguf import quants

    if tuple(weight.shape) != tensor.shape:
        raise UserError(
            f"gguf: {tensor.source} has the shape {list(weight.shape)}, and the config wants "
            f"{list(tensor.shape)}.\n  The weights belong to another config.json; fetch the model again."
        )
    kind = type_of(tensor, quantize)
    written, off, size = 0, 0.0, 0.0
    for rows in _rows(tensor, weight):
        _check_values(rows, tensor, kind.name)
        stored = quants.quantize(rows, kind)
        difference = quants.dequantize(stored, kind) - rows
        off += float(np.square(difference, dtype=np.float64).sum())
        size += float(np.square(rows, dtype=np.float64).sum())
        file.write(np.ascontiguousarray(stored).data)
        written += stored.nbytes
    writer.write_padding(file, written)
    return math.sqrt(off / size) if size else 0.0


def _rows(tensor: Placed, weight: Tensor) -> Iterator[np.ndarray[Any, np.dtype[np.float32]]]:
    """float32 blocks of rows in the file's order, ready to be quantised."""
    table = weight.reshape(-1, tensor.shape[-1]) if weight.ndim > 1 else weight.reshape(1, -1)
    order = tensor.row_order()
    if order is not None and weight.ndim == 1:
        table, order = weight[torch.from_numpy(order).to(weight.device)].reshape(1, -1), None
    step = max(1, _BLOCK_ELEMENTS // table.shape[1])
    for begin in range(0, table.shape[0], step):
        part = table[begin : begin + step]
        if order is not None:
            part = table[torch.from_numpy(order[begin : begin + step]).to(table.device)]
        values = part.to("cpu", torch.float32)
        if tensor.add or tensor.scale != 1.0:
            values = (values + tensor.add) * tensor.scale
        yield values.contiguous().numpy()


def _check_values(rows: np.ndarray[Any, np.dtype[np.float32]], tensor: Placed, kind: str) -> None:
    largest = float(np.abs(rows).max(initial=0.0))
    if not math.isfinite(largest):
        raise UserError(f"gguf: {tensor.source} holds values that are not finite.   The run diverged?")
    if kind == "F16" and largest > _LARGEST_HALF:
        raise UserError(
            f"gguf: {tensor.source} holds {largest:.3g}, and f16 ends at {_LARGEST_HALF:.0f}.\n"
            "  Write bf16 or f32: --quantize bf16"
        )
