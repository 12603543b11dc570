"""Gradients of the output head under inductor, of inputs that lie in memory otherwise than in rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from shoestring.ops.cross_entropy import cross_entropy_sum
from shoestring.ops.token_log_probs import token_log_probs
from torch import Tensor


def loss(hidden: Tensor, weight: Tensor, low: Tensor, high: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy_sum(hidden, weight, labels, low_rank=(low, high))


def log_probs(hidden: Tensor, weight: Tensor, low: Tensor, high: Tensor, labels: Tensor) -> Tensor:
    return token_log_probs(hidden, weight, labels).sum()


@pytest.mark.parametrize("function", [loss, log_probs])
def test_strided_inputs_go_through_a_compiled_graph(function: Callable[..., Tensor], device) -> None:
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(shape, generator=generator).to(device).requires_grad_()
        for shape in ((16, 12), (16, 50), (3, 12), (3, 50))
    ]
    labels = (torch.arange(12) % 50).to(device)

    def through(*tensors: Tensor) -> Tensor:
        return function(*(t.t() for t in tensors), labels)

    found = []
    for run in (through, torch.compile(through, fullgraph=True)):
        for leaf in leaves:
            leaf.grad = None
        run(*leaves).backward()
        found.append([leaf.grad for leaf in leaves[: 4 if function is loss else 2]])
    for eager, compiled in zip(*found, strict=True):
        assert eager is not None
        assert float(eager.norm()) > 0
        torch.testing.assert_close(compiled, eager)
