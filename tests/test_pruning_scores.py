"""Every criterion against a slow float64 reference, and the statistics that all of them read."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from pruning_models import NAMES, batches, logits, tiny
from shoestring.pruning import (
    Channels,
    Scores,
    calibrate,
    keep_counts,
    keep_uniform,
    learn_gates,
    read_anatomy,
    share_blocks,
)
from shoestring.pruning.cfsp import cfsp_counts, cfsp_scores, cfsp_shares, cfsp_weighted_scores
from shoestring.pruning.flap import flap_counts, flap_scores
from shoestring.pruning.foldgpt import foldgpt_blocks
from shoestring.pruning.magnitude import magnitude_scores
from shoestring.pruning.modegpt import leverage_scores
from shoestring.pruning.random_choice import random_blocks, random_scores
from shoestring.pruning.shortgpt import shortgpt_blocks
from shoestring.pruning.wanda import wanda_scores
from shoestring.recipes.errors import UserError


def traced(model):
    """By the whole model's own forward with hooks: per block the tokens' inputs of down and o, in and out."""
    found = [{"down": [], "o": [], "in": [], "out": []} for _ in model.model.layers]
    hooks = []
    for layer, kept in zip(model.model.layers, found, strict=True):

        def note(module, inputs, output, kept=kept):
            kept["in"].append(inputs[0].flatten(0, 1))
            kept["out"].append(output.flatten(0, 1))

        hooks.append(layer.register_forward_hook(note))
        for name, module in (("down", layer.mlp.down_proj), ("o", layer.self_attn.o_proj)):

            def before(module, inputs, kept=kept, name=name):
                kept[name].append(inputs[0].flatten(0, 1))

            hooks.append(module.register_forward_pre_hook(before))
    for ids in batches():
        logits(model, ids)
    for hook in hooks:
        hook.remove()
    return [{name: torch.cat(parts) for name, parts in kept.items()} for kept in found]


@pytest.mark.parametrize("family", NAMES)
def test_one_pass_sees_what_the_whole_model_computes(family):
    model = tiny(family)
    before = copy.deepcopy(model.state_dict())
    model.train()
    stats = list(calibrate(model, batches(), covariance=True))
    assert all(layer.training for layer in model.model.layers)
    assert all("forward" not in vars(layer) for layer in model.model.layers)
    assert torch.is_grad_enabled()
    for seen, true in zip(stats, traced(model.eval()), strict=True):
        assert seen.sequences == 10
        assert seen.mlp.count == len(true["down"]) == 94
        for channels, x in ((seen.mlp, true["down"]), (seen.attention, true["o"])):
            torch.testing.assert_close(channels.mean, x.mean(0), rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(channels.variance, x.var(0, unbiased=False), rtol=1e-9, atol=1e-14)
            torch.testing.assert_close(channels.norm, x.norm(dim=0), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(seen.covariance, true["down"].T @ true["down"], rtol=1e-9, atol=1e-11)
        cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(true["in"], true["out"], strict=True)]
        assert seen.influence == pytest.approx(sum(1 - c for c in cosines) / 94, rel=1e-9)
        assert seen.angular == pytest.approx(sum(math.acos(c) for c in cosines) / math.pi / 94, rel=1e-9)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_moments_keep_their_digits_far_from_zero():
    """E[x²] − E[x]² would have no digit of a variance of 1 around 10⁹."""
    x = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    channels = Channels.empty(3, torch.device("cpu"))
    for part in (x + 1e9).split(777):
        channels.add(part)
    torch.testing.assert_close(channels.variance, x.var(0, unbiased=False), rtol=1e-6, atol=0)


def test_identity_and_turned_blocks():
    model = tiny(dtype=torch.float32)
    still, turned = model.model.layers[1], model.model.layers[2]
    with torch.no_grad():
        for module in (still.self_attn.o_proj, still.mlp.down_proj):
            module.weight.zero_()
    turned.register_forward_hook(lambda module, inputs, output: -3 * inputs[0])
    stats = list(calibrate(model, batches()))
    assert stats[1].influence < 1e-12
    assert stats[1].angular < 1e-6
    assert stats[2].influence == pytest.approx(2)
    assert stats[2].angular == pytest.approx(1)
    assert shortgpt_blocks(stats, 2) == (0, 2)
    assert shortgpt_blocks(stats, 1) == (2,)


def test_scores_do_not_depend_on_how_tokens_are_batched():
    model = tiny()
    ids = torch.cat(batches()[:2])
    together, apart = (list(calibrate(model, parts)) for parts in ([ids], list(ids.split(1))))
    for one, other in zip(together, apart, strict=True):
        assert one.angular == pytest.approx(other.angular, rel=1e-12)
    twice = list(calibrate(model, [ids, ids]))
    assert [s.angular for s in twice] == pytest.approx([s.angular for s in together], rel=1e-12)
    ours, same = (cfsp_scores(read_anatomy(model), s).neurons for s in (together, twice))
    for a, b in zip(ours, same, strict=True):
        torch.testing.assert_close(a, b)


def test_calibration_refuses_nothing_to_look_at():
    with pytest.raises(UserError, match="calibration needs batches of token ids"):
        list(calibrate(tiny(), []))
    with pytest.raises(UserError, match=r"given were \[\(4,\)\]"):
        list(calibrate(tiny(), [torch.zeros(4, dtype=torch.int64)]))


# Criteria


def setting(family="llama"):
    model = tiny(family)
    return model, read_anatomy(model), list(calibrate(model, batches())), traced(model)


def test_cfsp_as_published():
    model, anatomy, stats, true = setting()
    scores = cfsp_scores(anatomy, stats)
    weighted = cfsp_weighted_scores(anatomy, stats)
    for index, layer in enumerate(model.model.layers):
        h = true[index]["down"]
        down = layer.mlp.down_proj.weight.detach().abs()
        up, gate = (p.weight.detach().abs() for p in (layer.mlp.up_proj, layer.mlp.gate_proj))
        activity = [math.sqrt(sum(float(value) ** 2 for value in h[:, j]) / 10) for j in range(40)]
        g = torch.stack([down[:, j] * activity[j] for j in range(40)], dim=1)
        for j in range(40):
            terms = [
                float(g[i, j] / g[:, j].sum() + up[j, i] / up[j].sum() + gate[j, i] / gate[j].sum())
                for i in range(64)
            ]
            published = activity[j] * sum(terms) / 64
            assert float(scores.neurons[index][j]) == pytest.approx(published, rel=1e-10)
            # the weights cancel
            assert published == pytest.approx(3 * activity[j] / 64, rel=1e-10)
            ours = g[:, j].mean() / g.mean() + up[j].mean() / up.mean() + gate[j].mean() / gate.mean()
            assert float(weighted.neurons[index][j]) == pytest.approx(activity[j] * float(ours), rel=1e-10)
    order = [s.argsort().tolist() for s in scores.neurons]
    assert order == [t["down"].norm(dim=0).argsort().tolist() for t in true]
    assert order != [s.argsort().tolist() for s in weighted.neurons]


def test_cfsp_shares():
    angles, p = [0.10, 0.12, 0.20, 0.31], 0.3
    s = [1 / (1 + math.exp(-131072 / 10_000 * (d - sum(angles) / 4))) for d in angles]
    mean = sum(s) / 4
    assert max(0.7 * each / mean for each in s) > 1  # so that deviations shrink
    factor = mean * (1 / 0.7 - 1) / (max(s) - mean) / 1.05
    expected = [0.7 * (mean + factor * (each - mean)) / mean for each in s]
    shares = cfsp_shares(angles, p)
    assert shares == pytest.approx(expected, rel=1e-12)
    assert sum(shares) / 4 == pytest.approx(0.7, rel=1e-12)
    assert max(shares) == pytest.approx(0.7 + 0.3 / 1.05, rel=1e-12)
    mild = cfsp_shares([0.1, 0.101, 0.102], 0.5)
    plain = [1 / (1 + math.exp(-13.1072 * d)) for d in (-0.001, 0.0, 0.001)]
    assert mild == pytest.approx([0.5 * each / (sum(plain) / 3) for each in plain], rel=1e-12)
    counts = cfsp_counts(11008, shares, multiple=128)
    assert all(
        count % 128 == 0 and abs(count - 11008 * k) <= 64 for count, k in zip(counts, shares, strict=True)
    )


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_flap_scores(family):
    model, anatomy, stats, true = setting(family)
    scores = flap_scores(anatomy, stats)
    for index, layer in enumerate(model.model.layers):
        down, o = layer.mlp.down_proj.weight.detach(), layer.self_attn.o_proj.weight.detach()

        def wifv(weight, x):
            return [
                float(x[:, j].var(unbiased=False)) * sum(float(w) ** 2 for w in weight[:, j])
                for j in range(weight.shape[1])
            ]

        def standard(values):
            mean = sum(values) / len(values)
            deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
            return [(v - mean) / deviation for v in values]

        assert scores.neurons[index].tolist() == pytest.approx(
            standard(wifv(down, true[index]["down"])), rel=1e-8, abs=1e-10
        )
        heads = standard([value**2 for value in wifv(o, true[index]["o"])])
        width = 2 * layer.self_attn.head_dim
        expected = [sum(heads[g * width : (g + 1) * width]) / width for g in range(4)]
        assert scores.groups[index].tolist() == pytest.approx(expected, rel=1e-8, abs=1e-10)


def test_flap_allocation_counts_units_by_their_parameters():
    _, anatomy, stats, _ = setting()
    scores = flap_scores(anatomy, stats)
    # a neuron has 3 rows or columns of 64; a group of 2 heads of 8 has 8 · 2 · (2 + 1) of them
    units = sorted(
        [(-float(s), "neurons", layer, 3 * 64) for layer in range(3) for s in scores.neurons[layer]]
        + [(-float(s), "groups", layer, 48 * 64) for layer in range(3) for s in scores.groups[layer]]
    )
    total = sum(cost for *_, cost in units)
    assert total == 3 * (40 * 192 + 4 * 3072)
    for share in (0.1, 0.35, 0.6):
        expected = {"neurons": [0] * 3, "groups": [0] * 3}
        spent = 0
        for _, kind, layer, cost in units:
            spent += cost
            if spent <= total * (1 - share):
                expected[kind][layer] += 1
        neurons, groups = flap_counts(anatomy, scores, share, ("neurons", "groups"))
        assert neurons == [max(1, n) for n in expected["neurons"]]
        assert groups == [max(1, n) for n in expected["groups"]]
        kept = sum(neurons) * 192 + sum(groups) * 3072
        floor = sum(n == 0 for n in expected["groups"]) * 3072
        assert 0 <= total * (1 - share) - kept + floor < 3072
    only, untouched = flap_counts(anatomy, scores, 0.25, ("neurons",))
    assert sum(only) == 90
    assert untouched == [4, 4, 4]
    # the cost matters: were a group as cheap as a neuron, other numbers would stay
    assert (
        len({tuple(map(tuple, flap_counts(anatomy, scores, s, ("neurons", "groups")))) for s in (0.1, 0.6)})
        == 2
    )


def test_wanda_and_magnitude():
    model, anatomy, stats, true = setting("qwen2")
    wanda, magnitude = wanda_scores(anatomy, stats), magnitude_scores(anatomy)
    for index, layer in enumerate(model.model.layers):
        mlp, attention = layer.mlp, layer.self_attn
        down, o = mlp.down_proj.weight.detach(), attention.o_proj.weight.detach()
        for j in range(40):
            norm = math.sqrt(sum(float(v) ** 2 for v in true[index]["down"][:, j]))
            expected = sum(abs(float(w)) for w in down[:, j]) / 64 * norm
            assert float(wanda.neurons[index][j]) == pytest.approx(expected, rel=1e-9)
            parts = (mlp.gate_proj.weight[j], mlp.up_proj.weight[j], down[:, j])
            expected = math.sqrt(sum(float(w) ** 2 for part in parts for w in part.tolist()))
            assert float(magnitude.neurons[index][j]) == pytest.approx(expected, rel=1e-9)
        for g in range(4):
            columns = range(16 * g, 16 * g + 16)
            expected = sum(float(o[:, c].abs().mean() * true[index]["o"][:, c].norm()) for c in columns)
            assert float(wanda.groups[index][g]) == pytest.approx(expected, rel=1e-9)
            rows = slice(8 * g, 8 * g + 8)
            parts = (
                *(attention.q_proj.weight[16 * g : 16 * g + 16], o[:, 16 * g : 16 * g + 16]),
                *(attention.k_proj.weight[rows], attention.v_proj.weight[rows]),
            )
            expected = math.sqrt(sum(float(part.double().square().sum()) for part in parts))
            assert float(magnitude.groups[index][g]) == pytest.approx(expected, rel=1e-9)


def test_leverage_is_what_the_others_cannot_say():
    h = torch.randn(500, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h[:, 5] = h[:, 4]  # two that say the same
    h[:, 3] *= 0.01  # one that says little
    c = h.T @ h
    ridge = c.diagonal().mean()
    expected = (c @ torch.linalg.inv(c + ridge * torch.eye(6, dtype=torch.float64))).diagonal()
    torch.testing.assert_close(leverage_scores(c), expected)
    scores = leverage_scores(c)
    assert scores[3] < scores[5] < scores[0]
    assert leverage_scores(torch.zeros(3, 3, dtype=torch.float64)).tolist() == [0, 0, 0]


def test_random_choices_follow_their_seed():
    anatomy = read_anatomy(tiny())
    one, same, other = (random_scores(anatomy, seed).neurons[0] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert {random_blocks(anatomy, 2, seed) for seed in range(20)} == set(itertools.combinations(range(3), 2))


def test_gates_fall_where_the_loss_can_spare_the_block():
    """Of three blocks one does nothing; the loss holds the others' gates up against the penalty."""
    model = tiny(dtype=torch.float32)
    with torch.no_grad():
        for module in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            module.weight.zero_()
    ids = batches()[0]
    target = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):  # so that the other blocks serve the loss
        target.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        for name, parameter in model.named_parameters():
            if name.startswith("model.layers.1."):
                parameter.grad = None
        target.step()
    model.zero_grad()
    model.model.norm.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    gates = learn_gates(model, [ids], steps=30, penalty=0.3)
    assert foldgpt_blocks(gates, 2) == (0, 2)
    # alone under its penalty, Adam moves it by the rate each step
    assert gates[1] == pytest.approx(1 - 30 * 0.02, abs=0.02)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for n, p in model.named_parameters() if "norm" in n][-1] is False
    assert all(p.grad is None for p in model.parameters())
    assert foldgpt_blocks([0.2, -0.9, 0.5], 2) == (1, 2)


