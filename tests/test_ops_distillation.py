"""Chunked distillation against its formula in float64: all tokens, or the likeliest and one for the rest."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from shoestring.ops import TopTokens, distillation_sums, top_tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

module: Any = importlib.import_module("shoestring.ops.distillation")
VOCABULARY, WIDTH = 53, 12


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", VOCABULARY * 8)


def tensors(dtype: torch.dtype, positions: int = 21) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias, labels, the teacher's logits."""
    torch.manual_seed(0)
    shapes = ((positions, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,))
    hidden, weight, bias = (
        torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes
    )
    labels = torch.randint(VOCABULARY, (positions,))
    return hidden, weight, bias, labels, 3 * torch.randn(positions, VOCABULARY, dtype=torch.float64)


def by_definition(
    logits: Tensor,
    labels: Tensor,
    teacher: Tensor,
    alpha: float,
    temperature: float,
    top_k: int | None = None,
) -> Tensor:
    """Position by position, event by event, from probabilities."""
    loss = torch.zeros((), dtype=torch.float64)
    for scores, label, wanted in zip(logits, labels.tolist(), teacher, strict=True):
        p = (scores / temperature).exp() / (scores / temperature).exp().sum()
        q = (wanted / temperature).exp() / (wanted / temperature).exp().sum()
        kept = range(len(q)) if top_k is None else q.argsort(descending=True)[:top_k].tolist()
        events = [(q[token], p[token]) for token in kept]
        if len(kept) < len(q):
            events.append((1 - q[kept].sum(), 1 - p[kept].sum()))
        loss = loss + alpha * temperature**2 * sum(a * (a / b).log() for a, b in events)
        loss = loss - (1 - alpha) * (scores[label] - scores.exp().sum().log())
    return loss


@pytest.mark.parametrize("top_k", [None, 1, 5, VOCABULARY])
@pytest.mark.parametrize(("alpha", "temperature"), [(1.0, 1.0), (0.5, 1.0), (0.7, 2.5), (0.2, 0.5)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_loss_and_gradients(dtype, tolerance, alpha, temperature, top_k) -> None:
    hidden, weight, bias, labels, teacher = tensors(dtype)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    logits = exact[0] @ exact[1].t() + exact[2]
    expected = by_definition(logits, labels, teacher, alpha, temperature, top_k)
    (0.37 * expected).backward()
    given: Any = teacher if top_k is None else top_tokens(teacher, top_k, temperature)
    loss, kl, hard = distillation_sums(
        hidden, weight, labels, given.__getitem__, alpha=alpha, temperature=temperature, bias=bias
    )
    assert not kl.requires_grad
    assert not hard.requires_grad
    (0.37 * loss).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    torch.testing.assert_close(alpha * temperature**2 * kl + (1 - alpha) * hard, loss.detach())
    for ours, theirs in zip((hidden, weight, bias), exact, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert ours.grad.dtype == dtype
        assert (ours.grad.double() - theirs.grad).norm() <= tolerance * theirs.grad.norm()


@pytest.mark.parametrize("top_k", [None, 5])
def test_the_reference_is_the_definition(top_k: int | None) -> None:
    hidden, weight, bias, labels, teacher = tensors(torch.float64)
    logits = hidden @ weight.t() + bias
    given: Any = teacher if top_k is None else top_tokens(teacher, top_k, 2.0)
    torch.testing.assert_close(
        module.reference(logits, labels, given, alpha=0.3, temperature=2.0),
        by_definition(logits, labels, teacher, 0.3, 2.0, top_k),
    )


@pytest.mark.parametrize("top_k", [None, 3])
def test_without_a_head_the_logits_get_the_gradient(top_k: int | None) -> None:
    _, _, _, labels, teacher = tensors(torch.float64)
    logits = torch.randn(21, VOCABULARY, dtype=torch.float64, requires_grad=True)
    given: Any = teacher if top_k is None else top_tokens(teacher, top_k, 2.0)
    before = logits.detach().clone()
    loss, _, _ = distillation_sums(logits, None, labels, given.__getitem__, alpha=0.4, temperature=2.0)
    loss.backward()
    assert torch.equal(logits.detach(), before)
    assert logits.grad is not None
    ours = logits.grad.clone()
    logits.grad = None
    module.reference(logits, labels, given, alpha=0.4, temperature=2.0).backward()
    torch.testing.assert_close(ours, logits.grad)


def test_gradients_by_finite_differences() -> None:
    torch.manual_seed(1)
    hidden, weight = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 3), (7, 3))
    )
    labels, teacher = torch.tensor([0, 6, 3, 1]), torch.randn(4, 7, dtype=torch.float64)
    for given in (teacher, top_tokens(teacher, 2, 1.5)):
        assert torch.autograd.gradcheck(
            lambda h, w, given=given: distillation_sums(
                h, w, labels, given.__getitem__, alpha=0.6, temperature=1.5
            )[0],
            (hidden, weight),
        )


