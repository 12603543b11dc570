"""WTA-CRS: the choice of rows against its rule, gradients against autograd, what is kept, swap and key."""

from __future__ import annotations

import copy
import gc
import io
import json
import math
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from plan_cases import Meter, machine, rows, tiny_facts
from plan_cases import recipe as plan_recipe
from shoestring.ops import use_fused, use_wta_crs
from shoestring.ops.wta_crs import SampledLinear, SharedSample, choose_rows, reference, sampled_linear
from shoestring.plan import Plan, make_plan
from shoestring.plan.live_bytes import LiveBytes
from shoestring.plan.replica import build_replica
from shoestring.recipes import UserError, load_recipe
from shoestring.recipes.errors import BudgetError
from shoestring.train.engine import NativeEngine
from shoestring.train.run import train_recipe
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def heavy(count: int, width: int, spread: float = 1.2) -> Tensor:
    """Rows in float64 whose norms differ a hundredfold and more."""
    return (torch.randn(count, width) * torch.randn(count, 1).mul(spread).exp()).double()


# The choice of rows


def winners_by_the_rule(norms: list[float], k: int) -> list[int]:
    """C in plain Python, in exact order."""
    total = math.fsum(norms)
    order = sorted(range(len(norms)), key=lambda i: -norms[i])
    bounds = [math.fsum(norms[i] for i in order[c:]) / total / (k - c) for c in range(k)]
    return order[: bounds.index(min(bounds))]


@pytest.mark.parametrize(("count", "k"), [(2, 1), (12, 1), (12, 5), (50, 30), (50, 49), (200, 20)])
@pytest.mark.parametrize("tail", [0.0, 1.0, 2.5])
def test_choice_follows_the_rule(count: int, k: int, tail: float) -> None:
    norms = torch.randn(count, dtype=torch.float64).mul(tail).exp() + torch.rand(count).mul(1e-3)
    indices, weights = choose_rows(norms, k)
    values = norms.tolist()
    best = winners_by_the_rule(values, k)
    c = len(best)
    assert indices.shape == weights.shape == (k,)
    assert indices[:c].tolist() == best
    assert weights[:c].tolist() == [1.0] * c
    left = math.fsum(values) - math.fsum(values[i] for i in best)
    for index, weight in zip(indices[c:].tolist(), weights[c:].tolist(), strict=True):
        assert index not in best
        assert weight == pytest.approx(left / (values[index] * (k - c)), rel=1e-9)


def test_rows_are_drawn_as_often_as_their_norms_say() -> None:
    norms = torch.tensor([5.0, 0.0, 1.0, 2.0, 3.0, 40.0, 0.5, 2.5], dtype=torch.float64)
    best = winners_by_the_rule(norms.tolist(), 4)
    rest = [i for i in range(8) if i not in best]
    runs = 4000
    drawn = torch.cat([choose_rows(norms, 4)[0][len(best) :] for _ in range(runs)])
    expected = norms[rest] / norms[rest].sum() * len(drawn)
    counts = drawn.bincount(minlength=8)[rest]
    assert counts[rest.index(1)] == 0
    seen = expected > 0
    chi_square = ((counts - expected)[seen].square() / expected[seen]).sum()
    assert best == [5, 0]
    assert chi_square < 18.5  # 4 degrees of freedom: once in a thousand


def test_one_heavy_row_is_a_winner_and_even_rows_have_none() -> None:
    norms = torch.ones(100)
    assert choose_rows(norms, 10)[1].tolist() == pytest.approx([10.0] * 10)
    norms[17] = 1000.0
    indices, weights = choose_rows(norms, 10)
    assert (indices[0], weights[0]) == (17, 1.0)
    assert (indices[1:] != 17).all()
    assert weights[1:].tolist() == pytest.approx([11.0] * 9)


def test_all_rows_where_k_is_no_less() -> None:
    for k in (3, 4):
        indices, weights = choose_rows(torch.rand(3), k)
        assert (indices.tolist(), weights.tolist()) == ([0, 1, 2], [1.0] * 3)
    indices, weights = choose_rows(torch.rand(0), 0)
    assert (indices.shape, weights.shape) == ((0,), (0,))


def test_few_rows_that_are_not_zero_are_all_taken() -> None:
    norms = torch.tensor([0.0, 3.0, 0.0, 1.0, 0.0, 0.0])
    indices, weights = choose_rows(norms, 4)
    assert indices[:2].tolist() == [1, 3]
    assert weights[:2].tolist() == [1.0, 1.0]
    assert (weights[2:] * norms[indices[2:]] == 0).all()


