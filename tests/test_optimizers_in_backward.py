"""LOMO, AdaLomo, and steps inside the backward pass: the ordinary step's numbers, in less memory."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path

import pytest
import tiny
import torch
from accelerate import Accelerator
from shoestring.data import collate
from shoestring.optimizers import APOLLO, GaLore, Muon, clip_by_global_norm
from shoestring.optimizers.adalomo import AdaLOMO
from shoestring.optimizers.adalomo import state_bytes as adalomo_bytes
from shoestring.optimizers.badam import BAdam
from shoestring.optimizers.elementwise import AdamW
from shoestring.optimizers.in_backward import BackwardStepper, measure_in_backward, step_in_backward
from shoestring.optimizers.lomo import LOMO
from shoestring.optimizers.lomo import state_bytes as lomo_bytes
from shoestring.plan.live_bytes import LiveBytes
from shoestring.recipes import load_recipe
from shoestring.recipes.errors import DivergedError, UserError
from shoestring.recipes.optimizers import AdaLomo, Lomo
from shoestring.train.engine import Interrupted, NativeEngine
from shoestring.train.objectives import LossModule, Objective
from shoestring.train.run import train_recipe
from torch import nn
from torch.utils.checkpoint import checkpoint

PAGE = Path(__file__).parents[1] / "docs/step-in-backward.md"
KINDS = {
    "adamw": lambda params, **o: AdamW(params, lr=1e-2, **o),
    "apollo": lambda params, **o: APOLLO(params, lr=1e-2, rank=4, **o),
    "galore": lambda params, **o: GaLore(params, lr=1e-2, rank=4, update_proj_gap=2, **o),
    "muon": lambda params, **o: Muon(params, lr=1e-2, **o),
    "lomo": lambda params, **o: LOMO(params, lr=1e-2, **o),
    "adalomo": lambda params, **o: AdaLOMO(params, lr=1e-1, weight_decay=0.1, **o),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


class Net(nn.Module):
    """Matrices of different shapes (equal ones are stacked in the ordinary step and not here), tied ends."""

    def __init__(self, dropout=0.0, checkpointed=False):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.wide = nn.Linear(8, 24)
        self.tall = nn.Linear(24, 12)
        self.norm = nn.LayerNorm(12)
        self.back = nn.Linear(12, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.ones(8), requires_grad=False)
        self.dropout, self.checkpointed = nn.Dropout(dropout), checkpointed

    def middle(self, x):
        return self.back(self.norm(self.tall(self.dropout(torch.tanh(self.wide(x))))))

    def forward(self, ids):
        x = self.embed(ids) * self.frozen
        x = checkpoint(self.middle, x, use_reentrant=False) if self.checkpointed else self.middle(x)
        return nn.functional.cross_entropy(self.head(x), (ids + 1) % 11)


def net(dtype=torch.float32, **options):
    torch.manual_seed(0)
    return Net(**options).to(dtype)


def batches(count=6, rows=16):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 11, (rows,), generator=generator) for _ in range(count)]


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def ordinary(model, optimizer, ids, max_norm=None):
    model(ids).backward()
    norm = clip_by_global_norm(model.parameters(), max_norm)
    optimizer.step()
    optimizer.zero_grad()
    return float(norm)


def same(model, other, optimizer=None, other_optimizer=None):
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    if optimizer is not None:
        for a, b in zip(trained(model), trained(other), strict=True):
            one, two = optimizer.state[a], other_optimizer.state[b]
            assert one.keys() == two.keys()
            assert all(torch.equal(one[key], two[key]) for key in one)


# --- the same numbers


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_equals_the_ordinary_step_to_the_bit(kind, dtype, checkpointed):
    a, b = net(dtype, checkpointed=checkpointed), net(dtype)
    one, two = KINDS[kind](a.named_parameters()), KINDS[kind](b.named_parameters())
    for ids in batches():
        with step_in_backward(one) as done:
            a(ids).backward()
        norm = ordinary(b, two, ids)
        assert done.norm == pytest.approx(norm, rel=1e-6)
        assert done.stepped == len(trained(a))
        assert all(p.grad is None for p in a.parameters())
    same(a, b, one, two)
    assert not torch.equal(a.embed.weight, net(dtype).embed.weight)


@each_kind
def test_accumulated_gradients_are_part_of_the_step(kind):
    a, b = net(), net()
    one, two = KINDS[kind](a.named_parameters()), KINDS[kind](b.named_parameters())
    for first, second in zip(batches()[::2], batches()[1::2], strict=True):
        a(first).backward()
        with step_in_backward(one):
            a(second).backward()
        b(first).backward()
        b(second).backward()
        two.step()
        two.zero_grad()
    same(a, b, one, two)


def test_gradients_that_only_earlier_passes_reached_are_stepped():
    a, b = nn.ModuleList(nn.Linear(3, 3) for _ in range(2)), nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
    b.load_state_dict(a.state_dict())
    one, two = LOMO(a.parameters(), lr=0.1), LOMO(b.parameters(), lr=0.1)
    x = torch.randn(2, 3)
    a[0](x).square().sum().backward()
    with step_in_backward(one) as done:
        a[1](x).square().sum().backward()
    (b[0](x).square().sum() + b[1](x).square().sum()).backward()
    two.step()
    assert done.stepped == 4
    same(a, b)


@each_kind
def test_exact_clipping_equals_clipping_and_stepping(kind):
    a, b = net(dropout=0.3).double().float(), net(dropout=0.3)
    one, two = KINDS[kind](a.named_parameters()), KINDS[kind](b.named_parameters())
    stepper = BackwardStepper(one, 0.05, "exact")
    for i, ids in enumerate(batches()):
        torch.manual_seed(i)
        done = stepper.step(lambda ids=ids: a(ids))
        after = torch.rand(1)
        torch.manual_seed(i)
        norm = ordinary(b, two, ids, max_norm=0.05)
        assert done.norm == pytest.approx(norm, rel=1e-6)
        assert done.norm > 0.05
        assert torch.equal(after, torch.rand(1))  # as many random numbers as one pass draws
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_clipping_by_the_norm_before():
    limit, rate = 0.05, 0.1
    model = net(torch.float64)
    optimizer = LOMO(model.parameters(), lr=rate)
    last = 0.0
    for ids in batches():
        loss = model(ids)
        grads = dict(zip(trained(model), torch.autograd.grad(loss, trained(model)), strict=True))
        expected = {
            p: p.detach() - rate * g * min(1.0, limit / last if last else 1.0, limit / float(g.norm()))
            for p, g in grads.items()
        }
        with step_in_backward(optimizer, limit) as done:
            model(ids).backward()
        for p, value in expected.items():
            torch.testing.assert_close(p.detach(), value, rtol=1e-12, atol=1e-14)
        last = done.norm
        assert last == pytest.approx(math.hypot(*(float(g.norm()) for g in grads.values())), rel=1e-12)


def test_the_norm_before_is_in_the_state_dict():
    a, b = net(), net()
    one, two = (AdaLOMO(m.named_parameters(), lr=0.1) for m in (a, b))
    first, second = batches(2)
    with step_in_backward(one, 0.05):
        a(first).backward()
    b.load_state_dict(a.state_dict())
    two.load_state_dict(one.state_dict())
    for model, optimizer in ((a, one), (b, two)):
        with step_in_backward(optimizer, 0.05):
            model(second).backward()
    same(a, b, one, two)


def test_badam_goes_from_block_to_block():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return x.square().sum()

    a, b = Model(), Model()
    one, two = (BAdam(m.named_parameters(), lr=0.1, switch_block_every=2, order="ascending") for m in (a, b))
    for _ in range(7):
        x = torch.randn(5, 4)
        with step_in_backward(one):
            a(x).backward()
        b(x).backward()
        two.step()
        two.zero_grad()
    same(a, b)
    assert one.steps == two.steps == 7


# --- memory


def test_no_more_than_the_largest_gradient_is_alive():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))
    largest, alive = 64 * 64 * 4, []

    def count(_):
        alive.append(sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(count)
    optimizer = LOMO(model.parameters(), lr=1e-3)
    with step_in_backward(optimizer):
        model(torch.randn(2, 64)).sum().backward()
    assert alive == [largest] * 8
    alive.clear()
    with measure_in_backward(model.parameters()):
        model(torch.randn(2, 64)).sum().backward()
    assert alive == [largest] * 8
    x = torch.randn(2, 64)
    peaks = {}
    for inside in (True, False):
        with LiveBytes(torch.device("cpu")) as live:
            if inside:
                with step_in_backward(optimizer):
                    model(x).sum().backward()
            else:
                model(x).sum().backward()
            peaks[inside] = live.peak
    assert peaks[False] > 8 * largest
    assert peaks[True] < 3 * largest  # the gradient and the update's temporary


# --- gradients that are not finite


class Poison(torch.autograd.Function):
    """A gradient of NaN for what lies before it."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * math.nan


