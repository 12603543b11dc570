"""What every optimizer of ours promises, each promise tried on each of them."""

import copy
import io
import math
from itertools import pairwise

import pytest
import torch
from shoestring.checkpoint import load_optimizer_state, optimizer_state
from shoestring.ops.rounding import noise_key, noise_start, noise_window
from shoestring.optimizers import (
    APOLLO,
    COSMOS,
    FRUGAL,
    LOMO,
    QAPOLLO,
    SOAP,
    AdaLOMO,
    AdamW,
    APOLLOMini,
    GaLore,
    Lion,
    Muon,
    NaturalGaLore,
    build_optimizer,
    matrix,
    set_rate,
    slots,
    state_bytes,
    update_cost,
)
from shoestring.optimizers.moments import BLOCK, moment_bytes, new_moment, read, write
from shoestring.optimizers.subspace import leading_basis, turn
from shoestring.recipes import (
    AdaLomo,
    Apollo,
    ApolloMini,
    Cosmos,
    Frugal,
    Lomo,
    QApollo,
    Soap,
)
from shoestring.recipes import AdamW as AdamWConfig
from shoestring.recipes import GaLore as GaLoreConfig
from shoestring.recipes import Lion as LionConfig
from shoestring.recipes import Muon as MuonConfig
from shoestring.recipes import NaturalGaLore as NaturalGaLoreConfig
from torch import nn

OURS = {
    "adamw": (AdamW, {"lr": 1e-3}, AdamWConfig),
    "lion": (Lion, {"lr": 1e-3}, LionConfig),
    "apollo": (APOLLO, {"lr": 3e-3, "rank": 8, "update_proj_gap": 3}, Apollo),
    "apollo_mini": (APOLLOMini, {"lr": 1e-3, "update_proj_gap": 3}, ApolloMini),
    "q_apollo": (QAPOLLO, {"lr": 3e-3, "rank": 8, "update_proj_gap": 3}, QApollo),
    "galore": (GaLore, {"lr": 1e-2, "rank": 8, "update_proj_gap": 3}, GaLoreConfig),
    "natural_galore": (
        NaturalGaLore,
        {"lr": 1e-2, "rank": 8, "update_proj_gap": 3, "history": 4},
        NaturalGaLoreConfig,
    ),
    "frugal": (FRUGAL, {"lr": 1e-3, "update_proj_gap": 3}, Frugal),
    "frugal_randk": (FRUGAL, {"lr": 1e-3, "update_proj_gap": 3, "projection": "randk"}, Frugal),
    "frugal_random": (FRUGAL, {"lr": 1e-3, "update_proj_gap": 3, "projection": "random"}, Frugal),
    "frugal_svd": (FRUGAL, {"lr": 1e-3, "update_proj_gap": 3, "projection": "svd"}, Frugal),
    "frugal_blocks": (
        FRUGAL,
        {"lr": 1e-3, "update_proj_gap": 3, "projection": "blocks", "density": 0.5},
        Frugal,
    ),
    "cosmos": (COSMOS, {"lr": 5e-3, "rank": 8}, Cosmos),
    "muon": (Muon, {"lr": 5e-3}, MuonConfig),
    "soap": (SOAP, {"lr": 3e-3, "precondition_frequency": 3}, Soap),
    "lomo": (LOMO, {"lr": 0.1}, Lomo),
    "adalomo": (AdaLOMO, {"lr": 1e-2}, AdaLomo),
}
EACH = pytest.mark.parametrize("name", OURS)
DTYPES = [torch.float32, torch.bfloat16]


def pairs(bits):
    """Each optimizer with each number of bits, in one of the dtypes; every two values meet."""
    return [(name, DTYPES[(i + j) % 2], of) for i, name in enumerate(OURS) for j, of in enumerate(bits)]


