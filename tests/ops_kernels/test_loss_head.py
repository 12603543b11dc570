"""The output head's loss, and log-probabilities of labels: both providers against float64."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from shoestring.ops import loss_heads, providers
from shoestring.ops.cross_entropy import cross_entropy_sum
from torch import Tensor

from .harness import Guarded, distance

log_probs_module: Any = importlib.import_module("shoestring.ops.token_log_probs")
PROVIDERS = ["torch", "triton"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# float32 products in another order, over some thousand terms; half precision: logits are stored in it
NEAR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass
class Problem:
    """What goes in; `tensors`: hidden, weight, bias, u and B, the last three where they are asked for."""

    tensors: dict[str, Tensor]
    labels: Tensor
    softcap: float | None = None
    smoothing: float = 0.0

    @classmethod
    def draw(
        cls,
        rows: int,
        vocabulary: int,
        dtype: torch.dtype,
        device: str,
        *,
        extras: bool = False,
        **settings: Any,
    ) -> Problem:
        generator = torch.Generator().manual_seed(rows * 10007 + vocabulary)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            drawn = torch.randn(*shape, generator=generator) * scale
            return drawn.to(device, dtype).requires_grad_()

        tensors = {"hidden": normal(rows, 24), "weight": normal(vocabulary, 24, scale=0.25)}
        if extras:
            tensors |= {"bias": normal(vocabulary), "u": normal(rows, 3), "B": normal(vocabulary, 3)}
        labels = torch.randint(vocabulary, (rows,), generator=generator).to(device)
        return cls(tensors, labels, **settings)

    def loss(self, **keys: Any) -> Tensor:
        low_rank = (self.tensors["u"], self.tensors["B"]) if "u" in self.tensors else None
        return cross_entropy_sum(
            self.tensors["hidden"],
            self.tensors["weight"],
            self.labels,
            bias=self.tensors.get("bias"),
            softcap=self.softcap,
            label_smoothing=self.smoothing,
            low_rank=low_rank,
            **keys,
        )

    def exact(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and gradients in float64, one position after the other, straight from the formulas."""
        t = {name: tensor.detach().double().cpu() for name, tensor in self.tensors.items()}
        gradients = {name: torch.zeros_like(tensor) for name, tensor in t.items()}
        total = torch.zeros((), dtype=torch.float64)
        size = len(t["weight"])
        for i, label in enumerate(self.labels.tolist()):
            if label == -100:
                continue
            z = t["weight"] @ t["hidden"][i]
            if "bias" in t:
                z = z + t["bias"] + t["B"] @ t["u"][i]
            slope = torch.ones_like(z)
            if self.softcap is not None:
                slope = 1 - torch.tanh(z / self.softcap) ** 2
                z = self.softcap * torch.tanh(z / self.softcap)
            target = torch.full_like(z, self.smoothing / size)
            target[label] += 1 - self.smoothing
            total -= (target * (z - z.max() - (z - z.max()).exp().sum().log())).sum()
            dz = ((z - z.max()).exp() / (z - z.max()).exp().sum() - target) * slope
            gradients["hidden"][i] = dz @ t["weight"]
            gradients["weight"] += dz[:, None] * t["hidden"][i]
            if "bias" in t:
                gradients["bias"] += dz
                gradients["u"][i] = dz @ t["B"]
                gradients["B"] += dz[:, None] * t["u"][i]
        return total, gradients


@pytest.fixture(params=PROVIDERS)
def provider(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SHOESTRING_OPS", f"loss_head={request.param},token_log_probs={request.param}")
    return request.param


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in loss_heads.CHUNK:
        monkeypatch.setitem(loss_heads.CHUNK, key, 8 * 1000)
    monkeypatch.setattr(log_probs_module, "CHUNK", 8 * 1000)
    monkeypatch.setattr(log_probs_module, "CUDA_CHUNK", 8 * 1000)


def check(problem: Problem, provider: str, near: float) -> None:
    loss = problem.loss()
    (loss * 0.37).backward()
    assert providers.used["loss_head"] == provider
    exact, gradients = problem.exact()
    assert loss.dtype == torch.float32
    assert abs(float(loss.detach()) - float(exact)) <= near * max(abs(float(exact)), 1e-3)
    for name, tensor in problem.tensors.items():
        assert tensor.grad is not None
        assert tensor.grad.dtype == tensor.dtype
        if float(gradients[name].norm()) == 0:
            assert not tensor.grad.any(), name
        else:
            assert distance(tensor.grad, gradients[name] * 0.37) <= near, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 17), (17, 1000), (2, 8193)])