def poisoned(where):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3)))
    x = model[0](torch.ones(1, 4))
    for place in (1, 2):
        x = model[place](Poison.apply(x) if place == where else x)
    return model, x


@each_kind
def test_a_gradient_of_nan_reaches_no_weight(kind):
    model, out = poisoned(where=2)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = KINDS[kind](model.parameters(), weights="plain")
    with step_in_backward(optimizer, 1.0) as done:
        out.sum().backward()
    assert math.isnan(done.norm)
    assert (done.stepped, done.broken) == (1, model[1].weight)
    changed = [not torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True)]
    assert changed == [False, False, True]
    assert all(p.grad is None for p in model.parameters())
    assert not optimizer.state[model[0].weight]


def test_exact_applies_all_or_nothing():
    model, out = poisoned(where=2)
    before = [p.detach().clone() for p in model.parameters()]
    done = BackwardStepper(LOMO(model.parameters()), 1.0, "exact").step(lambda: out.sum())
    assert (done.stepped, done.broken) == (0, model[1].weight)
    assert math.isnan(done.norm)
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("clipping", ["exact", "previous"])
def test_a_loss_that_is_not_finite_applies_nothing(clipping):
    model = net()
    done = BackwardStepper(LOMO(model.parameters()), 1.0, clipping).step(
        lambda: model(batches(1)[0]) + math.inf
    )
    assert (done.stepped, done.broken) == (0, None)
    assert math.isnan(done.norm)
    same(model, net())


