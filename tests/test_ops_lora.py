"""The fused LoRA layer against its formula and against PEFT's own, and when it steps aside."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from shoestring.models.weights import keep_four_bit_layout
from shoestring.ops import lora_dropout, mlp, use_fused
from shoestring.ops.lora import Projection, lora_linear, reference
from shoestring.ops.lora_layers import FusedLoraLinear, projection_of
from torch import Tensor, nn


def adapted(**options) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.SiLU(), nn.Linear(40, 8, bias=False))
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"], **options)
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    output = model(leaf)
    output.square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), "x": leaf.grad, **found}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 1.2e-2)]
)
def test_output_and_gradients_match_float64(dtype, tolerance, bias) -> None:
    torch.manual_seed(0)
    exact = [torch.randn(shape, dtype=torch.float64) for shape in ((2, 9, 24), (40, 24), (4, 24), (40, 4))]
    offset = torch.randn(40, dtype=torch.float64) if bias else None
    master = torch.float32 if dtype == torch.bfloat16 else dtype
    x, w, a, b = (t.to(d) for t, d in zip(exact, (dtype, dtype, master, master), strict=True))
    for leaf in (x, a, b, exact[0], exact[2], exact[3]):
        leaf.requires_grad_()
    ours = lora_linear(x, Projection(w, None if offset is None else offset.to(dtype), a, b, 0.7))
    theirs = reference(exact[0], Projection(exact[1], offset, exact[2], exact[3], 0.7))
    weights = torch.randn(theirs.shape, dtype=torch.float64)
    (ours.double() * weights).sum().backward()
    (theirs * weights).sum().backward()
    assert ours.dtype == dtype
    for value, expected in [
        (ours, theirs),
        (x.grad, exact[0].grad),
        (a.grad, exact[2].grad),
        (b.grad, exact[3].grad),
    ]:
        assert (value.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"2": 2}}])
def test_equals_peft(options) -> None:
    model = adapted(**options)
    fused = copy.deepcopy(model)
    assert use_fused(fused) == ["fused: 2 LoRA layers"]
    assert use_fused(fused) == []
    x = torch.randn(5, 24)
    for name, value in gradients(model, x).items():
        torch.testing.assert_close(gradients(fused, x)[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_steps_aside_for_what_is_not_plain(options) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["0"], **options)
    model = get_peft_model(nn.Sequential(nn.Linear(24, 8)), config)
    fused = copy.deepcopy(model)
    use_fused(fused)
    x = torch.randn(5, 24)
    layers = [m for m in fused.modules() if isinstance(m, FusedLoraLinear)]
    assert layers
    assert all(projection_of(layer) is None for layer in layers)
    for name, value in gradients(model, x).items():
        torch.testing.assert_close(gradients(fused, x)[name], value)


def test_dropout_works_in_training_only() -> None:
    model = adapted(lora_dropout=0.5)
    use_fused(model)
    layer = next(m for m in model.modules() if isinstance(m, FusedLoraLinear))
    model.train()
    assert projection_of(layer).dropout == 0.5
    model.eval()
    assert projection_of(layer).dropout == 0.0
    model.train()
    layer.lora_dropout["default"] = nn.AlphaDropout(0.5)
    assert projection_of(layer) is None


class HashDropout(nn.Module):
    """PEFT's dropout with the mask that a seed stands for."""

    def forward(self, x: Tensor) -> Tensor:
        mask = lora_dropout.zeroed(torch.ones_like(x).view(-1, x.shape[-1]), 0.25, 99).view(x.shape)
        return x * mask / 0.75


def test_dropout_equals_peft_under_the_same_mask(monkeypatch) -> None:
    model = adapted(lora_dropout=0.25).train()
    fused = copy.deepcopy(model)
    use_fused(fused)
    for layer in model.modules():
        if type(layer) is PeftLinear:
            layer.lora_dropout["default"] = HashDropout()
    monkeypatch.setattr(lora_dropout, "draw_seed", lambda: torch.tensor(99))
    x = torch.randn(3, 5, 24)
    ours = gradients(fused, x)
    for name, value in gradients(model, x).items():
        assert (ours[name] - value).norm() <= 1e-5 * value.norm()
    with torch.no_grad():
        assert (fused.eval()(x) - ours["output"]).abs().max() > 1e-2


