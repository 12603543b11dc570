"""Pruning in one call: every method reaches its ratio, records what it did, and refuses what cannot be."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from pruning_models import batches, logits, tiny
from shoestring.pruning import calibrate, prune, read_anatomy, remove
from shoestring.pruning.cfsp import cfsp_counts, cfsp_shares
from shoestring.recipes.errors import UserError

METHODS = {
    "random": ("neurons", "groups"),
    "magnitude": ("neurons", "groups"),
    "wanda": ("neurons", "groups"),
    "flap": ("neurons", "groups"),
    "cfsp": ("neurons",),
    "cfsp_weighted": ("neurons",),
    "modegpt": ("neurons",),
    "shortgpt": ("blocks",),
    "foldgpt": ("blocks",),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_reaches_the_ratio_with_equal_layers(method):
    model = tiny("qwen3", dtype=torch.float32)
    original = copy.deepcopy(model)
    result = prune(model, batches(), method=method, ratio=0.2, parts=METHODS[method], gate_steps=3)
    left = sum(p.numel() for p in model.parameters())
    assert result.before == sum(p.numel() for p in original.parameters())
    assert (result.after, result.ratio) == (left, 1 - left / result.before)
    anatomy = read_anatomy(model)
    assert len({(b.neurons, b.groups) for b in anatomy.blocks}) == 1
    if METHODS[method] == ("blocks",):
        assert (len(anatomy.blocks), model.config.num_hidden_layers) == (2, 2)
    else:
        assert 0.2 <= result.ratio < 0.2 + 3 * 192 / result.before
    assert logits(model).isfinite().all()
    record = json.loads(json.dumps(result.record, allow_nan=False))
    assert (record["method"], record["parameters"]) == (method, left)
    assert record["calibration_tokens"] == 94
    assert len(record["calibration_sha256"]) == 64
    # the cut, applied again to the original, gives the same model
    remove(original, result.cut)
    assert [p.shape for p in original.parameters()] == [p.shape for p in model.parameters()]
    assert torch.equal(logits(original), logits(model))
    assert record["neurons"] == [kept.tolist() for kept in result.cut.neurons]


def test_the_same_call_gives_the_same_model():
    one, two = tiny(), tiny()
    records = [prune(m, batches(), method="flap", ratio=0.2).record for m in (one, two)]
    assert records[0] == records[1]
    assert torch.equal(logits(one), logits(two))
    other = prune(tiny(), batches(seed=5), method="flap", ratio=0.2).record
    assert other["calibration_sha256"] != records[0]["calibration_sha256"]
    assert other["scores_sha256"] != records[0]["scores_sha256"]


def test_widths_of_each_layer_follow_the_allocation():
    model = tiny()
    angles = [seen.angular for seen in calibrate(model, batches())]
    # of all parameters to of the MLPs' parameters
    share = 0.2 * sum(p.numel() for p in model.parameters()) / (3 * 40 * 3 * 64)
    expected = cfsp_counts(40, cfsp_shares(angles, share))
    assert len(set(expected)) > 1
    result = prune(model, batches(), method="cfsp", ratio=0.2, widths="per_layer")
    assert [b.neurons for b in read_anatomy(model).blocks] == expected
    assert result.ratio == pytest.approx(0.2, abs=3 * 0.5 * 192 / result.before)

    both = tiny()
    parts = ("neurons", "groups")
    result = prune(both, batches(), method="flap", ratio=0.2, parts=parts, widths="per_layer")
    assert len({(b.neurons, b.groups) for b in read_anatomy(both).blocks}) > 1
    assert abs(result.ratio - 0.2) < 3072 / result.before
    assert logits(both).isfinite().all()


def test_a_criterion_that_looks_at_data_beats_chance():
    """Neurons that never speak are found by all of them; random choice takes others."""
    model = tiny()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[::2] *= 1e-4
            layer.mlp.down_proj.weight[:, ::2] *= 3  # weights alone mislead
    before = logits(model)

    def error(method):
        pruned = copy.deepcopy(model)
        prune(pruned, batches(), method=method, ratio=0.16)
        return float((logits(pruned) - before).norm())

    chance = error("random")
    for method in ("wanda", "flap", "cfsp", "cfsp_weighted", "modegpt"):
        assert error(method) < 1e-2 * chance, method


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"method": "sparsegpt"}, "pruning.method: sparsegpt is not one of random, magnitude"),
        (
            {"method": "cfsp", "parts": ("groups",)},
            "pruning.parts: cfsp does not judge groups; allowed are neurons",
        ),
        ({"method": "wanda", "widths": "per_layer"}, "wanda has no rule for widths per layer; flap, cfsp"),
        ({"method": "flap", "widths": "even"}, "pruning.widths: even is not one of uniform, per_layer"),
        ({"method": "flap", "refit": True, "compensate": True}, "Leave out refit or compensate"),
        ({"method": "wanda", "parts": ("groups",), "refit": True}, "parts needs neurons"),
        ({"method": "shortgpt", "compensate": True}, "pruning.compensate: shortgpt on blocks"),
        ({"method": "modegpt", "compensate": True}, "pruning.compensate: modegpt"),
        ({"method": "flap", "refit": True, "ridge": 0.0}, "pruning.ridge: 0.0 is not possible"),
        ({"method": "flap", "ratio": math.nan}, "allowed is 0 < ratio < 1"),
    ],
)
def test_what_does_not_go_together_is_refused(given, told):
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=told):
        prune(model, batches(), **{"ratio": 0.2, **given})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
