"""The lossless codec: every bit comes back, both implementations write the same, damage is an error."""

from __future__ import annotations

import math
from contextlib import suppress

import pytest
import torch
from shoestring.ops import native, providers
from shoestring.ops.lossless import BLOCK, decode, encode
from torch import Tensor


@pytest.fixture(params=["torch", "native"])
def provider(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "native" and native.missing():
        pytest.skip(f"no C++ here: {native.missing()}")
    monkeypatch.setenv("SHOESTRING_OPS", f"lossless={request.param}")
    providers.used.pop("lossless", None)
    return str(request.param)


def weights(count: int, seed: int = 0) -> Tensor:
    return (torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 0.02).bfloat16()


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, since no NaN equals itself."""
    return torch.equal(a.view(torch.int16).view(-1), b.view(torch.int16).view(-1))


ALL = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(torch.bfloat16)
CASES = {
    "every pattern": ALL,
    "every pattern, mixed": ALL[torch.randperm(1 << 16, generator=torch.Generator().manual_seed(1))],
    "every pattern among weights": torch.cat([weights(1 << 20), ALL, weights(77)]),
    "NaNs of all payloads": ALL[ALL.isnan()].repeat(40),
    "NaNs and a few weights": torch.cat([ALL[ALL.isnan()].repeat(40), weights(50)]),
    "zeros of both signs": torch.tensor([0.0, -0.0]).bfloat16().repeat(5000),
    "subnormals": ALL[(ALL.abs() < 1e-38)].repeat(9),
    "infinities": torch.tensor([math.inf, -math.inf, 1.0]).bfloat16().repeat(2001),
}


@pytest.mark.parametrize("case", CASES)
def test_every_bit_comes_back(case, provider):
    data = encode(CASES[case])
    assert providers.used["lossless"] == provider
    assert same(decode(data), CASES[case])


@pytest.mark.parametrize("count", [0, 1, 17, 511, 513, BLOCK - 1, BLOCK, BLOCK + 1, 300 * BLOCK + 1234])
def test_sizes(count, provider):
    given = weights(count, count)
    data = encode(given)
    assert same(decode(data), given)
    out = torch.full((count + 8,), math.nan, dtype=torch.bfloat16)
    assert same(decode(data, out[:count], verify=False), given)
    assert bool(out[count:].isnan().all())


def test_shapes_and_strides(provider):
    given = weights(60_000).view(200, 300)
    for layout in (given, given.t(), given[::3, 5:], given[0].expand(40, 300)):
        assert same(
            decode(encode(layout), torch.empty(layout.shape, dtype=torch.bfloat16)), layout.contiguous()
        )


def test_an_odd_place_in_memory(provider):
    data, given = encode(weights(9000)), weights(9000)
    held = torch.empty(len(data) + 1, dtype=torch.uint8)
    held[1:] = data
    assert same(decode(held[1:]), given)


def test_both_write_the_same(monkeypatch):
    if native.missing():
        pytest.skip(f"no C++ here: {native.missing()}")
    for given in (*CASES.values(), weights(5 * BLOCK + 99)):
        monkeypatch.setenv("SHOESTRING_OPS", "torch")
        plain = encode(given)
        monkeypatch.setenv("SHOESTRING_OPS", "native")
        assert torch.equal(plain, encode(given))


def test_threads_are_no_matter():
    given, threads, found = weights(200 * BLOCK + 5), torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            found.append(encode(given))
            assert same(decode(found[0]), given)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_what_it_saves(provider):
    given = weights(1 << 20)
    # 8 + 3 bits, a byte for each exponent outside the best seven, and three bytes a block
    inside = (given.view(torch.int16) >> 7 & 0xFF).long().bincount(minlength=256).unfold(0, 7, 1).sum(1).max()
    bits = 11 + 8 * (1 - int(inside) / len(given)) + 24 / BLOCK
    assert 8 * len(encode(given)) / len(given) == pytest.approx(bits, abs=0.01)
    assert len(encode(given)) < 0.702 * given.nbytes
    noise = torch.randint(-(1 << 15), 1 << 15, (1 << 16,), dtype=torch.int16).view(torch.bfloat16)
    assert len(encode(noise)) == noise.nbytes + 32
    assert same(decode(encode(noise)), noise)


def test_damage_is_an_error(provider):
    given = weights(2 * BLOCK + 100)
    data = encode(given)
    for length in (0, 31, 32, 100, len(data) - 1):
        with pytest.raises(ValueError, match=r"cut off|cannot have"):
            decode(data[:length])
    with pytest.raises(ValueError, match="cannot have"):
        decode(torch.cat([data, data[:1]]))
    for place in (*range(32), 33, 40, 5000, len(data) - 1):
        for flip in (1, 128):
            damaged = data.clone()
            damaged[place] ^= flip
            with pytest.raises(ValueError, match=r"no compressed|cannot have|damaged"):
                decode(damaged)


def test_without_the_checksum_nothing_is_read_or_written_outside(provider):
    given = weights(2 * BLOCK + 100)
    data = encode(given)
    places = torch.randint(40, len(data), (100,), generator=torch.Generator().manual_seed(5)).tolist()
    out = torch.zeros(len(given) + 64, dtype=torch.bfloat16)
    for place in [32, 33, 36, 38, *places]:
        damaged = data.clone()
        damaged[place] ^= 0x55
        with suppress(ValueError):
            decode(damaged, out[: len(given)], verify=False)
        assert bool((out[len(given) :] == 0).all())
    # counts that keep their sum: what one block has too many the next lacks
    damaged = data.clone()
    damaged[32] += 1
    damaged[34] -= 1
    with pytest.raises(ValueError, match="codes contradict"):
        decode(damaged, verify=False)


@pytest.mark.parametrize("more", [True, False])
def test_codes_that_name_more_or_fewer_others_than_there_are(more, provider):
    data = encode(weights(BLOCK))
    planes = data[32 + 3 + BLOCK :][: 3 * 512].view(3, 512)  # a view: what follows damages the data
    code_seven = planes[0] & planes[1] & planes[2]
    code_six = ~planes[0] & planes[1] & planes[2]
    place = int((code_six if more else code_seven).nonzero()[-1])
    bits = int((code_six if more else code_seven)[place])
    planes[0, place] ^= bits & -bits
    with pytest.raises(ValueError, match="codes contradict"):
        decode(data, verify=False)


def test_codes_behind_the_end_are_damage(provider):
    data = encode(weights(BLOCK - 100))
    assert data[:8].numpy().tobytes() == b"bf16 11b"
    planes = 32 + 3 + BLOCK - 100
    for plane in range(3):
        data[planes + plane * 512 + 511] |= 128
    data[32] += 1
    longer = torch.cat([data, torch.zeros(1, dtype=torch.uint8)])
    longer[16] += 1
    with pytest.raises(ValueError, match="codes contradict"):
        decode(longer, verify=False)


def test_what_it_is_not_for():
    with pytest.raises(ValueError, match=r"bfloat16 on the CPU, not torch\.float32"):
        encode(torch.zeros(3))
    with pytest.raises(ValueError, match="on meta"):
        encode(torch.zeros(3, dtype=torch.bfloat16, device="meta"))
    data = encode(weights(10))
    with pytest.raises(ValueError, match="uint8"):
        decode(data.float())
    for out in (
        torch.zeros(10),
        torch.zeros(9, dtype=torch.bfloat16),
        torch.zeros(20, dtype=torch.bfloat16)[::2],
    ):
        with pytest.raises(ValueError, match="do not fit"):
            decode(data, out)