# --- what cannot be


def test_refusals():
    model = net()
    with pytest.raises(TypeError, match=r"AdamW steps all its tensors at once"):
        BackwardStepper(torch.optim.AdamW(model.parameters()))
    own = LOMO(trained(model))
    with pytest.raises(TypeError), step_in_backward(torch.optim.SGD(model.parameters())):
        pass
    with pytest.raises(ValueError, match="clipping is 'global'; allowed: 'exact', 'previous'"):
        BackwardStepper(own, clipping="global")
    with pytest.raises(ValueError, match="max_grad_norm is 0"):
        BackwardStepper(own, max_grad_norm=0)
    with pytest.raises(ValueError, match="clip_threshold"):
        AdaLOMO(trained(model), clip_threshold=0)
    ids = batches(1)[0]

    def twice():
        with step_in_backward(own):
            model(ids).backward()
            model(ids).backward()

    with pytest.raises(RuntimeError, match="second backward pass"):
        twice()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model(ids).backward()  # the hooks are gone, whatever happened inside
    assert all(p.grad is not None for p in trained(model))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="single process"):
        BackwardStepper(LOMO(trained(net())))


# --- the rules, against float64 written from the equations


def lomo(w, grads, *, lr, weight_decay):
    w = w.double().clone()
    for g in grads:
        w = (1 - lr * weight_decay) * w - lr * g.double()
    return w


def adalomo(w, grads, *, lr, weight_decay, exponent=0.8, smallest=1e-3, threshold=1.0, first=1):
    w = w.double().clone()
    row = column = square = None
    for t, g in enumerate(grads, start=first):
        g = g.double()
        beta2 = 1 - t**-exponent
        s = g**2 + 1e-30
        if g.ndim == 2:
            row = s.mean(1) if row is None else beta2 * row + (1 - beta2) * s.mean(1)
            column = s.mean(0) if column is None else beta2 * column + (1 - beta2) * s.mean(0)
            u = g / torch.outer(row / row.mean(), column).sqrt()
        else:
            square = s if square is None else beta2 * square + (1 - beta2) * s
            u = g / square.sqrt()
        u = u / max(1.0, float(u.square().mean().sqrt()) / threshold)
        rate = lr * max(smallest, float(w.square().mean().sqrt()))
        w = w - rate * weight_decay * w
        w = w - rate * u
    return w


SHAPES = [(24, 16), (16, 24), (16, 16), (16,), (1, 16), (16, 1), (1,)]


