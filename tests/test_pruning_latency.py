"""A share of the forward time: by times given by hand against a search of everything, and by the clock."""

from __future__ import annotations

import copy
import itertools
import json
import time

import pytest
import torch
from pruning_models import NAMES, batches, logits, tiny
from shoestring.pruning import amounts_for_latency, latency, measure_times, prune, read_anatomy
from shoestring.recipes.errors import UserError
from test_pruning_heads import narrow_cut


def by_hand(neurons: int, groups: int, blocks: int) -> float:
    """Neurons in steps of 8, as kernels have them, groups and blocks in proportion; something stays."""
    return 5.0 + blocks * (1.0 + 0.5 * -(-neurons // 8) + 0.75 * groups)


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.17, 0.2, 0.24])
@pytest.mark.parametrize("multiple", [1, 4, 8])
def test_neurons_are_the_most_that_reach_the_ratio(ratio, multiple):
    anatomy = read_anatomy(tiny())
    amounts, found = amounts_for_latency(anatomy, ratio, by_hand, multiple=multiple)
    target = (1 - ratio) * by_hand(40, 4, 3)
    reach = [n for n in range(multiple, 41, multiple) if by_hand(n, 4, 3) <= target]
    assert (amounts.neurons, amounts.groups, amounts.blocks) == (max(reach), 4, 3)
    assert (found.before, found.predicted) == (by_hand(40, 4, 3), by_hand(max(reach), 4, 3))
    assert found.ratio == 1 - found.predicted / found.before >= ratio
    assert (found.measured_before, found.measured_after) == (None, None)
    gone = 3 * (40 - amounts.neurons) * 3 * 64
    assert (amounts.parameters, amounts.ratio) == (anatomy.parameters - gone, gone / anatomy.parameters)


@pytest.mark.parametrize("ratio", [0.05, 0.12, 0.2])
def test_groups_and_blocks_are_the_nearest_that_can_be_saved(ratio):
    anatomy = read_anatomy(tiny("gemma2"))  # 3 groups of 2 heads do not divide 64
    target = (1 - ratio) * by_hand(40, 4, 3)
    amounts, _ = amounts_for_latency(anatomy, ratio, by_hand, parts=("groups",))
    assert amounts.groups == min((1, 2), key=lambda n: abs(by_hand(40, n, 3) - target))
    amounts, _ = amounts_for_latency(anatomy, ratio, by_hand, parts=("blocks",))
    assert amounts.blocks == min((1, 2), key=lambda n: abs(by_hand(40, 4, n) - target))


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.3])
def test_both_keep_shares_that_are_nearest_to_each_other(ratio):
    anatomy = read_anatomy(tiny())
    amounts, found = amounts_for_latency(anatomy, ratio, by_hand, parts=("neurons", "groups"))
    target = (1 - ratio) * by_hand(40, 4, 3)
    most = {}
    for groups, neurons in itertools.product(range(1, 5), range(1, 41)):
        if by_hand(neurons, groups, 3) <= target:
            most[groups] = neurons
    groups = min(most, key=lambda g: abs(most[g] / 40 - g / 4))
    assert (amounts.neurons, amounts.groups) == (most[groups], groups)
    assert found.predicted <= target


