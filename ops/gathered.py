"""The product of gathered rows: the gradient of a weight from a sample of the rows (`wta_crs.py`).

    dW = sum_i g[r_i] x_i^T = G[r]^T X     G [N, out], r [k] indices of rows, X [k, in] -> [out, in]

By PyTorch it is a copy of k rows of G and a product. On a CPU the copy is 2 to 6 % of the time, and copying
and multiplying a cache-sized part after the other takes longer, not shorter: the sum is read and written once
a part. On a GPU the copy moves 4 bytes an element of k x out, 3 to 9 % of the product's time by the bytes,
and takes memory of k x out. The kernel reads the rows where they lie, but then has to multiply as fast as
cuBLAS does. That was timed nowhere yet, so it runs only where SHOESTRING_OPS asks for it by name.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .providers import Provider, choose


def gathered_product(grad: Tensor, rows: Tensor, kept: Tensor, dtype: torch.dtype) -> Tensor:
    """grad [N, out], rows int64 [k] in 0..N-1, kept [k, in] in grad's type -> [out, in] in `dtype`.

    Rows may repeat; without any the result is zero. Not differentiable.
    """
    if torch.compiler.is_compiling():
        product: Tensor = gathered_product_op(grad, rows, kept, dtype)
        return product
    # Tensor cores take 16 bits; what is unmeasured runs by name alone.
    mine: list[Provider] = ["triton"] if grad.dtype in (torch.bfloat16, torch.float16) else []
    if choose("wta_crs", grad.device, [], by_name=mine) == "triton":
        from .kernels.gathered import gathered

        total = torch.empty(grad.shape[1], kept.shape[1], dtype=dtype, device=grad.device)
        gathered(_dense_rows(grad), rows.contiguous(), _dense_rows(kept), total)
        return total
    return reference(grad, rows, kept, dtype)


def reference(grad: Tensor, rows: Tensor, kept: Tensor, dtype: torch.dtype) -> Tensor:
    """The same by its formula."""
    return (grad.index_select(0, rows).t() @ kept).to(dtype)


@torch.library.custom_op("shoestring::gathered_product", mutates_args=())
def gathered_product_op(grad: Tensor, rows: Tensor, kept: Tensor, dtype: torch.dtype) -> Tensor:
    """`gathered_product` as an operation that torch.compile keeps whole."""
    return gathered_product(grad, rows, kept, dtype)


@gathered_product_op.register_fake
def _(grad: Tensor, rows: Tensor, kept: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.new_empty((grad.shape[1], kept.shape[1]), dtype=dtype)


def _dense_rows(matrix: Tensor) -> Tensor:
    """`matrix`, or a copy of it where its columns do not lie side by side."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
