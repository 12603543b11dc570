"""Chunked linear cross entropy against its formula in float64."""

import inspect

import pytest
import torch
from shoestring.ops import cross_entropy, cross_entropy_sum, loss_heads, providers
from shoestring.plan.live_bytes import LiveBytes
from shoestring.recipes.errors import UserError
from torch import Tensor, nn


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
    monkeypatch.setitem(loss_heads.CHUNK, ("cpu", False), 101 * 8)
    monkeypatch.setitem(loss_heads.CHUNK, ("cpu", True), 101 * 16)


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


def test_smoothing_and_missing_labels_are_pytorchs() -> None:
    hidden, weight, labels, offset = tensors(torch.float64, bias=True)
    labels[::3] = -100
    loss = cross_entropy_sum(hidden, weight, labels, bias=offset, label_smoothing=0.3)
    got = torch.autograd.grad(loss, [hidden, weight, offset])
    logits = nn.functional.linear(hidden, weight, offset)
    expected = nn.functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.3)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(got, torch.autograd.grad(expected, [hidden, weight, offset]), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not got[0][::3].any()


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradients_by_finite_differences(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    for key in loss_heads.CHUNK:
        monkeypatch.setitem(loss_heads.CHUNK, key, 7 * 2)
    shapes = ((5, 3), (7, 3), (7,), (5, 2), (7, 2))
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    labels = torch.tensor([0, 6, -100, 3, 1])

    def loss(h: Tensor, w: Tensor, b: Tensor, low: Tensor, high: Tensor) -> Tensor:
        keys = {"bias": b, "softcap": softcap, "label_smoothing": 0.2, "low_rank": (low, high)}
        return cross_entropy_sum(h, w, labels, **keys)

    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize(
    ("vocabulary", "trained"), [(49152, False), (49152, True), (262144, False), (2**28, True)]
)
def test_a_chunk_is_bounded_whatever_the_vocabulary(vocabulary: int, trained: bool) -> None:
    real = {("cpu", False): 12 * 2**20, ("cpu", True): 48 * 2**20}
    loss_heads.CHUNK.update(real)  # given back after the test by the fixture above
    rows = loss_heads.rows_of_chunk(vocabulary, torch.device("cpu"), trained)
    assert rows == max(1, real["cpu", trained] // vocabulary)


@pytest.mark.parametrize("trained", [False, True])
def test_logits_of_one_chunk_exist_at_a_time(trained: bool) -> None:
    """Bytes at the peak: two buffers of a chunk, one tensor like hidden, and sums for a trained weight."""
    hidden, weight, labels, _ = tensors(torch.float32, positions=640)
    weight.requires_grad_(trained)
    chunk = loss_heads.CHUNK["cpu", trained]
    with LiveBytes(torch.device("cpu")) as live:
        loss = cross_entropy_sum(hidden, weight, labels)
        peak = live.peak
    del loss
    weights = 4 * weight.numel()
    expected = 2 * 4 * chunk + 4 * hidden.numel() + (weights if trained else 0)
    assert peak <= expected + 20_000
    assert trained or 1.5 * peak < 4 * 640 * 101


def test_several_chunks_of_half_precision_lose_nothing_of_the_weights_gradient() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(600, 16).bfloat16()
    weight = (torch.randn(101, 16) / 8).bfloat16().requires_grad_()
    labels = torch.randint(101, (600,))
    cross_entropy_sum(hidden, weight, labels).backward()  # 38 chunks
    exact = weight.detach().double().requires_grad_()
    cross_entropy.reference(hidden.double(), exact, labels).backward()
    assert weight.grad is not None
    assert exact.grad is not None
    # 38 sums rounded to bfloat16 would be 0.8 % off (simulated); rounding the result alone is 0.17 %
    assert (weight.grad.double() - exact.grad).norm() <= 4e-3 * exact.grad.norm()


def test_liger_is_called_as_its_signature_says(monkeypatch: pytest.MonkeyPatch) -> None:
    functional = pytest.importorskip("liger_kernel.transformers.functional")
    signature = inspect.signature(functional.liger_fused_linear_cross_entropy)
    calls: list[inspect.BoundArguments] = []

    def stand_in(*args: object, **keys: object) -> Tensor:
        bound = signature.bind(*args, **keys)
        calls.append(bound)
        bound.apply_defaults()
        given = bound.arguments
        return cross_entropy.reference(
            given["input"],
            given["weight"],
            given["target"],
            bias=given["bias"],
            softcap=given["softcap"],
            label_smoothing=given["label_smoothing"],
        )

    monkeypatch.setattr(functional, "liger_fused_linear_cross_entropy", stand_in)
    monkeypatch.setattr(providers, "_lacks", lambda provider, device: None)
    monkeypatch.setenv("SHOESTRING_OPS", "loss_head=liger")
    hidden, weight, labels, offset = tensors(torch.float32, bias=True)
    labels[5] = -100
    keys = {"bias": offset, "softcap": 5.0, "label_smoothing": 0.1}
    loss = cross_entropy_sum(hidden, weight, labels, **keys)
    assert providers.used["loss_head"] == "liger"
    torch.testing.assert_close(loss, cross_entropy.reference(hidden, weight, labels, **keys))
    given = calls[0].arguments
    assert given["accum_dtype"] == torch.float32
    assert given["reduction"] == "sum"
    assert len(given["input"]) == len(labels) - 1
    with pytest.raises(UserError, match="it has none for these arguments"):
        cross_entropy_sum(hidden, weight, labels, low_rank=(hidden[:, :2], weight[:, :2]))
    with pytest.raises(
        UserError, match="it has none for these arguments"
    ):  # Liger would leave the weight out
        cross_entropy_sum(hidden.detach(), weight, labels)


def test_liger_is_never_taken_unasked_and_refused_where_it_cannot_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hidden, weight, labels, _ = tensors(torch.float32)
    monkeypatch.delenv("SHOESTRING_OPS", raising=False)
    cross_entropy_sum(hidden, weight, labels)
    assert providers.used["loss_head"] == "torch"
    monkeypatch.setenv("SHOESTRING_OPS", "loss_head=liger")
    with pytest.raises(UserError, match="Liger's kernels need a CUDA device"):
        cross_entropy_sum(hidden, weight, labels)
