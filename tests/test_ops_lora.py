"""The fused LoRA layer against its formula and against PEFT's own, and when it steps aside."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from shoestring.ops import use_fused
from shoestring.ops.lora import FusedLoraLinear, Projection, lora_linear, projection_of, reference
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
    assert projection_of(layer) is None
    model.eval()
    assert projection_of(layer) is not None


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
