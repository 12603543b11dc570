"""Ranks by importance: the scores of layers, how ranks follow them, and what they cost."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel
from shoestring.adapters import attach, save_adapter, trainable_parameters
from shoestring.adapters.ranks import layer_scores, share_out, turned
from shoestring.models import load_model, read_facts
from shoestring.recipes import LoraAdapter, ModelConfig, UserError
from torch import Tensor, nn

IDS = torch.arange(48).reshape(2, 24) % 23
MASK = torch.ones_like(IDS)
MASK[1, 10:] = 0
BATCHES = [{"input_ids": IDS, "attention_mask": MASK}, {"input_ids": IDS[:1, :7] + 1}]
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
    return tiny.model_folder(tmp_path_factory.mktemp("base"), layers=4)


def load(folder: Path, four_bit: bool = False) -> tuple[Any, Any]:
    """The tiny model; its second layer does nothing, and its third ten times as much."""
    recipe = ModelConfig(model_name_or_path=str(folder), load_in_4bit=four_bit)
    facts = read_facts(recipe)
    model: Any = load_model(facts, recipe, device=CPU, dtype=torch.float32).eval()
    if not four_bit:
        with torch.no_grad():
            for part in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
                part.weight.zero_()
            model.model.layers[2].mlp.down_proj.weight.mul_(10)
    return model, facts


def states_of(model: Any, ids: Tensor, mask: Tensor) -> list[Tensor]:
    """Input of each layer and output of the last; transformers' own last one is after the final norm."""
    last: list[Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))
    hidden = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    hook.remove()
    return [*hidden[:4], last[0]]


@pytest.mark.parametrize("score", ["block_influence", "angular_distance"])
@torch.no_grad()
def test_scores_are_those_of_the_papers(folder: Path, score: Any) -> None:
    """float64, token by token, from the hidden states that transformers gives itself."""
    model, _ = load(folder)
    sums, tokens = [0.0] * 4, 0
    for batch in BATCHES:
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids))
        inside = states_of(model, ids, mask)
        for row in range(ids.shape[0]):
            for place in range(ids.shape[1]):
                if not mask[row, place]:
                    continue
                tokens += 1
                for layer in range(4):
                    x, y = (inside[layer + k][row, place].double() for k in (0, 1))
                    cosine = float(x @ y / (x.norm() * y.norm()))
                    angle = float(torch.tensor(min(max(cosine, -1.0), 1.0), dtype=torch.float64).arccos())
                    sums[layer] += 1 - cosine if score == "block_influence" else angle / 3.141592653589793
    hooks = [len(layer._forward_hooks) for layer in model.model.layers]
    found = layer_scores(model, BATCHES, score)
    assert tokens == 24 + 10 + 7
    assert found == pytest.approx([total / tokens for total in sums], rel=1e-6, abs=1e-7)
    assert found[1] == pytest.approx(0, abs=1e-7)
    assert found[2] == max(found)
    assert [len(layer._forward_hooks) for layer in model.model.layers] == hooks


def test_extremes_of_the_scores() -> None:
    x = torch.randn(5, 8, dtype=torch.float64)
    assert turned(x, 3 * x, "block_influence") == pytest.approx(torch.zeros(5), abs=1e-7)
    assert turned(x, 3 * x, "angular_distance") == pytest.approx(torch.zeros(5), abs=1e-7)
    assert turned(x, -x, "block_influence") == pytest.approx(2 * torch.ones(5), abs=1e-7)
    assert turned(x, -x, "angular_distance") == pytest.approx(torch.ones(5), abs=1e-7)
    orthogonal = torch.tensor([[0.0, 1.0]])
    assert float(turned(torch.tensor([[1.0, 0.0]]), orthogonal, "angular_distance")) == pytest.approx(0.5)


def test_scores_do_not_depend_on_how_rows_are_batched(folder: Path) -> None:
    model, _ = load(folder)
    together = layer_scores(model, [{"input_ids": IDS}], "block_influence")
    apart = layer_scores(model, [{"input_ids": row[None]} for row in IDS], "block_influence")
    assert together == pytest.approx(apart, rel=1e-5, abs=1e-9)


