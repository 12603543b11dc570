"""The pass over gradients: norm, largest, whether all is finite and the packed copy, held to float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from shoestring.ops import grad_pack, native, providers
from shoestring.ops.grad_pack import BLOCK, pack
from shoestring.optimizers import clip_by_global_norm
from torch import Tensor, nn

from .harness import Guarded

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 17, 1000, BLOCK + 1, 40_001]
PROVIDERS = ["torch", "triton", "native"]


@pytest.fixture(params=PROVIDERS)
def provider(request: pytest.FixtureRequest, device: str, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "native" and (device != "cpu" or native.missing()):
        pytest.skip(f"no C++ here: {native.missing() or 'the tensors are on a GPU'}")
    monkeypatch.setenv("SHOESTRING_OPS", f"grad_pack={request.param}")
    providers.used.pop("grad_pack", None)
    return str(request.param)


def numbers(count: int, dtype: torch.dtype, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return (torch.randn(count, generator=generator) * torch.logspace(-3, 1, count)).to(device, dtype)


def exact_norm(grads: list[Tensor], scale: float = 1.0) -> float:
    """The root of the sum of squares, in float64."""
    return math.sqrt(math.fsum(float((g.double() * scale).square().sum()) for g in grads))


def exact_copy(grads: list[Tensor], scale: float, dtype: torch.dtype) -> Tensor:
    """What is packed: products in float32, each rounded once."""
    return torch.cat([(g.float() * scale).reshape(-1) for g in grads]).to(dtype)


@pytest.mark.parametrize(
    ("into", "scale"), [(None, 1.0), (torch.float32, 1.0), (torch.bfloat16, 1 / 3), (torch.float16, 1 / 3)]
)
def test_of_all_types_and_sizes_at_once(into, scale, provider, device):
    if provider == "native" and into == torch.float16:
        return  # it has none, see below
    grads = [numbers(n, dtype, device) for n in SIZES for dtype in DTYPES]
    kept = [g.clone() for g in grads]
    count, guard = sum(g.numel() for g in grads), Guarded()
    target = None if into is None else guard.empty(count + 5, into, device)
    found = pack(grads, target=target, scale=None if scale == 1 else torch.tensor(scale, device=device))
    assert providers.used["grad_pack"] == provider
    assert found.norm.dtype == torch.float64
    assert found.norm.shape == found.largest.shape == found.finite.shape == ()
    assert float(found.norm) == pytest.approx(exact_norm(grads, scale), rel=1e-6)
    assert float(found.largest) == max(float((g.float() * torch.tensor(scale)).abs().max()) for g in kept)
    assert found.finite.dtype == torch.bool
    assert bool(found.finite)
    assert all(torch.equal(a, b) for a, b in zip(grads, kept, strict=True))
    if target is not None:
        factor = float(torch.tensor(scale))
        assert torch.equal(target[:count].cpu(), exact_copy([g.cpu() for g in grads], factor, into))
        assert bool(target[count:].isnan().all())  # as it was
        guard.check()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.view(100, 90).t(),
    "transposed in the middle": lambda x: x.view(10, 9, 100).permute(1, 2, 0),
    "rows left out": lambda x: x.view(100, 90)[::2],
    "columns left out": lambda x: x.view(100, 90)[:, 3:71],
    "expanded": lambda x: x[:90].expand(100, 90),
    "one number expanded": lambda x: x[5].expand(3, 7),
    "from an odd place on": lambda x: x[3:],
    "no dimension": lambda x: x[7],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout, provider, device):
    grads = [LAYOUTS[layout](numbers(9000, dtype, device)) for dtype in DTYPES]
    target = torch.full((sum(g.numel() for g in grads),), math.nan, device=device)
    packed, measured = pack(grads, target=target), pack(grads)
    assert providers.used["grad_pack"] == provider
    assert torch.equal(target, exact_copy(grads, 1.0, torch.float32))
    for found in (packed, measured):
        assert float(found.norm) == pytest.approx(exact_norm(grads), rel=1e-6)
        assert float(found.largest) == max(float(g.abs().max()) for g in grads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 4096, BLOCK + 16])
def test_what_is_not_finite_is_seen_wherever_it_is(place, dtype, provider, device):
    grads = [numbers(n, dtype, device) for n in (100, BLOCK + 17)]
    target = torch.zeros(BLOCK + 117, dtype=torch.bfloat16, device=device)
    for bad, options in ((math.nan, {}), (math.inf, {"target": target}), (-math.inf, {"scale": 0.5})):
        grads[1][place] = bad
        found = pack(grads, **options)
        assert not bool(found.finite)
        assert str(float(found.norm)) == ("nan" if math.isnan(bad) else "inf")
        assert str(float(found.largest)) == ("nan" if math.isnan(bad) else "inf")
    assert target.double().isfinite().logical_not().nonzero().view(-1).tolist() == [100 + place]
    assert providers.used["grad_pack"] == provider


def test_a_scale_that_is_not_finite_is_seen(provider, device):
    grads = [torch.zeros(10, device=device), torch.ones(70_000, device=device)]
    assert not bool(pack(grads, scale=math.inf).finite)
    assert not bool(pack(grads, scale=math.nan, target=torch.empty(70_010, device=device)).finite)
    found = pack(grads[1:], scale=math.inf)
    assert float(found.norm) == float(found.largest) == math.inf  # and no NaN of what is behind the end


def test_squares_that_overflow_are_no_gradient_that_does(provider, device):
    for count in (50, 40_000):
        found = pack([torch.full((count,), 1e30, device=device)])
        assert float(found.norm) == math.inf
        assert bool(found.finite)
        assert float(found.largest) == pytest.approx(1e30)


def test_nothing_and_zeros(provider, device):
    assert float(pack([]).norm) == float(pack([]).largest) == 0.0
    empty = [torch.empty(0, device=device), torch.empty(3, 0, device=device, dtype=torch.bfloat16)]
    zeros = [torch.zeros(1000, device=device), torch.zeros(7, device=device, dtype=torch.float16)]
    for grads in (empty, zeros, [*empty, *zeros]):
        target = torch.full((1007,), math.nan, device=device)
        for found in (pack(grads), pack(grads, target=target)):
            assert float(found.norm) == float(found.largest) == 0.0
            assert bool(found.finite)
        assert int(target.isnan().sum()) == 1007 - sum(g.numel() for g in grads)


def test_every_number_of_sixteen_bits_and_every_rounding(provider, device):
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16, device=device)
    for dtype in (torch.bfloat16, torch.float16):
        target = torch.empty(1 << 16, device=device)
        pack([bits.view(dtype)], target=target)
        torch.testing.assert_close(target, bits.view(dtype).float(), rtol=0, atol=0, equal_nan=True)
    halves = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32, device=device)
    wide = ((bits[::3].int() << 16)[:, None] | halves).view(-1).view(torch.float32)
    rounded = torch.empty(wide.numel(), dtype=torch.bfloat16, device=device)
    pack([wide], target=rounded)
    torch.testing.assert_close(rounded, wide.bfloat16(), rtol=0, atol=0, equal_nan=True)
    assert providers.used["grad_pack"] == provider


def test_the_order_of_programs_is_no_matter(device, monkeypatch):
    if device != "cpu":
        pytest.skip("a GPU has its own order")
    from .interpreter import reversed_programs

    monkeypatch.setenv("SHOESTRING_OPS", "grad_pack=triton")
    grads = [numbers(n, dtype, device) for n in SIZES for dtype in DTYPES[:2]]
    targets = [torch.zeros(sum(g.numel() for g in grads), device=device) for _ in range(2)]
    forward = pack(grads, target=targets[0])
    with reversed_programs():
        backward = pack(grads, target=targets[1])
    assert torch.equal(forward.norm, backward.norm)
    assert torch.equal(forward.largest, backward.largest)
    assert torch.equal(*targets)


@pytest.mark.parametrize("name", ["torch", "native"])
def test_the_number_of_threads_is_no_matter(name, device, monkeypatch):
    if device != "cpu" or (name == "native" and native.missing()):
        pytest.skip("no C++ here")
    monkeypatch.setenv("SHOESTRING_OPS", f"grad_pack={name}")
    grads = [numbers(n, dtype, device) for n in (700_001, 30_000, 90_000) for dtype in DTYPES]
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            target = torch.zeros(sum(g.numel() for g in grads), dtype=torch.bfloat16)
            packed = pack(grads, target=target)
            found.append((float(pack(grads).norm), float(packed.norm), float(packed.largest), target))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert other[:3] == found[0][:3]
        assert torch.equal(other[3], found[0][3])


@pytest.mark.parametrize("name", ["torch", "native"])
def test_the_norm_of_many_elements_is_as_good_as_that_of_few(name, device, monkeypatch):
    # PyTorch's own norm on a CPU is 1e-4 off here.
    if name == "native" and (device != "cpu" or native.missing()):
        pytest.skip("no C++ here")
    monkeypatch.setenv("SHOESTRING_OPS", f"grad_pack={name}")
    wide = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).to(device)
    for grad in (wide, wide.bfloat16()):
        assert float(pack([grad]).norm) == pytest.approx(exact_norm([grad]), rel=1e-6)
        assert float(grad_pack.global_norm([grad])) == pytest.approx(exact_norm([grad]), rel=1e-6)


def test_gradients_that_have_moved_or_grown_are_found(provider, device):
    memory = numbers(60_000, torch.float32, device)
    for first, count in ((0, 100), (0, 50_000), (9000, 50_000), (0, 100), (1, 100)):
        part = memory[first : first + count]
        assert float(pack([part]).norm) == pytest.approx(exact_norm([part]), rel=1e-6)
        part[0] += 100
        assert float(pack([part]).norm) == pytest.approx(exact_norm([part]), rel=1e-6)


def test_tables_stay_for_each_gradient_alone_and_within_bounds(monkeypatch):
    """Steps from inside a backward ask for each of some hundred gradients, in every step again."""
    rows = grad_pack.Kept(1 << 18, lambda table: table.rows.numel())
    owners = grad_pack.Kept(1 << 24, Tensor.numel)
    monkeypatch.setattr(grad_pack, "_TABLES", rows)
    monkeypatch.setattr(grad_pack, "_OWNERS", owners)
    grads = [torch.ones(n + 1) for n in range(300)]
    first = [grad_pack.table_of([g], None) for g in grads]
    again = [grad_pack.table_of([g], None) for g in grads]
    assert all(one is other for one, other in zip(first, again, strict=True))
    assert (len(rows), len(owners)) == (300, 1)  # all of them are one block
    few = grad_pack.Kept(100, lambda table: table.rows.numel())
    monkeypatch.setattr(grad_pack, "_TABLES", few)
    for grad in grads:
        grad_pack.table_of([grad], None)
    assert len(few) == 20


def test_a_table_belongs_to_the_stream_that_it_was_sent_on(monkeypatch):
    grad, found = torch.ones(3), []
    for stream in (1, 2, 1):
        monkeypatch.setattr(grad_pack, "stream_of", lambda device, stream=stream: stream)
        found.append(grad_pack.table_of([grad], None))
    assert found[0] is found[2]
    assert found[0].rows is not found[1].rows
    assert found[0].owner is not found[1].owner


@pytest.mark.parametrize("scale", [None, -0.5])
def test_pytorchs_norms_of_all_at_once_which_a_gpu_without_triton_takes(scale, device):
    grads = [numbers(n, dtype, device) for n in (0, 1, 300) for dtype in DTYPES]
    factor = None if scale is None else torch.tensor(scale, device=device)
    norm, largest = grad_pack._at_once(grads, factor, torch.float32, False)
    assert float(norm) == pytest.approx(exact_norm(grads, scale or 1.0), rel=1e-6)
    top = max(float(g.float().abs().max()) for g in grads if g.numel())
    assert float(largest) == pytest.approx(top * abs(scale or 1.0), rel=1e-6)
    assert float(grad_pack._at_once(grads, factor, torch.float32, True)[0]) == float(norm)
    grads[5][0] = math.nan
    assert math.isnan(float(grad_pack._at_once(grads, factor, torch.float32, False)[1]))


def test_float64_stays_precise(device):
    grads = [numbers(n, torch.float64, device) for n in (1000, 50_000)] + [numbers(9, torch.float32, device)]
    target = torch.zeros(51_009, dtype=torch.float64, device=device)
    for found in (pack(grads), pack(grads, target=target)):
        assert providers.used["grad_pack"] == "torch"
        assert float(found.norm) == pytest.approx(exact_norm(grads), rel=1e-12)
    assert torch.equal(target, torch.cat([g.double() for g in grads]))


def test_what_a_provider_lacks_is_an_error_or_left_to_pytorch(device, monkeypatch):
    target = torch.zeros(10, dtype=torch.float16, device=device)
    monkeypatch.setenv("SHOESTRING_OPS", "grad_pack=native")
    with pytest.raises(providers.UserError, match="grad_pack"):
        pack([torch.ones(10, device=device)], target=target)
    monkeypatch.delenv("SHOESTRING_OPS")
    pack([torch.ones(10, device=device)], target=target)
    assert bool((target == 1).all())


def test_targets_that_cannot_be(device):
    grads = [torch.ones(10, device=device)]
    for target, words in (
        (torch.empty(9, device=device), "9 elements is too small for 10"),
        (torch.empty(40, device=device)[::2], "contiguous"),
        (torch.empty(10, dtype=torch.int32, device=device), "floating"),
        (torch.empty(10, device="meta"), "where the gradients do"),
    ):
        with pytest.raises(ValueError, match=words):
            pack(grads, target=target)
    with pytest.raises(ValueError, match="one device"):
        pack([*grads, torch.ones(1, device="meta")])


def test_it_is_an_operation_that_a_compiler_can_keep(provider, device):
    grads = [numbers(n, dtype, device) for n, dtype in zip((1000, 17, 300), DTYPES, strict=True)]
    scale = torch.tensor(0.5, device=device)
    torch.library.opcheck(grad_pack.pack_op, (grads, None, None))
    torch.library.opcheck(grad_pack.pack_op, (grads, torch.zeros(1317, device=device), scale))

    def both(a: Tensor, b: Tensor, c: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        target = torch.zeros(1317, device=a.device)
        found = pack([a * 2, b, c], target=target, scale=scale)
        return found.norm, found.finite, target

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(*grads, scale), both(*grads, scale), strict=True):
        assert torch.equal(ours, theirs)
    assert providers.used["grad_pack"] == provider


def test_clipping_goes_by_this_norm(provider, device):
    parameters = [nn.Parameter(torch.zeros(n, device=device)) for n in (100, BLOCK + 5)]
    for p in parameters:
        p.grad = numbers(p.numel(), torch.float32, device)
    exact = exact_norm([p.grad for p in parameters])
    norm = clip_by_global_norm(parameters, exact / 3)
    assert providers.used["grad_pack"] == provider
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(exact, rel=1e-6)
    assert exact_norm([p.grad for p in parameters]) == pytest.approx(exact / 3, rel=1e-6)


@pytest.mark.gpu
def test_more_elements_than_32_bits_count(monkeypatch):
    monkeypatch.setenv("SHOESTRING_OPS", "grad_pack=triton")
    count = (1 << 31) + 5000
    grads = [torch.full((count,), 2.0, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    target = torch.zeros(2 * count, dtype=torch.bfloat16, device="cuda")
    grads[1][-1] = 7.0
    found = pack(grads, target=target, scale=0.5)
    assert float(found.norm) == pytest.approx(math.sqrt(2 * count - 1 + 3.5**2), rel=1e-6)
    assert float(found.largest) == float(target[-1]) == 3.5
    assert bool((target[:-1] == 1).all())
