"""Chunked log-probabilities of labels against their formula in float64, and how much they hold at once."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from shoestring.ops import token_log_probs
from shoestring.plan.live_bytes import LiveBytes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

module: Any = importlib.import_module("shoestring.ops.token_log_probs")
VOCABULARY, WIDTH = 101, 24


def tensors(
    dtype: torch.dtype, positions: int = 37, bias: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    torch.manual_seed(0)
    hidden = torch.randn(positions, WIDTH, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64).to(dtype).requires_grad_()
    offset = torch.randn(VOCABULARY, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
    return hidden, weight, torch.randint(VOCABULARY, (positions,)), offset


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", VOCABULARY * 8)


def by_definition(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, softcap: float | None
) -> Tensor:
    """One position at a time: the exponential of the label's score over the sum of all exponentials."""
    found = []
    for vector, label in zip(hidden, labels.tolist(), strict=True):
        scores = weight @ vector + (0 if bias is None else bias)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        found.append(scores[label] - scores.exp().sum().log())
    return torch.stack(found)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6), (torch.bfloat16, 1e-2)]
)
def test_values_and_gradients(dtype, tolerance, frozen, bias, softcap) -> None:
    hidden, weight, labels, offset = tensors(dtype, bias=bias)
    weight.requires_grad_(not frozen)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight, offset) if t is not None]
    factors = torch.linspace(-1.5, 2.0, len(labels), dtype=torch.float64)
    expected = by_definition(exact[0], exact[1], labels, exact[2] if bias else None, softcap)
    (expected * factors).sum().backward()
    got = token_log_probs(hidden, weight, labels, bias=offset, softcap=softcap)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (got.double() - expected).norm() <= tolerance * expected.norm()
    (got * factors.to(got.dtype)).sum().backward()
    for ours, theirs in zip([t for t in (hidden, weight, offset) if t is not None], exact, strict=True):
        if not ours.requires_grad:
            assert ours.grad is None
            continue
        assert ours.grad is not None
        assert theirs.grad is not None
        assert ours.grad.dtype == dtype
        assert (ours.grad.double() - theirs.grad).norm() <= tolerance * theirs.grad.norm()


def test_the_reference_is_the_definition() -> None:
    hidden, weight, labels, offset = tensors(torch.float64, bias=True)
    torch.testing.assert_close(
        module.reference(hidden, weight, labels, bias=offset, softcap=3.0),
        by_definition(hidden, weight, labels, offset, 3.0),
    )


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradients_by_finite_differences(monkeypatch: pytest.MonkeyPatch, softcap: float | None) -> None:
    torch.manual_seed(1)
    monkeypatch.setattr(module, "CHUNK", 7 * 2)
    hidden, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 3), (7, 3), (7,))
    )
    labels = torch.tensor([0, 6, 3, 3, 1])
    assert torch.autograd.gradcheck(
        lambda h, w, b: token_log_probs(h, w, labels, bias=b, softcap=softcap), (hidden, weight, bias)
    )


def test_no_positions() -> None:
    hidden, weight, _, _ = tensors(torch.float32)
    got = token_log_probs(hidden[:0], weight, torch.empty(0, dtype=torch.long))
    got.sum().backward()
    assert got.shape == (0,)
    assert hidden.grad is not None
    assert weight.grad is not None
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_improbable_labels_do_not_overflow() -> None:
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[-1e4], [1e4]])
    got = token_log_probs(hidden, weight, torch.tensor([0]))
    got.sum().backward()
    assert got.item() == -2e4
    assert hidden.grad is not None
    assert hidden.grad.item() == -2e4


def test_autocast_computes_in_its_type() -> None:
    hidden, weight, labels, _ = tensors(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = token_log_probs(hidden, weight, labels)
        expected = module.reference(hidden, weight, labels)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=2e-2)
    got.sum().backward()
    expected_gradient = torch.autograd.grad(expected.sum(), [hidden, weight])
    for ours, theirs in zip((hidden.grad, weight.grad), expected_gradient, strict=True):
        assert ours is not None
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() <= 2e-2 * theirs.norm()


class Largest(TorchDispatchMode):
    """Remembers the most elements that one operation's result had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


@pytest.mark.parametrize("positions", [64, 640])
def test_no_more_than_a_chunk_of_logits_exists(positions: int) -> None:
    hidden, weight, labels, _ = tensors(torch.float32, positions)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    chunk = VOCABULARY * 8
    with Largest() as seen, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        token_log_probs(hidden, weight, labels).sum().backward()
    # the largest things are a chunk of logits and what the caller holds anyway
    assert seen.elements == max(chunk, hidden.numel(), weight.numel())
    assert positions * VOCABULARY > 2 * chunk
    # kept between the passes, beyond the arguments: one number a position
    assert sorted(kept) == sorted([hidden.numel(), weight.numel(), len(labels), len(labels)])


def test_shapes_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match=r"hidden \(3, 4\) and labels \(2,\) do not match"):
        token_log_probs(torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(2, dtype=torch.long))


def test_one_chunk_of_logits_lives_at_a_time() -> None:
    """Beside two float32 numbers a position."""
    hidden, weight, labels, _ = tensors(torch.float32, 640)
    with LiveBytes(torch.device("cpu")) as live, torch.no_grad():
        token_log_probs(hidden, weight, labels)
    assert live.peak < 1.5 * (4 * VOCABULARY * 8) + 2 * 4 * 640
