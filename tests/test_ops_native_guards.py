"""What C++ and Triton are given is checked first, and what they do is what PyTorch's operations would."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ops_kernels.step_job import BF16, FP32, Job
from shoestring.ops import codec, lossless, native, quantise
from shoestring.ops.grad_pack import pack
from shoestring.ops.rounding import dither_, noise_key, noise_tile
from shoestring.ops.writing import add_step
from shoestring.optimizers import (
    APOLLO,
    FRUGAL,
    AdamW,
    GaLore,
    Lion,
    Muon,
    NaturalGaLore,
    Slot,
    state_bytes,
)
from shoestring.recipes import optimizers as configs
from torch import Tensor, nn

NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(native.missing() is not None, reason=f"no C++: {native.missing()}")
)
PROVIDERS = ["torch", NATIVE]


@pytest.mark.parametrize("mode", ["kahan", "master"])
def test_a_state_of_another_mode_is_refused(mode: str) -> None:
    parameter = nn.Parameter(torch.randn(5000).to(BF16))
    optimizer = AdamW([parameter], lr=1e-3, state_bits=8, weights="sr")
    parameter.grad = torch.randn(5000).to(BF16)
    optimizer.step()
    optimizer.param_groups[0]["weights"] = mode
    with pytest.raises(ValueError, match="made with another mode or type of weights"):
        optimizer.step()


def test_scales_from_a_damaged_checkpoint_are_refused() -> None:
    parameter = nn.Parameter(torch.randn(8192))
    optimizer = AdamW([parameter], lr=1e-3, state_bits=8)
    parameter.grad = torch.randn(8192)
    optimizer.step()
    state = optimizer.state[parameter]
    state["exp_avg_scale"] = state["exp_avg_scale"][:1].clone()
    with pytest.raises(ValueError, match="first_scales has 1 elements in tensor 0, not 32"):
        optimizer.step()


def test_what_is_kept_beside_a_written_weight_is_checked() -> None:
    weight = torch.randn(1, 8, 16).to(BF16)
    state = {"master": weight.clone()}  # narrow, where float32 is written
    with pytest.raises(ValueError, match="master is of bfloat16; allowed: one of float32"):
        add_step([weight], [state], lambda t, _: None, keep=1.0, mode="master", noise=[(0, 0)])


def test_a_graph_made_before_a_step_is_not_gone_back_through() -> None:
    for optimizer, shape in ((AdamW, (5000,)), (Muon, (64, 80))):
        weight = nn.Parameter(torch.randn(shape).to(BF16))
        x = torch.randn(shape).to(BF16).requires_grad_()
        loss = (x * weight).sum()
        weight.grad = torch.randn(shape).to(BF16)
        optimizer([weight], lr=1e-2).step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64])
def default(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def trained() -> list[Tensor]:
    """A step of some optimizers and a norm, all tensors of named types."""
    generator = torch.Generator().manual_seed(0)
    found: list[Tensor] = []
    for kind, more in (
        (AdamW, {"state_bits": 8, "weights": "kahan"}),
        (AdamW, {"state_bits": 32}),
        (Muon, {"weights": "sr"}),
        (APOLLO, {"rank": 8, "state_bits": 8}),
    ):
        for dtype in (FP32, BF16):
            weight = nn.Parameter(torch.randn(96, 128, generator=generator, dtype=FP32).to(dtype))
            weight.grad = torch.randn(96, 128, generator=generator, dtype=FP32).to(dtype)
            found.append(pack([weight.grad]).norm)
            optimizer: Any = kind
            made = optimizer([weight], lr=1e-3, **more)
            made.step()
            found += [
                weight.detach().clone(),
                *(t for t in made.state[weight].values() if isinstance(t, Tensor)),
            ]
    return found


@pytest.fixture(scope="module")
def plain() -> list[Tensor]:
    return trained()


def test_the_default_type_of_tensors_changes_nothing(plain: list[Tensor], default: torch.dtype) -> None:
    found = trained()
    assert [t.dtype for t in found] == [t.dtype for t in plain]
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_tables_made_under_another_device_are_real() -> None:
    codec._dynamic_table.cache_clear()
    with torch.device("meta"):
        tables = codec.dynamic_table(True), noise_tile(noise_key(0, 1))
    assert [t.device.type for t in tables] == ["cpu", "cpu"]


FLOAT64: list[tuple[Any, Any, list[int], dict[str, Any]]] = [
    (AdamW, configs.AdamW, [16, 8, 4], {}),
    (Lion, configs.Lion, [16, 8, 4], {}),
    (APOLLO, configs.Apollo, [16, 8], {"rank": 64}),
    (GaLore, configs.GaLore, [16, 8], {"rank": 64, "update_proj_gap": 2}),
    (NaturalGaLore, configs.NaturalGaLore, [16, 8], {"rank": 64, "update_proj_gap": 2, "history": 2}),
    (FRUGAL, configs.Frugal, [16, 8], {"density": 0.5, "projection": "randk", "update_proj_gap": 2}),
]


@pytest.mark.parametrize(("kind", "config", "allowed", "more"), FLOAT64)
def test_moments_of_float64_weights_keep_their_digits(
    kind: Any, config: Any, allowed: list[int], more: dict[str, Any]
) -> None:
    """Whatever the bits; and the plan counts what there is."""
    found = []
    for bits in (32, *allowed):
        generator = torch.Generator().manual_seed(0)
        weight = nn.Parameter(torch.randn(96, 128, generator=generator, dtype=torch.float64))
        made = kind([weight], lr=1e-3, state_bits=bits, **more)
        for _ in range(3):
            weight.grad = torch.randn(96, 128, generator=generator, dtype=torch.float64)
            made.step()
        found.append(weight.detach())
        state = made.state[weight]
        assert state["exp_avg"].dtype == torch.float64
        held = sum(t.nbytes for t in state.values() if isinstance(t, Tensor))
        asked = config(state_bits=bits, **more)
        if bits < 32:  # the plan counts PyTorch's own AdamW, which runs where 32 are asked for
            assert held == state_bytes(asked, [Slot("w", (96, 128), "matrix")], torch.float64)
    # Bases of GaLore are bfloat16 where few bits are asked for; AdamW and Lion have moments alone.
    limit = 0.0 if kind in (AdamW, Lion, APOLLO, FRUGAL) else 0.05
    for other in found[1:]:
        assert float((other - found[0]).abs().max()) <= limit


WRITTEN = [("torch", "float32"), ("torch", "master"), ("native", "master")]


@pytest.mark.parametrize(("provider", "mode"), WRITTEN)
def test_a_decay_is_not_rounded_to_a_multiple_of_6e_8(
    provider: str, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1e-7 of each is taken off, not 1.2e-7. The weights' own rounding to nearest leaves a twentieth."""
    if provider == "native" and native.missing() is not None:
        pytest.skip(f"no C++: {native.missing()}")
    monkeypatch.setenv("SHOESTRING_OPS", f"writing={provider}")
    generator = torch.Generator().manual_seed(0)
    wide = [1 + torch.rand(1, 1, 1 << 16, generator=generator) for _ in range(2)]
    weights = wide if mode == "float32" else [w.to(BF16) for w in wide]
    states = [{}, {}] if mode == "float32" else [{"master": w} for w in wide]
    before = [w.double() for w in wide]
    for _ in range(20):
        add_step(
            weights, states, lambda target, rows: None, keep=1 - 1e-7, mode="master", noise=[(0, 0), (0, 7)]
        )
    gone = sum(float((a - b.double()).sum()) for a, b in zip(before, wide, strict=True))
    assert gone == pytest.approx(20 * 1e-7 * float(sum(b.sum() for b in before)), rel=0.06)


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000, 0x7F800000, -0x800000])
def test_what_is_not_finite_is_not_rounded_away(bits: int) -> None:
    """A GPU's NaN is 0x7FFFFFFF: a random bit more is -0."""
    for value in (bits, 0x3F800000):
        values = torch.full((300,), value, dtype=torch.int32)
        values[7] = bits
        wanted = values.clone().view(FP32)
        found = dither_(values.view(FP32), torch.full((300,), 0xFFFF, dtype=torch.int32))
        assert torch.equal(found.isnan(), wanted.isnan())
        assert torch.equal(found.isinf(), wanted.isinf())


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_weight_without_elements_is_written_at_once(dtype: torch.dtype) -> None:
    for shape in ((1, 0, 4), (1, 4, 0), (0, 4, 4)):
        weights = [torch.empty(shape, dtype=dtype)] * 2
        add_step(weights, [{}, {}], lambda t, _: None, keep=0.5, mode="sr", noise=[(0, 0)] * 2)
        parameter = nn.Parameter(torch.empty(shape[1:], dtype=dtype))
        parameter.grad = torch.empty(shape[1:], dtype=dtype)
        if parameter.numel():
            continue
        Muon([parameter], lr=0.1).step()


