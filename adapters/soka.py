"""SoKA (arXiv:2506.15251): train the leading Kronecker factors of each weight, in place of the weight.

A weight [out, in] with out = m1 m2 and in = n1 n2, rearranged so that each block of m2 x n2 is a row (Van
Loan and Pitsianis), has the singular value decomposition R = sum_k s_k u_k v_k^T, and

    W = sum_k s_k mat(u_k; m1 x n1) (x) mat(v_k; m2 x n2)

with the Kronecker product (x); cut off after r terms it is the nearest such sum in the Frobenius norm, and
the error is the root of the sum of the other s_k^2. The factors A_k and B_k get the root of s_k each. What is
trained is a change of them against the frozen ones, so that training starts at the base model and the base
stays as it is:

    W' = W + sum_k (A_k + a_k) (x) (B_k + b_k) - A_k (x) B_k = W + sum_k a_k (x) B_k + (A_k + a_k) (x) b_k

A term costs m1 n1 + m2 n2 numbers, as much as LoRA of rank 1 on a square matrix, and its rank may be full.
The product is built for the time of one layer and never kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..ops.autocast import computing_dtype
from .layers import OwnConfig, OwnLayer, OwnTuner, base_weight, is_meta, register
from .spectra import elbow_rank, energy_rank, singular_values, sketch, thin_svd


@dataclass
class SokaConfig(OwnConfig):
    """r: most terms of a matrix; fewer where they hold `energy`, or where the spectrum has its elbow."""

    r: int = 16
    energy: float = 0.9

    def __post_init__(self) -> None:
        """The key under which PEFT knows the method."""
        super().__post_init__()
        self.peft_type: Any = "SOKA (import shoestring.adapters)"


def split(out_features: int, in_features: int) -> tuple[int, int, int, int]:
    """m1, m2, n1, n2 with out = m1 m2 and in = n1 n2.

    m1 is the largest divisor up to the root of out, n1 the smallest one from the root of in, so that the two
    factors are of about one size.
    """
    m1 = next(size for size in range(isqrt(out_features), 0, -1) if out_features % size == 0)
    n2 = next(size for size in range(isqrt(in_features), 0, -1) if in_features % size == 0)
    return m1, out_features // m1, in_features // n2, n2


def rearranged(weight: Tensor, m1: int, n1: int) -> Tensor:
    """weight [m1 m2, n1 n2] -> [m1 n1, m2 n2]: row (i, j) is block (i, j)."""
    m2, n2 = weight.shape[0] // m1, weight.shape[1] // n1
    return weight.reshape(m1, m2, n1, n2).permute(0, 2, 1, 3).reshape(m1 * n1, m2 * n2)


def choose_rank(values: Tensor, energy: float, most: int) -> int:
    """min(most, rank by energy, rank at the elbow) of the whole spectrum `values`, descending."""
    return min(most, energy_rank(values, energy), elbow_rank(values))


def kronecker_factors(weight: Tensor, terms: int) -> tuple[Tensor, Tensor]:
    """a [terms, m1, n1] and b [terms, m2, n2] of a float64 weight; sum of a_k (x) b_k is nearest to it."""
    m1, m2, n1, n2 = split(*weight.shape)
    u, s, v = thin_svd(rearranged(weight, m1, n1), terms)
    root = s.sqrt()
    return (u * root).t().reshape(-1, m1, n1), (v * root).t().reshape(-1, m2, n2)


def built(left: Tensor, right: Tensor) -> Tensor:
    """sum_j left_j (x) right_j, [m1 m2, n1 n2], from left [j, m1, n1] and right [j, m2, n2]."""
    m1, n1, m2, n2 = *left.shape[1:], *right.shape[1:]
    rows = left.flatten(1).t() @ right.flatten(1)
    return rows.view(m1, n1, m2, n2).permute(0, 2, 1, 3).reshape(m1 * m2, n1 * n2)


class _AddKronecker(torch.autograd.Function):
    """base + built(left, right) x; of what is as long as the tokens x alone is kept, the sum is built anew.

    One product of whole matrices is quicker than the terms one by one, which take as many multiplications
    from about 2 r = root of the width on, in far smaller products.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Tensor, left: Tensor, right: Tensor) -> Tensor:
        dtype = computing_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            delta = built(left, right).to(dtype)
            out = torch.addmm(base.flatten(0, -2).to(dtype), x.flatten(0, -2).to(dtype), delta.t())
        ctx.save_for_backward(x, left, right)
        ctx.dtype, ctx.base_dtype = dtype, base.dtype
        return out.view(base.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, left, right = ctx.saved_tensors
        grad, flat = grad_output.flatten(0, -2).to(ctx.dtype), x.flatten(0, -2).to(ctx.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (grad @ built(left, right).to(ctx.dtype)).view(x.shape).to(x.dtype)
        rows = rearranged((grad.t() @ flat).to(left.dtype), left.shape[1], left.shape[2])
        dleft = (right.flatten(1) @ rows.t()).view_as(left)
        dright = (left.flatten(1) @ rows).view_as(right)
        dbase = grad_output.to(ctx.base_dtype) if ctx.needs_input_grad[1] else None
        return dx, dbase, dleft, dright


def add_kronecker(x: Tensor, base: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """base [..., m1 m2] + sum_j (left_j (x) right_j) x for x [..., n1 n2].

    left [j, m1, n1], right [j, m2, n2]; gradients reach all four. Of what is as long as the tokens it keeps x
    alone; while it runs it holds the sum once in float32 and once in the type it computes in.
    """
    output: Tensor = _AddKronecker.apply(x, base, left, right)  # type: ignore[no-untyped-call]  # torch has none
    return output


class SokaLayer(OwnLayer):
    """A linear layer with trained Kronecker factors: frozen `soka_a`, `soka_b`, trained changes of them."""

    adapter_layer_names = ("soka_da", "soka_db")
    other_param_names = ("soka_a", "soka_b")

    def __init__(self, base_layer: nn.Module, adapter_name: str, a: Tensor, b: Tensor) -> None:
        """a [r, m1, n1] and b [r, m2, n2] in float32: they are small."""
        super().__init__(base_layer)
        self.soka_a = nn.Parameter(a, requires_grad=False)
        self.soka_b = nn.Parameter(b, requires_grad=False)
        self.soka_da = nn.ParameterDict({adapter_name: nn.Parameter(torch.zeros_like(a))})
        self.soka_db = nn.ParameterDict({adapter_name: nn.Parameter(torch.zeros_like(b))})
        self.set_adapter([adapter_name])

    def _sides(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Left and right factors of the 2 r terms of the change."""
        da, db = self.soka_da[adapter], self.soka_db[adapter]
        return torch.cat([da, self.soka_a + da]), torch.cat([self.soka_b, db])

    def add(self, x: Tensor, base: Tensor) -> Tensor:
        """See `add_kronecker`."""
        (name,) = self.active_adapters
        return add_kronecker(x, base, *self._sides(name))

    @torch.no_grad()
    def delta(self, adapter: str) -> Tensor:
        """The change, [out, in]."""
        left, right = (side.float() for side in self._sides(adapter))
        return built(left, right)


class SokaTuner(OwnTuner):
    """Wraps linear layers for SoKA."""

    prefix = "soka_"
    tuner_layer_cls = SokaLayer

    def wrap(self, config: SokaConfig, name: str, target: nn.Module, adapter_name: str) -> SokaLayer:
        """Kronecker factors of the weight; from shapes alone, `r` terms."""
        plain = OwnLayer(target)
        m1, m2, n1, n2 = split(plain.out_features, plain.in_features)
        weight: Any = target.weight
        terms = config.ranks.get(name)
        if config.init_weights and not is_meta(plain):
            whole = base_weight(plain)
            if terms is None:
                values = singular_values(rearranged(whole, m1, n1))
                terms = choose_rank(values, config.energy, config.r)
            a, b = (value.to(weight.device, torch.float32) for value in kronecker_factors(whole, terms))
            config.ranks[name] = len(a)
            config.fingerprints[name] = sketch(a.flatten(1).t(), b.flatten(1).t())
        else:
            terms = min(config.r if terms is None else terms, m1 * n1, m2 * n2)
            a = torch.full((terms, m1, n1), (m1 * n1) ** -0.5, device=weight.device)
            b = torch.full((terms, m2, n2), (m2 * n2) ** -0.5, device=weight.device)
        return SokaLayer(target, adapter_name, a.contiguous(), b.contiguous())


register(SokaConfig, SokaTuner)