@pytest.mark.parametrize("compiled", [False, True])
def test_the_feed_forward_block_with_dropout(compiled) -> None:
    """Gate and up read one dropped x; down drops what it reads by a seed of its own."""
    torch.manual_seed(0)
    x = torch.randn(2, 9, 24, dtype=torch.float64, requires_grad=True)
    parts = []
    for out, width, p in ((40, 24, 0.25), (40, 24, 0.25), (24, 40, 0.5)):
        w, a, b = (torch.randn(s, dtype=torch.float64) / 5 for s in ((out, width), (4, width), (out, 4)))
        parts.append(Projection(w, None, a.requires_grad_(), b.requires_grad_(), 0.7, p))
    leaves = [x, *(leaf for part in parts for leaf in (part.a, part.b))]
    block = torch.compile(mlp.gated_mlp, fullgraph=True, backend="aot_eager") if compiled else mlp.gated_mlp
    torch.manual_seed(1)
    seed, seed_down = (int(lora_dropout.draw_seed()) for _ in range(2))
    torch.manual_seed(1)
    output = block(x, *parts)
    ours = torch.autograd.grad(output.sin().sum(), leaves)
    gate, up = (reference(x, part, seed) for part in parts[:2])
    expected = reference(nn.functional.silu(gate) * up, parts[2], seed_down)
    torch.testing.assert_close(output, expected)
    for value, exact in zip(ours, torch.autograd.grad(expected.sin().sum(), leaves), strict=True):
        torch.testing.assert_close(value, exact)


def test_layers_that_drop_different_shares_are_no_group() -> None:
    tensors = torch.randn(8, 8), None, torch.randn(2, 8), torch.randn(8, 2)
    one, other = Projection(*tensors, 1.0, 0.1), Projection(*tensors, 1.0, 0.2)
    with pytest.raises(ValueError, match=r"share their dropout, but have \[0.1, 0.2\]"):
        mlp.gated_mlp(torch.randn(3, 8), one, other, one)
    assert not mlp._alike(one, other)
    assert mlp._alike(one, one)
    assert mlp._alike(one, Projection(*tensors[:2], None, None))


def test_dropout_is_repeatable_and_right_on_average() -> None:
    model = adapted(lora_dropout=0.25)
    use_fused(model)
    layer = next(m for m in model.modules() if isinstance(m, FusedLoraLinear))
    x = torch.randn(5, 24)
    torch.manual_seed(1)
    with torch.no_grad():
        many = torch.stack([layer.train()(x) for _ in range(400)])
        torch.manual_seed(1)
        assert torch.equal(layer(x), many[0])
        assert not torch.equal(many[1], many[0])
        off = (many.mean(0) - layer.eval()(x)) / (many.std(0) / 20)
    assert float(off.square().mean()) < 2  # of a standard normal it is one


