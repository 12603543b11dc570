"""Int8 weights: the rule against float64, rounding right on average, gradients, memory, files, models."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from shoestring.ops import Int8Weight, dense_weights, quantise, use_int8_weights
from shoestring.ops.int8_weight import from_plain, to_plain
from shoestring.plan.live_bytes import LiveBytes
from tiny import model_folder
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

GROUP = 32
CPU = torch.device("cpu")

normal = torch.randn(40, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
# Groups of every kind that has broken such a rule somewhere.
WEIGHTS = {
    "normal": normal,
    "bfloat16": normal.bfloat16(),
    "positive": normal.abs() + 3,
    "negative": -normal.abs() - 3,
    "far positive": normal * 1e-3 + 100,
    "mostly positive": torch.where(normal > 2.5, -normal, normal.abs()),
    "one negative": normal.abs().index_fill(1, torch.tensor([5]), -1e-4),
    "one tiny positive": (-normal.abs()).index_fill(1, torch.tensor([5]), 1e-30),
    "one outlier": normal.index_fill(1, torch.tensor([7]), 50.0),
    "constant": torch.full((40, 48), 0.37),
    "negative constant": torch.full((40, 48), -2.0),
    "zeros": torch.zeros(40, 48),
    "tiny": normal * 1e-7,
    "huge": normal * 1e30,
    "not divisible": normal[:7, :5].contiguous(),
    "less than a group": normal[:2, :3].contiguous(),
    "vector": normal[0],
    "empty": torch.empty(0, 8),
    "not contiguous": normal.t(),
}


def grid(group: list[float]) -> tuple[float, set[int]]:
    """Scale of one group and the zeros it may have, in float64: the formulas of ops/int8_weight.py.

    Two zeros where float32 may find a whole number on either side: there the values on the grid are the same.
    """
    low, high = min(0.0, *group), max(0.0, *group)
    scale = max(high - low, 1e-5) / 254
    return scale, {math.ceil(-low / scale * (1 - 1e-6)), math.ceil(-low / scale * (1 + 1e-6))}


def steps(weight: Int8Weight) -> Tensor:
    """The scale of each element, [shape] float32."""
    each = weight.scale.repeat_interleave(weight.group_size)[: weight.codes.numel()]
    return each.view(weight.codes.shape)


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    return layer


# The rule


@pytest.mark.parametrize("kind", WEIGHTS)
def test_every_weight_is_within_half_a_step(kind: str) -> None:
    weight = WEIGHTS[kind]
    coded = quantise(weight, GROUP)
    assert type(coded) is Int8Weight
    assert (coded.dtype, coded.shape) == (weight.dtype, weight.shape)
    assert (coded.codes.dtype, coded.scale.dtype, coded.zero.dtype) == (
        torch.uint8,
        torch.float32,
        torch.uint8,
    )
    step = steps(coded).double()
    error = (coded.dequantise(torch.float32).double() - weight.double()).abs()
    assert (error <= step * (0.5 + 1e-4)).all()


@pytest.mark.parametrize("kind", WEIGHTS)
def test_codes_are_those_of_the_rule_in_float64(kind: str) -> None:
    weight = WEIGHTS[kind]
    coded = quantise(weight, GROUP)
    codes = coded.codes.reshape(-1).split(GROUP)
    for index, group in enumerate(weight.double().reshape(-1).split(GROUP)):
        if not len(group):
            continue
        scale, zeros = grid(group.tolist())
        zero = int(coded.zero[index])
        assert zero in zeros
        assert float(coded.scale[index]) == pytest.approx(scale, rel=1e-6)
        for value, code in zip(group.tolist(), codes[index].tolist(), strict=True):
            assert 0 <= code <= 255
            assert abs(code - (value / scale + zero)) <= 0.5 + 1e-4


def test_values_on_a_grid_and_zeros_stay_where_they_are() -> None:
    coded = quantise(torch.where(normal.abs() < 0.2, 0.0, normal), GROUP)
    values = coded.dequantise()
    assert (values == 0).sum() >= (normal.abs() < 0.2).sum()
    again = quantise(values, GROUP)
    assert torch.allclose(again.dequantise(), values, rtol=1e-6, atol=0)
    for seed in range(3):
        coded.requantise_(coded.dequantise(), generator=torch.Generator().manual_seed(seed))
    assert (coded.dequantise() - values).abs().max() <= 1.01 * steps(coded).max()
    assert ((coded.dequantise() - values).abs() > 1e-5).float().mean() < 2e-3  # the last bit of a division
    assert (coded.dequantise()[normal.abs() < 0.2] == 0).all()


@pytest.mark.parametrize("kind", ["normal", "positive", "negative", "mostly positive", "not divisible"])
def test_random_rounding_is_right_on_average_and_within_one_code(kind: str) -> None:
    weight = WEIGHTS[kind]
    coded = quantise(torch.zeros_like(weight), GROUP)
    generator = torch.Generator().manual_seed(3)
    draws = 3000
    total = torch.zeros(weight.shape, dtype=torch.float64)
    for draw in range(draws):
        if draw % 2:
            coded.requantise_(weight, generator=generator)
        else:
            coded.requantise_(weight, torch.rand(weight.shape, generator=generator))
        value = coded.dequantise().double()
        assert ((value - weight).abs() < steps(coded) * (1 + 1e-4)).all()
        total += value
    step = steps(coded).double()
    off = (total / draws - weight.double()) / step
    # A coin's deviation is at most 1/2: five of the mean's for the worst element, ends of groups included.
    assert off.abs().max() < 5 * 0.5 / math.sqrt(draws)
    assert off.mean().abs() < 5 * 0.5 / math.sqrt(draws * weight.numel())
    for index, group in enumerate(weight.reshape(-1).split(GROUP)):
        scale, zeros = grid(group.double().tolist())
        assert float(coded.scale[index]) == pytest.approx(scale, rel=1e-6)
        assert int(coded.zero[index]) in zeros


def published(values: Tensor) -> tuple[Tensor, Tensor]:
    """The rule of the papers, 255 steps, for groups of both signs."""
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    scale = (high - low) / 255
    return scale, (-low / scale).round()


def lag_of_the_largest() -> float:
    """Steps by which the largest weights are behind after 500 updates of about a fortieth of a step each."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 128, generator=generator) * 0.02
    update = torch.randn(256, 128, generator=generator) * 1e-5
    coded = quantise(weight)
    exact = coded.dequantise().double()
    for _ in range(500):
        coded.requantise_(coded.dequantise() + update, generator=generator)
        exact += update
    ahead = (coded.dequantise() - exact) * exact.sign() / steps(coded)
    return -float(ahead[exact.abs() > 0.04].mean())


