"""Blockwise codes: the kernels against PyTorch's code for code, and both against the laws in float64."""

from __future__ import annotations

import pytest
import torch
from shoestring.ops import codec, providers
from shoestring.ops.codec import LAWS, block_of, code_count, scale_count, threshold_at

from .harness import Guarded, distance

SIZES = [1, 17, 256, 1000, 9001]


def numbers(count: int, signed: bool, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, generator=generator) * torch.logspace(-6, 2, count)
    return (x if signed else x.square()).to(device)


def table(law: str, signed: bool) -> torch.Tensor:
    """What each code from the lowest to the highest stands for, of scale 1, by the module's table."""
    if law == "dynamic":
        return codec.dynamic_table(signed).double()[0 if signed else 1 :]
    top = {True: 7, False: 15}[signed] if law == "four" else {True: 127, False: 255}[signed]
    codes = torch.arange(-top if signed else 1, top + 1, dtype=torch.float64)
    share = codes / top
    power = {(True, False): 2, (True, True): 1, (False, False): 4, (False, True): 2}[signed, law == "linear"]
    return share.sign() * share.abs() ** power


@pytest.mark.parametrize("provider", ["torch", "triton"])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("law", LAWS)
def test_each_value_becomes_the_nearest_that_a_code_stands_for(law, signed, provider, device, monkeypatch):
    monkeypatch.setenv("SHOESTRING_OPS", f"codec={provider}")
    entries = table(law, signed)
    # Unsigned values are rounded in their root: with threshold 0.5 to the nearest root.
    root = {True: 1.0, False: 0.5 if law == "linear" else 0.25}[signed] if law != "dynamic" else 1.0
    if signed and law in ("companded", "four"):
        root = 0.5
    for count in SIZES:
        x = numbers(count, signed, device)
        codes = torch.zeros(code_count(count, law), dtype=torch.uint8, device=device)
        scales = torch.zeros(scale_count(count, law), device=device)
        codec.encode(x, codes, scales, law, signed=signed, threshold=0.5)
        back = codec.decode(codes, scales, count, law, signed=signed)
        assert providers.used["codec"] == provider
        block = block_of(law)
        for b in range(len(scales)):
            part, got = x[b * block : (b + 1) * block].double().cpu(), back[b * block : (b + 1) * block]
            largest = float(part.abs().max())
            assert float(scales[b]) == pytest.approx(largest, rel=1e-6)

            def rooted(v: torch.Tensor) -> torch.Tensor:
                return v.sign() * v.abs() ** root

            gap = (rooted(part / largest)[:, None] - rooted(entries)[None]).abs()
            chosen = (rooted(got.double().cpu() / largest) - rooted(part / largest)).abs()
            # nearest but for values at the very middle, where float32 may go the other way
            assert bool((chosen <= gap.min(1).values * (1 + 1e-4) + 2e-5).all())


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("law", LAWS)
def test_the_kernel_and_pytorch_write_the_same(law, signed, device, monkeypatch):
    for count in SIZES:
        x = numbers(count, signed, device)
        found = []
        for provider in ("torch", "triton"):
            monkeypatch.setenv("SHOESTRING_OPS", f"codec={provider}")
            guard = Guarded()
            codes = guard.empty(code_count(count, law), torch.uint8, device)
            scales = guard.empty(scale_count(count, law), torch.float32, device)
            codec.encode(x, codes, scales, law, signed=signed, threshold=threshold_at(3))
            guard.check()
            found.append((codes, scales, codec.decode(codes, scales, count, law, signed=signed)))
        (codes, scales, value), (codes_2, scales_2, value_2) = found
        assert torch.equal(scales, scales_2)
        same = float((codes == codes_2).float().mean())
        assert same > 0.998, same  # a reciprocal's last bit at the very edge of a code
        assert distance(value_2, value) < 3e-3 or count < 100


@pytest.mark.parametrize("provider", ["torch", "triton"])
@pytest.mark.parametrize("law", LAWS)
def test_zeros_stay_and_what_is_not_finite_is_seen(law, provider, device, monkeypatch):
    monkeypatch.setenv("SHOESTRING_OPS", f"codec={provider}")
    for bad in (float("nan"), float("inf")):
        x = torch.zeros(600, device=device)
        x[10] = bad
        codes = torch.zeros(code_count(600, law), dtype=torch.uint8, device=device)
        scales = torch.zeros(scale_count(600, law), device=device)
        codec.encode(x, codes, scales, law, signed=True)
        back = codec.decode(codes, scales, 600, law, signed=True)
        block = block_of(law)
        assert not bool(torch.isfinite(back[:block]).any())
        assert bool((back[block:] == 0).all())


def test_nothing_is_encoded_of_nothing(device, monkeypatch):
    monkeypatch.setenv("SHOESTRING_OPS", "codec=triton")
    empty = torch.empty(0, device=device)
    codec.encode(empty, empty.to(torch.uint8), empty.clone(), "companded", signed=True)
    assert codec.decode(empty.to(torch.uint8), empty, 0, "companded", signed=True).shape == (0,)


def test_encode_and_decode_are_operations_that_a_compiler_can_keep(device):
    x = torch.randn(1000, device=device)
    codes, scales = torch.zeros(1000, dtype=torch.uint8, device=device), torch.zeros(4, device=device)
    torch.library.opcheck(codec.encode_op, (x, codes, scales, "companded", True, 0.0))
    torch.library.opcheck(codec.decode_op, (codes, scales, 1000, "companded", True))

    def there_and_back(x: torch.Tensor) -> torch.Tensor:
        codes = torch.zeros(1000, dtype=torch.uint8, device=x.device)
        scales = torch.zeros(4, device=x.device)
        codec.encode(x, codes, scales, "companded", signed=True)
        return codec.decode(codes, scales, 1000, "companded", signed=True)

    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), there_and_back(x))