class Model(nn.Module):
    """An embedding, wide, tall and square matrices, a stack of matrices, norms and biases."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(50, 96)
        self.layers = nn.ModuleList(nn.Linear(96, 96) for _ in range(3))
        self.wide = nn.Linear(96, 64)
        self.tall = nn.Linear(64, 96, bias=False)
        self.norm = nn.LayerNorm(96)
        self.experts = nn.Parameter(torch.randn(2, 96, 64) * 0.1)
        self.lm_head = nn.Linear(64, 50, bias=False)
        self.to(dtype)

    def forward(self, tokens):
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        x = self.norm(x + self.tall(torch.tanh(self.wide(x))))
        return self.lm_head(torch.tanh(x @ self.experts[0] + x @ self.experts[1]))


TOKENS = torch.randint(0, 50, (4, 33), generator=torch.Generator().manual_seed(1))


def loss_of(model, tokens=TOKENS):
    return nn.functional.cross_entropy(model(tokens[:, :-1]).float().flatten(0, 1), tokens[:, 1:].flatten())


def fill_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype) * 0.1


def make(name, model, **more):
    kind, options, _ = OURS[name]
    return kind(model.named_parameters(), **{**options, **more})


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize(("name", "dtype", "bits"), pairs([32, 16, 8]))
def test_it_lowers_the_loss(name, dtype, bits):
    model = Model(dtype)
    optimizer = make(name, model, state_bits=bits)
    before = float(loss_of(model))
    for _ in range(30):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    assert float(loss_of(model)) < before - 0.2


@EACH
def test_eight_and_sixteen_bits_of_state_stay_near_thirty_two(name):
    starts = Model()
    moved = {}
    for bits in (32, 16, 8):
        model = copy.deepcopy(starts)
        optimizer = make(name, model, state_bits=bits)
        for step in range(8):
            fill_gradients(model, step)
            optimizer.step()
        moved[bits] = torch.cat(
            [(p - q).flatten() for p, q in zip(model.parameters(), starts.parameters(), strict=True)]
        ).detach()
    assert torch.cosine_similarity(moved[32], moved[16], dim=0) > 0.99
    assert torch.cosine_similarity(moved[32], moved[8], dim=0) > 0.97


@EACH
def test_bfloat16_weights_take_updates_below_their_last_digit(name):
    """A rate so small that rounding to nearest loses most of every update, and how much each mode keeps."""
    starts, small = Model(torch.bfloat16), OURS[name][1]["lr"] * (0.002 if name == "lomo" else 0.02)
    exact = copy.deepcopy(starts).float()
    models = {mode: copy.deepcopy(starts) for mode in ("sr", "kahan", "master", "plain")}
    optimizers = [make(name, model, lr=small, weights=mode) for mode, model in models.items()]
    optimizers.append(make(name, exact, lr=small))
    for step in range(40):
        for model in models.values():
            fill_gradients(model, step // 20)  # one direction for a while, as in training
        for p, q in zip(exact.parameters(), models["plain"].parameters(), strict=True):
            p.grad = q.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    for mode, model in models.items():
        along = []
        for p, q, start in zip(exact.parameters(), model.parameters(), starts.parameters(), strict=True):
            if p.ndim == 2 and p.shape[0] != 50:
                wanted, got = (p - start.float()).flatten(), (q.float() - start.float()).flatten()
                along.append(float(got @ wanted / (wanted @ wanted)))
        kept = sum(along) / len(along)
        if mode == "plain":
            assert kept < 0.8
        else:
            # its history, kept in bfloat16, sees gradients that float32 weights see whole
            assert kept == pytest.approx(1.0, abs=0.25 if name == "natural_galore" else 0.1), mode


@pytest.mark.parametrize(("name", "dtype", "bits"), pairs([32, 8]))
def test_torchs_state_dict_goes_through_a_safe_load_and_continues_bit_for_bit(name, dtype, bits):
    whole = Model(dtype)
    first = copy.deepcopy(whole)
    optimizers = {m: make(name, m, state_bits=bits, weights="kahan") for m in (whole, first)}
    for step in range(9):
        fill_gradients(whole, step)
        optimizers[whole].step()
        if step < 4:  # in the middle of a projection's life
            fill_gradients(first, step)
            optimizers[first].step()
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizers[first].state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = Model(dtype)
    second.load_state_dict(saved["model"])
    restored = make(name, second, state_bits=bits, weights="kahan")
    restored.load_state_dict(saved["optimizer"])
    for step in range(4, 9):
        fill_gradients(second, step)
        restored.step()
    assert equal(whole, second)


@EACH
def test_a_checkpoint_by_name_continues_bit_for_bit(name):
    whole = Model(torch.bfloat16)
    first, second = copy.deepcopy(whole), Model(torch.bfloat16)
    a, b = make(name, whole, state_bits=8), make(name, first, state_bits=8)
    for step in range(9):
        fill_gradients(whole, step)
        a.step()
        if step < 4:
            fill_gradients(first, step)
            b.step()
    tensors, rest = optimizer_state(b, dict(first.named_parameters()))
    tensors = {key: value.clone() for key, value in tensors.items()}
    second.load_state_dict(first.state_dict())
    restored = make(name, second, state_bits=8)
    load_optimizer_state(restored, dict(second.named_parameters()), tensors, rest)
    for step in range(4, 9):
        fill_gradients(second, step)
        restored.step()
    assert equal(whole, second)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [32, 16, 8])
@pytest.mark.parametrize("mode", ["sr", "kahan", "master"])
def test_the_stated_bytes_are_those_in_state(name, dtype, bits, mode):
    config_class, options = OURS[name][2], OURS[name][1]
    given = {key: value for key, value in options.items() if key in config_class.model_fields}
    config = config_class(state_bits=bits, weights=mode, **given)
    model = Model(dtype)
    optimizer = make(name, model, state_bits=bits, weights=mode)
    for step in range(2):
        fill_gradients(model, step)
        optimizer.step()
    found = sum(
        value.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    stated = state_bytes(config, slots(model), dtype)
    if name == "frugal_blocks":  # the largest matrices count, whichever are active now
        assert found <= stated
    elif name == "adamw" and (dtype, bits) == (torch.float32, 32):
        # a recipe takes torch's AdamW here, whose step counter has four bytes
        assert stated == found - 4 * len(optimizer.state)
    else:
        assert stated == found
    assert update_cost(config, slots(model), dtype).bytes > 0


@EACH
def test_one_parameter_can_step_alone(name):
    together = Model()
    alone = copy.deepcopy(together)
    a, b = make(name, together), make(name, alone)
    for step in range(7):
        fill_gradients(together, step)
        fill_gradients(alone, step)
        a.step()
        for p in reversed(list(alone.parameters())):  # the order of a backward pass
            b.step_parameter(p)
    assert equal(together, alone)


@EACH
def test_matrices_of_one_shape_stepped_together_are_those_stepped_one_by_one(name, monkeypatch):
    """What a GPU does in one launch for many."""
    one = Model(torch.float64)
    many = copy.deepcopy(one)
    a, b = make(name, one), make(name, many)
    for step in range(7):
        fill_gradients(one, step)
        fill_gradients(many, step)
        monkeypatch.setattr(matrix, "_CPU_BATCH", 1)
        a.step()
        monkeypatch.setattr(matrix, "_CPU_BATCH", 1 << 20)
        b.step()
    for p, q in zip(one.parameters(), many.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@EACH
def test_two_processes_with_the_same_gradients_have_the_same_weights(name):
    """Nothing is drawn from the global generators, whose states differ between ranks."""
    first = Model(torch.bfloat16)
    second = copy.deepcopy(first)
    a, b = make(name, first), make(name, second)
    for step in range(7):
        fill_gradients(first, step)
        fill_gradients(second, step)
        torch.manual_seed(1)
        a.step()
        torch.manual_seed(2)
        state = torch.random.get_rng_state()
        b.step()
        assert torch.equal(state, torch.random.get_rng_state())
    assert equal(first, second)


@EACH
def test_missing_gradients_are_skipped_and_sparse_ones_refused(name):
    model = Model()
    optimizer = make(name, model)
    start = copy.deepcopy(model)
    optimizer.step()
    assert equal(model, start)
    assert not optimizer.state
    embedding = nn.Embedding(10, 8, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    optimizer = OURS[name][0]([{"params": [embedding.weight], "kind": "adamw"}], lr=1e-3)
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


@EACH
def test_a_closure_a_torch_schedule_and_a_tensor_for_the_rate_work(name):
    model = Model()
    optimizer = make(name, model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    losses = []
    for _ in range(2):
        losses.append(float(optimizer.step(closure)))
        schedule.step()
    assert math.isfinite(losses[0])
    assert losses[1] < losses[0]
    assert optimizer.param_groups[0]["lr"] == OURS[name][1]["lr"] * 0.25
    optimizer.param_groups[0]["lr"] = torch.tensor(1e-4)
    optimizer.step(closure)


@EACH
def test_a_rate_of_zero_moves_nothing(name):
    model = Model(torch.bfloat16)
    start = copy.deepcopy(model)
    optimizer = make(name, model, lr=0.0)
    for step in range(3):
        fill_gradients(model, step)
        optimizer.step()
    assert equal(model, start)


MATRIX_METHODS = [n for n in OURS if n not in ("adamw", "lion", "lomo", "adalomo")]


@pytest.mark.parametrize("name", MATRIX_METHODS)
def test_what_is_no_matrix_goes_to_adamw_and_one_line_says_so(name, caplog):
    make(name, Model())
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert "AdamW takes embed_tokens.weight (50, 96), layers.0.bias (96,)" in lines[0]
    assert "more" in lines[0]


@pytest.mark.parametrize("name", MATRIX_METHODS)
def test_groups_as_in_the_published_packages(name, caplog):
    """A group that gives the method's key is for the method, one that does not is AdamW's, without a word."""
    kind, options, _ = OURS[name]
    model = Model()
    key = kind.matrix_keys[0]
    value = {"rank": 4, "density": 0.5, "momentum": 0.9, "precondition_frequency": 5}[key]
    light = {"params": [model.wide.weight], key: value, "lr": 1e-4, "weight_decay": 0.1}
    rest = {"params": [model.norm.weight, model.lm_head.weight]}
    optimizer = kind([light, rest], **options)
    assert [group["kind"] for group in optimizer.param_groups] == ["matrix", "adamw"]
    assert optimizer.param_groups[0][key] == value
    assert optimizer.param_groups[0]["lr"] == 1e-4
    assert not caplog.records
    fill_gradients(model, 0)
    optimizer.step()
    moments = optimizer.state[model.lm_head.weight]
    assert moments["exp_avg"].shape == model.lm_head.weight.shape


@pytest.mark.parametrize("name", ["apollo", "galore", "natural_galore", "q_apollo"])
def test_a_rank_that_does_not_fit_names_the_parameter(name):
    with pytest.raises(
        ValueError, match=r"rank 70 does not fit experts \(2, 96, 64\), whose smaller side is 64"
    ):
        make(name, Model(), rank=70)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0; it must not be negative"),
        ({"betas": (0.9, 1.0)}, r"betas are \(0.9, 1.0\); each must be in \[0, 1\)"),
        ({"state_bits": 4}, "state_bits is 4; allowed: 32, 16, 8"),
        ({"weights": "round"}, "weights is 'round'; allowed: 'sr', 'kahan', 'master', 'plain'"),
        ({"density": 1.5}, "density 1.5 of the group of .* is not between 0 and 1"),
        (
            {"projection": "best"},
            "projection is 'best'; allowed: 'columns', 'randk', 'random', 'svd', 'blocks'",
        ),
        ({"state_free": "adam"}, "state_free is 'adam'; allowed: 'sign_sgd', 'sgd', 'none'"),
    ],
)
def test_options_out_of_range_say_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        FRUGAL(Model().named_parameters(), **options)


def test_an_empty_list_and_a_vector_in_a_group_for_matrices_are_refused():
    with pytest.raises(ValueError, match="empty parameter list"):
        APOLLO([])
    with pytest.raises(ValueError, match=r"a parameter \(4,\) is no matrix; give it kind='adamw'"):
        APOLLO([{"params": [nn.Parameter(torch.zeros(4))], "kind": "matrix"}])


def test_adamw_says_that_it_has_no_rule_for_matrices_alone():
    p = nn.Parameter(torch.zeros(4, 4))
    optimizer = AdamW([p])
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4, 4))], "kind": "matrix"})
    fill_gradients(nn.ParameterList(optimizer.param_groups[1]["params"]), 0)
    with pytest.raises(TypeError, match="AdamW has no rule for matrices alone; give the group kind='adamw'"):
        optimizer.step()


CONFIGS = [entry[2] for entry in {e[2]: e for e in OURS.values()}.values()]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.model_fields["name"].default)
def test_a_recipe_builds_it_with_rates_by_group(config):
    model = Model()
    optimizer = build_optimizer(model, config(weight_decay=0.1))
    assert {group["lr"] for group in optimizer.param_groups} == {0.0}
    set_rate(optimizer, 1e-3)
    before = float(loss_of(model))
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    assert float(loss_of(model)) < before
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {id(p) for p in model.parameters() if p.ndim > 1}


def test_a_recipes_rank_is_cut_where_a_matrix_is_smaller():
    optimizer = build_optimizer(Model(), Apollo(rank=70))
    ranks = {
        g["rank"]: [tuple(p.shape) for p in g["params"]]
        for g in optimizer.param_groups
        if g["kind"] == "matrix"
    }
    assert ranks == {70: [(96, 96)] * 3, 64: [(2, 96, 64), (64, 96), (96, 64)]} or set(ranks) == {70, 64}


# --- the parts


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("elements", [4096, 5000, 65536])
def test_eight_bits_are_right_to_half_a_code(signed, elements):
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(elements, generator=generator) * torch.rand(elements, generator=generator) ** 3
    value = value if signed else value.square()
    state = {}
    new_moment(state, "m", (elements,), bits=8, like=value, signed=signed)
    assert (
        sum(t.nbytes for t in state.values())
        == moment_bytes(elements, 8)
        == elements + 4 * -(-elements // BLOCK)
    )
    write(state, "m", value, 1)
    got = read(state, "m")
    for first in range(0, elements, BLOCK):
        exact, found = value[first : first + BLOCK].double(), got[first : first + BLOCK].double()
        largest = exact.abs().max()
        if signed:
            code = (exact.abs() / largest).sqrt() * 127
            near = ((code + 0.5) ** 2 - code**2) * largest / 127**2
        else:  # rounded up or down, by a threshold that moves
            code = (exact / largest) ** 0.25 * 255
            near = ((code + 1) ** 4 - code**4) * largest / 255**4
        assert ((found - exact).abs() <= 1.001 * near).all()
    if not signed:
        assert (got > 0).all()


def test_eight_bits_read_by_range_as_whole():
    value = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    state = {}
    new_moment(state, "m", (5000,), bits=8, like=value)
    write(state, "m", value[:2560], 1, slice(0, 2560))
    write(state, "m", value[2560:], 1, slice(2560, 5000))
    whole = read(state, "m")
    assert torch.equal(whole[2560:], read(state, "m", slice(2560, 5000)))
    assert (whole - value).abs().max() < 0.05 * value.abs().max()


def test_a_mean_square_in_eight_bits_decays_where_rounding_to_nearest_would_freeze_it():
    state = {}
    start = torch.rand(4096, generator=torch.Generator().manual_seed(0)) + 0.5
    new_moment(state, "v", (4096,), bits=8, like=start, signed=False)
    write(state, "v", start, 0)
    for step in range(1, 1001):
        # one element of each block stays, so that the scale does, and the others really have to move
        v = read(state, "v")
        v.view(-1, BLOCK)[:, 1:] *= 0.999
        v.view(-1, BLOCK)[:, 0] = 1.6
        write(state, "v", v, step)
    moved = (read(state, "v") / start).view(-1, BLOCK)[:, 1:]
    assert moved.mean() == pytest.approx(0.999**1000, rel=0.02)


def test_stochastic_rounding_is_unbiased_and_layout_does_not_matter():
    noise, cpu = (noise_key(0, 3), noise_start(7)), torch.device("cpu")
    whole = noise_window(noise, 0, 10_000, cpu).clone()
    assert torch.equal(whole[4000:6000], noise_window(noise, 4000, 2000, cpu))
    long = noise_window(noise, 0, 300_000, cpu)
    assert torch.equal(long[290_000:], noise_window(noise, 290_000, 10_000, cpu))
    assert whole.min() >= 0
    assert whole.max() < 1 << 16
    for value in (1 + 2**-10, -1 - 2**-10, 3e-5, -7.1e4):
        fine = torch.full((64, 64), value)
        total, count = torch.zeros(64, 64, dtype=torch.float64), 64
        for step in range(count):
            bits = fine.clone().view(torch.int32)
            bits += noise_window((noise_key(0, step), 0), 0, 4096, cpu).view(64, 64)
            total += (bits & -65536).view(torch.float32).double()
        ulp = abs(value) * 2**-7
        assert abs(float(total.mean()) / count - value) < ulp * 4 / math.sqrt(4096 * count)


def test_kahan_sums_ten_thousand_tiny_updates_to_one_ulp():
    p = nn.Parameter(torch.full((8, 8), 1.0, dtype=torch.bfloat16))
    optimizer = LOMO([p], lr=1e-5, weights="kahan")
    for _ in range(10_000):
        p.grad = -torch.ones_like(p)
        optimizer.step()
    assert (p.float() - 1.1).abs().max() <= 2**-7


def test_the_iterated_subspace_holds_nearly_what_the_best_one_does():
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(200, 80, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(80, 80, generator=generator))[0]
    grad = left * 0.9 ** torch.arange(80) @ right
    best = torch.linalg.svd(grad)[2][:16].mT
    for matrix_ in (grad, grad.mT):
        basis = leading_basis(matrix_, None, 16, seed=1, exact=False)
        torch.testing.assert_close(basis.mT @ basis, torch.eye(16), rtol=0, atol=1e-5)
        assert (grad @ basis).norm() > 0.98 * (grad @ best).norm()
        for _ in range(5):
            basis = leading_basis(matrix_, basis, 16, seed=1, exact=False)
        assert (grad @ basis).norm() > 0.999 * (grad @ best).norm()


@pytest.mark.parametrize("exact", [True, False])
def test_a_gradient_that_is_not_finite_leaves_the_subspace(exact):
    grad = torch.randn(32, 16)
    before = leading_basis(grad, None, 4, seed=0, exact=exact)
    grad[3, 3] = math.nan
    assert torch.equal(leading_basis(grad, before, 4, seed=0, exact=exact), before)
    assert torch.isfinite(leading_basis(grad, None, 4, seed=0, exact=exact)).all()


def test_a_failing_decomposition_falls_back(monkeypatch):
    def fail(*_, **__):
        raise torch.linalg.LinAlgError("no convergence")

    grad = torch.randn(32, 16)
    before = leading_basis(grad, None, 4, seed=0, exact=False)
    monkeypatch.setattr(torch.linalg, "svd", fail)
    assert leading_basis(grad, before, 4, seed=0, exact=True).shape == (16, 4)
    monkeypatch.setattr(torch.linalg, "qr", fail)
    assert torch.equal(leading_basis(grad, before, 4, seed=0, exact=True), before)


def test_matrices_take_turns():
    gap, places = 10, 25
    by_step = {}
    for place in range(places):
        refreshed = [step for step in range(1, 41) if turn(step, gap, place, places)[0] == 0]
        assert refreshed[0] == 1
        assert all(b - a == gap for a, b in pairwise(refreshed[1:]))
        assert refreshed[1] - refreshed[0] <= gap
        for step in refreshed[1:]:
            by_step.setdefault(step, []).append(place)
    assert max(map(len, by_step.values())) <= -(-places // gap)


def test_a_sketch_preserves_norms_and_differs_between_tensors():
    params = [nn.Parameter(torch.randn(300, 256)) for _ in range(3)]
    optimizer = APOLLO(params, rank=64)
    g = torch.randn(300, 256)
    group = optimizer.param_groups[0]
    seen = [optimizer.projection(i, g.shape, group, 1, g.double()) for i in range(3)]
    for p in seen:
        ratio = (g.double() @ p.double()).norm(dim=1) / g.double().norm(dim=1)
        assert abs(float(ratio.mean()) - 1) < 0.02
        assert float(ratio.std()) == pytest.approx(1 / math.sqrt(2 * 64), rel=0.3)
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        assert abs(float((seen[a] * seen[b]).sum() / (seen[a].norm() * seen[b].norm()))) < 0.03


def test_the_scale_of_a_sketch_is_the_root_of_its_share():
    """s of the sketch over s of the whole gradient is near √(r / k), which `scale` undoes."""
    torch.manual_seed(0)
    grads = [torch.randn(256, 128) for _ in range(30)]
    moved = []
    for rank in (16, 128):
        p = nn.Parameter(torch.zeros(256, 128))
        optimizer = APOLLO([p], lr=1.0, rank=rank, scale=1.0, norm_growth_limit=None)
        for g in grads:
            p.grad = g
            optimizer.step()
        p.data.zero_()
        p.grad = grads[0]
        optimizer.step()
        moved.append(float(p.detach().norm()))
    assert moved[0] / moved[1] == pytest.approx(math.sqrt(16 / 128), rel=0.15)


def test_growth_of_an_update_is_limited():
    p = nn.Parameter(torch.zeros(64, 32))
    optimizer = APOLLO([p], lr=1.0, rank=8, betas=(0.0, 0.0))
    torch.manual_seed(0)
    sizes = []
    for step in range(6):
        before = p.detach().clone()
        p.grad = torch.randn(64, 32) * 10.0**step  # without moments the scale follows, with noise
        optimizer.step()
        sizes.append(float((p.detach() - before).norm()))
    assert all(b <= 1.0101 * a for a, b in pairwise(sizes))


def test_updates_compile_without_a_break():
    from shoestring.optimizers.adamw import adamw_update
    from shoestring.optimizers.apollo import apollo_update
    from shoestring.optimizers.cosmos import cosmos_direction
    from shoestring.optimizers.galore import galore_update
    from shoestring.optimizers.muon import orthogonalise
    from shoestring.optimizers.natural_galore import natural_gradient

    torch.manual_seed(0)
    g, r = torch.randn(2, 24, 16), torch.randn(2, 24, 4)
    calls = [
        (adamw_update, (g, g * 0, g * 0), {"betas": (0.9, 0.99), "eps": 1e-8, "step": 3}),
        (apollo_update, (r, r * 0, r * 0), {"betas": (0.9, 0.99), "eps": 1e-8}),
        (galore_update, (r, r * 0, r * 0), {"betas": (0.9, 0.99), "eps": 1e-8}),
        (orthogonalise, (g,), {}),
        (cosmos_direction, (g, torch.randn(2, 16, 4), r.square(), 0.2, 1e-8, torch.float32), {}),
        (natural_gradient, (r.flatten(1), torch.zeros(2, 3, 96), torch.zeros(2, 3, 3).double(), 1, 0.1), {}),
    ]
    for function, given, options in calls:
        plain = function(*copy.deepcopy(given), **options)
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="eager")(*copy.deepcopy(given), **options)
        torch.testing.assert_close(plain, compiled)


def test_it_trains_in_transformers_trainer(tmp_path):
    from tiny import model_folder
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(model_folder(tmp_path / "model"))
    rows = [{"input_ids": list(range(3, 19)), "labels": list(range(3, 19))} for _ in range(8)]
    optimizer = APOLLO(model.named_parameters(), lr=1e-2, rank=4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 8)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=8,
        report_to=[],
        use_cpu=True,
        save_steps=4,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, schedule))
    result = trainer.train()
    assert result.training_loss < 6
    again = Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, schedule))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