def test_many_small_updates_reach_the_largest_weights_too(monkeypatch) -> None:
    assert abs(lag_of_the_largest()) < 0.3
    monkeypatch.setattr("shoestring.ops.int8_weight._grid", published)
    assert lag_of_the_largest() > 2


def test_noise_decides_between_floor_and_ceiling() -> None:
    exact = (normal / steps(quantise(normal, GROUP))).double()
    for u, wanted in ((0.0, exact.floor()), (0.999, (exact + 0.999).floor()), (0.5, (exact + 0.5).floor())):
        coded = quantise(normal, GROUP).requantise_(normal, torch.full_like(normal, u))
        found = coded.dequantise().double() / steps(coded).double()
        near_an_edge = (exact + u - (exact + u).round()).abs() < 1e-3
        assert torch.allclose(found[~near_an_edge], wanted[~near_an_edge], atol=1e-3)


def test_the_same_generator_gives_the_same_codes_and_pieces_do_not_matter(monkeypatch) -> None:
    def coded() -> Int8Weight:
        return quantise(normal, GROUP).requantise_(normal, generator=torch.Generator().manual_seed(5))

    noise = torch.rand(normal.shape, generator=torch.Generator().manual_seed(6))
    whole = quantise(normal, GROUP).requantise_(normal, noise)
    assert torch.equal(coded().codes, coded().codes)
    monkeypatch.setattr("shoestring.ops.int8_weight._CPU_ELEMENTS", 100)
    pieces = quantise(normal, GROUP).requantise_(normal, noise)
    for part in ("codes", "scale", "zero"):
        assert torch.equal(getattr(whole, part), getattr(pieces, part))
    assert torch.equal(whole.dequantise(), pieces.dequantise())


def test_what_is_refused() -> None:
    coded = quantise(normal, GROUP)
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        quantise(normal.double())
    with pytest.raises(ValueError, match="at least one weight, not 0"):
        quantise(normal, 0)
    with pytest.raises(ValueError, match="either noise or a generator"):
        coded.requantise_(normal)
    with pytest.raises(ValueError, match="either noise or a generator"):
        coded.requantise_(normal, torch.zeros_like(normal), generator=torch.Generator())
    with pytest.raises(ValueError, match="shape \\(40, 48\\)"):
        coded.requantise_(normal.view(-1), torch.zeros_like(normal))
    with pytest.raises(ValueError, match="shape \\(60,\\), not \\(59,\\)"):
        Int8Weight(coded.codes, coded.scale[1:], coded.zero[1:], GROUP, torch.float32)
    with pytest.raises(ValueError, match="uint8, float32 and uint8"):
        Int8Weight(coded.codes, coded.scale.double(), coded.zero, GROUP, torch.float32)
    with pytest.raises(TypeError, match=r"not through \.data"):
        coded.data = normal


