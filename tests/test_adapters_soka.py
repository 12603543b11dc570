"""SoKA: the rearrangement, the sum of Kronecker products, how many of them, and how they are trained."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel
from shoestring.adapters import attach, load_adapter_state, merge_in_place, save_adapter, trainable_parameters
from shoestring.adapters.layers import own_layers
from shoestring.adapters.soka import (
    add_kronecker,
    choose_rank,
    kronecker_factors,
    rearranged,
    split,
)
from shoestring.adapters.spectra import elbow_rank, energy_rank, singular_values
from shoestring.models import load_model, read_facts
from shoestring.optimizers import build_optimizer, set_rate
from shoestring.recipes import AdamW, AdamW8bit, Apollo, ModelConfig, SokaAdapter
from torch import Tensor

IDS = torch.arange(48).reshape(2, 24) % 23
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small are many times slower when several threads share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("base"))


def load(folder: Path, dtype: torch.dtype = torch.float32, four_bit: bool = False) -> tuple[Any, Any]:
    recipe = ModelConfig(model_name_or_path=str(folder), load_in_4bit=four_bit)
    facts = read_facts(recipe)
    return load_model(facts, recipe, device=CPU, dtype=dtype).eval(), facts


def attached(
    folder: Path,
    adapter: SokaAdapter,
    *,
    scale: float = 0.0,
    dtype: torch.dtype = torch.float32,
    four_bit: bool = False,
    **more: Any,
) -> Any:
    """The tiny model with SoKA, its trained factors moved by `scale`."""
    base, facts = load(folder, dtype, four_bit)
    wrapped: Any = attach(base, adapter, facts, seed=0, **more).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)
    return wrapped


@torch.no_grad()
def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def test_split_and_rearrangement_by_their_definition() -> None:
    assert split(4096, 4096) == (64, 64, 64, 64)
    assert split(11008, 4096) == (86, 128, 64, 64)
    assert split(128, 128) == (8, 16, 16, 8)
    assert split(7, 6) == (1, 7, 3, 2)
    m1, m2, n1, n2 = split(12, 15)
    weight = torch.randn(12, 15, dtype=torch.float64)
    found = rearranged(weight, m1, n1)
    for i1 in range(m1):
        for j1 in range(n1):
            block = weight[i1 * m2 : (i1 + 1) * m2, j1 * n2 : (j1 + 1) * n2]
            assert torch.equal(found[i1 * n1 + j1], block.reshape(-1))


def test_the_error_of_the_sum_is_the_tail_of_the_spectrum() -> None:
    torch.manual_seed(0)
    weight = torch.randn(12, 15, dtype=torch.float64)
    m1, m2, n1, n2 = split(12, 15)
    values = torch.linalg.svdvals(rearranged(weight, m1, n1))
    torch.testing.assert_close(singular_values(rearranged(weight, m1, n1)), values, rtol=1e-9, atol=1e-12)
    for terms in (1, 3, len(values)):
        a, b = kronecker_factors(weight, terms)
        assert a.shape == (terms, m1, n1)
        assert b.shape == (terms, m2, n2)
        left = weight - sum(torch.kron(x, y) for x, y in zip(a, b, strict=True))
        tail = values[terms:].square().sum().sqrt()
        assert float(left.norm()) == pytest.approx(float(tail), rel=1e-10, abs=1e-12)
        torch.testing.assert_close(a.flatten(1).norm(dim=1), b.flatten(1).norm(dim=1))


def test_a_kronecker_product_has_one_term() -> None:
    torch.manual_seed(0)
    m1, m2, n1, n2 = split(64, 32)
    product = torch.kron(torch.randn(m1, n1, dtype=torch.float64), torch.randn(m2, n2, dtype=torch.float64))
    values = singular_values(rearranged(product, m1, n1))
    assert choose_rank(values, 0.999, 16) == 1
    assert int((values > 1e-7 * values[0]).sum()) == 1
    a, b = kronecker_factors(product, 1)
    assert relative(torch.kron(a[0], b[0]), product) < 1e-12


def test_the_rank_is_the_least_of_three() -> None:
    values = torch.tensor([8.0, 4, 2, 1, 0.9, 0.8, 0.7, 0.6], dtype=torch.float64)
    by_energy, by_elbow = energy_rank(values, 0.99), elbow_rank(values)
    assert (by_energy, by_elbow) == (6, 4)
    assert choose_rank(values, 0.99, 16) == 4
    assert choose_rank(values, 0.9, 16) == energy_rank(values, 0.9) == 2
    assert choose_rank(values, 0.99, 3) == 3


def test_output_and_gradients_are_those_of_the_built_product() -> None:
    torch.manual_seed(0)
    m1, m2, n1, n2 = 2, 3, 4, 5
    x = torch.randn(3, 2, n1 * n2, dtype=torch.float64, requires_grad=True)
    base = torch.randn(3, 2, m1 * m2, dtype=torch.float64, requires_grad=True)
    left = torch.randn(3, m1, n1, dtype=torch.float64, requires_grad=True)
    right = torch.randn(3, m2, n2, dtype=torch.float64, requires_grad=True)
    built = sum(torch.kron(a, b) for a, b in zip(left, right, strict=True))
    torch.testing.assert_close(add_kronecker(x, base, left, right), base + x @ built.t())
    assert torch.autograd.gradcheck(add_kronecker, (x, base, left, right))


def test_backward_keeps_the_input_once() -> None:
    x = torch.randn(50, 64, requires_grad=True)
    left, right = torch.randn(6, 8, 8, requires_grad=True), torch.randn(6, 12, 8, requires_grad=True)
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        add_kronecker(x, torch.zeros(50, 96), left, right)
    assert sorted(sizes) == sorted([50 * 64, left.numel(), right.numel()])


@pytest.mark.parametrize("four_bit", [False, True], ids=["float", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_starts_at_the_base_and_merges_to_the_trained(
    folder: Path, dtype: torch.dtype, four_bit: bool
) -> None:
    before = load(folder, dtype, four_bit)[0](IDS).logits.detach()
    adapter = SokaAdapter(r=3, target_modules=["q_proj", "v_proj", "down_proj"])
    wrapped = attached(folder, adapter, dtype=dtype, four_bit=four_bit)
    assert torch.equal(wrapped(IDS).logits, before)
    wrapped = attached(folder, adapter, dtype=dtype, four_bit=four_bit, scale=0.2)
    assert {p.dtype for p in wrapped.parameters() if p.requires_grad} == {torch.float32}
    after = wrapped(IDS).logits.detach()
    assert relative(after, before) > 0.05
    merged = merge_in_place(wrapped)
    assert type(merged).__name__ == "LlamaForCausalLM"
    assert relative(merged(IDS).logits, after) < (5e-6 if dtype == torch.float32 else 0.05)


def test_the_change_is_that_of_the_factors(folder: Path) -> None:
    """float64: (A + a) (x) (B + b) - A (x) B summed over the terms, from the definition."""
    wrapped = attached(folder, SokaAdapter(r=4, energy=1.0), scale=0.3)
    for _, layer in own_layers(wrapped):
        names = ("soka_a", "soka_b")
        a, b = (getattr(layer, name).detach().double() for name in names)
        da, db = (getattr(layer, name)["default"].detach().double() for name in ("soka_da", "soka_db"))
        expected = sum(torch.kron(a[k] + da[k], b[k] + db[k]) - torch.kron(a[k], b[k]) for k in range(len(a)))
        assert relative(layer.get_delta_weight(), expected) < 1e-5
        weight = layer.base_layer.weight.detach().double()
        terms = kronecker_factors(weight, len(a))
        torch.testing.assert_close(a, terms[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(b, terms[1], rtol=1e-5, atol=1e-6)


def test_a_gradient_is_that_of_the_merged_weight(folder: Path) -> None:
    """One backward pass through the whole model, against autograd on weights built from the factors."""
    adapter = SokaAdapter(r=2, target_modules=["up_proj"], layers_to_transform=[1])
    wrapped = attached(folder, adapter, scale=0.2)
    wrapped(input_ids=IDS, labels=IDS).loss.backward()
    (_, layer), base = next(own_layers(wrapped)), load(folder)[0]
    left = layer.soka_da["default"].detach().requires_grad_()
    right = layer.soka_db["default"].detach().requires_grad_()
    total = sum(
        torch.kron(layer.soka_a[k] + left[k], layer.soka_b[k] + right[k])
        - torch.kron(layer.soka_a[k], layer.soka_b[k])
        for k in range(2)
    )
    name = "model.layers.1.mlp.up_proj.weight"
    weights = {name: base.get_parameter(name).detach() + total}
    torch.func.functional_call(base, weights, (), {"input_ids": IDS, "labels": IDS}).loss.backward()
    torch.testing.assert_close(layer.soka_da["default"].grad, left.grad, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(layer.soka_db["default"].grad, right.grad, rtol=1e-4, atol=1e-7)


def test_files_and_checkpoints(folder: Path, tmp_path: Path) -> None:
    wrapped = attached(folder, SokaAdapter(r=5), scale=0.2)
    expected = wrapped(IDS).logits.detach()
    wrapped.save_pretrained(tmp_path / "own")
    loaded = PeftModel.from_pretrained(load(folder)[0], tmp_path / "own").eval()
    assert torch.equal(loaded(IDS).logits, expected)
    save_adapter(wrapped, tmp_path / "checkpoint")
    saved = json.loads((tmp_path / "checkpoint" / "adapter_config.json").read_text())
    again = attached(folder, SokaAdapter(r=5), saved=saved)
    load_adapter_state(again, tmp_path / "checkpoint")
    assert torch.equal(again(IDS).logits, expected)


def test_counts_from_shapes(folder: Path) -> None:
    """The most that there may be; a random matrix has a flat spectrum, so that few terms hold little."""
    _, facts = load(folder)
    adapter = SokaAdapter(r=3, energy=1.0, target_modules=["q_proj"])
    assert trainable_parameters(adapter, facts) == 2 * 3 * (8 * 8 + 8 * 8)
    counted = sum(p.numel() for p in attached(folder, adapter).parameters() if p.requires_grad)
    assert counted == trainable_parameters(adapter, facts)
    less = attached(folder, SokaAdapter(r=3, energy=1e-3, target_modules=["q_proj"]))
    assert sum(p.numel() for p in less.parameters() if p.requires_grad) == counted // 3


@pytest.mark.parametrize("optimizer", [AdamW(), Apollo(rank=4), AdamW8bit()], ids=lambda one: one.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_the_optimizers(folder: Path, optimizer: Any, dtype: torch.dtype) -> None:
    wrapped = attached(folder, SokaAdapter(r=3), dtype=dtype).train()
    steps = build_optimizer(wrapped, optimizer, seed=0)
    set_rate(steps, 0.01)
    losses = []
    for _ in range(4):
        loss = wrapped(input_ids=IDS, labels=IDS).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in wrapped.parameters() if p.requires_grad)
        steps.step()
        steps.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
