"""The gated feed-forward block of Llama's kind, SwiGLU (Shazeer, arXiv 2002.05202), with less memory.

    y = down(silu(gate(x)) * up(x))
    z = silu(g) * u,   du = dz * silu(g),   dg = dz * u * silu'(g)

`gated_mlp` runs the whole block with frozen projections (with or without LoRA) as one operation and keeps x,
g and u: silu(g) and z are computed again in backward. `swiglu` is the middle alone, for projections that are
trained themselves. Plain autograd keeps silu(g) and z as well: two tensors of the intermediate size a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .autocast import computing_dtype
from .lora import Projection, backward_group, check_frozen, forward_group, projection_of
from .lora import reference as linear_reference


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; both of one shape and type."""
    output: Tensor = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]  # torch has no types here
    return output


def gated_mlp(x: Tensor, gate: Projection, up: Projection, down: Projection) -> Tensor:
    """x [..., H] -> [..., H]; gradients reach x and the adapters. Raises ValueError for a trained base."""
    check_frozen(gate, up, down)
    output: Tensor = _GatedMLP.apply(  # type: ignore[no-untyped-call]  # torch has no types here
        x,
        *gate.tensors,
        *up.tensors,
        *down.tensors,
        (gate.scaling, up.scaling, down.scaling),
    )
    return output


def reference(x: Tensor, gate: Projection, up: Projection, down: Projection) -> Tensor:
    """The same by its formula."""
    return linear_reference(nn.functional.silu(linear_reference(x, gate)) * linear_reference(x, up), down)


def forward(module: Any, x: Tensor) -> Tensor:
    """Forward of a module with gate_proj, up_proj, down_proj and a SiLU: the one dispatch point."""
    gate, up, down = (projection_of(getattr(module, f"{name}_proj")) for name in ("gate", "up", "down"))
    if gate is not None and up is not None and down is not None:
        return gated_mlp(x, gate, up, down)
    output: Tensor = module.down_proj(swiglu(module.gate_proj(x), module.up_proj(x)))
    return output


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), nn.functional.silu(gate).mul_(grad)


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        tensors, scalings = rest[:12], rest[12]
        dtype = computing_dtype(x)
        gate, up, down = _projections(tensors, scalings)
        with torch.autocast(x.device.type, enabled=False):
            flat = x.reshape(-1, x.shape[-1]).to(dtype)
            (g, u), h = forward_group(flat, [gate, up])
            z = nn.functional.silu(g).mul_(u)
            (y,), h_down = forward_group(z, [down])
        ctx.save_for_backward(flat, g, u, h, h_down, *tensors)
        ctx.scalings, ctx.shape, ctx.x_dtype = scalings, x.shape, x.dtype
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        flat, g, u, h, h_down, *tensors = ctx.saved_tensors
        gate, up, down = _projections(tensors, ctx.scalings)
        grad = grad_output.reshape(-1, grad_output.shape[-1])
        silu = nn.functional.silu(g)
        z = silu * u
        dz, ((da_down, db_down),) = backward_group(z, h_down, [grad], [down], True)
        assert dz is not None
        du = silu.mul_(dz)
        dg = torch.ops.aten.silu_backward(dz.mul_(u), g)
        dx, ((da_gate, db_gate), (da_up, db_up)) = backward_group(
            flat, h, [dg, du], [gate, up], ctx.needs_input_grad[0]
        )
        dx = None if dx is None else dx.view(ctx.shape).to(ctx.x_dtype)
        return (
            *(dx, None, None, da_gate, db_gate, None, None, da_up, db_up, None, None, da_down, db_down),
            None,
        )


def _projections(tensors: Any, scalings: tuple[float, float, float]) -> list[Projection]:
    return [
        Projection(tensors[4 * i], tensors[4 * i + 1], tensors[4 * i + 2], tensors[4 * i + 3], scaling)
        for i, scaling in enumerate(scalings)
    ]