def test_a_weight_that_is_not_finite_shows() -> None:
    broken = normal.clone()
    broken[0, 0] = float("nan")
    assert quantise(broken, GROUP).dequantise()[0, :GROUP].isnan().all()


# Linear layers


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast", "autocast of bfloat16 weights"])
def test_linear_equals_dense_linear_on_the_decoded_weight(mode: str, bias: bool) -> None:
    autocast = mode.startswith("autocast")
    dtype = torch.float32 if mode in ("float32", "autocast") else torch.bfloat16
    x_dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
    generator = torch.Generator().manual_seed(1)
    coded = quantise(normal, GROUP, dtype)
    offset = torch.randn(40, generator=generator).to(dtype) if bias else None
    x = torch.randn(3, 5, 48, generator=generator).to(x_dtype)
    upstream = torch.randn(3, 5, 40, generator=generator)
    found = []
    for layer in (linear(coded, offset), linear(coded.dequantise(), offset)):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(leaf)
        (y.float() * upstream).sum().backward()
        found.append([y, leaf.grad, layer.weight.grad, *([layer.bias.grad] if bias else [])])
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if mode == "float32" else {"rtol": 2e-2, "atol": 2e-2}
    assert isinstance(layer.weight, nn.Parameter)
    for ours, dense in zip(*found, strict=True):
        assert type(ours) is Tensor
        assert (ours.dtype, ours.shape) == (dense.dtype, dense.shape)
        torch.testing.assert_close(ours, dense, **tolerance)
    assert found[0][0].dtype == (torch.float32 if mode == "float32" else torch.bfloat16)
    assert found[0][2].dtype == dtype


def test_two_backwards_add_up_and_frozen_weights_get_none() -> None:
    layer = linear(quantise(normal, GROUP), None)
    first, second = torch.randn(2, 4, 48).unbind()
    layer(first).square().sum().backward()
    once = layer.weight.grad.clone()
    layer(second).square().sum().backward()
    both = layer.weight.grad.clone()
    layer.weight.grad = None
    layer(second).square().sum().backward()
    torch.testing.assert_close(both, once + layer.weight.grad)
    layer.weight.requires_grad_(False).grad = None
    leaf = first.clone().requires_grad_()
    layer(leaf).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(leaf.grad, layer.weight.dequantise().sum(0).expand(4, 48))
    assert layer(first[0]).shape == (40,)
    assert layer(first[:0]).shape == (0, 40)


def test_a_weight_changed_between_forward_and_backward_is_noticed() -> None:
    layer = linear(quantise(normal, GROUP), None)
    loss = layer(torch.randn(4, 48, requires_grad=True)).sum()
    layer.weight.requantise_(normal, torch.zeros_like(normal))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_other_operations_see_the_dense_weight() -> None:
    weight = nn.Parameter(quantise(normal, GROUP))
    dense = nn.Parameter(weight.dequantise())
    rows = torch.tensor([3, 1, 3])
    v = torch.randn(48, requires_grad=True)
    for operation in (
        lambda w: F.embedding(rows, w).square().sum(),
        lambda w: w.norm(),
        lambda w: (w @ v).square().sum(),
        lambda w: (2 * w.t() - w.float().t()).exp().mean(),
        lambda w: F.linear(w, w).mean(),
        lambda w: torch.cat([w, w]).view(-1, 8).sum(0).prod(),
    ):
        weight.grad = dense.grad = None
        ours, theirs = operation(weight), operation(dense)
        torch.testing.assert_close(ours, theirs)
        ours.backward()
        theirs.backward()
        assert type(weight.grad) is Tensor
        torch.testing.assert_close(weight.grad, dense.grad)
    assert type(torch.zeros_like(weight)) is Tensor
    with torch.no_grad():
        assert weight.mul_(0.5) is weight
        torch.testing.assert_close(weight.dequantise(), dense * 0.5, rtol=0, atol=float(weight.scale.max()))
        torch.add(dense, 1.0, out=weight.detach())
        torch._foreach_add_([weight], 1.0)
    torch.testing.assert_close(weight.dequantise(), dense + 2, rtol=0, atol=float(weight.scale.max()))


# Memory