def problem(shape, dtype, size=1.0):
    generator = torch.Generator().manual_seed(len(shape) * 100 + shape[0])
    draws = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(22)]
    grads = [(1 + 0.3 * i) * (draws[1] + g) for i, g in enumerate(draws[2:])]
    if len(shape) == 2 and shape[0] > 1:
        for g in grads:
            g[0] = 0.0  # a row of an embedding that no token uses
    return size * draws[0].to(dtype), [g.to(dtype) for g in grads]


def run(optimizer_class, w, grads, **options):
    p = nn.Parameter(w.clone())
    optimizer = optimizer_class([p], **options)
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
    return p.detach(), optimizer


def error(ours, reference, start):
    return float((ours.double() - reference).norm() / (reference - start.double()).norm())


PRECISION = {torch.float64: 1e-12, torch.float32: 1e-5}
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", PRECISION)


@each_shape
@each_dtype
def test_lomo_is_its_equation(shape, dtype):
    w, grads = problem(shape, dtype)
    options = {"lr": 1e-2, "weight_decay": 0.1}
    ours, optimizer = run(LOMO, w, grads, **options)
    assert error(ours, lomo(w, grads, **options), w) < PRECISION[dtype]
    assert error(ours, lomo(w, grads, **options | {"weight_decay": 0.11}), w) > 10 * PRECISION[dtype]
    (state,) = optimizer.state.values()
    assert list(state) == ["step"]


@each_shape
@each_dtype
@pytest.mark.parametrize("size", [1.0, 1e-4], ids=["weights", "near_zero"])
def test_adalomo_is_its_equations(shape, dtype, size):
    w, grads = problem(shape, dtype, size)
    options = {"lr": 2e-2, "weight_decay": 0.1}
    ours, _ = run(AdaLOMO, w, grads, **options)
    assert error(ours, adalomo(w, grads, **options), w) < PRECISION[dtype]
    wrong = [{"exponent": 0.7}, {"threshold": 0.9}]
    wrong += [{"smallest": 2e-3}] if size < 1e-3 else [{"weight_decay": 0.2}]
    for change in wrong:
        assert error(ours, adalomo(w, grads, **options | change), w) > 1e-4


def test_the_common_mistakes_with_adalomo_are_seen():
    w, grads = problem((24, 16), torch.float64)
    options = {"lr": 2e-2, "weight_decay": 0.1}
    ours, _ = run(AdaLOMO, w, grads, **options)
    assert error(ours, adalomo(w, grads, first=2, **options), w) > 1e-4  # counting steps from another number
    assert error(ours, adalomo(w.T, [g.T for g in grads], **options).T, w) < 1e-12  # neither side is special