def four_bit(nested: bool, dtype: torch.dtype, **options) -> nn.Module:
    """Two layers of 4 bits with LoRA."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layers = []
    for width, out, bias in ((64, 128, True), (128, 8, False)):
        layer = bnb.nn.Linear4bit(
            width, out, bias=bias, compute_dtype=dtype, quant_type="nf4", compress_statistics=nested
        )
        layer.weight = bnb.nn.Params4bit(
            torch.randn(out, width) / width**0.5,
            quant_type="nf4",
            compress_statistics=nested,
            requires_grad=False,
        )
        if bias:
            layer.bias = nn.Parameter(torch.randn(out).to(dtype), requires_grad=False)
        layers.append(layer.to("cpu"))
    model = nn.Sequential(layers[0], nn.SiLU(), layers[1])
    keep_four_bit_layout(model)
    model.is_loaded_in_4bit = True
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"], **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_a_four_bit_base_equals_peft(dtype, tolerance, nested) -> None:
    model = four_bit(nested, dtype)
    fused = copy.deepcopy(model)
    assert use_fused(fused) == ["fused: 2 LoRA layers"]
    assert use_fused(fused) == []
    assert fused.state_dict().keys() == model.state_dict().keys()
    assert all(projection_of(m) is not None for m in fused.modules() if "Fused" in type(m).__name__)
    x = torch.randn(3, 5, 64).to(dtype)
    shapes: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        ours = gradients(fused, x)
    assert (128, 64) not in shapes  # the codes are kept, two in a byte, and no dequantised weight
    assert (128 * 64 // 2, 1) in shapes
    for name, value in gradients(model, x).items():
        assert ours[name].dtype == value.dtype
        assert (ours[name].double() - value.double()).norm() <= tolerance * value.double().norm()


def test_a_four_bit_base_is_what_its_codes_stand_for() -> None:
    model = four_bit(False, torch.float32)
    use_fused(model)
    layer = next(m for m in model.modules() if type(m).__name__ == "FusedLinear4bit")
    codes, absmax = layer.base_layer.weight.detach().view(-1), layer.base_layer.weight.quant_state.absmax
    # NormalFloat4, arXiv 2305.14314, appendix E
    levels = [
        -1.0,
        -0.6961928,
        -0.52507305,
        -0.39491749,
        -0.28444138,
        -0.18477343,
        -0.09105004,
        0.0,
        0.0795803,
    ]
    levels += [0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
    pairs = torch.stack([codes >> 4, codes & 15], 1).view(-1).long()
    weight = (torch.tensor(levels, dtype=torch.float64)[pairs].view(-1, 64) * absmax[:, None]).view(128, 64)
    x = torch.randn(5, 64, requires_grad=True)
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    exact = x.double() @ weight.t() + layer.base_layer.bias.double() + 2 * x.double() @ a.t() @ b.t()
    assert (layer(x).double() - exact).norm() <= 1e-6 * exact.norm()


def test_a_four_bit_base_is_left_to_bitsandbytes_without_gradients_and_in_another_type() -> None:
    model = four_bit(True, torch.bfloat16)
    plain = copy.deepcopy(model)
    use_fused(model)
    layer = next(m for m in model.modules() if type(m).__name__ == "FusedLinear4bit")
    x = torch.randn(5, 64)
    assert projection_of(layer, x.bfloat16()) is not None
    assert projection_of(layer, x) is None
    with torch.no_grad():
        assert projection_of(layer, x.bfloat16()) is None
        assert torch.equal(model(x), plain(x))
    with model.disable_adapter():
        assert torch.equal(model(x), plain.get_base_model()(x)) or projection_of(layer).a is None
    layer.base_layer.weight.quant_state.packing_format_for_cpu = True
    assert projection_of(layer, x.bfloat16()) is None


@pytest.mark.parametrize("kind", ["plain", "dropout", "four bits"])
def test_a_compiler_keeps_a_peft_model_whole(kind) -> None:
    model = (
        four_bit(True, torch.float32)
        if kind == "four bits"
        else adapted(lora_dropout=0.25 * (kind == "dropout"))
    )
    use_fused(model.train())
    x = torch.randn(5, 64 if kind == "four bits" else 24)
    torch.manual_seed(4)
    eager = gradients(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(4)
    for name, value in gradients(compiled, x).items():
        torch.testing.assert_close(value, eager[name.removeprefix("_orig_mod.")])


def test_disabled_merged_and_unloaded() -> None:
    model = adapted().eval()
    use_fused(model)
    x = torch.randn(5, 24)
    with_adapter = model(x)
    with model.disable_adapter():
        base = model(x)
    assert (with_adapter - base).abs().max() > 1e-3
    model.merge_adapter()
    torch.testing.assert_close(model(x), with_adapter, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), with_adapter, rtol=1e-4, atol=1e-4)
    plain = model.merge_and_unload()
    assert not any(isinstance(m, FusedLoraLinear) for m in plain.modules())
    torch.testing.assert_close(plain(x), with_adapter, rtol=1e-4, atol=1e-4)


def test_two_adapters_at_once_are_left_to_peft() -> None:
    model = adapted()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["0", "2"]))
    model.base_model.set_adapter(["default", "second"])
    use_fused(model)
    layer = next(m for m in model.modules() if isinstance(m, FusedLoraLinear))
    assert projection_of(layer) is None


def test_autocast_computes_in_its_type() -> None:
    model = adapted()
    fused = copy.deepcopy(model)
    use_fused(fused)
    x = torch.randn(5, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = gradients(fused, x), gradients(model, x)
    assert ours["output"].dtype == torch.bfloat16
    for name, value in theirs.items():
        assert (ours[name].float() - value.float()).norm() <= 0.03 * value.float().norm() + 1e-6


def test_a_trained_base_is_refused() -> None:
    weight = torch.randn(8, 24, requires_grad=True)
    with pytest.raises(ValueError, match="the base wants a gradient"):
        lora_linear(torch.randn(2, 24), Projection(weight, None, torch.randn(4, 24), torch.randn(8, 4)))