def test_loss_and_gradients_are_the_formulas(rows, vocabulary, dtype, provider, device):
    check(Problem.draw(rows, vocabulary, dtype, device), provider, NEAR[dtype])


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_adapter_softcap_and_smoothing(softcap, smoothing, dtype, provider, device):
    problem = Problem.draw(9, 1001, dtype, device, extras=True, softcap=softcap, smoothing=smoothing)
    check(problem, provider, NEAR[dtype])


@pytest.mark.parametrize("left", ["none", "first", "all"])
def test_positions_without_a_label_never_reach_the_head(left, provider, device, monkeypatch):
    problem = Problem.draw(11, 300, torch.float32, device, extras=True)
    ignored = {"none": slice(0, 0), "first": slice(0, 4), "all": slice(None)}[left]
    problem.labels[ignored] = -100
    problem.labels[8:10] = problem.labels[8:10] if left == "none" else -100
    seen = []
    name = "_rows" if provider == "torch" else "_rows_in_place"
    real = getattr(loss_heads, name)
    monkeypatch.setattr(loss_heads, name, lambda z, *rest: seen.append(len(z)) or real(z, *rest))
    check(problem, provider, 2e-6)
    assert sum(seen) == int((problem.labels != -100).sum())
    if left == "all":
        assert float(problem.loss()) == 0.0


def test_another_layout_is_read_as_it_is(provider, device):
    problem = Problem.draw(17, 500, torch.float32, device)
    wide = torch.randn(24, 2 * 17, device=device)
    problem.tensors["hidden"] = wide.t()[::2].detach().requires_grad_()  # transposed, every second one
    problem.tensors["weight"] = torch.randn(500, 48, device=device)[:, :24].detach().requires_grad_()
    check(problem, provider, 2e-6)


def test_no_position_at_all(provider, device):
    problem = Problem.draw(0, 100, torch.float32, device, extras=True)
    loss = problem.loss()
    loss.backward()
    assert loss.item() == 0.0
    for tensor in problem.tensors.values():
        assert tensor.grad is not None
        assert not tensor.grad.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(bad, provider, device):
    problem = Problem.draw(3, 100, torch.float32, device)
    with torch.no_grad():
        problem.tensors["hidden"][1, 0] = bad
    loss = problem.loss()
    loss.backward()
    assert not torch.isfinite(loss)
    grad = problem.tensors["hidden"].grad
    assert grad is not None
    assert bool(torch.isfinite(grad[[0, 2]]).all())
    assert not bool(torch.isfinite(grad[1]).any())


def test_a_token_that_cannot_be_costs_nothing(provider, device):
    """Logits of -inf, as of masked words: the whole first block of them too."""
    problem = Problem.draw(3, 9000, torch.float32, device)
    problem.tensors["bias"] = torch.zeros(9000, device=device)
    problem.tensors["bias"][:8300] = float("-inf")
    problem.labels = torch.tensor([8300, 8999, 8500], device=device)
    hidden, weight, bias = (problem.tensors[name] for name in ("hidden", "weight", "bias"))
    loss = cross_entropy_sum(hidden, weight, problem.labels, bias=bias)
    loss.backward()
    kept = Problem({"hidden": hidden.detach(), "weight": weight.detach()[8300:]}, problem.labels - 8300)
    exact, gradients = kept.exact()
    assert float(loss) == pytest.approx(float(exact), rel=2e-6)
    assert distance(hidden.grad, gradients["hidden"]) < 2e-6
    assert not weight.grad[:8300].any()