def test_a_known_value() -> None:
    """Two tokens, by hand: q = (3/4, 1/4), p = (1/2, 1/2)."""
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    teacher = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    logits = torch.zeros(1, 2, dtype=torch.float64)
    for temperature in (1.0, 2.0):
        loss, found, hard = distillation_sums(
            logits,
            None,
            torch.tensor([0]),
            (temperature * teacher).__getitem__,
            alpha=0.25,
            temperature=temperature,
        )
        assert found.item() == pytest.approx(kl, rel=1e-12)
        assert hard.item() == pytest.approx(math.log(2.0), rel=1e-12)
        assert loss.item() == pytest.approx(0.25 * temperature**2 * kl + 0.75 * math.log(2.0), rel=1e-12)


def test_fewer_tokens_never_show_more() -> None:
    hidden, weight, bias, labels, teacher = tensors(torch.float64)
    found = [
        distillation_sums(
            hidden,
            weight,
            labels,
            top_tokens(teacher, k, 1.0).__getitem__,
            alpha=1.0,
            temperature=1.0,
            bias=bias,
        )[1].item()
        for k in (1, 2, 5, 20, VOCABULARY)
    ]
    whole = distillation_sums(
        hidden, weight, labels, teacher.__getitem__, alpha=1.0, temperature=1.0, bias=bias
    )[1].item()
    assert found == sorted(found)
    assert found[-1] == pytest.approx(whole, rel=1e-12)
    assert 0 < found[0] < whole


def test_impossible_tokens_count_nothing() -> None:
    teacher = torch.zeros(2, 4, dtype=torch.float64)
    teacher[:, 3] = float("-inf")
    logits = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    for given in (teacher, top_tokens(teacher, 4, 1.0), top_tokens(teacher, 2, 1.0)):
        loss, _, _ = distillation_sums(
            logits, None, torch.tensor([0, 1]), given.__getitem__, alpha=1.0, temperature=1.0
        )
        assert torch.isfinite(loss)
        assert torch.isfinite(torch.autograd.grad(loss, logits)[0]).all()


@pytest.mark.parametrize("top_k", [None, 4])
def test_from_itself_there_is_nothing_to_learn(top_k: int | None) -> None:
    hidden, weight, _, labels, _ = tensors(torch.float32)
    logits = (hidden @ weight.t()).detach()
    given: Any = logits if top_k is None else top_tokens(logits, top_k, 2.0)
    loss, _, _ = distillation_sums(hidden, weight, labels, given.__getitem__, alpha=1.0, temperature=2.0)
    loss.backward()
    assert abs(loss.item()) < 1e-5
    assert hidden.grad is not None
    assert hidden.grad.abs().max() < 1e-5


def test_no_positions_and_no_gradient() -> None:
    hidden, weight, _, labels, teacher = tensors(torch.float32)
    none: Any = torch.empty(0, dtype=torch.long)
    loss, _, _ = distillation_sums(hidden[:0], weight, none, teacher.__getitem__, alpha=0.5, temperature=1.0)
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None
    assert not hidden.grad.any()
    with torch.no_grad():
        loss, _, _ = distillation_sums(
            hidden, weight, labels, teacher.__getitem__, alpha=0.5, temperature=1.0
        )
    assert not loss.requires_grad
    with pytest.raises(ValueError, match=r"hidden \(21, 12\) and labels \(0,\) do not match"):
        distillation_sums(hidden, weight, none, teacher.__getitem__, alpha=0.5, temperature=1.0)


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


def test_no_more_than_a_chunk_of_logits_exists() -> None:
    hidden, weight, _, labels, _ = tensors(torch.float32, positions=300)
    teacher_hidden, teacher_weight = torch.randn(300, 2), torch.randn(VOCABULARY, 2)

    def part(chosen: slice) -> TopTokens:
        return top_tokens(teacher_hidden[chosen] @ teacher_weight.t(), 4, 1.0)

    with Largest() as seen:
        loss, _, _ = distillation_sums(hidden, weight, labels, part, alpha=0.5, temperature=1.0)
        loss.backward()
    assert seen.elements == hidden.numel() < 300 * VOCABULARY / 2


def test_autocast_computes_in_its_type() -> None:
    hidden, weight, bias, labels, teacher = tensors(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _, _ = distillation_sums(
            hidden, weight, labels, teacher.__getitem__, alpha=0.5, temperature=1.0, bias=bias
        )
    loss.backward()
    exact = module.reference(hidden @ weight.t() + bias, labels, teacher, alpha=0.5, temperature=1.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=2e-2)
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.float32