@pytest.mark.skipif(native.missing() is not None, reason=f"no C++: {native.missing()}")
@pytest.mark.parametrize("law", codec.LAWS)
def test_codes_of_what_is_no_number_are_the_smallest(law: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a scale that is NaN; C++ itself has no integer for it, and another on each processor."""
    monkeypatch.setenv("SHOESTRING_OPS", "quantised_step=native")
    given = Job(law=law, sizes=[128])
    given.grads[0].fill_(float("nan"))
    given.run()
    assert bool(given.first_scales[0].isnan().all() & given.second_scales[0].isnan().all())
    if law != "dynamic":
        assert set(given.first[0].tolist()) == {0}
        assert set(given.second[0].tolist()) == ({0x11} if law == "four" else {1})


def test_lossless_codes_are_decoded_on_the_cpu_alone() -> None:
    data = lossless.encode(torch.randn(5000).to(BF16))
    with pytest.raises(ValueError, match="not into a tensor on meta"):
        lossless.decode(data, torch.empty(5000, dtype=BF16, device="meta"))
    out = torch.empty(5000, dtype=BF16)
    lossless.decode(data, out)
    assert out._version > 0


def test_noise_of_an_int8_weight_may_come_in_pieces() -> None:
    """Which a weight of many pieces asks for one by one, so that the noise of all of it is never held."""
    dense = torch.randn(700, 512)
    noise, asked = torch.rand(dense.numel()), []

    def draw(part: slice) -> Tensor:
        asked.append(part)
        return noise[part]

    whole = quantise(dense, 64).requantise_(dense, noise.view(dense.shape))
    pieces = quantise(dense, 64).requantise_(dense, draw)
    assert torch.equal(whole.codes, pieces.codes)
    assert len(asked) > 1