def test_prune_by_time_says_what_it_expects_and_counts_exactly():
    model = tiny()
    result = prune(
        model, batches(), method="wanda", ratio=0.2, ratio_of="latency", times=by_hand, latency_tokens=7
    )
    amounts, expected = amounts_for_latency(read_anatomy(tiny()), 0.2, by_hand, tokens=7)
    assert result.latency == expected
    assert {b.neurons for b in read_anatomy(model).blocks} == {amounts.neurons}
    assert result.after == amounts.parameters == sum(p.numel() for p in model.parameters())
    record = json.loads(json.dumps(result.record, allow_nan=False))
    assert record["ratio_of"] == "latency"
    assert record["latency"] == {"tokens": 7, "before": by_hand(40, 4, 3), "predicted": expected.predicted,
                                 "measured_before": None, "measured_after": None}  # fmt: skip

    uneven = prune(
        tiny(), batches(), method="cfsp", ratio=0.2, ratio_of="latency", times=by_hand, widths="per_layer"
    )
    assert len({len(kept) for kept in uneven.cut.neurons}) > 1
    assert uneven.ratio == pytest.approx(amounts.ratio, abs=3 * 192 / result.before)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"ratio_of": "energy"}, "pruning.ratio_of: energy is not one of parameters, latency"),
        ({"ratio_of": "parameters"}, "pruning.times: they are read with ratio_of: latency alone"),
        ({"ratio": 1.5}, "1.5 is not a share of the forward time; allowed is 0 < ratio < 1"),
        (
            {"ratio": 0.6},
            "0.6 of the forward time cannot leave with neurons.*18.5 of 24.5.*At most 0.245 can",
        ),
        ({"latency_tokens": 0}, "pruning.latency_tokens: 0 is not possible; allowed is 1"),
        ({"method": "modegpt", "parts": ("values",)}, "latency is measured for neurons, groups and blocks"),
    ],
)
def test_what_cannot_be_is_told(given, told):
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    asked = {"method": "flap", "ratio": 0.1, "ratio_of": "latency", "times": by_hand, **given}
    with pytest.raises(UserError, match="(?s)" + told):
        prune(model, batches(), **asked)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def counted(model, ids):
    """In place of the clock: the weights of the layers that a real forward went through."""
    seen = []
    hooks = [
        module.register_forward_hook(lambda m, i, o: seen.append(m.weight.numel()))
        for module in model.model.layers.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    assert model(input_ids=ids, use_cache=False, logits_to_keep=1).logits.shape[1] == 1
    for hook in hooks:
        hook.remove()
    assert not model.training
    return 1000.0 + sum(seen)


@pytest.mark.parametrize("family", NAMES)
def test_the_model_s_own_layers_are_timed_at_each_width(family, monkeypatch):
    monkeypatch.setattr(latency, "_forward", counted)
    model = tiny(family)
    model.train()
    weights = [(name, id(p), p.clone()) for name, p in model.named_parameters()]
    anatomy = read_anatomy(model)
    first = anatomy.blocks[0]
    times = measure_times(anatomy, parts=("neurons", "groups"), tokens=5, turns=3)
    linear = [m.weight.numel() for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert times(40, 4, 3) == 1000 + sum(linear)
    per_group = 3 * first.group_parameters - 3 * 4 * first.head_dim * (first.q.bias is not None)
    # 37 lies between widths that were timed; the counts are straight lines
    assert times(37, 3, 3) == pytest.approx(1000 + sum(linear) - 3 * 3 * 192 - per_group)
    assert times(1, 4, 3) == times(2, 4, 3) < times(3, 4, 3)  # 1/16 of 40 is the narrowest
    blocks = measure_times(anatomy, parts=("blocks",), turns=1)
    assert [blocks(40, 4, n) for n in (1, 2, 3)] == [1000 + n * sum(linear) / 3 for n in (1, 2, 3)]
    assert [(n, id(p)) for n, p in model.named_parameters()] == [(n, i) for n, i, _ in weights]
    assert all(torch.equal(p, was) for p, (_, _, was) in zip(model.parameters(), weights, strict=True))
    assert model.training
    assert len(model.model.layers) == 3


def test_narrow_heads_can_be_timed_too(monkeypatch):
    from shoestring.pruning import remove

    monkeypatch.setattr(latency, "_forward", counted)
    model = tiny()
    cut = narrow_cut(model)
    for field in (cut.pairs, cut.values):  # the same widths in each layer
        for index in (1, 2):
            field[index] = field[0]
    remove(model, cut)
    before = logits(model)
    times = measure_times(read_anatomy(model), parts=("groups",), turns=1)
    assert times(40, 1, 3) < times(40, 3, 3) < times(40, 4, 3)
    assert torch.equal(logits(model), before)


def test_a_wider_layer_counts_as_no_faster():
    line = latency._line([(10, 3.0), (1, 1.0), (5, 4.0), (20, 6.0)])
    assert [line(x) for x in (0, 1, 3, 5, 7, 10, 15, 20, 99)] == [1.0, 1.0, 2.5, 4.0, 4.0, 4.0, 5.0, 6.0, 6.0]


def test_medians_of_alternating_turns(monkeypatch):
    one, two = tiny(), tiny()
    order = []

    def took(model, ids):
        order.append(1 if model is one else 2)
        return {1: [9.0, 3.0, 1.0, 2.0], 2: [9.0, 5.0, 4.0, 70.0]}[order[-1]][order.count(order[-1]) - 1]

    monkeypatch.setattr(latency, "_forward", took)
    assert latency.compare_forwards([one, two], 4, turns=3) == [2.0, 5.0]
    assert order == [2, 1, 1, 2, 2, 1, 1, 2]


@pytest.mark.slow
def test_the_measured_time_falls_by_about_the_ratio(monkeypatch):
    """An MLP that takes nearly all of the time, in processor time: other processes take no part of it."""
    monkeypatch.setattr(latency, "perf_counter", time.process_time)
    shape = {"hidden_size": 256, "intermediate_size": 8192, "num_hidden_layers": 3, "vocab_size": 61}
    model = tiny(dtype=torch.float32, **shape)
    result = prune(
        model, batches(), method="magnitude", ratio=0.5, ratio_of="latency", latency_tokens=32, multiple=64
    )
    found = result.latency
    assert found.tokens == 32
    assert 0 < found.predicted <= 0.5 * found.before
    assert 0 < found.measured_after < 0.8 * found.measured_before
    assert {b.neurons % 64 for b in read_anatomy(model).blocks} == {0}
    assert 0.3 < result.ratio < 0.7
