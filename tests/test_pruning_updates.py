"""Weight updates of a cut: the least-squares refit and the bias compensation, against plain references."""

from __future__ import annotations

import copy

import pytest
import torch
from pruning_models import batches, logits, tiny
from shoestring.pruning import calibrate, keep_uniform, mask, prune, read_anatomy, refit_all, remove
from shoestring.pruning.flap import compensation, flap_compensation, flap_scores
from shoestring.pruning.refit import refit_weight
from shoestring.recipes.errors import UserError


def data(tokens=300, width=20, out=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    h = torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ mix + 0.5
    return h, torch.randn(out, width, generator=generator, dtype=torch.float64)


KEPT = torch.tensor([0, 2, 3, 7, 8, 12, 13, 19])
GONE = torch.tensor([j for j in range(20) if j not in KEPT.tolist()])


def test_the_refit_is_least_squares():
    h, weight = data()
    best = torch.linalg.lstsq(h[:, KEPT], h @ weight.T).solution.T
    torch.testing.assert_close(refit_weight(weight, h.T @ h, KEPT, ridge=0.0), best, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(refit_weight(weight, h.T @ h, KEPT, ridge=1e-8), best, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 1.0, 1e3])
def test_a_ridge_draws_towards_slicing_and_never_does_worse(ridge):
    h, weight = data()
    got = refit_weight(weight, h.T @ h, KEPT, ridge=ridge)
    # the same as least squares with rows √λ · I that ask for the sliced weight
    strength = (ridge * float((h.T @ h).diagonal().mean())) ** 0.5
    rows = torch.cat([h[:, KEPT], strength * torch.eye(len(KEPT), dtype=torch.float64)])
    wanted = torch.cat([h @ weight.T, strength * weight[:, KEPT].T])
    expected = torch.linalg.lstsq(rows, wanted).solution.T
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)
    errors = [float((h @ weight.T - h[:, KEPT] @ w.T).square().sum()) for w in (got, weight[:, KEPT])]
    assert errors[0] < errors[1]


def test_a_refit_with_too_few_tokens_or_dead_neurons_stays_finite_and_helps():
    h, weight = data(tokens=5)
    h[:, 3] = 0
    got = refit_weight(weight, h.T @ h, KEPT, ridge=1e-6)
    assert got.isfinite().all()
    torch.testing.assert_close(got[:, 2], weight[:, 3])  # neuron 3 never spoke: nothing says how to change it
    errors = [float((h @ weight.T - h[:, KEPT] @ w.T).square().sum()) for w in (got, weight[:, KEPT])]
    assert errors[0] < 1e-3 * errors[1]
    assert torch.equal(refit_weight(weight, torch.zeros(20, 20, dtype=torch.float64), KEPT), weight[:, KEPT])


def test_the_refit_of_a_model_lowers_the_error_of_each_mlp():
    model = tiny()
    anatomy = read_anatomy(model)
    stats = list(calibrate(model, batches(), covariance=True))
    cut = keep_uniform(anatomy, flap_scores(anatomy, stats), 20, 4)
    weights = refit_all(model, batches(), cut)
    assert sorted(weights) == [0, 1, 2]
    for index, block in enumerate(anatomy.blocks):
        expected = refit_weight(block.down.weight, stats[index].covariance, cut.neurons[index])
        torch.testing.assert_close(weights[index], expected)
    plain, fitted = copy.deepcopy(model), copy.deepcopy(model)
    before = logits(model, batches()[0])
    record = prune(fitted, batches(), method="flap", ratio=0.15, refit=True, ridge=0.01).record
    prune(plain, batches(), method="flap", ratio=0.15)
    errors = [float((logits(m, batches()[0]) - before).norm()) for m in (fitted, plain)]
    assert errors[0] < errors[1]
    assert (record["refit"], record["ridge"]) == (True, 0.01)