def test_ranks_follow_the_scores_at_constant_parameters() -> None:
    assert share_out([1, 1, 1, 1], [10] * 4, 8) == [8, 8, 8, 8]
    assert share_out([1, 2, 3, 2], [10] * 4, 8) == [4, 8, 12, 8]
    # 24 ranks by 3.6, 8.4, 12: the largest remainder gets the one that rounding down left
    assert share_out([0.3, 0.7, 1.0], [5] * 3, 8) == [4, 8, 12]
    assert share_out([0.0, 0.0], [5] * 2, 8) == [8, 8]
    # a layer that does nothing keeps 1, and the others share the rest: 31 by 1, 1 and 2
    assert share_out([1, 0, 1, 2], [7] * 4, 8) == [8, 1, 8, 15]
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        layers = int(torch.randint(1, 40, (), generator=generator))
        r = int(torch.randint(1, 64, (), generator=generator))
        scores = torch.rand(layers, generator=generator, dtype=torch.float64).pow(3).tolist()
        ranks = share_out(scores, [11] * layers, r)
        assert sum(ranks) == r * layers
        assert min(ranks) >= 1
        mean = sum(scores) / layers
        if min(r * s / mean for s in scores) >= 1:
            assert all(abs(rank - r * s / mean) < 1 for rank, s in zip(ranks, scores, strict=True))
        order = sorted(range(layers), key=lambda i: scores[i])
        assert all(ranks[i] <= ranks[j] + 1 for i, j in itertools.pairwise(order))


def test_unequal_layers_share_parameters_and_not_ranks() -> None:
    costs = [10, 30, 10]
    ranks = share_out([1, 2, 4], costs, 8)
    spent = sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
    assert 8 * 50 - 30 < spent <= 8 * 50
    assert ranks == [4, 7, 15]  # 400 parameters by 10, 60 and 40 parts of 110: 3.64, 7.27, 14.55


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_gets_the_ranks_and_keeps_its_scale(folder: Path, rslora: bool, tmp_path: Path) -> None:
    model, facts = load(folder)
    adapter = LoraAdapter(r=8, rank_allocation="block_influence", use_rslora=rslora)
    wrapped: Any = attach(model, adapter, facts, seed=0, batches=BATCHES)
    layers = wrapped.base_model.model.model.layers
    ranks = [layer.self_attn.q_proj.r["default"] for layer in layers]
    scores = layer_scores(load(folder)[0], BATCHES, "block_influence")
    assert ranks == share_out(scores, [1] * 4, 8)
    assert ranks[1] == 1
    assert max(ranks) == ranks[2] > 8
    for layer, rank in zip(layers, ranks, strict=True):
        modules = [module for module in layer.modules() if hasattr(module, "lora_A")]
        assert len(modules) == 7
        assert {module.r["default"] for module in modules} == {rank}
        scale = 8 / 8**0.5 if rslora else 32 / 8
        assert all(module.scaling["default"] == pytest.approx(scale) for module in modules)
    counted = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert counted == trainable_parameters(adapter, facts)
    save_adapter(wrapped, tmp_path, portable=True)
    loaded = PeftModel.from_pretrained(load(folder)[0], tmp_path)
    assert torch.equal(loaded(IDS).logits, wrapped.eval()(IDS).logits)


def test_a_resumed_run_keeps_its_ranks(folder: Path) -> None:
    from shoestring.adapters import adapter_config

    model, facts = load(folder)
    adapter = LoraAdapter(r=8, rank_allocation="angular_distance", layers_to_transform=[0, 2, 3])
    wrapped: Any = attach(model, adapter, facts, seed=0, batches=BATCHES)
    again: Any = attach(load(folder)[0], adapter, facts, seed=0, saved=adapter_config(wrapped))
    shapes = [[tuple(p.shape) for p in one.parameters() if p.requires_grad] for one in (wrapped, again)]
    assert shapes[0] == shapes[1]
    assert len({shape[0] for shape in shapes[0] if shape[1] == 64}) > 1


def test_on_four_bits_a_rank_costs_what_it_costs_on_a_plain_layer(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model, facts = load(folder, four_bit=True)
    adapter = LoraAdapter(r=8, rank_allocation="block_influence", target_modules=["q_proj", "down_proj"])
    wrapped: Any = attach(model, adapter, facts, seed=0, batches=BATCHES)
    counted = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert counted == trainable_parameters(adapter, facts) == 4 * 8 * (128 + 192)


def test_what_has_no_rows_or_no_layers_is_told(folder: Path) -> None:
    model, facts = load(folder)
    with pytest.raises(UserError, match="block_influence looks at training rows first, and there are none"):
        attach(model, LoraAdapter(rank_allocation="block_influence"), facts, seed=0)
    odd: Any = nn.Module()
    odd.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=3))
    odd.config.get_text_config = lambda *_, **__: SimpleNamespace(num_hidden_layers=3)
    odd.get_decoder = lambda: nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(UserError, match="needs one list of decoder layers"):
        layer_scores(odd, BATCHES, "block_influence")
