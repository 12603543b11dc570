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

from . import liger
from .autocast import computing_dtype
from .lora import Projection, backward_group, check_frozen, drawn_for, forward_group, seed_for
from .lora import reference as linear_reference
from .lora_layers import projection_of
from .providers import choose


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; both of one shape and type."""
    if torch.compiler.is_compiling():  # which makes one kernel of the formula
        return swiglu_reference(gate, up)
    if choose("swiglu", gate.device, liger.offers("swiglu", gate, up)) == "liger":
        return liger.swiglu(gate, up)
    output: Tensor = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]  # torch has no types here
    return output


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The middle alone by its formula."""
    return nn.functional.silu(gate) * up


def gated_mlp(x: Tensor, gate: Projection, up: Projection, down: Projection) -> Tensor:
    """x [..., H] -> [..., H]; gradients reach x and the adapters. Raises ValueError for a trained base.

    With dropout, gate and up see the same dropped x. Under torch.compile the block is its three layers and a
    product that the compiler computes again by itself.
    """
    check_frozen(gate, up, down)
    if torch.compiler.is_compiling():
        from .lora_registered import lora_linear

        seed, seed_down = drawn_for(gate, up), drawn_for(down)
        z = nn.functional.silu(lora_linear(x, gate, seed)) * lora_linear(x, up, seed)
        return lora_linear(z, down, seed_down)
    output: Tensor = _GatedMLP.apply(  # type: ignore[no-untyped-call]  # torch has no types here
        x,
        *gate.tensors,
        *up.tensors,
        *down.tensors,
        (gate.settings, up.settings, down.settings),
        (seed_for(gate, up), seed_for(down)),
    )
    return output


def reference(x: Tensor, gate: Projection, up: Projection, down: Projection) -> Tensor:
    """The same by its formula."""
    return linear_reference(nn.functional.silu(linear_reference(x, gate)) * linear_reference(x, up), down)


def forward(module: Any, x: Tensor) -> Tensor:
    """Forward of a module with gate_proj, up_proj, down_proj and a SiLU: the one dispatch point."""
    gate, up, down = (projection_of(getattr(module, f"{name}_proj"), x) for name in ("gate", "up", "down"))
    if gate is not None and up is not None and down is not None and _alike(gate, up):
        return gated_mlp(x, gate, up, down)
    output: Tensor = module.down_proj(swiglu(module.gate_proj(x), module.up_proj(x)))
    return output


def _alike(gate: Projection, up: Projection) -> bool:
    """Whether the two can read one dropped x."""
    return gate.a is None or up.a is None or gate.dropout == up.dropout


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
        tensors, settings, seeds = rest[:12], rest[12], rest[13]
        dtype = computing_dtype(x)
        gate, up, down = _projections(tensors, settings)
        with torch.autocast(x.device.type, enabled=False):
            flat = x.reshape(-1, x.shape[-1]).to(dtype)
            (g, u), h = forward_group(flat, [gate, up], seeds[0])
            z = nn.functional.silu(g).mul_(u)
            (y,), h_down = forward_group(z, [down], seeds[1])
        ctx.save_for_backward(flat, g, u, h, h_down, *tensors)
        ctx.settings, ctx.seeds, ctx.shape, ctx.x_dtype = settings, seeds, x.shape, x.dtype
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        flat, g, u, h, h_down, *tensors = ctx.saved_tensors
        gate, up, down = _projections(tensors, ctx.settings)
        grad = grad_output.reshape(-1, grad_output.shape[-1])
        silu = nn.functional.silu(g)
        z = silu * u
        dz, ((da_down, db_down),) = backward_group(z, h_down, [grad], [down], True, ctx.seeds[1])
        assert dz is not None
        du = silu.mul_(dz)
        dg = torch.ops.aten.silu_backward(dz.mul_(u), g)
        dx, ((da_gate, db_gate), (da_up, db_up)) = backward_group(
            flat, h, [dg, du], [gate, up], ctx.needs_input_grad[0], ctx.seeds[0]
        )
        dx = None if dx is None else dx.view(ctx.shape).to(ctx.x_dtype)
        return (
            *(dx, None, None, da_gate, db_gate, None, None, da_up, db_up, None, None, da_down, db_down),
            *(None, None),
        )


def _projections(tensors: Any, settings: Any) -> list[Projection]:
    return [
        Projection(tensors[4 * i], tensors[4 * i + 1], tensors[4 * i + 2], tensors[4 * i + 3], *rest)
        for i, rest in enumerate(settings)
    ]
