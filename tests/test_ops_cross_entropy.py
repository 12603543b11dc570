"""Chunked linear cross entropy against its formula in float64."""

import pytest
import torch
from shoestring.ops import cross_entropy, cross_entropy_sum
from torch import Tensor


def tensors(
    dtype: torch.dtype, positions: int = 37, bias: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    torch.manual_seed(0)
    hidden = torch.randn(positions, 24, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(101, 24, dtype=torch.float64).to(dtype).requires_grad_()
    offset = torch.randn(101, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
    return hidden, weight, torch.randint(101, (positions,)), offset


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "FROZEN_CHUNK", 101 * 8)
    monkeypatch.setattr(cross_entropy, "TRAINED_CHUNK", 101 * 16)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 8e-3)]
)
def test_loss_and_gradients(dtype, tolerance, frozen, bias, softcap) -> None:
    hidden, weight, labels, offset = tensors(dtype, bias=bias)
    weight.requires_grad_(not frozen)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight, offset) if t is not None]
    expected = cross_entropy.reference(
        exact[0], exact[1], labels, bias=exact[2] if bias else None, softcap=softcap
    )
    (expected * 0.37).backward()
    loss = cross_entropy_sum(hidden, weight, labels, bias=offset, softcap=softcap)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (loss * 0.37).backward()
    assert abs(loss.item() - expected.item()) <= tolerance * expected.item()
    for ours, theirs in zip([t for t in (hidden, weight, offset) if t is not None], exact, strict=True):
        if not ours.requires_grad:
            assert ours.grad is None
            continue
        assert ours.grad is not None
        assert ours.grad.dtype == dtype
        assert (ours.grad.double() - theirs.grad).norm() <= tolerance * theirs.grad.norm()


def test_no_positions_give_zero() -> None:
    hidden, weight, _, _ = tensors(torch.float32)
    loss = cross_entropy_sum(hidden[:0], weight, torch.empty(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None
    assert hidden.grad.abs().max() == 0
    assert weight.grad.abs().max() == 0


def test_without_gradient_no_gradient_is_kept() -> None:
    hidden, weight, labels, _ = tensors(torch.float32)
    with torch.no_grad():
        loss = cross_entropy_sum(hidden, weight, labels)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, cross_entropy.reference(hidden, weight, labels).detach())


def test_improbable_labels_do_not_overflow() -> None:
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[-1e4], [1e4]])
    loss = cross_entropy_sum(hidden, weight, torch.tensor([0]))
    loss.backward()
    assert loss.item() == 2e4
    assert hidden.grad.item() == 2e4


def test_autocast_computes_in_its_type() -> None:
    hidden, weight, labels, _ = tensors(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cross_entropy_sum(hidden, weight, labels)
        expected = cross_entropy.reference(hidden, weight, labels)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


def test_shapes_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match=r"hidden \(3, 4\) and labels \(2,\) do not match"):
        cross_entropy_sum(torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(2, dtype=torch.long))
