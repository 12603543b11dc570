"""SVFit: its formula, what it keeps for the backward pass, its files, and that it is a LoRA."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from shoestring.adapters import (
    attach,
    load_adapter_state,
    merge_in_place,
    on_meta,
    reading_lora,
    save_adapter,
    trainable_parameters,
)
from shoestring.adapters.layers import own_layers
from shoestring.adapters.spectra import elbow_rank, energy_rank, sketch, thin_svd
from shoestring.adapters.svfit import add_scaled
from shoestring.models import load_model, read_facts
from shoestring.optimizers import build_optimizer, set_rate
from shoestring.recipes import AdamW, AdamW8bit, Apollo, ModelConfig, SvfitAdapter, UserError
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


def attached(folder: Path, *, scale: float = 0.0, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """The tiny model with SVFit, its trained vectors moved by `scale`."""
    keys = {name: more.pop(name) for name in ("r", "energy", "target_modules") if name in more}
    base, facts = load(folder, dtype, more.pop("four_bit", False))
    wrapped: Any = attach(base, SvfitAdapter(**keys), facts, seed=0, **more).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)
    return wrapped


@torch.no_grad()
def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def test_the_decomposition_is_that_of_the_definition() -> None:
    """Exact and randomised: orthonormal vectors, the largest singular values, and signs that are fixed."""
    torch.manual_seed(0)
    small = torch.randn(20, 12, dtype=torch.float64)
    u, s, v = thin_svd(small)
    assert (u * s @ v.t() - small).abs().max() < 1e-12
    assert (u.t() @ u - torch.eye(12)).abs().max() < 1e-12
    assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()
    assert sketch(*(x[:, :6] for x in (u, v))) == pytest.approx(sketch(-u[:, :6], -v[:, :6]))
    large = (torch.randn(600, 40, dtype=torch.float64) * 0.8 ** torch.arange(40)) @ torch.randn(
        40, 640, dtype=torch.float64
    )
    u, s, v = thin_svd(large, 8)
    torch.testing.assert_close(s, torch.linalg.svdvals(large)[:8], rtol=1e-9, atol=0)
    assert (large @ v - u * s).abs().max() < 1e-8 * s[0]
    assert torch.equal(thin_svd(large, 8)[0], u)


def test_ranks_of_a_spectrum() -> None:
    values = torch.tensor([3.0, 2.0, 1.0, 1.0], dtype=torch.float64)  # squares 9, 4, 1, 1 of 15
    assert [energy_rank(values, share) for share in (0.5, 0.6, 13 / 15 + 1e-9, 14.5 / 15, 1.0)] == [
        1,
        1,
        3,
        4,
        4,
    ]
    # logs 0 -4 -5 -6: the chord goes through 0 -2 -4 -6, farthest above the second value
    assert elbow_rank(torch.tensor([0.0, -4.0, -5.0, -6.0], dtype=torch.float64).exp()) == 2
    assert elbow_rank(torch.tensor([0.0, -1.0, -2.0, -9.0], dtype=torch.float64).exp()) == 4  # nothing below
    assert elbow_rank(torch.tensor([1.0, 0.0], dtype=torch.float64)) == 1


def test_rotated_vectors_are_noticed() -> None:
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(rows, 9, dtype=torch.float64)).Q for rows in (30, 20))
    turn = torch.eye(9, dtype=torch.float64)
    turn[3:5, 3:5] = torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
    assert abs(sketch(u @ turn, v @ turn) - sketch(u, v)) > 1e-2


def test_gradients_are_those_of_the_formula() -> None:
    torch.manual_seed(0)
    x, base = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(2, 5, 7, dtype=torch.float64)
    u, v, d = (torch.randn(size, dtype=torch.float64) for size in ((7, 3), (6, 3), (3,)))
    for leaf in (x, base, d):
        leaf.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, base, d: add_scaled(x, base, u, v, d), (x, base, d))
    expected = base + x @ (u @ torch.diag(d) @ v.t()).t()
    torch.testing.assert_close(add_scaled(x, base, u, v, d), expected, rtol=1e-12, atol=1e-12)


def test_backward_keeps_the_narrow_product_and_not_the_input() -> None:
    """Of what is as long as the tokens: [tokens, r]. Autograd's own would keep x and two of these."""
    x = torch.randn(50, 64, requires_grad=True)
    u, v, d = torch.randn(96, 4), torch.randn(64, 4), torch.zeros(4, requires_grad=True)

    def saved(compute: Any) -> int:
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel() if tensor.shape[0] == 50 else 0)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            compute()
        return sum(sizes)

    base = torch.zeros(50, 96)
    assert saved(lambda: add_scaled(x, base, u, v, d)) == 50 * 4
    w = v.clone().requires_grad_()  # a factor that is trained, as LoRA's A is
    assert saved(lambda: base + (x @ w * d) @ u.t()) >= 50 * (64 + 4)