def test_zeros_give_finite_weights_and_broken_rows_stay_visible() -> None:
    indices, weights = choose_rows(torch.zeros(9), 3)
    assert weights.isfinite().all()
    assert (indices < 9).all()
    for broken in (float("nan"), float("inf")):
        norms = torch.ones(9)
        norms[4] = broken
        indices, weights = choose_rows(norms, 3)
        assert 4 in indices or not weights.isfinite().all()
        assert ((indices >= 0) & (indices < 9)).all()


def test_a_generator_decides_alone() -> None:
    norms = torch.rand(50)
    state = torch.get_rng_state()
    first, second = (choose_rows(norms, 9, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(choose_rows(norms, 9)[0], choose_rows(norms, 9)[0])


def test_no_rows_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match=r"k=0 rows cannot stand for 5; k must be at least 1"):
        choose_rows(torch.rand(5), 0)


# The operation


def tensors(shape: tuple[int, ...] = (3, 20, 8), out: int = 6, bias: bool = True) -> list[Tensor | None]:
    """x with heavy rows, weight, bias and the output's gradient, in float64."""
    x = heavy(math.prod(shape[:-1]), shape[-1]).view(shape)
    weight = torch.randn(out, shape[-1], dtype=torch.float64)
    offset = torch.randn(out, dtype=torch.float64) if bias else None
    return [x, weight, offset, torch.randn(*shape[:-1], out, dtype=torch.float64)]


def gradients(
    function: Callable[..., Tensor], given: list[Tensor | None], *more: float
) -> list[Tensor | None]:
    """Output, then the gradients of x, weight and bias."""
    leaves = [None if t is None else t.clone().requires_grad_() for t in given[:3]]
    output = function(*leaves, *more)
    output.backward(given[3].to(output.dtype))
    return [output.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_ratio_one_is_the_plain_layer(dtype: torch.dtype, bias: bool) -> None:
    given = [None if t is None else t.to(dtype) for t in tensors(bias=bias)]
    for ours, theirs in zip(
        gradients(sampled_linear, given, 1.0), gradients(nn.functional.linear, given), strict=True
    ):
        assert ours is theirs is None or torch.equal(ours, theirs)


@pytest.mark.parametrize("ratio", [0.01, 0.3, 0.9])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(60, 8), (3, 20, 8), (2, 3, 10, 8)])
def test_output_and_all_but_the_weights_gradient_are_exact(ratio: float, bias: bool, shape) -> None:
    given = tensors(shape, bias=bias)
    ours = gradients(sampled_linear, given, ratio)
    theirs = gradients(nn.functional.linear, given)
    for index in (0, 1, 3):
        if theirs[index] is not None:
            torch.testing.assert_close(ours[index], theirs[index], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(ours[2], theirs[2])


@pytest.mark.parametrize("ratio", [0.1, 0.4])
def test_the_weights_gradient_is_the_formula(ratio: float) -> None:
    given = tensors()
    torch.manual_seed(5)
    ours = gradients(sampled_linear, given, ratio)[2]
    flat = given[0].reshape(-1, 8)
    torch.manual_seed(5)
    chosen = choose_rows(flat.norm(dim=-1), round(60 * ratio))
    torch.testing.assert_close(ours, reference(flat, given[3].reshape(-1, 6), *chosen))


def deviations(found: Tensor, exact: Tensor) -> Tensor:
    """z of the mean of estimates [runs, ...] around the exact value, by their own spread."""
    return (found.mean(0) - exact) / (found.std(0) / math.sqrt(len(found)))


def test_the_weights_gradient_is_right_on_average_and_the_check_would_notice() -> None:
    x, weight, _, grad = tensors((40, 5), out=3)
    exact = grad.t() @ x
    found = torch.stack([gradients(sampled_linear, [x, weight, None, grad], 0.3)[2] for _ in range(1500)])
    z = deviations(found, exact)
    assert z.abs().max() < 4.5
    assert 0.3 < z.square().mean() < 2.5
    # the same estimates with drawn rows weighted 1 / (p (k - c)), and by (1 - P_C) alone
    norms = x.norm(dim=-1)
    c = len(winners_by_the_rule(norms.tolist(), 12))
    assert 0 < c < 12
    left = float(norms.sort().values[: 40 - c].sum() / norms.sum())
    for wrong in (lambda w: w / left, lambda w: torch.full_like(w, left), torch.ones_like):
        estimates = []
        for _ in range(1500):
            indices, weights = choose_rows(norms, 12)
            weights[c:] = wrong(weights[c:])
            estimates.append((grad[indices] * weights[:, None]).t() @ x[indices])
        assert deviations(torch.stack(estimates), exact).abs().max() > 6


def test_spread_is_below_that_of_drawing_all_rows() -> None:
    x, grad = heavy(200, 5, spread=2.0), torch.randn(200, 3, dtype=torch.float64)
    k, runs = 60, 400
    norms = x.norm(dim=-1)
    p = norms / norms.sum()

    def spread(choose: Callable[[], tuple[Tensor, Tensor]]) -> float:
        found = []
        for _ in range(runs):
            indices, weights = choose()
            found.append((grad[indices] * weights[:, None]).t() @ x[indices])
        return float(torch.stack(found).var(0).sum())

    def plain() -> tuple[Tensor, Tensor]:
        indices = torch.multinomial(p, k, replacement=True)
        return indices, 1 / (p[indices] * k)

    assert spread(lambda: choose_rows(norms, k)) < 0.5 * spread(plain)


def test_bfloat16_is_a_rounding_away() -> None:
    given = tensors()
    low = [None if t is None else t.bfloat16() for t in given]
    high = [None if t is None else t.double() for t in low]
    results = []
    for tensors_ in (low, high):
        torch.manual_seed(3)
        results.append(gradients(sampled_linear, tensors_, 0.3))
    for ours, exact in zip(*results, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - exact).norm() <= 1.2e-2 * exact.norm()


def test_autocast_is_obeyed_and_masters_get_float32_gradients() -> None:
    given = [t.float() for t in tensors()]
    torch.manual_seed(3)
    exact = gradients(sampled_linear, given, 0.3)
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = gradients(sampled_linear, given, 0.3)
    assert [t.dtype for t in ours] == [torch.bfloat16] + [torch.float32] * 3
    for value, expected in zip(ours, exact, strict=True):
        assert (value.float() - expected).norm() <= 1.5e-2 * expected.norm()


@pytest.mark.parametrize("shape", [(8,), (1, 8), (0, 8), (2, 0, 8), (5, 8)])
def test_few_rows_and_zero_rows(shape) -> None:
    for scale in (1.0, 0.0):
        given = tensors(shape)
        given[0] *= scale
        ours, theirs = gradients(sampled_linear, given, 0.2), gradients(nn.functional.linear, given)
        assert all(t.isfinite().all() for t in ours)
        assert torch.equal(ours[0], theirs[0])
        if scale == 0 or math.prod(shape[:-1]) <= 1:
            assert torch.equal(ours[2], theirs[2])


def test_a_ratio_outside_its_range_is_refused() -> None:
    for ratio in (0.0, -1.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="must be above 0 and at most 1"):
            sampled_linear(torch.rand(4, 8), torch.rand(6, 8, requires_grad=True), None, ratio)
        with pytest.raises(ValueError, match="must be above 0 and at most 1"):
            use_wta_crs(nn.Linear(2, 2), ratio)


def test_the_number_of_rows_is_not_rounded_up_for_a_rounding() -> None:
    weight = torch.rand(6, 8, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        sampled_linear(torch.rand(30, 8), weight, None, 0.1)
    assert sorted(t.shape[0] for t in saved if t is not weight and t.shape[0] != 6) == [3, 3]


# What is kept


def kept_bytes(function: Callable[[], object]) -> int:
    """Bytes alive after `function`, besides what it was given, while its result is."""
    with LiveBytes(torch.device("cpu")) as live:
        result = function()
        kept = live.now
        del result
    return kept


class Three(nn.Module):
    """Three layers that read one tensor, which nobody else keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, 16, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        return self.q(x).sum() + self.k(x).sum() + self.v(x).sum()


def test_only_a_sample_is_kept_and_once_for_all_readers() -> None:
    model, x = Three(), torch.randn(1000, 64)
    whole = kept_bytes(lambda: model(x))
    use_wta_crs(model, 0.1)
    sampled = kept_bytes(lambda: model(x))
    assert whole >= 1000 * 64 * 4
    assert 100 * (64 * 4 + 8) <= sampled <= 100 * (64 * 4 + 8) + 100  # rows, indices, and the sums


def rows_drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    drawn: list[int] = []

    def counted(norms: Tensor, k: int) -> tuple[Tensor, Tensor]:
        drawn.append(k)
        return choose_rows(norms, k)

    monkeypatch.setattr("shoestring.ops.wta_crs.choose_rows", counted)
    return drawn


def test_a_sample_is_never_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = rows_drawn(monkeypatch)
    shared = SharedSample()
    weight = torch.rand(6, 8, requires_grad=True)
    x = torch.rand(30, 8)
    graph = [sampled_linear(x, weight, None, 0.5, shared) for _ in range(3)]
    assert drawn == [15]
    x.mul_(2)  # changed in place
    graph.append(sampled_linear(x, weight, None, 0.5, shared))
    assert drawn == [15, 15]
    graph.append(sampled_linear(x, weight, None, 0.1, shared))  # another number of rows
    graph.append(sampled_linear(x.view(30, 8), weight, None, 0.1, shared))  # another tensor
    assert drawn == [15, 15, 3, 3]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        graph.append(sampled_linear(x, weight, None, 0.1, shared))  # another type
    assert drawn == [15, 15, 3, 3, 3]
    x = x.clone()
    graph.append(sampled_linear(x, weight, None, 0.1, shared))
    graph.clear()  # the sample is gone with its graph
    sampled_linear(x, weight, None, 0.1, shared)
    assert drawn == [15, 15, 3, 3, 3, 3, 3]


def test_sharing_keeps_nothing_alive() -> None:
    shared, weight = SharedSample(), torch.rand(6, 8, requires_grad=True)
    x = torch.rand(30, 8)
    loss = sampled_linear(x, weight, None, 0.5, shared).sum()
    kept = shared._last.kept
    assert kept() is not None
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None
    loss.backward()
    assert kept() is None  # though the loss is still there


def test_shared_gradients_come_from_one_choice() -> None:
    x, weight, _, grad = tensors()
    weights = [weight.clone().requires_grad_() for _ in range(2)]
    shared = SharedSample()
    for leaf in weights:
        sampled_linear(x, leaf, None, 0.3, shared).backward(grad, retain_graph=True)
    assert not torch.equal(weights[0].grad, weights[1].grad)  # the first backward freed its sample
    for leaf in weights:
        leaf.grad = None
    outputs = [sampled_linear(x, leaf, None, 0.3, shared) for leaf in weights]
    torch.autograd.backward(outputs, [grad, grad])
    assert torch.equal(weights[0].grad, weights[1].grad)


# The swap


def llama(dtype: torch.dtype = torch.float32, tied: bool = False) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(dtype).train()


IDS = torch.arange(200).view(4, 50).square() % 50


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_the_swap_leaves_head_names_and_evaluation_alone(tied: bool, fused: bool) -> None:
    model = llama(tied=tied)
    if fused:
        use_fused(model)
    before = copy.deepcopy(model)
    assert use_wta_crs(model, 0.3) == ["wta-crs: 14 linear layers keep 0.3 of their input's rows"]
    assert type(model.lm_head) is nn.Linear
    assert sum(isinstance(m, SampledLinear) for m in model.modules()) == 14
    assert list(model.state_dict()) == list(before.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in before.named_parameters()]
    assert torch.equal(model(IDS).logits, before(IDS).logits)
    model.eval(), before.eval()
    for result in (model, before):
        result.zero_grad()
        result(input_ids=IDS, labels=IDS).loss.backward()
    for ours, theirs in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_frozen_layers_and_adapters_are_left_alone() -> None:
    model = llama()
    for parameter in model.model.layers[0].parameters():
        parameter.requires_grad_(False)
    assert use_wta_crs(model, 0.3) == ["wta-crs: 7 linear layers keep 0.3 of their input's rows"]
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    adapted = get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear"))
    assert use_wta_crs(adapted, 0.3) == []


def test_called_again_it_sets_the_ratio_and_no_gradient_draws_nothing() -> None:
    model = llama()
    use_wta_crs(model, 0.3)
    use_wta_crs(model, 0.5)
    layers = [m for m in model.modules() if isinstance(m, SampledLinear)]
    assert {m.wta_crs_ratio for m in layers} == {0.5}
    assert len({id(m.wta_crs_shared) for m in layers}) == 1
    state = torch.get_rng_state()
    with torch.no_grad():
        model(IDS)
    model.eval()(IDS)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_that_has_run_can_be_copied_and_saved(tmp_path: Path) -> None:
    model = llama()
    use_wta_crs(model, 0.3)
    loss = model(input_ids=IDS, labels=IDS).loss
    copied = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copied, loaded):
        layers = [m for m in other.modules() if isinstance(m, SampledLinear)]
        assert len({id(m.wta_crs_shared) for m in layers}) == 1
        assert layers[0].wta_crs_shared is not model.model.layers[0].mlp.up_proj.wta_crs_shared
        assert torch.equal(other(input_ids=IDS, labels=IDS).loss, loss)
    model.save_pretrained(tmp_path)
    plain = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(plain(IDS).logits, model.eval()(IDS).logits)


def loss_and_gradients(model: nn.Module, seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def test_same_seed_same_gradients_and_one_sample_for_each_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = rows_drawn(monkeypatch)
    model = llama()
    use_fused(model)
    use_wta_crs(model, 0.25)
    first, second, other = (loss_and_gradients(model, seed) for seed in (1, 1, 2))
    assert drawn == [50] * 3 * 2 * 4  # runs, layers; and the inputs of qkv, o, gate and up, down
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_checkpointing_draws_the_same_rows_again() -> None:
    model = llama()
    use_wta_crs(model, 0.25)
    once, again = (loss_and_gradients(model, 1) for _ in range(2))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    first, second = (loss_and_gradients(model, 1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(t.isfinite().all() for t in first)


def test_a_llama_keeps_less_and_learns() -> None:
    model = llama()
    use_fused(model)
    whole = kept_bytes(lambda: model.model(IDS).last_hidden_state)
    use_wta_crs(model, 0.2)
    assert kept_bytes(lambda: model.model(IDS).last_hidden_state) < 0.8 * whole
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


# The key of the recipe


def test_a_killed_run_draws_on_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny.recipe(
        tmp_path,
        adapter=None,
        optimizer={"name": "adamw", "learning_rate": 1e-3},
        train={"batch_tokens": 128, "wta_crs_ratio": 0.3},
        budget={"steps": 8},
        eval={"samples": 0},
    )

    def train(folder: str) -> list[float]:
        given = (f"output_dir={tmp_path / folder}",)
        assert train_recipe(str(path), given, fresh=False, started=time.monotonic()) == 0
        lines = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    whole = train("whole")
    real, calls = NativeEngine.step, []

    def dies(self: NativeEngine, max_grad_norm: float | None) -> Tensor:
        calls.append(None)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return real(self, max_grad_norm)

    monkeypatch.setattr(NativeEngine, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        train("broken")
    monkeypatch.setattr(NativeEngine, "step", real)
    torch.manual_seed(999)
    assert train("broken") == whole
    events = (tmp_path / "whole" / "events.jsonl").read_text()
    assert "wta-crs: 14 linear layers keep 0.3 of their input's rows" in events


def problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> str:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("model: m\ndata: a.jsonl\nbudget: 1h\n" + text)
    with pytest.raises(UserError) as caught:
        load_recipe("recipe.yaml")
    return str(caught.value)


def test_an_adapter_has_no_gradients_to_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("", "adapter: lora\n"):
        found = problems(tmp_path, monkeypatch, text + "train: {wta_crs_ratio: 0.3}\n")
        assert found.split("  ", 1)[1].startswith(
            "train.wta_crs_ratio=0.3 samples the weight gradients of whole linear layers, and adapter=lora "
            "has none.   Set adapter=null, or train.wta_crs_ratio=null"
        )


def test_checkpointing_and_sampling_exclude_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "adapter: null\ntrain:\n  wta_crs_ratio: 0.3\n  activation_checkpointing: true\n"
    assert problems(tmp_path, monkeypatch, text).startswith(
        "recipe.yaml:6  train.wta_crs_ratio=0.3 and train.activation_checkpointing=true exclude each other: "
        "what is computed again need not be sampled.   Keep one; the other is train.wta_crs_ratio=null or "
        "train.activation_checkpointing=auto"
    )


def test_the_ratio_is_a_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("0", "1.5", "-0.1", "yes"):
        found = problems(tmp_path, monkeypatch, f"adapter: null\ntrain: {{wta_crs_ratio: {value}}}\n")
        assert "train.wta_crs_ratio is" in found


def planned(*overrides: str) -> Plan:
    return make_plan(
        plan_recipe("adapter=null", *overrides),
        machine(host=2.0),
        tiny_facts(),
        rows(longest=4000),
        world_size=1,
        measure=Meter(),
        libraries=10**9,
        can_pack=True,
    )


def test_the_plan_measures_the_sample_and_never_adds_checkpointing() -> None:
    assert planned().activation_checkpointing
    with pytest.raises(BudgetError):
        planned("train.wta_crs_ratio=0.3")
    model = build_replica(
        plan_recipe("adapter=null", "train.wta_crs_ratio=0.3"),
        tiny_facts(),
        1,
        device=torch.device("cpu"),
        dtype=torch.float32,
        packed=False,
        checkpointing=False,
    )
    assert sum(isinstance(m, SampledLinear) for m in model.modules()) == 7
