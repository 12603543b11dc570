"""`lora_linear` as two operations, forward and backward, that torch.compile keeps whole.

Eager code goes past them, by an autograd function. Neither the mask of dropout nor a dequantised base lives
between the two: the seed and the codes are their arguments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .autocast import computing_dtype
from .lora import Projection, backward_group, forward_group


def lora_linear(x: Tensor, projection: Projection, seed: Tensor | None = None) -> Tensor:
    """As `lora.lora_linear`, which checks the arguments; seed: of the mask, where dropout is at work."""
    dtype = computing_dtype(x)
    weight, bias, a, b = projection.weight, projection.bias, projection.a, projection.b
    if a is None and projection.state is None:  # nothing that the compiler should not see
        return nn.functional.linear(x, weight, bias)
    if a is None:
        seed = None  # of a layer that shares it with another
    tensors, numbers, kind = _taken_apart(projection.state)
    y, _ = lora_linear_op(
        x.to(dtype), weight, bias, a, b, projection.scaling, projection.dropout, seed, tensors, numbers, kind
    )
    output: Tensor = y
    return output


@torch.library.custom_op("shoestring::lora_linear", mutates_args=())
def lora_linear_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    state: Sequence[Tensor],
    numbers: Sequence[int],
    kind: str,
) -> tuple[Tensor, Tensor]:
    """y [..., out] and h [T, r] of x [..., in] in the computing type; h has no gradient.

    seed: int64 [] on the CPU where dropout is at work; state, numbers, kind: `_taken_apart`, of a dense
    weight empty.
    """
    projection = _projection(weight, bias, a, b, scaling, dropout, state, numbers, kind)
    with torch.autocast(x.device.type, enabled=False):
        flat = x.reshape(-1, x.shape[-1])
        (y,), h = forward_group(flat, [projection], None if seed is None else int(seed))
    return y.view(*x.shape[:-1], y.shape[-1]), x.new_empty(flat.shape[0], 0) if h is None else h


@lora_linear_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, scaling: float,
    dropout: float, seed: Tensor | None, state: Sequence[Tensor], numbers: Sequence[int], kind: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = numbers[0] if kind else weight.shape[0]
    rank = 0 if a is None else a.shape[0]
    return x.new_empty(*x.shape[:-1], out), x.new_empty(math.prod(x.shape[:-1]), rank)


@torch.library.custom_op("shoestring::lora_linear_backward", mutates_args=())
def lora_linear_backward_op(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    state: Sequence[Tensor],
    numbers: Sequence[int],
    kind: str,
    wants_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, da and db; what is not wanted or not there is empty, [0]."""
    projection = _projection(weight, None, a, b, scaling, dropout, state, numbers, kind)
    flat = x.reshape(-1, x.shape[-1])
    with torch.autocast(x.device.type, enabled=False):
        dx, ((da, db),) = backward_group(
            flat, None if a is None else h, [grad.reshape(flat.shape[0], -1)], [projection], wants_x,
            None if seed is None else int(seed),
        )  # fmt: skip
    none = x.new_empty(0)
    return (
        none if dx is None else dx.view(x.shape),
        none.clone() if da is None else da,
        none.clone() if db is None else db,
    )


@lora_linear_backward_op.register_fake
def _(
    grad: Tensor, x: Tensor, h: Tensor, weight: Tensor, a: Tensor | None, b: Tensor | None, scaling: float,
    dropout: float, seed: Tensor | None, state: Sequence[Tensor], numbers: Sequence[int], kind: str,
    wants_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        x.new_empty(x.shape if wants_x else (0,)),
        x.new_empty(0) if a is None else a.new_empty(a.shape),
        x.new_empty(0) if b is None else b.new_empty(b.shape),
    )


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _, a, b, scaling, dropout, seed, state, numbers, kind = inputs
    ctx.save_for_backward(x, output[1], weight, a, b, seed, *state)
    ctx.mark_non_differentiable(output[1])
    ctx.settings = scaling, dropout, numbers, kind


def _backward(ctx: Any, grad: Tensor, grad_h: Tensor) -> tuple[Any, ...]:
    x, h, weight, a, b, seed, *state = ctx.saved_tensors
    scaling, dropout, numbers, kind = ctx.settings
    dx, da, db = lora_linear_backward_op(
        grad, x, h, weight, a, b, scaling, dropout, seed, state, numbers, kind, ctx.needs_input_grad[0]
    )
    return (
        dx if ctx.needs_input_grad[0] else None,
        *(None, None),
        da if a is not None and ctx.needs_input_grad[3] else None,
        db if b is not None and ctx.needs_input_grad[4] else None,
        *(None, None, None, [None] * len(state), None, None),
    )


lora_linear_op.register_autograd(_backward, setup_context=_setup)


def _taken_apart(state: Any) -> tuple[list[Tensor], list[int], str]:
    """bitsandbytes' QuantState as tensors, numbers (out, in, block, block of scales) and "nf4 bfloat16"."""
    if state is None:
        return [], [0, 0, 0, 0], ""  # an empty list of numbers would need a gradient of its own
    tensors, blocks = [state.absmax], [state.blocksize, 0]
    if state.nested:
        tensors += [state.offset, state.state2.absmax, state.state2.code]
        blocks[1] = state.state2.blocksize
    return tensors, [*state.shape, *blocks], f"{state.quant_type} {str(state.dtype).removeprefix('torch.')}"


def _projection(
    weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, scaling: float, dropout: float,
    tensors: Sequence[Tensor], numbers: Sequence[int], kind: str,
) -> Projection:  # fmt: skip
    if not kind:
        return Projection(weight, bias, a, b, scaling, dropout)
    from bitsandbytes import functional

    make_state: Any = functional.QuantState  # untyped
    out, width, block, upper_block = numbers
    quant_type, dtype = kind.split()
    rest: dict[str, Any] = {}
    if upper_block:
        absmax, offset, upper, code = tensors
        state2 = make_state(absmax=upper, code=code, blocksize=upper_block, dtype=torch.float32)
        rest = {"offset": offset, "state2": state2}
    else:
        (absmax,) = tensors
    state = make_state(
        absmax=absmax, shape=torch.Size((out, width)), blocksize=block, quant_type=quant_type,
        dtype=getattr(torch, dtype), **rest,
    )  # fmt: skip
    return Projection(weight, bias, a, b, scaling, dropout, state)
