"""Removal is zeroing: the same function, the same training, in models that stay ordinary ones."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from pruning_models import NAMES, batches, logits, tiny
from shoestring.pruning import Cut, amounts_for, everything, mask, pad, prune, read_anatomy, remove
from shoestring.recipes.errors import UserError


def cut_of(model, *, neurons=(17, 23, 9), groups=(3, 2, 3), blocks=(0, 1, 2), seed=1, updates=False) -> Cut:
    """An uneven random cut, with new down weights where asked."""
    generator = torch.Generator().manual_seed(seed)

    def draw(total, count):
        return torch.randperm(total, generator=generator)[:count].sort().values

    whole = everything(read_anatomy(model))
    kept = tuple(draw(40, n) for n in neurons)
    weights = {
        index: torch.randn(64, len(each), generator=generator, dtype=torch.float64)
        for index, each in enumerate(kept)
    }
    return dataclasses.replace(
        whole,
        neurons=kept,
        groups=tuple(draw(4, n) for n in groups),
        blocks=tuple(blocks),
        down_weight=weights if updates else {},
    )


def masked(model, cut: Cut):
    twin = copy.deepcopy(model)
    mask(twin, cut)
    return twin


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("blocks", [(0, 1, 2), (0, 2)])
def test_removal_computes_what_zeroing_computes(family, blocks):
    model = tiny(family)
    before = logits(model)
    cut = cut_of(model, blocks=blocks, updates=True)
    zeroed = masked(model, cut)
    remove(model, cut)
    after = logits(model)
    assert (after - logits(zeroed)).abs().max() < 1e-12
    assert (after - before).abs().max() > 1e-2
    anatomy = read_anatomy(model)
    assert [(b.neurons, b.groups) for b in anatomy.blocks] == [[(17, 3), (23, 2), (9, 3)][i] for i in blocks]


def test_zeroing_by_hand_is_what_mask_does():
    """The oracle of the oracle: a plain loop over single entries of a Llama without updates."""
    model = tiny()
    cut = cut_of(model, blocks=(0, 2))
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        for index, layer in enumerate(by_hand.model.layers):
            attention, mlp = layer.self_attn, layer.mlp
            for j in set(range(40)) - set(cut.neurons[index].tolist()):
                mlp.gate_proj.weight[j] = mlp.up_proj.weight[j] = mlp.down_proj.weight[:, j] = 0
            for group in set(range(4)) - set(cut.groups[index].tolist()):
                for row in range(8 * group, 8 * group + 8):
                    attention.k_proj.weight[row] = attention.v_proj.weight[row] = 0
                for row in range(16 * group, 16 * group + 16):
                    attention.q_proj.weight[row] = attention.o_proj.weight[:, row] = 0
        by_hand.model.layers[1].self_attn.o_proj.weight.zero_()
        by_hand.model.layers[1].mlp.down_proj.weight.zero_()
    mask(model, cut)
    for (name, ours), theirs in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_generation_with_a_cache_after_blocks_left(family):
    model = tiny(family, dtype=torch.float32)
    remove(model, cut_of(model, blocks=(1, 2), neurons=(9, 9, 9), groups=(2, 2, 2)))
    ids = batches()[0][:1]
    cached = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    slow = ids
    for _ in range(8):
        slow = torch.cat([slow, logits(model, slow)[:, -1:].argmax(-1)], dim=1)
    assert cached.tolist() == slow.tolist()


def train(model, optimizer, steps, *, first=0):
    for step in range(first, first + steps):
        ids = batches(seed=100 + step)[0]
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("blocks", [(0, 1, 2), (0, 2)])
def test_training_goes_on_as_in_the_masked_model(family, blocks):
    """AdamW with decay and momentum: its state follows the weights, in place."""
    model = tiny(family)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    train(model, optimizer, 3)
    zeroed = copy.deepcopy(model)
    other = torch.optim.AdamW(zeroed.parameters(), lr=1e-2, weight_decay=0.1)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    cut = cut_of(model, blocks=blocks)
    names = {name for name, _ in model.named_parameters()}

    mask(zeroed, cut)
    frozen = copy.deepcopy(zeroed)  # zero where something left: the mask of weights and of states
    for parameter, stays in zip(zeroed.parameters(), frozen.parameters(), strict=True):
        state = other.state[parameter]
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] *= stays != 0
    removed_layers = {f"model.layers.{i}." for i in range(3) if i not in blocks}
    for name, parameter in zeroed.named_parameters():
        # a zeroed block still has gradients at its zero outputs; the removed one has none
        if any(name.startswith(prefix) for prefix in removed_layers):
            parameter.requires_grad_(False)
            parameter.grad = None
    other.param_groups[0]["params"] = [p for p in zeroed.parameters() if p.requires_grad]

    remove(model, cut, optimizer=optimizer)
    held = [id(p) for p in optimizer.param_groups[0]["params"]]
    assert held == [id(p) for p in model.parameters()]
    assert set(map(id, optimizer.state)) == set(held)
    train(model, optimizer, 4, first=3)
    train(zeroed, other, 4, first=3)
    assert (logits(model) - logits(zeroed)).abs().max() < 1e-9
    assert len(names) > len(held) or len(blocks) == 3
    # and not because nothing moved
    assert (logits(zeroed) - logits(frozen)).abs().max() > 1e-3


def test_gradients_and_frozen_parameters_stay_so():
    model = tiny()
    ids = batches()[0]
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    model(input_ids=ids, labels=ids).loss.backward()
    gradient = model.model.layers[1].mlp.down_proj.weight.grad.clone()
    cut = cut_of(model)
    remove(model, cut)
    assert not model.model.layers[0].mlp.up_proj.weight.requires_grad
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight.grad, gradient[:, cut.neurons[1]])


def test_states_that_are_not_like_their_weights_are_refused_before_anything_changes():
    model = tiny()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=1e-3)
    train(model, optimizer, 1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=r"state row_var of Adafactor has the shape .* cannot be cut"):
        remove(model, cut_of(model), optimizer=optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_compensating_biases_join_the_optimizer():
    model = tiny("llama", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, 1)
    prune(model, batches(), method="flap", ratio=0.1, compensate=True, optimizer=optimizer)
    held = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert held == {id(p) for p in model.parameters()}
    down = model.model.layers[0].mlp.down_proj
    assert down.bias.abs().max() > 0
    before = down.bias.detach().clone()
    train(model, optimizer, 1, first=1)
    assert not torch.equal(down.bias, before)


def test_padding_is_exact_and_even():
    model = tiny("qwen2")
    remove(model, cut_of(model))
    before, parameters = logits(model), read_anatomy(model).parameters
    added = pad(model)
    assert added == read_anatomy(model).parameters - parameters > 0
    assert {(b.neurons, b.groups) for b in read_anatomy(model).blocks} == {(23, 3)}
    assert (logits(model) - before).abs().max() < 1e-12


def test_a_cut_of_another_model_is_refused():
    cut = cut_of(tiny())
    with pytest.raises(ValueError, match="the cut is of 3 layers, the model has 2"):
        remove(tiny(num_hidden_layers=2), cut)


# Amounts


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("parts", [("neurons",), ("groups",), ("neurons", "groups"), ("blocks",)])
def test_amounts_count_what_a_removal_leaves(family, parts):
    model = tiny(family)
    anatomy = read_anatomy(model)
    amounts = amounts_for(anatomy, 0.12, parts=parts)
    total = anatomy.parameters
    assert total == sum(p.numel() for p in set(model.parameters()))
    cut = Cut(
        (torch.arange(amounts.neurons),) * 3,
        (torch.arange(amounts.groups),) * 3,
        tuple(range(amounts.blocks)),
    )
    per_neuron, block = 3 * anatomy.blocks[0].neuron_parameters, anatomy.blocks[0]
    assert block.parameters == sum(p.numel() for p in block.layer.parameters())
    remove(model, cut)
    left = sum(p.numel() for p in set(model.parameters()))
    assert left == amounts.parameters
    assert amounts.ratio == pytest.approx(1 - left / total, abs=1e-15)
    if "neurons" in parts:
        assert 0 <= (total - left) - 0.12 * total < per_neuron


@pytest.mark.parametrize(
    ("family", "compensate", "kept"),
    [("llama", False, 3), ("llama", True, 2), ("qwen2", True, 2), ("qwen3", True, 3), ("gemma2", False, 2)],
)
def test_groups_that_stay_can_be_saved(family, compensate, kept):
    """8 heads on 64 channels: 6 do not divide them, which Llama and Gemma 2 want."""
    anatomy = read_anatomy(tiny(family))
    one = 3 * anatomy.blocks[0].group_parameters / anatomy.parameters
    assert amounts_for(anatomy, one, parts=("groups",), compensate=compensate).groups == kept
    # of Qwen3 no class holds the bias that neurons would need
    biased = compensate and family != "qwen3"
    both = amounts_for(anatomy, 2 * one, parts=("neurons", "groups"), compensate=biased)
    assert both.groups in ({3, 4} if kept == 3 else {2, 4})
    assert both.ratio >= 2 * one


def test_biases_of_what_leaves_are_counted():
    model = tiny(mlp_bias=True, attention_bias=True)
    amounts = amounts_for(read_anatomy(model), 0.3, parts=("neurons", "groups"))
    assert amounts.neurons < 40
    assert amounts.groups < 4
    kept = (torch.arange(amounts.neurons),) * 3, (torch.arange(amounts.groups),) * 3
    remove(model, Cut(*kept, (0, 1, 2)))
    assert sum(p.numel() for p in model.parameters()) == amounts.parameters


def test_widths_are_multiples_and_reach_the_ratio():
    anatomy = read_anatomy(tiny())
    amounts = amounts_for(anatomy, 0.1, multiple=8)
    assert amounts.neurons % 8 == 0
    assert amounts.ratio >= 0.1
    assert amounts_for(anatomy, 0.1).neurons >= amounts.neurons


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            {"ratio": 0.9},
            r"pruning.ratio: 0.9 of all parameters cannot leave with neurons.*At most 0\.\d+ can",
        ),
        ({"ratio": 0.0}, "allowed is 0 < ratio < 1"),
        ({"ratio": 0.1, "parts": ("heads",)}, r"pruning.parts: \['heads'\] is not possible"),
        ({"ratio": 0.1, "parts": ("blocks", "neurons")}, "prune twice: blocks first"),
    ],
)
def test_what_cannot_be_reached_is_told(given, told):
    with pytest.raises(UserError, match="(?s)" + told):
        amounts_for(read_anatomy(tiny()), **given)


def test_one_group_of_heads_cannot_shrink():
    with pytest.raises(UserError, match="one group of heads"):
        amounts_for(read_anatomy(tiny(num_key_value_heads=1)), 0.1, parts=("groups",))


def test_other_models_are_refused():
    import transformers
    from peft import LoraConfig, get_peft_model

    other = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=20)
    )
    with pytest.raises(UserError, match="GPT2LMHeadModel is not known here; known are LlamaForCausalLM"):
        read_anatomy(other)
    model = tiny(dtype=torch.float32)
    get_peft_model(model, LoraConfig(target_modules=["up_proj"]))
    with pytest.raises(UserError, match=r"layer 0 has up_proj as Linear|can be cut"):
        read_anatomy(model)
