"""Optimizers: the update against references, groups, rates, clipping, exact state bytes."""

import math
import sys

import pytest
import torch
from shoestring.checkpoint import load_optimizer_state, optimizer_state
from shoestring.optimizers import (
    build_optimizer,
    clip_by_global_norm,
    parameter_groups,
    set_rate,
    slots,
    state_bytes,
)
from shoestring.recipes import AdamW, AdamW8bit, Lion8bit, PagedAdamW8bit
from shoestring.recipes.errors import UserError
from torch import nn

ALL = [AdamW(), AdamW8bit(), PagedAdamW8bit(), Lion8bit()]


class Model(nn.Module):
    """Tensors above and below the size that 8-bit states start at, one no multiple of the block."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.big = nn.Linear(96, 67, dtype=dtype)
        self.small = nn.Linear(67, 5, dtype=dtype)
        self.norm = nn.RMSNorm(96, dtype=dtype)
        self.frozen = nn.Linear(4, 4, dtype=dtype).requires_grad_(False)

    def forward(self, x):
        return self.small(torch.tanh(self.big(self.norm(x))))


def batches(dtype, count=10):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 96, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def backward(model, x):
    model.zero_grad()
    model(x).square().sum().backward()


def adamw_reference(parameters, grads, state, step, *, rate, betas, eps, weight_decay):
    """AdamW as in arXiv:1711.05101, algorithm 2, with bias correction; in place, float64."""
    for p, g, (m, v), decay in zip(parameters, grads, state, weight_decay, strict=True):
        p.mul_(1 - rate * decay)
        m.mul_(betas[0]).add_(g, alpha=1 - betas[0])
        v.mul_(betas[1]).add_(g * g, alpha=1 - betas[1])
        corrected_m = m / (1 - betas[0] ** step)
        corrected_v = v / (1 - betas[1] ** step)
        p.sub_(rate * corrected_m / (corrected_v.sqrt() + eps))


def test_adamw_is_the_papers_for_ten_steps_in_float64():
    config = AdamW(weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6)
    model = Model(torch.float64)
    optimizer = build_optimizer(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    copies = [p.detach().clone() for p in trained]
    state = [(torch.zeros_like(p), torch.zeros_like(p)) for p in copies]
    for step, x in enumerate(batches(torch.float64), start=1):
        rate = 1e-2 / step
        backward(model, x)
        adamw_reference(
            copies,
            [p.grad for p in trained],
            state,
            step,
            rate=rate,
            betas=config.betas,
            eps=config.eps,
            weight_decay=[0.1 if p.ndim >= 2 else 0.0 for p in copies],
        )
        set_rate(optimizer, rate)
        optimizer.step()
    for ours, reference in zip(trained, copies, strict=True):
        torch.testing.assert_close(ours.detach(), reference, rtol=1e-11, atol=1e-13)


def test_adamw_is_torchs_unfused_for_ten_steps():
    ours, theirs = Model(), Model()
    optimizer = build_optimizer(ours, AdamW(weight_decay=0.0))
    assert optimizer.defaults["fused"]
    reference = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0, foreach=False
    )
    for x in batches(torch.float32):
        backward(ours, x)
        backward(theirs, x)
        set_rate(optimizer, 1e-3)
        optimizer.step()
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("config", ALL, ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_optimizer_lowers_the_loss_and_has_exactly_the_bytes_it_states(config, dtype):
    model = Model(dtype)
    optimizer = build_optimizer(model, config)
    x = batches(dtype, 1)[0]
    before = float(model(x).detach().square().sum())
    set_rate(optimizer, 1e-3)
    for _ in range(10):
        backward(model, x)
        optimizer.step()
    assert float(model(x).detach().square().sum()) < 0.8 * before
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for tensor in state.values()
        if isinstance(tensor, torch.Tensor)
    }
    assert sum(storages.values()) == state_bytes(config, slots(model), dtype)


@pytest.mark.parametrize("config", ALL, ids=lambda c: c.name)
def test_a_restored_optimizer_goes_on_bit_for_bit(config):
    whole, first, second = Model(), Model(), Model()
    optimizers = {m: build_optimizer(m, config, loraplus_lr_ratio=None) for m in (whole, first)}
    data = batches(torch.float32, 6)

    def train(model, optimizer, xs):
        for x in xs:
            backward(model, x)
            set_rate(optimizer, 1e-3)
            optimizer.step()

    train(whole, optimizers[whole], data)
    train(first, optimizers[first], data[:3])
    tensors, rest = optimizer_state(optimizers[first], dict(first.named_parameters()))
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    second.load_state_dict(first.state_dict())
    restored = build_optimizer(second, config)
    load_optimizer_state(restored, dict(second.named_parameters()), tensors, rest)
    train(second, restored, data[3:])
    for (name, a), b in zip(whole.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_eight_bit_states_follow_the_full_ones():
    """8-bit AdamW stays near AdamW: the state is quantised, the algorithm is the same."""
    moved = []
    for config in (AdamW(), AdamW8bit()):
        model = Model()
        start = model.big.weight.detach().clone()
        optimizer = build_optimizer(model, config)
        assert set_rate(optimizer, 1e-3) is None
        for x in batches(torch.float32):
            backward(model, x)
            optimizer.step()
        moved.append((model.big.weight.detach() - start).flatten())
    assert torch.cosine_similarity(*moved, dim=0) > 0.98


class LoraLike(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Module()
        self.q.lora_A = nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)})
        self.q.lora_B = nn.ModuleDict({"default": nn.Linear(2, 8, bias=True)})
        self.q.lora_magnitude_vector = nn.Parameter(torch.ones(8))


def test_groups_decay_matrices_only_and_scale_b_under_lora_plus():
    model = LoraLike()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, weight_decay=0.1, loraplus_lr_ratio=16.0)
    found = {
        group["name"]: ([names[id(p)] for p in group["params"]], group["weight_decay"], group["rate_scale"])
        for group in groups
    }
    assert found == {
        "no_decay": (["q.lora_magnitude_vector"], 0.0, 1.0),
        "decay": (["q.lora_A.default.weight"], 0.1, 1.0),
        "lora_B_decay": (["q.lora_B.default.weight"], 0.1, 16.0),
        "lora_B_no_decay": (["q.lora_B.default.bias"], 0.0, 16.0),
    }
    optimizer = build_optimizer(model, AdamW(weight_decay=0.1), loraplus_lr_ratio=16.0)
    assert {group["lr"] for group in optimizer.param_groups} == {0.0}
    set_rate(optimizer, 1e-4)
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == {
        "no_decay": 1e-4,
        "decay": 1e-4,
        "lora_B_decay": 16e-4,
        "lora_B_no_decay": 16e-4,
    }


def test_without_lora_plus_there_are_two_groups():
    groups = parameter_groups(LoraLike(), weight_decay=0.1)
    assert sorted(group["name"] for group in groups) == ["decay", "no_decay"]


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), AdamW())


def test_a_missing_bitsandbytes_is_one_message(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError) as caught:
        build_optimizer(Model(), AdamW8bit())
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("optimizer.name  adamw_8bit needs the package bitsandbytes: ")
    assert lines[1].strip() == (
        'Install it: pip install "shoestring[quantized]"   or use optimizer.name=adamw'
    )
    assert len(lines) == 2


def test_paged_on_a_cpu_says_once_that_it_is_not(caplog, recwarn):
    build_optimizer(Model(), PagedAdamW8bit())
    assert [record.message for record in caplog.records] == [
        "optimizer: paged_adamw_8bit has nothing to page on a CPU; adamw_8bit is used"
    ]
    assert not [w for w in recwarn if "Paged" in str(w.message)]


@pytest.mark.parametrize("max_norm", [0.5, 1e6, None])
def test_clipping_is_torchs(max_norm):
    ours, theirs = Model(torch.float64), Model(torch.float64)
    x = batches(torch.float64, 1)[0]
    backward(ours, x)
    backward(theirs, x)
    norm = clip_by_global_norm(ours.parameters(), max_norm)
    reference = nn.utils.clip_grad_norm_(theirs.parameters(), max_norm or math.inf)
    torch.testing.assert_close(norm, reference, rtol=1e-12, atol=0)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=0)


def test_the_norm_of_bfloat16_gradients_is_measured_in_float32():
    parameters = [nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16)) for _ in range(3)]
    generator = torch.Generator().manual_seed(2)
    for p in parameters:
        p.grad = torch.randn(1000, generator=generator).to(torch.bfloat16)
    exact = math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters))
    norm = clip_by_global_norm(parameters, 1.0)
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(exact, rel=1e-6)
    assert clip_by_global_norm(parameters, 1.0) <= 1.01


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_shows_in_the_norm(bad):
    p = nn.Parameter(torch.zeros(3))
    p.grad = torch.tensor([1.0, bad, 1.0])
    assert not torch.isfinite(clip_by_global_norm([p], 1.0))


def test_no_gradient_has_norm_zero():
    assert float(clip_by_global_norm([nn.Parameter(torch.ones(2))], 1.0)) == 0.0