def test_rows_stay_within_their_memory_and_in_any_order(device):
    from shoestring.ops.kernels.cross_entropy import losses_of_rows

    found = []
    for backwards in (False, True):
        guard = Guarded()
        logits = guard.like(torch.randn(5, 8195, generator=torch.Generator().manual_seed(1)).to(device))
        labels = torch.arange(5, device=device) * 2000
        keys = {"bias": None, "softcap": 30.0, "smoothing": 0.1, "gradient": True}
        if backwards and device == "cpu":
            from .interpreter import reversed_programs

            with reversed_programs():
                losses, _ = losses_of_rows(logits, labels, **keys)
        else:
            losses, _ = losses_of_rows(logits, labels, **keys)
        guard.check()
        found.append((losses, logits))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_a_label_outside_the_vocabulary_is_not_passed_over(device):
    from shoestring.ops.kernels.cross_entropy import losses_of_rows

    logits = torch.randn(3, 50, device=device)
    losses, _ = losses_of_rows(
        logits, torch.tensor([0, 50, -1], device=device), bias=None, softcap=None, gradient=True
    )
    assert torch.isfinite(losses).tolist() == [True, False, False]
    assert torch.isfinite(logits).all(1).tolist() == [True, False, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extras", [False, True])
def test_log_probabilities_and_their_gradients(extras, dtype, provider, device):
    problem = Problem.draw(9, 1000, dtype, device)
    softcap = 5.0 if extras else None
    bias = (torch.arange(1000.0) / 500).to(device, dtype) if extras else None
    factors = torch.linspace(-1.5, 2.0, 9, device=device)
    hidden, weight = problem.tensors["hidden"], problem.tensors["weight"]
    got = log_probs_module.token_log_probs(hidden, weight, problem.labels, bias=bias, softcap=softcap)
    (got * factors).sum().backward()
    assert providers.used["token_log_probs"] == provider
    h, w = (x.detach().double().cpu() for x in (hidden, weight))
    z = h @ w.t() + (0 if bias is None else bias.double().cpu())
    cap = torch.ones_like(z)
    if softcap is not None:
        cap = 1 - torch.tanh(z / softcap) ** 2
        z = softcap * torch.tanh(z / softcap)
    onehot = torch.nn.functional.one_hot(problem.labels.cpu(), 1000)
    exact = (z - z.logsumexp(1, keepdim=True))[onehot.bool()]
    dz = factors.double().cpu()[:, None] * (onehot - z.softmax(1)) * cap
    assert distance(got, exact) <= NEAR[dtype]
    assert distance(hidden.grad, dz @ w) <= NEAR[dtype]
    assert distance(weight.grad, dz.t() @ h) <= NEAR[dtype]


def test_both_are_operations_that_a_compiler_keeps(provider, device):
    problem = Problem.draw(5, 60, torch.float32, device, extras=True)
    problem.labels[1] = -100
    t = problem.tensors
    wants = [True] * 5
    args = (t["hidden"], t["weight"], t["bias"], t["u"], t["B"], problem.labels, 4.0, 0.1, -100, wants)
    torch.library.opcheck(importlib.import_module("shoestring.ops.cross_entropy").loss_op, args)
    labels = problem.labels.clamp(min=0)
    pair = (t["hidden"], t["weight"], t["bias"], labels, 4.0)
    torch.library.opcheck(log_probs_module.log_probs_op, pair)

    if provider == "torch":
        return  # the operations are opaque to the compiler: one provider tells of both

    def both() -> Tensor:
        found = log_probs_module.token_log_probs(
            t["hidden"], t["weight"], labels, bias=t["bias"], softcap=4.0
        )
        return problem.loss() + (found * found).sum()

    results = []
    for function in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
        for tensor in t.values():
            tensor.grad = None
        loss = function()
        loss.backward()
        results.append([loss.detach(), *(tensor.grad for tensor in t.values())])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.gpu
def test_logits_past_two_to_the_thirty_one(device):
    from shoestring.ops.kernels.cross_entropy import losses_of_rows

    logits = torch.zeros(2, 2**30 + 2**29, dtype=torch.bfloat16, device=device)
    logits[1, -1] = 30
    labels = torch.full((2,), logits.shape[1] - 1, device=device)
    losses, _ = losses_of_rows(logits, labels, bias=None, softcap=None, gradient=True)
    size = float(logits.shape[1])
    exact = torch.tensor([size, (size - 1) + torch.tensor(30.0).exp().item()]).double().log()
    exact[1] -= 30
    assert distance(losses, exact) < 1e-4
    assert float(logits[0, -1]) == pytest.approx(-1, abs=1e-2)