@pytest.mark.parametrize("four_bit", [False, True], ids=["float", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_starts_at_the_base_and_merges_to_the_trained(
    folder: Path, dtype: torch.dtype, four_bit: bool
) -> None:
    before = load(folder, dtype, four_bit)[0](IDS).logits.detach()
    wrapped = attached(folder, dtype=dtype, four_bit=four_bit, r=24)
    assert torch.equal(wrapped(IDS).logits, before)
    wrapped = attached(folder, dtype=dtype, four_bit=four_bit, r=24, scale=0.5)
    kinds = {(p.requires_grad, p.dtype) for p in wrapped.parameters() if p.is_floating_point()}
    assert kinds == {(True, torch.float32), (False, dtype)}
    after = wrapped(IDS).logits.detach()
    assert relative(after, before) > 0.05
    merged = merge_in_place(wrapped)
    assert type(merged).__name__ == "LlamaForCausalLM"
    assert relative(merged(IDS).logits, after) < (5e-6 if dtype == torch.float32 else 0.05)


def test_delta_is_that_of_the_definition_and_merging_can_be_undone(folder: Path) -> None:
    """float64: W + U diag(d) V^T with U and V from the SVD of W; with all r and d = -s nothing is left."""
    wrapped = attached(folder)
    name, layer = next(own_layers(wrapped))
    assert name == "model.layers.0.self_attn.q_proj"
    weight = layer.base_layer.weight.detach().double()
    singular = torch.linalg.svdvals(weight)
    rank = len(layer.svfit_d["default"])
    assert rank == energy_rank(singular, 0.99) < 64
    with torch.no_grad():
        layer.svfit_d["default"].copy_(-singular[:rank])
    left = torch.linalg.svdvals(weight + layer.get_delta_weight().double())
    torch.testing.assert_close(left[: 64 - rank], singular[rank:], rtol=1e-4, atol=1e-6)
    layer.merge(safe_merge=True)
    assert layer.merged
    assert relative(layer.base_layer.weight.double(), weight) > 0.1
    layer.unmerge()
    assert relative(layer.base_layer.weight, weight.float()) < 1e-6


def test_switched_off_it_is_the_base(folder: Path) -> None:
    wrapped = attached(folder, scale=0.5)
    base = load(folder)[0](IDS).logits
    with wrapped.disable_adapter():
        assert torch.equal(wrapped(IDS).logits, base)
    assert not torch.equal(wrapped(IDS).logits, base)


KEYS = [{}, {"r": 8}, {"r": 40, "target_modules": ["q_proj", "down_proj"]}]


@pytest.mark.slow
def test_files_in_a_fresh_process(folder: Path, tmp_path: Path) -> None:
    """As LoRA it needs nothing of ours; as itself our import, and no decomposition: the factors are in it."""
    for number, keys in enumerate(KEYS):
        wrapped = attached(folder, scale=0.5, **keys)
        torch.save(wrapped(IDS).logits.detach(), tmp_path / f"expected{number}.pt")
        save_adapter(wrapped, tmp_path / f"lora{number}", portable=True)
        wrapped.save_pretrained(tmp_path / f"own{number}")
    code = (
        "import sys, torch; from peft import PeftModel; from transformers import AutoModelForCausalLM\n"
        "def difference(kind, number):\n"
        f"    base = AutoModelForCausalLM.from_pretrained({str(folder)!r}, dtype=torch.float32)\n"
        f"    model = PeftModel.from_pretrained(base, f'{tmp_path}/{{kind}}{{number}}').eval()\n"
        f"    expected = torch.load(f'{tmp_path}/expected{{number}}.pt')\n"
        "    logits = model(torch.arange(48).reshape(2, 24) % 23).logits\n"
        "    return float((logits - expected).abs().max() / expected.abs().max())\n"
        "print(*(difference('lora', number) for number in range(3)))\n"
        "assert 'shoestring' not in sys.modules\n"
        "import shoestring.adapters\n"
        "torch.linalg.svd = None\n"
        "print(*(difference('own', number) for number in range(3)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lora, own = ([float(value) for value in line.split()] for line in done.stdout.splitlines())
    assert max(lora) < 2e-6
    assert own == [0.0, 0.0, 0.0]


def test_exported_it_is_a_lora(folder: Path, tmp_path: Path) -> None:
    wrapped = attached(folder, scale=0.5, r=8)
    expected = wrapped(IDS).logits.detach()
    save_adapter(wrapped, tmp_path, portable=True)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    loaded = PeftModel.from_pretrained(load(folder)[0], tmp_path).eval()
    assert relative(loaded(IDS).logits, expected) < 2e-6
    with reading_lora(wrapped, tmp_path):
        assert relative(wrapped(IDS).logits, expected) < 2e-6
    assert torch.equal(wrapped(IDS).logits, expected)


def test_without_our_import_peft_says_which(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT's error for a method that it does not know is the method's key."""
    wrapped = attached(folder, scale=0.5)
    wrapped.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(folder)[0], tmp_path, is_trainable=True)
    counts = [sum(p.numel() for p in one.parameters() if p.requires_grad) for one in (again, wrapped)]
    assert counts[0] == counts[1] > 0
    assert torch.equal(again.eval()(IDS).logits, wrapped(IDS).logits)
    monkeypatch.delitem(PEFT_TYPE_TO_CONFIG_MAPPING, "SVFIT (import shoestring.adapters)")
    with pytest.raises(KeyError, match=r"SVFIT \(import shoestring.adapters\)"):
        PeftModel.from_pretrained(load(folder)[0], tmp_path)


def test_a_checkpoint_finds_the_same_factors(folder: Path, tmp_path: Path) -> None:
    wrapped = attached(folder, scale=0.5)
    save_adapter(wrapped, tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    again = attached(folder, saved=saved)
    for (_, one), (_, other) in zip(own_layers(wrapped), own_layers(again), strict=True):
        assert torch.equal(one.svfit_u, other.svfit_u)
    load_adapter_state(again, tmp_path)
    assert torch.equal(again(IDS).logits, wrapped(IDS).logits)
    other = tiny.model_folder(tmp_path / "other", seed=5)
    with pytest.raises(UserError, match="are not those that this training started with"):
        attached(other, saved=saved)


def test_counts_from_shapes(folder: Path) -> None:
    _, facts = load(folder)
    wrapped = attached(folder, r=24)
    trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert trainable_parameters(SvfitAdapter(r=24), facts) == trained == 2 * 7 * 24
    # by energy it is known only from the weights: the most there may be. k and v are 32 wide, the others 64
    most = trainable_parameters(SvfitAdapter(), facts)
    assert most == 2 * (5 * 64 + 2 * 32)
    by_energy = sum(p.numel() for p in attached(folder).parameters() if p.requires_grad)
    assert 0.7 * most < by_energy < most
    assert all(p.is_meta for p in on_meta(SvfitAdapter(), facts).parameters())


def test_measured_only_it_starts_from_no_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoestring.adapters.svfit.thin_svd", None)
    wrapped = attached(folder, from_weights=False)
    assert sum(p.numel() for p in wrapped.parameters() if p.requires_grad) == 2 * (5 * 64 + 2 * 32)


@pytest.mark.parametrize("optimizer", [AdamW(), Apollo(rank=4), AdamW8bit()], ids=lambda one: one.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_the_optimizers(folder: Path, optimizer: Any, dtype: torch.dtype) -> None:
    wrapped = attached(folder, dtype=dtype, r=16).train()
    steps = build_optimizer(wrapped, optimizer, seed=0)
    set_rate(steps, 0.05)
    losses = []
    for _ in range(4):
        loss = wrapped(input_ids=IDS, labels=IDS).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in wrapped.parameters() if p.requires_grad)
        steps.step()
        steps.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_what_is_not_linear_is_refused(folder: Path) -> None:
    with pytest.raises(
        UserError, match="embed_tokens is of class Embedding, and this adapter is for linear layers"
    ):
        attached(folder, target_modules=["embed_tokens"])
