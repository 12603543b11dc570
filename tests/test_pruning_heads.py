"""MoDeGPT's types II and III against the paper's equations, and narrower heads in a model."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from pruning_models import NAMES, batches, logits, tiny
from shoestring.pruning import (
    Values,
    calibrate,
    everything,
    head_amounts_for,
    mask,
    pad,
    prune,
    read_anatomy,
    remove,
)
from shoestring.pruning.modegpt_heads import kept_pairs, pair_scores, value_factors
from shoestring.recipes.errors import UserError

ROTATED = [name for name in NAMES if name not in ("qwen3", "gemma3_text")]


def seen_by(model, index=1):
    """Of one layer, by the whole model's own forward: inputs of the projections, and rotated q and k."""
    layer = model.model.layers[index]
    found = {"x": [], "q": [], "k": [], "v": []}
    attention = layer.self_attn
    hooks = [attention.v_proj.register_forward_pre_hook(lambda m, i: found["x"].append(i[0].flatten(0, 1)))]
    rotations = []

    def positions(module, inputs, given):
        rotations.append(given["position_embeddings"])

    hooks.append(attention.register_forward_pre_hook(positions, with_kwargs=True))
    for name in ("q", "k", "v"):

        def after(module, inputs, output, name=name):
            found[name].append(output)

        hooks.append(getattr(attention, f"{name}_proj").register_forward_hook(after))
    for ids in batches():
        logits(model, ids)
    for hook in hooks:
        hook.remove()
    width = attention.head_dim
    for name in ("q", "k"):
        turned = []
        for x, (cos, sin) in zip(found[name], rotations, strict=True):
            heads = x.reshape(*x.shape[:2], -1, width)
            out = heads.clone()
            for i in range(width // 2):  # the two channels of a pair, one after the other
                c, s = cos[:, :, None, i], sin[:, :, None, i]
                a, b = heads[..., i], heads[..., i + width // 2]
                out[..., i] = a * c - b * s
                out[..., i + width // 2] = b * c + a * s
            turned.append(out.flatten(0, 1))
        found[name] = torch.cat(turned)
    return torch.cat(found["x"]), found["q"], found["k"], torch.cat([v.flatten(0, 1) for v in found["v"]])


def root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T


def stats_of(model, index=1):
    return [stats.heads for stats in calibrate(model, batches(), heads=True)][index]


@pytest.mark.parametrize("family", ROTATED)
def test_pairs_are_judged_by_the_columns_of_the_roots_after_the_rotation(family):
    """Σ over the pair of ‖C_Q^½[:,i]‖² times that of C_K, of what really meets in the scores."""
    model = tiny(family)
    block = read_anatomy(model).blocks[1]
    _, q, k, _ = seen_by(model)
    half = block.head_dim // 2
    expected = torch.zeros(block.groups, half, dtype=torch.float64)
    for group in range(block.groups):
        key_root = root(k[:, group].T @ k[:, group])
        query_roots = [root(q[:, head].T @ q[:, head]) for head in range(2 * group, 2 * group + 2)]
        for i in range(half):
            pair = (i, i + half)
            keys = sum(float(key_root[:, c].norm()) ** 2 for c in pair)
            queries = sum(float(r[:, c].norm()) ** 2 for r in query_roots for c in pair)
            expected[group, i] = (keys * queries) ** 0.5
    found = pair_scores(block, stats_of(model))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)  # rotations are float32
    kept = kept_pairs(block, stats_of(model), half - 1)
    for group in range(block.groups):
        lost = set(range(half)) - set(kept[group].tolist())
        assert lost == {int(expected[group].argmin())}


@pytest.mark.parametrize("family", NAMES)
def test_values_are_the_svd_of_the_weighted_product(family):
    """C^½ [W_V W_O of each head of the group, beside each other], with C of the attention's input."""
    model = tiny(family)
    if family == "qwen2":  # biases of v belong to the product: one more input that is always 1
        assert model.model.layers[1].self_attn.v_proj.bias is not None
    block = read_anatomy(model).blocks[1]
    x, _, _, v = seen_by(model)
    w_v, w_o = block.v.weight.detach().T, block.o.weight.detach().T
    if block.v.bias is not None:
        x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
        w_v = torch.cat([w_v, block.v.bias.detach()[None]])
    torch.testing.assert_close(x @ w_v, v, rtol=1e-9, atol=1e-9)
    wide, width = block.value_dim, block.value_dim - 3
    got = value_factors(block, stats_of(model), width)
    for group in range(block.groups):
        own = slice(group * wide, (group + 1) * wide)
        product = torch.cat(
            [w_v[:, own] @ w_o[h * wide : (h + 1) * wide] for h in (2 * group, 2 * group + 1)], dim=1
        )
        weighted = root(x.T @ x) @ product
        _, s, vh = torch.linalg.svd(weighted, full_matrices=False)
        best = x @ product @ vh[:width].T @ vh[:width]
        rows = slice(group * width, (group + 1) * width)
        new_v = got.v[rows].T
        if got.bias is not None:
            new_v = torch.cat([new_v, got.bias[rows][None]])
        new_o = torch.cat(
            [got.o[:, h * width : (h + 1) * width].T for h in (2 * group, 2 * group + 1)], dim=1
        )
        found = x @ new_v @ new_o
        torch.testing.assert_close(found, best, rtol=1e-6, atol=1e-6)
        error = float((x @ product - found).square().sum())
        assert error == pytest.approx(float(s[width:].square().sum()), rel=1e-6)
        # never above slicing, whichever channels stay
        for first in range(4):
            kept = slice(first, first + width)
            sliced = torch.cat([w_v[:, own][:, kept] @ w_o[h * wide : (h + 1) * wide][kept]
                                for h in (2 * group, 2 * group + 1)], dim=1)  # fmt: skip
            assert error < float((x @ (product - sliced)).square().sum())


def test_full_rank_is_the_identity():
    model = tiny("qwen2")
    before = logits(model)
    anatomy = read_anatomy(model)
    heads = [stats.heads for stats in calibrate(model, batches(), heads=True)]
    blocks = list(zip(anatomy.blocks, heads, strict=True))
    cut = dataclasses.replace(
        everything(anatomy),
        values={i: value_factors(block, seen, 8) for i, (block, seen) in enumerate(blocks)},
        pairs={i: kept_pairs(block, seen, 4) for i, (block, seen) in enumerate(blocks)},
    )
    remove(model, cut)
    assert (logits(model) - before).abs().max() < 1e-9
    assert type(model.model.layers[0].self_attn).__name__ == "PrunedQwen2Attention"


def test_heads_that_say_nothing_keep_an_order_by_their_weights():
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.zero_()
    block = read_anatomy(model).blocks[1]
    found = value_factors(block, stats_of(model), 5)
    assert found.o.isfinite().all()
    assert found.v.abs().max() == 0


def narrow_cut(model, *, seed=3, groups=None):
    """Random pairs and random values, other widths in each layer."""
    generator = torch.Generator().manual_seed(seed)
    anatomy = read_anatomy(model)
    pairs, values = {}, {}
    for index, block in enumerate(anatomy.blocks):
        if anatomy.family in ROTATED:
            half = block.query_dim // 2
            kept = [
                torch.randperm(half, generator=generator)[: max(1, half - 1 - index % 2)]
                for _ in range(block.groups)
            ]
            pairs[index] = torch.stack(kept).sort().values
        width = max(1, block.value_dim - 2 - index)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64) / 8

        heads = block.groups * block.heads_per_group
        bias = None if block.v.bias is None else draw(block.groups * width)
        values[index] = Values(width, draw(block.groups * width, 64), draw(64, heads * width), bias)
    whole = everything(anatomy)
    kept = whole.groups if groups is None else tuple(map(torch.tensor, groups))
    return dataclasses.replace(whole, pairs=pairs, values=values, groups=kept)


# transformers refuses gemma2's soft caps in sdpa
WAYS = [(name, way) for name in NAMES for way in ("sdpa", "eager") if (name, way) != ("gemma2", "sdpa")]


@pytest.mark.parametrize(("family", "attention"), WAYS)
def test_narrow_heads_compute_what_zeroed_ones_compute(family, attention):
    model = tiny(family)
    model.set_attn_implementation(attention)
    before = logits(model)
    cut = narrow_cut(model, groups=([0, 1, 2, 3], [1, 3], [0, 2, 3]))
    zeroed = copy.deepcopy(model)
    mask(zeroed, cut)
    remove(model, cut)
    after = logits(model)
    assert (after - logits(zeroed)).abs().max() < 1e-12
    assert (after - before).abs().max() > 1e-2
    block = read_anatomy(model).blocks[1]
    assert (block.groups, block.value_dim) == (2, block.head_dim - 3)
    assert block.query_dim == (block.head_dim if family not in ROTATED else block.head_dim - 4)

    again = narrow_cut(model, seed=4)  # a second cut, of the first one's result
    zeroed = copy.deepcopy(model)
    mask(zeroed, again)
    remove(model, again)
    assert (logits(model) - logits(zeroed)).abs().max() < 1e-12
    after = logits(model)
    pad(model)
    assert (logits(model) - after).abs().max() < 1e-12
    assert all(type(layer.self_attn).__name__[:6] != "Pruned" for layer in model.model.layers)
    assert not read_anatomy(model).blocks[0].is_narrow


def test_a_pair_keeps_its_frequency():
    """Pair 3 of 4 alone, at distant positions: scores as with the slowest rotation, not with the first."""
    model = tiny(num_hidden_layers=1)
    with torch.no_grad():
        attention = model.model.layers[0].self_attn
        for linear in (attention.q_proj, attention.k_proj):
            linear.weight.view(-1, 8, 64)[:, [0, 1, 2, 4, 5, 6]] = 0
    before = logits(model, batches(1, length=40)[0])
    block = read_anatomy(model).blocks[0]
    heads = next(iter(calibrate(model, batches(), heads=True))).heads
    kept = kept_pairs(block, heads, 1)
    assert kept.tolist() == [[3]] * 4
    remove(model, dataclasses.replace(everything(read_anatomy(model)), pairs={0: kept}))
    assert (logits(model, batches(1, length=40)[0]) - before).abs().max() < 1e-12
    model.model.layers[0].self_attn.rotary_pairs = [[0]] * 4
    assert (logits(model, batches(1, length=40)[0]) - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    "parts", [("values",), ("queries",), ("queries", "values"), ("neurons", "queries", "values")]
)
def test_prune_reaches_the_ratio_and_counts_exactly(parts):
    model = tiny("qwen2")
    original = copy.deepcopy(model)
    anatomy = read_anatomy(model)
    ratio = {1: 0.06, 2: 0.1, 3: 0.25}[len(parts)]
    amounts = head_amounts_for(anatomy, ratio, parts=parts)
    result = prune(model, batches(), method="modegpt", ratio=ratio, parts=parts)
    assert result.after == sum(p.numel() for p in model.parameters()) == amounts.parameters
    largest = 3 * max(anatomy.blocks[0].pair_parameters, anatomy.blocks[0].value_parameters)
    if "neurons" in parts:
        largest = 3 * anatomy.blocks[0].neuron_parameters
    assert ratio <= result.ratio < ratio + largest / result.before
    blocks = read_anatomy(model).blocks
    assert {(b.neurons, b.query_dim // 2, b.value_dim) for b in blocks} == {
        (amounts.neurons, amounts.pairs, amounts.values)
    }
    assert (amounts.neurons < 40, amounts.pairs < 4, amounts.values < 8) == tuple(
        part in parts for part in ("neurons", "queries", "values")
    )
    zeroed = copy.deepcopy(original)
    mask(zeroed, result.cut)
    assert (logits(zeroed) - logits(model)).abs().max() < 1e-10
    assert result.record["value_width"] == ({"0": amounts.values, "1": amounts.values, "2": amounts.values}
                                            if "values" in parts else {})  # fmt: skip
    assert [len(p[0]) for p in result.record["rotary_pairs"].values()] == (
        [amounts.pairs] * 3 if "queries" in parts else []
    )
    assert result.record["refit"] == ("neurons" in parts)


def test_the_methods_own_choice_loses_less_than_the_opposite_one():
    model = tiny()
    before = logits(model, batches()[0])
    anatomy = read_anatomy(model)
    heads = [stats.heads for stats in calibrate(model, batches(), heads=True)]

    def error(keep):
        other = copy.deepcopy(model)
        pairs = {
            i: keep(block, seen) for i, (block, seen) in enumerate(zip(anatomy.blocks, heads, strict=True))
        }
        remove(other, dataclasses.replace(everything(anatomy), pairs=pairs))
        return float((logits(other, batches()[0]) - before).norm())

    def worst(block, seen):
        return pair_scores(block, seen).argsort(dim=1)[:, :2].sort(dim=1).values

    assert error(lambda block, seen: kept_pairs(block, seen, 2)) < error(worst)


def test_an_optimizer_follows_pairs_and_not_values():
    model = tiny(dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = batches()[0]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    q = model.model.layers[0].self_attn.q_proj.weight
    moment = optimizer.state[q]["exp_avg"].clone()
    cut = narrow_cut(model)
    with pytest.raises(UserError, match=r"values mix the channels.*AdamW cannot follow"):
        remove(model, cut, optimizer=optimizer)
    assert model.model.layers[0].self_attn.q_proj.weight is q
    remove(model, dataclasses.replace(cut, values={}), optimizer=optimizer)
    q = model.model.layers[0].self_attn.q_proj.weight
    rows = [
        head * 8 + c
        for head in range(8)
        for half in (0, 4)
        for c in (cut.pairs[0][head // 2] + half).tolist()
    ]
    assert torch.equal(optimizer.state[q]["exp_avg"], moment[rows])
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert q.shape == (8 * 6, 64)


@pytest.mark.parametrize(
    ("family", "given", "told"),
    [
        ("qwen3", {"parts": ("queries",)}, "qwen3 models divide q and k by their norm"),
        ("gemma3_text", {"parts": ("neurons", "queries")}, "gemma3_text models divide q and k"),
        ("llama", {"parts": ("groups", "values")}, "modegpt does not judge groups"),
        ("llama", {"parts": ("values",), "ratio": 0.5}, "cannot leave with values.*At most 0\\.237"),
        ("llama", {"parts": ("values",), "ratio": 1.0}, "allowed is 0 < ratio < 1"),
        ("llama", {"parts": ("values",), "refit": True}, "parts needs neurons"),
    ],
)
def test_what_heads_cannot_do_is_told(family, given, told):
    model = tiny(family)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match="(?s)" + told):
        prune(model, batches(), **{"method": "modegpt", "ratio": 0.1, **given})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_cuts_of_other_heads_are_refused():
    model = tiny()
    cut = narrow_cut(model)
    other = tiny(num_key_value_heads=2)
    with pytest.raises(ValueError, match="layer 0 is of other heads"):
        remove(other, dataclasses.replace(everything(read_anatomy(other)), pairs=cut.pairs))
    with pytest.raises(ValueError, match="layer 0 is of other heads"):
        remove(other, dataclasses.replace(everything(read_anatomy(other)), values=cut.values))


@pytest.mark.parametrize("family", NAMES)
def test_other_kernels_are_told_the_same_windows_and_scales(family):
    """Masks say the window to sdpa; kernels without masks are told it by name."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    told = []

    def note(module, query, key, value, mask, **given):
        told.append({name: given.get(name) for name in ("sliding_window", "scaling", "softcap", "dropout")})
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, scaling=given["scaling"])

    ALL_ATTENTION_FUNCTIONS.register("noted", note)
    model = tiny(family)
    model.config._attn_implementation = "noted"
    logits(model)
    before = told.copy()
    told.clear()
    remove(model, narrow_cut(model))
    logits(model)
    assert told == before
    assert len(told) == 3