def test_a_stack_is_its_matrices():
    w, grads = problem((24, 16), torch.float64)
    options = {"lr": 2e-2, "weight_decay": 0.1}
    stack = torch.stack([w, 3 * w])
    together, _ = run(AdaLOMO, stack, [torch.stack([g, -2 * g]) for g in grads], **options)
    for i, factor in enumerate((1, -2)):
        alone, _ = run(AdaLOMO, stack[i], [factor * g for g in grads], **options)
        torch.testing.assert_close(together[i], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("optimizer_class", [LOMO, AdaLOMO])
@pytest.mark.parametrize("weights", ["sr", "kahan", "master", "plain"])
def test_bfloat16_weights(optimizer_class, weights):
    w, grads = problem((24, 16), torch.bfloat16)
    reference = lomo if optimizer_class is LOMO else adalomo
    options = {"lr": 2e-3 if optimizer_class is LOMO else 2e-2, "weight_decay": 0.1}
    ours, _ = run(optimizer_class, w, grads, weights=weights, **options)
    off = error(ours, reference(w, grads, **options), w)
    assert off < {"sr": 0.2, "kahan": 0.1, "master": 0.1, "plain": 0.4}[weights]


@pytest.mark.parametrize("shape", [(24, 16), (16,), (), (3, 8, 4), (4, 3, 2, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", ["sr", "kahan", "master"])
def test_state_bytes_are_those_of_the_state(shape, dtype, weights):
    for optimizer_class, config, count in ((LOMO, Lomo, lomo_bytes), (AdaLOMO, AdaLomo, adalomo_bytes)):
        p = nn.Parameter(torch.randn(shape).to(dtype))
        optimizer = optimizer_class([p], weights=weights)
        p.grad = torch.randn_like(p)
        optimizer.step()
        assert torch.isfinite(p).all()
        assert sum(v.nbytes for v in optimizer.state[p].values()) == count(
            shape, config(weights=weights), dtype
        )


# --- the engine and the recipe


def engine(model, optimizer, **options):
    objective = Objective(
        collate=collate,
        loss=lambda net, ids: net(ids) * len(ids),
        metrics=lambda loss, tokens: {"loss": loss},
    )
    made = NativeEngine(Accelerator(cpu=True), LossModule(model, objective), optimizer, autocast=False)
    made.stepper = BackwardStepper(optimizer, **options) if options else None
    return made


OPTIONS = [
    {"max_grad_norm": None},
    {"max_grad_norm": 0.05, "clipping": "exact"},
    {"max_grad_norm": 0.05, "clipping": "previous"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["without", "exact", "previous"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_the_engine_steps_as_without(options, micro_batches):
    a, b = net(dropout=0.3), net(dropout=0.3)
    one = engine(a, AdaLOMO(a.named_parameters(), lr=0.1), **options)
    two = engine(b, AdaLOMO(b.named_parameters(), lr=0.1))
    for i in range(3):
        ids, limit = batches(micro_batches), options["max_grad_norm"]
        results = []
        for each in (one, two):
            torch.manual_seed(i)
            loss = each.forward_backward(ids, 16 * micro_batches, lambda: False)
            results.append((float(loss), float(each.step(limit))))
            assert all(p.grad is None for p in each.parameters.values())
        assert one.half_stepped() is None
        if options.get("clipping") == "previous" and micro_batches == 1:
            return  # the norm before is another one; see test_clipping_by_the_norm_before
        assert results[0] == pytest.approx(results[1], rel=1e-6)
    if micro_batches == 3 or limit is None:
        same(a, b, one.optimizer, two.optimizer)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=["without", "exact", "previous"])
@pytest.mark.parametrize("after", [0, 1])
def test_an_interrupt_leaves_nothing_applied(options, after):
    model = net()
    made = engine(model, LOMO(model.named_parameters(), lr=0.1), **options)
    asked = iter([False] * after + [True])
    with pytest.raises(Interrupted):
        made.forward_backward(batches(after + 1), 16 * (after + 1), lambda: next(asked))
    same(model, net())
    assert all(p.grad is None for p in model.parameters())
    assert not made.optimizer.state


def test_the_norm_of_an_accumulated_step_is_the_norm_before():
    model = net()
    made = engine(model, LOMO(model.named_parameters(), lr=0.1), max_grad_norm=0.05)
    made.forward_backward(batches(2), 32, lambda: False)
    norm = float(made.step(0.05))
    assert made.optimizer.param_groups[0]["norm_of_last_backward"] == norm


def test_exact_clipping_to_nothing_is_a_problem(tmp_path):
    given = str(tiny.recipe(tmp_path, optimizer={"name": "adalomo"}))
    with pytest.raises(UserError, match=r"optimizer\.clipping=exact.*optimizer\.max_grad_norm=null"):
        load_recipe(given, ["optimizer.clipping=exact"])


def test_the_example_of_the_page_runs():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    torch.manual_seed(0)
    exec(compile(code, str(PAGE), "exec"), {})


# --- whole runs


def train(recipe, *overrides):
    return train_recipe(str(recipe), overrides, fresh=False, started=time.monotonic())


def lines(run):
    kept = ("step", "loss", "learning_rate", "grad_norm")
    return [
        tuple(json.loads(line)[key] for key in kept)
        for line in (run / "metrics.jsonl").read_text().splitlines()
    ]


def weights(run):
    return (sorted(run.glob("checkpoint-*"))[-1] / "trained.safetensors").read_bytes()


def recipe(folder, **optimizer):
    return tiny.recipe(
        folder,
        adapter=None,
        optimizer={"step_in_backward": True, "learning_rate": 1e-2, **optimizer},
        eval={"samples": 0},
    )


RUNS = {
    "previous": {"name": "adamw", "max_grad_norm": 0.1},
    "exact": {"name": "lomo", "learning_rate": 0.5, "clipping": "exact", "max_grad_norm": 0.1},
    "without": {"name": "adalomo", "learning_rate": 0.1},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_goes_on_to_the_bit(tmp_path, name, monkeypatch):
    path = recipe(tmp_path, **RUNS[name])
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train(path, f"output_dir={whole}") == 0
    assert lines(whole)[-1][1] < lines(whole)[0][1]
    real, calls = NativeEngine.step, [0]

    def dies(self, max_grad_norm):
        calls[0] += 1
        if calls[0] == 7:
            raise KeyboardInterrupt  # the backward pass has stepped; step 4's checkpoint knows nothing of it
        return real(self, max_grad_norm)

    monkeypatch.setattr(NativeEngine, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        train(path, f"output_dir={broken}")
    monkeypatch.setattr(NativeEngine, "step", real)
    torch.manual_seed(999)
    assert train(path, f"output_dir={broken}") == 0
    assert lines(broken) == lines(whole)
    assert weights(broken) == weights(whole)


def spoil(monkeypatch, step):
    """Make the gradient of layer 0's output NaN in one step: the layers behind it have a good one."""
    real, calls = NativeEngine.forward_backward, [0]

    def forward_backward(self, *arguments):
        calls[0] += 1
        layer = self.loss_module.model.model.layers[0]

        def hook(module, inputs, output):
            whole = output[0] if isinstance(output, tuple) else output
            spoilt = Poison.apply(whole)
            return (spoilt, *output[1:]) if isinstance(output, tuple) else spoilt

        handle = layer.register_forward_hook(hook) if calls[0] == step else None
        try:
            return real(self, *arguments)
        finally:
            if handle is not None:
                handle.remove()

    monkeypatch.setattr(NativeEngine, "forward_backward", forward_backward)


@pytest.mark.slow
def test_weights_that_have_changed_are_not_saved_as_the_state_before(tmp_path, monkeypatch):
    path = recipe(tmp_path, name="adamw")
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train(path, f"output_dir={whole}") == 0
    with monkeypatch.context() as patch:
        spoil(patch, step=7)
        with pytest.raises(
            DivergedError, match=r"only kept as of step 4\..*optimizer\.clipping=exact"
        ) as stopped:
            train(path)
    assert "first non-finite gradient: model.layers.0." in str(stopped.value)
    assert [p.name for p in run.glob("checkpoint-*")] == ["checkpoint-000004"]
    assert train(path) == 0  # the cause is gone: the same command goes on from step 4
    assert lines(run) == lines(whole)
    assert weights(run) == weights(whole)


def test_the_first_step_may_break_before_any_checkpoint(tmp_path, monkeypatch):
    spoil(monkeypatch, step=1)
    with pytest.raises(DivergedError, match=r"lost, and no checkpoint had been saved"):
        train(recipe(tmp_path, name="adamw"))
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_exact_keeps_the_state_before_the_step(tmp_path, monkeypatch):
    spoil(monkeypatch, step=7)
    with pytest.raises(DivergedError, match=r"The state before that step is kept: .*checkpoint-000006"):
        train(recipe(tmp_path, name="adamw", clipping="exact"))


def test_a_rehearsal_changes_nothing(tmp_path, monkeypatch):
    from shoestring.train.rehearsal import rehearse

    class Seen(Exception):
        pass

    def look(run):
        engine = run.engine
        before = {name: p.detach().clone() for name, p in engine.parameters.items()}
        rehearse(run)
        assert not engine.optimizer.state
        assert all(torch.equal(p, before[name]) and p.grad is None for name, p in engine.parameters.items())
        raise Seen

    monkeypatch.setattr("shoestring.train.run.first_measurements", look)
    with pytest.raises(Seen):
        train(recipe(tmp_path, name="adalomo"))


def test_two_processes_are_one_clear_error(tmp_path, monkeypatch):
    from shoestring.train import assembly

    path = recipe(tmp_path, name="lomo")
    real = assembly.build_engine

    def as_if_two(recipe, plan, facts, data, accelerator, checkpoint, **others):
        monkeypatch.setattr(Accelerator, "num_processes", 2)
        return real(recipe, plan, facts, data, accelerator, checkpoint, **others)

    monkeypatch.setattr("shoestring.train.building.build_engine", as_if_two)
    with pytest.raises(UserError, match=r"step_in_backward=true needs one process, and this run has 2"):
        train(path)
