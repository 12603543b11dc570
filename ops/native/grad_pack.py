"""The pass over gradients in C++ (`grad_pack.cpp`)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ..grad_pack import KINDS, new_table
from . import library


def pack(flat: Sequence[Tensor], target: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """float32 [blocks]: sums of squares and largest of each block of tensors without holes."""
    table = new_table(flat, target)  # which nobody waits for here: kept ones would pile up
    blocks = len(table.owner)
    sums, tops = torch.empty(2, blocks, dtype=torch.float32, device="cpu")
    library().shoestring_grad_pack(
        ctypes.c_void_p(table.rows.data_ptr()),
        ctypes.c_void_p(table.owner.data_ptr()),
        ctypes.c_int64(table.rows.shape[1]),
        ctypes.c_int64(blocks),
        ctypes.c_void_p(sums.data_ptr()),
        ctypes.c_void_p(tops.data_ptr()),
        ctypes.c_void_p(0 if target is None else target.data_ptr()),
        ctypes.c_int64(-1 if target is None else KINDS[target.dtype]),
        ctypes.c_float(1.0 if scale is None else float(scale)),
        ctypes.c_int32(scale is not None),
        ctypes.c_int64(torch.get_num_threads()),
    )
    return sums, tops