@pytest.mark.parametrize("group", [32, 128, 256])
def test_bytes_are_one_and_five_for_each_group(group: int) -> None:
    coded = quantise(torch.randn(64, 256), group)
    assert coded.nbytes == sum(t.untyped_storage().nbytes() for t in (coded.codes, coded.scale, coded.zero))
    assert coded.nbytes == 64 * 256 * (1 + 5 / group)
    assert quantise(normal, 1000).nbytes == 1920 + 2 * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_dense_weight_lives_between_forward_and_backward(dtype, monkeypatch) -> None:
    monkeypatch.setattr("shoestring.ops.int8_weight._CPU_ELEMENTS", 4096)
    width, tokens, layers = 256, 4, 4
    model = nn.Sequential(*(nn.Linear(width, width, bias=False, dtype=dtype) for _ in range(layers)))
    use_int8_weights(model)
    x = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    one, activation = width * width * dtype.itemsize, tokens * width * dtype.itemsize
    pieces = 3 * 4096 * 4
    with LiveBytes(CPU) as live:
        y = model(x)
        assert live.now <= layers * activation
        assert live.peak <= one + pieces + (layers + 2) * activation
        y.backward(torch.ones_like(y))
    gradients = layers * one
    assert gradients <= live.now <= gradients + (layers + 4) * activation
    assert live.peak <= gradients + one + pieces + (layers + 8) * activation


# Copies, types and files


def test_copies() -> None:
    weight = nn.Parameter(quantise(normal, GROUP))
    weight.grad = torch.ones_like(normal)
    other = copy.deepcopy(weight)
    assert isinstance(other, Int8Weight)
    assert isinstance(other, nn.Parameter)
    assert torch.equal(other.grad, weight.grad)
    for twin in (other, weight.clone(), weight.detach().clone()):
        assert type(twin) is Int8Weight
        assert same(twin, weight)
        assert twin.codes.data_ptr() != weight.codes.data_ptr()
    assert weight.detach().codes is weight.codes
    assert not weight.detach().requires_grad

    target = quantise(torch.zeros_like(normal), GROUP)
    with torch.no_grad():
        assert same(target.copy_(weight), weight)  # exact codes
        assert same(target.copy_(normal * 2), quantise(normal * 2, GROUP))
        regrouped = quantise(normal, 16).copy_(weight)
        assert same(regrouped, quantise(weight.dequantise(), 16))
        dense = torch.empty(40, 48, dtype=torch.float64).copy_(weight)
        assert torch.equal(dense.float(), weight.dequantise())
        assert torch.equal(target.copy_(torch.tensor(1.5)).dequantise(), torch.full((40, 48), 1.5))
    requantised = quantise(weight, 16)
    assert same(requantised, quantise(weight.dequantise(), 16))


def same(one: Int8Weight, two: Int8Weight) -> bool:
    parts = all(torch.equal(getattr(one, part), getattr(two, part)) for part in ("codes", "scale", "zero"))
    return parts and (one.group_size, one.dtype) == (two.group_size, two.dtype)