def test_compensation_is_the_removed_channels_mean_effect():
    h, weight = data()
    got = compensation(weight, h.mean(dim=0), GONE)
    effects = [
        [sum(float(weight[i, j] * h[t, j]) for j in GONE.tolist()) for i in range(7)] for t in range(300)
    ]
    torch.testing.assert_close(got, torch.tensor(effects, dtype=torch.float64).mean(0))
    # of all constants it is the one with the least squared error, and better than none
    lost = h[:, GONE] @ weight[:, GONE].T
    errors = [float((lost - shift).square().sum()) for shift in (got, got * 0, got * 1.01, got * 0.99)]
    assert errors[0] < min(errors[1:])


@pytest.mark.parametrize("parts", [("neurons",), ("groups",), ("neurons", "groups")])
def test_compensation_lowers_the_error_of_every_layer(parts):
    model = tiny()
    with torch.no_grad():  # activations with a mean, so that there is something to keep
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight += 0.2
    anatomy = read_anatomy(model)
    stats = list(calibrate(model, batches()))
    cut = keep_uniform(
        anatomy,
        flap_scores(anatomy, stats),
        20 if "neurons" in parts else 40,
        2 if "groups" in parts else 4,
    )
    down, o = flap_compensation(anatomy, stats, cut)
    assert (sorted(down), sorted(o)) == (
        [0, 1, 2] if "neurons" in parts else [],
        [0, 1, 2] if "groups" in parts else [],
    )
    inputs = {"down": [], "o": []}
    block = anatomy.blocks[0]
    hooks = [
        module.register_forward_pre_hook(lambda m, i, name=name: inputs[name].append(i[0].flatten(0, 1)))
        for name, module in (("down", block.down), ("o", block.o))
    ]
    for ids in batches():
        logits(model, ids)
    for hook in hooks:
        hook.remove()
    widths = {"down": torch.ones(40, dtype=torch.bool), "o": torch.ones(64, dtype=torch.bool)}
    widths["down"][cut.neurons[0]] = False
    for group in cut.groups[0].tolist():
        widths["o"][16 * group : 16 * group + 16] = False
    for name, biases in (("down", down), ("o", o)):
        gone = widths[name]
        if not gone.any():
            continue
        x = torch.cat(inputs[name])[:, gone]
        lost = x @ getattr(block, name).weight.detach()[:, gone].T
        torch.testing.assert_close(biases[0], lost.mean(0), rtol=1e-8, atol=1e-10)
        assert (lost - biases[0]).square().sum() < lost.square().sum()


def test_compensated_models_say_so_in_their_config():
    model = tiny()
    before = copy.deepcopy(model)
    result = prune(model, batches(), method="flap", ratio=0.35, parts=("neurons", "groups"), compensate=True)
    assert (model.config.mlp_bias, model.config.attention_bias) == (True, True)
    biases = {n: p for n, p in model.named_parameters() if n.endswith(".bias")}
    assert len(biases) == 3 * 7
    loud = {n.split(".")[-2] for n, p in biases.items() if p.abs().max() > 0}
    assert loud == {"down_proj", "o_proj"}
    for index, layer in enumerate(model.model.layers):
        torch.testing.assert_close(layer.mlp.down_proj.bias.detach(), result.cut.down_bias[index])
    zeroed = copy.deepcopy(before)
    mask(zeroed, result.cut)
    assert (logits(zeroed) - logits(model)).abs().max() < 1e-12
    remove(before, result.cut)
    assert torch.equal(logits(before), logits(model))


@pytest.mark.parametrize(
    ("family", "given", "parts", "told"),
    [
        ("gemma", {}, ("neurons",), "gemma models cannot hold a bias of down_proj"),
        ("qwen3", {}, ("neurons",), "qwen3 models cannot hold a bias of down_proj"),
        ("mistral", {}, ("groups",), "mistral models cannot hold a bias of o_proj"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, ("neurons",), "qwen2 models cannot"),
    ],
)
def test_biases_that_no_file_could_hold_are_refused(family, given, parts, told):
    model = tiny(family, **given)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=told):
        prune(model, batches(), method="flap", ratio=0.1, parts=parts, compensate=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
