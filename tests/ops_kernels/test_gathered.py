"""The product of gathered rows: PyTorch's and the kernel's against the sum of outer products, row by row."""

from __future__ import annotations

import pytest
import torch
from shoestring.ops import providers
from shoestring.ops.gathered import gathered_product, gathered_product_op
from shoestring.ops.wta_crs import sampled_linear
from shoestring.recipes import UserError
from torch import Tensor

from .harness import TOLERANCE, Guarded, distance

# Of a float32 sum: tensor cores line up their addends and cut what sticks out.
SUMMED = 5e-6
# N, out, k, in: one of each, odd ones, just above a tile in each direction, more than one group of tiles.
SIZES = [
    (1, 1, 1, 1),
    (5, 17, 3, 9),
    (40, 129, 65, 257),
    (300, 1000, 130, 100),
    (70, 8, 64, 1000),
    (9, 1153, 1, 300),
]


def numbers(
    size: tuple[int, int, int, int], dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """G [N, out], rows [k], X [k, in]."""
    count, out, k, width = size
    generator = torch.Generator().manual_seed(sum(size))
    grad = torch.randn(count, out, generator=generator).to(dtype)
    kept = torch.randn(k, width, generator=generator).to(dtype)
    return grad.to(device), torch.randint(count, (k,), generator=generator).to(device), kept.to(device)


def exact(grad: Tensor, rows: Tensor, kept: Tensor) -> Tensor:
    """float64, row after row."""
    total = torch.zeros(grad.shape[1], kept.shape[1], dtype=torch.float64)
    for place, row in enumerate(rows.tolist()):
        total += torch.outer(grad[row].double().cpu(), kept[place].double().cpu())
    return total


@pytest.fixture(params=["torch", "triton"])
def provider(request, monkeypatch) -> str:
    monkeypatch.setenv("SHOESTRING_OPS", f"wta_crs={request.param}")
    return request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_sum_of_outer_products(size, dtype, provider, device):
    given = numbers(size, dtype, device)
    expected = exact(*given)
    for into in (dtype, torch.float32):
        product = gathered_product(*given, into)
        assert providers.used["wta_crs"] == provider
        assert product.dtype == into
        assert product.shape == expected.shape
        # PyTorch makes the product in 16 bits before it is widened; the kernel has the float32 sum
        fine = into == torch.float32 and provider == "triton"
        assert distance(product, expected) < (SUMMED if fine else TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_types_are_pytorchs(dtype, device, monkeypatch):
    given = numbers(SIZES[3], dtype, device)
    assert distance(gathered_product(*given, dtype), exact(*given)) < 1e-6
    assert providers.used["wta_crs"] == "torch"
    monkeypatch.setenv("SHOESTRING_OPS", "wta_crs=triton")
    with pytest.raises(UserError, match="it has none for these arguments"):
        gathered_product(*given, dtype)


def test_the_kernel_runs_by_name_alone(device, monkeypatch):
    monkeypatch.delenv("SHOESTRING_OPS", raising=False)
    monkeypatch.setattr(providers, "_idle", lambda provider, device: True)  # as if on a GPU
    given = numbers(SIZES[1], torch.bfloat16, device)
    gathered_product(*given, torch.bfloat16)
    assert providers.used["wta_crs"] == "torch"
    assert providers.choose("another", torch.device(device), ["triton"]) == "triton"


def test_any_layout_is_read_as_it_lies(provider, device):
    grad, rows, kept = numbers((60, 40, 33, 50), torch.bfloat16, device)
    expected = exact(grad, rows, kept)
    wide = torch.full((120, 90), float("nan"), dtype=grad.dtype, device=device)
    wide[::2, 7:47] = grad
    layouts = {
        "transposed": grad.t().contiguous().t(),
        "every other row, columns from the middle": wide[::2, 7:47],
    }
    for name, layout in layouts.items():
        assert not layout.is_contiguous()
        assert distance(gathered_product(layout, rows, kept, torch.float32), expected) < 8e-3, name
    wide_rows = torch.stack([rows, rows.flip(0)], 1)[:, 0]
    beside = torch.stack([kept, kept * float("nan")], 1)[:, 0]
    for turned in (kept.t().contiguous().t(), beside):
        assert not turned.is_contiguous()
        assert distance(gathered_product(grad, wide_rows, turned, torch.float32), expected) < 8e-3
    for expanded in (grad[:1].expand(60, 40), grad[:, :1].expand(60, 40)):
        found = gathered_product(expanded, rows, kept, torch.float32)
        assert distance(found, exact(expanded, rows, kept)) < 8e-3


def test_repeated_first_and_last_rows(provider, device):
    grad, _, kept = numbers((200, 30, 70, 20), torch.bfloat16, device)
    for rows in (torch.zeros(70), torch.full((70,), 199), torch.arange(70).flip(0) * 2 + 61):
        rows = rows.long().to(device)
        assert distance(gathered_product(grad, rows, kept, torch.bfloat16), exact(grad, rows, kept)) < 8e-3


def test_nothing_makes_zero(provider, device):
    for size in ((5, 17, 0, 9), (0, 17, 0, 9)):
        grad, kept = (torch.ones(n, m, device=device).bfloat16() for n, m in (size[:2], size[2:]))
        rows = torch.empty(0, dtype=torch.int64, device=device)
        product = gathered_product(grad, rows, kept, torch.bfloat16)
        assert torch.equal(product.cpu(), torch.zeros(17, 9).bfloat16())
    rows = torch.zeros(3, dtype=torch.int64, device=device)
    for out, width in ((0, 9), (9, 0), (0, 0)):
        grad, kept = (torch.ones(3, n, device=device).bfloat16() for n in (out, width))
        assert gathered_product(grad, rows, kept, torch.float32).shape == (out, width)
    grad, rows, kept = numbers(SIZES[2], torch.bfloat16, device)
    assert not gathered_product(grad * 0, rows, kept, torch.bfloat16).any()


def test_what_is_not_finite_is_seen_where_it_was_taken(provider, device):
    for bad in (float("nan"), float("inf")):
        grad, rows, kept = numbers((50, 140, 70, 40), torch.bfloat16, device)
        rows[rows == 0] = 1
        grad[0] = bad  # not taken, but the row that a place behind the last one would read
        assert distance(gathered_product(grad, rows, kept, torch.bfloat16), exact(grad, rows, kept)) < 8e-3
        grad[rows[69], 135] = bad
        product = gathered_product(grad, rows, kept, torch.bfloat16)
        assert not product[135].isfinite().any()
        assert product[:135].isfinite().all()
        assert product[136:].isfinite().all()


def kernel_into(total: Tensor, given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    from shoestring.ops.kernels.gathered import gathered

    gathered(*given, total)
    return total


@pytest.mark.parametrize("size", [SIZES[1], SIZES[2], SIZES[5]])
def test_the_kernel_writes_all_of_its_output_and_nothing_else(size, device):
    given, guard = numbers(size, torch.bfloat16, device), Guarded()
    for dtype in (torch.bfloat16, torch.float32):
        total = kernel_into(guard.empty((size[1], size[3]), dtype, device), given)
        guard.check()
        assert distance(total, exact(*given)) < (SUMMED if dtype == torch.float32 else TOLERANCE[dtype])


def test_the_order_of_programs_does_not_matter(device):
    given = numbers((300, 1200, 70, 520), torch.bfloat16, device)
    totals = [torch.empty(1200, 520, device=device) for _ in range(2)]
    kernel_into(totals[0], given)
    if device == "cuda":
        kernel_into(totals[1], given)
    else:
        from .interpreter import reversed_programs

        with reversed_programs():
            kernel_into(totals[1], given)
    assert torch.equal(*totals)
    assert distance(totals[0], exact(*given)) < SUMMED


def test_every_tile_is_made_once_whatever_the_shape(device):
    """Tiles are walked in groups; each shape has a last group and a last column of its own."""
    from shoestring.ops.kernels.gathered import GROUP, TILES

    tiles = TILES[90]
    for down, across in ((1, 3), (GROUP, 2), (GROUP + 1, 2), (2 * GROUP - 1, 1)):
        size = (3, down * tiles.out - 1, 2, across * tiles.inner - 1)
        given = numbers(size, torch.bfloat16, device)
        total = kernel_into(torch.full((size[1], size[3]), float("nan"), device=device), given)
        assert distance(total, exact(*given)) < SUMMED


def test_a_sampled_layer_learns_by_the_kernel_as_without(device, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(90, 48, generator=generator) * torch.randn(90, 1, generator=generator).exp()).to(device)
    upstream = torch.randn(90, 70, generator=generator).bfloat16().to(device)
    found = {}
    for provider in ("torch", "triton"):
        for masters in (torch.bfloat16, torch.float32):
            monkeypatch.setenv("SHOESTRING_OPS", f"wta_crs={provider}")
            weight = torch.zeros(70, 48, dtype=masters, device=device, requires_grad=True)
            torch.manual_seed(3)
            with torch.autocast(device, dtype=torch.bfloat16):
                y = sampled_linear(x.to(masters), weight, None, 0.3)
            y.backward(upstream)
            assert providers.used["wta_crs"] == provider
            assert weight.grad.dtype == masters
            found[provider, masters] = weight.grad
    for masters in (torch.bfloat16, torch.float32):
        assert found["torch", masters].any()
        assert distance(found["triton", masters], found["torch", masters]) < 8e-3


def test_it_is_an_operation_that_a_compiler_can_keep(provider, device):
    given = (*numbers(SIZES[1], torch.bfloat16, device), torch.float32)
    torch.library.opcheck(gathered_product_op, given)

    def twice(grad: Tensor, rows: Tensor, kept: Tensor) -> Tensor:
        return gathered_product(grad * 2, rows, kept, torch.float32) + 1

    torch.compiler.reset()
    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given[:3]), twice(*given[:3]))
    assert providers.used["wta_crs"] == provider


@pytest.mark.gpu
def test_offsets_pass_two_to_the_31st(monkeypatch):
    monkeypatch.setenv("SHOESTRING_OPS", "wta_crs=triton")
    grad = torch.zeros(600_000, 4096, dtype=torch.bfloat16, device="cuda")
    rows = torch.tensor([599_999, 3, 524_289], device="cuda")
    grad[rows] = torch.randn(3, 4096, device="cuda").bfloat16()
    kept = torch.randn(3, 64, device="cuda").bfloat16()
    product = gathered_product(grad, rows, kept, torch.float32)
    assert distance(product, exact(grad[rows], torch.arange(3), kept)) < SUMMED