def test_outward_types() -> None:
    weight = quantise(normal, GROUP)
    half = weight.to(torch.bfloat16)
    assert (type(half), half.dtype) == (Int8Weight, torch.bfloat16)
    assert same(half.float(), weight)
    assert torch.equal(half.dequantise(), weight.dequantise().bfloat16())
    assert torch.equal(half.dequantise(torch.float32), weight.dequantise())
    assert type(weight.double()) is Tensor
    assert weight.to("meta").codes.is_meta
    assert same(quantise(normal.bfloat16(), GROUP, torch.float32), quantise(normal.bfloat16().float(), GROUP))

    layer = linear(weight, torch.zeros(40))
    parameter = layer.weight
    layer(torch.ones(2, 48)).sum().backward()
    layer.to(torch.bfloat16)
    assert layer.weight is parameter  # an optimizer's reference stays good
    assert (parameter.dtype, parameter.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert same(parameter, half)


def test_plain_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    weights = {
        "a.weight": quantise(normal, GROUP),
        "b.weight": quantise(WEIGHTS["not divisible"], 16, torch.bfloat16),
    }
    plain = {key: value for name, w in weights.items() for key, value in to_plain(name, w).items()}
    assert all(type(value) is Tensor for value in plain.values())
    save_file(plain, tmp_path / "weights.safetensors")
    loaded = load_file(tmp_path / "weights.safetensors")
    for name, weight in weights.items():
        assert same(from_plain(name, loaded), weight)
    loaded["a.weight.layout"][0] = 2
    with pytest.raises(ValueError, match=r"a\.weight: int8 layout 2"):
        from_plain("a.weight", loaded)
    with pytest.raises(KeyError, match=r"c\.weight"):
        from_plain("c.weight", loaded)


def test_state_dict_and_torch_save(tmp_path: Path) -> None:
    layer = linear(quantise(normal, GROUP), torch.ones(40))
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    with torch.serialization.safe_globals([Int8Weight]):
        state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = linear(quantise(torch.zeros_like(normal), GROUP), torch.zeros(40))
    parameter = other.weight
    other.load_state_dict(state)
    assert other.weight is parameter
    assert same(parameter, layer.weight)
    other.load_state_dict({"weight": normal * 2, "bias": torch.ones(40)})  # a dense file: to nearest
    assert same(parameter, quantise(normal * 2, GROUP))


# Whole models


def llama(folder: Path, **options) -> nn.Module:
    path = folder / "model"
    if not path.exists():
        model_folder(path)
    return AutoModelForCausalLM.from_pretrained(path, **options)


TOKENS = torch.arange(24).view(2, 12) % 20


def test_the_linear_layers_of_a_model_are_held_in_int8(tmp_path: Path) -> None:
    model = llama(tmp_path)
    frozen = model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    shared = model.model.layers[0].self_attn.k_proj
    shared.weight = model.model.layers[1].self_attn.k_proj.weight
    before = sum(m.weight.nbytes for m in model.modules() if isinstance(m, nn.Linear))
    left = model.lm_head.weight.nbytes + frozen.nbytes + 2 * shared.weight.nbytes
    lines = use_int8_weights(model, 64)
    coded = [m.weight for m in model.modules() if isinstance(getattr(m, "weight", None), Int8Weight)]
    after = sum(w.nbytes for w in coded)
    assert len(coded) == 14 - 1 - 2
    assert lines == [f"int8: 11 linear weights in groups of 64, {before - left:,} -> {after:,} bytes"]
    assert all(isinstance(w, nn.Parameter) and w.requires_grad for w in coded)
    kept = (model.lm_head.weight, frozen, shared.weight, model.model.embed_tokens.weight)
    assert not any(isinstance(w, Int8Weight) for w in kept)
    assert use_int8_weights(model, 64) == []
    assert len(list(model.parameters())) == len(set(map(id, model.parameters())))


def test_a_tied_head_stays_as_it_is() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(10, 16), "head": nn.Linear(16, 10, bias=False)})
    model["head"].weight = model["embedding"].weight
    assert use_int8_weights(model) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_trains_and_is_exported_dense(dtype, tmp_path: Path) -> None:
    model = llama(tmp_path, dtype=dtype)
    dense = copy.deepcopy(model)
    use_int8_weights(model, 64)
    model(TOKENS, labels=TOKENS).loss.backward()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for one, two in zip(model.parameters(), dense.parameters(), strict=True):
            assert (one.grad.dtype, one.grad.shape) == (one.dtype, one.shape)
            if isinstance(one, Int8Weight):
                stepped = one.dequantise(torch.float32).sub_(one.grad, alpha=0.1)
                one.requantise_(stepped, generator=generator)
                assert (one.dequantise(torch.float32) - two).abs().max() < 0.05
    model.eval()
    with torch.no_grad():
        wanted = model(TOKENS).logits
    held = {name: id(parameter) for name, parameter in model.named_parameters()}
    with dense_weights(model):
        assert not any(isinstance(parameter, Int8Weight) for parameter in model.parameters())
        model.save_pretrained(tmp_path / "export")
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == held
    for tensor in load_file(tmp_path / "export" / "model.safetensors").values():
        assert tensor.dtype == dtype
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=dtype).eval()
    with torch.no_grad():
        logits = exported(TOKENS).logits
    torch.testing.assert_close(logits, wanted, rtol=2e-2, atol=2e-2)
    if dtype == torch.float32:
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)


def test_dense_weights_puts_int8_back_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    use_int8_weights(model)
    weight = model[0].weight

    def fail() -> None:
        with dense_weights(model):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert model[0].weight is weight


def test_activation_checkpointing_gives_the_same_gradients(tmp_path: Path) -> None:
    model = llama(tmp_path)
    use_int8_weights(model, 64)
    model.train()
    found = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def test_saved_weights_may_be_moved_by_hooks() -> None:
    layer = linear(quantise(normal, GROUP), None)
    x = torch.randn(4, 48, requires_grad=True)
    layer(x).square().sum().backward()
    wanted, x.grad = x.grad, None
    with torch.autograd.graph.save_on_cpu():
        loss = layer(x).square().sum()
    loss.backward()
    torch.testing.assert_close(x.grad, wanted)
    x.grad = None
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(x.grad, wanted)