def test_a_first_gate_step_is_the_gradient_of_loss_and_penalty():
    """At rate r Adam's first step is r in the direction of the gradient's sign, here found by differences."""
    model = tiny()
    ids = batches()[0]

    def loss(gates):
        hooks = [
            layer.register_forward_hook(lambda m, i, out, g=g: i[0] + g * (out - i[0]))
            for layer, g in zip(model.model.layers, gates, strict=True)
        ]
        value = float(model(input_ids=ids, labels=ids).loss)
        for hook in hooks:
            hook.remove()
        return value

    slopes = []
    for index in range(3):
        up, down = [1.0] * 3, [1.0] * 3
        up[index], down[index] = 1 + 1e-5, 1 - 1e-5
        slopes.append((loss(up) - loss(down)) / 2e-5)
    steepest = max(slopes, key=abs)
    # a third of the penalty reaches each gate: 0.9 of the steepest slope against it just leaves its sign
    for share in (0.9, 1.1):
        gates = learn_gates(model, [ids], steps=1, rate=0.01, penalty=-3 * share * steepest)
        totals = [slope - share * steepest for slope in slopes]
        assert gates == pytest.approx([1 - 0.01 * math.copysign(1, total) for total in totals], abs=1e-5)


def test_sharing_copies_linear_layers_and_leaves_norms():
    model = tiny("qwen2", num_hidden_layers=4)
    norms = [layer.input_layernorm.weight.detach().clone() for layer in model.model.layers]
    assert share_blocks(model, 3) == [(0, 1, 2), (3,)]
    first, second, third, last = model.model.layers
    for other in (second, third):
        for name, parameter in first.named_parameters():
            same = torch.equal(parameter, other.get_parameter(name))
            assert same == ("norm" not in name), name
    assert not torch.equal(first.mlp.up_proj.weight, last.mlp.up_proj.weight)
    assert all(
        torch.equal(layer.input_layernorm.weight, norm)
        for layer, norm in zip(model.model.layers, norms, strict=True)
    )
    with pytest.raises(UserError, match="5 blocks cannot share weights; allowed is 2 to 4"):
        share_blocks(model, 5)


# Choosing


def test_uniform_keeps_the_same_number_everywhere_and_the_best_of_each():
    anatomy = read_anatomy(tiny())
    generator = torch.Generator().manual_seed(0)
    scores = Scores(
        tuple(torch.rand(40, generator=generator, dtype=torch.float64) + layer for layer in range(3))
    )
    cut = keep_uniform(anatomy, scores, 7, 4)
    for kept, values in zip(cut.neurons, scores.neurons, strict=True):
        best = sorted(range(40), key=lambda j: -float(values[j]))[:7]
        assert kept.tolist() == sorted(best)
    assert [kept.tolist() for kept in cut.groups] == [[0, 1, 2, 3]] * 3
    uneven = keep_counts(anatomy, scores, [1, 40, 5], [])
    assert [len(kept) for kept in uneven.neurons] == [1, 40, 5]
    ties = keep_uniform(anatomy, Scores((torch.ones(40, dtype=torch.float64),) * 3), 3, 4)
    assert ties.neurons[0].tolist() == [0, 1, 2]
