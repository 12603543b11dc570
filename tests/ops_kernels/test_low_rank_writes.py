"""What the parts of a low-rank step that write weights owe to others: autograd, NaN, types, any size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from shoestring.ops import low_rank, providers
from shoestring.ops.kernels import low_rank_write
from shoestring.ops.low_rank_torch import sign_of
from shoestring.optimizers.frugal import FRUGAL
from torch import Tensor, nn
from triton.runtime.jit import KernelInterface

PROVIDERS = pytest.mark.parametrize("provider", ["torch", "triton"])
NOISE = (12345, 7)
COLUMNS: dict[str, Any] = {
    "keep": 1.0, "rate": 0.1, "free": 0.5, "betas": (0.9, 0.999), "eps": 1e-8, "step": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _asked_for(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    wanted = getattr(request.node, "callspec", None) and request.node.callspec.params.get("provider")
    if wanted:
        monkeypatch.setenv("SHOESTRING_OPS", f"low_rank={wanted}")
        providers.used.pop("low_rank", None)
    yield
    if wanted:
        assert providers.used["low_rank"] == wanted


def drawn(device: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


def scaled(weight: Tensor, noise: low_rank.Noise | None) -> list[Tensor]:
    grad, factors = drawn(weight.device.type, 1, 9, 6), drawn(weight.device.type, 1, 9, 1)
    low_rank.add_scaled(weight, grad.to(weight.dtype), factors, keep=0.9, noise=noise)
    return []


def product(weight: Tensor, noise: low_rank.Noise | None) -> list[Tensor]:
    sides = (drawn(weight.device.type, 1, n, 2) for n in (9, 6))
    low_rank.add_product(weight, *sides, keep=0.9, noise=noise)
    return []


def columns(weight: Tensor, noise: low_rank.Noise | None) -> list[Tensor]:
    moments = [torch.zeros(1, 9, 2, device=weight.device) for _ in range(2)]
    grad = drawn(weight.device.type, 1, 9, 6).to(weight.dtype)
    low_rank.add_columns(weight, grad, *moments, 3, **COLUMNS | {"keep": 0.9}, rule="sgd", noise=noise)
    return moments


WRITERS = pytest.mark.parametrize("write", [scaled, product, columns])


@PROVIDERS
@WRITERS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autograd_learns_what_was_written(provider, write: Callable[..., list[Tensor]], dtype, device):
    """A graph made before the step must not go backward with the weights of after it."""
    weight = nn.Parameter(drawn(device, 9, 6, dtype=dtype))
    x = drawn(device, 4, 6, dtype=dtype).requires_grad_()
    loss = (x @ weight.mT).square().sum()
    before = weight._version
    with torch.no_grad():
        moments = write(weight.unsqueeze(0), NOISE)
    assert weight._version > before
    assert all(moment._version > 0 for moment in moments)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@PROVIDERS
def test_moments_of_the_small_step_are_marked_too(provider, device):
    m, v = (torch.zeros(1, 9, 2, device=device) for _ in range(2))
    norm = torch.ones(1, 1, 1, device=device)
    found = low_rank.first_pass(drawn(device, 1, 9, 6), drawn(device, 1, 6, 2))
    given = {"betas": (0.9, 0.99), "eps": 1e-6}
    low_rank.apollo_factors(
        found, m, v, norm, **given, per_channel=True, limit=1.1, before=1.0, first=False, rate=0.1
    )
    assert min(m._version, v._version, norm._version) > 0
    before = m._version, v._version
    low_rank.subspace_step(found.projected(), m, v, **given, factor=1.0, dtype=torch.float32)
    assert m._version > before[0]
    assert v._version > before[1]


@PROVIDERS
@WRITERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_of_other_types_are_not_cut_to_bfloat16(provider, write, dtype, device):
    start = 1 + 0.01 * drawn(device, 1, 9, 6)
    random, nearest = start.to(dtype), start.to(dtype)
    write(random, NOISE)
    write(nearest, None)
    assert torch.equal(random, nearest)
    assert not torch.equal(random, random.bfloat16().to(dtype))


@PROVIDERS
@WRITERS
def test_a_small_decay_is_all_taken_off(provider, write, device):
    """A factor of float32 just below 1 is a multiple of 6e-8: of a decay of 1e-6 it would make 1.013e-6."""
    n, none = 1 << 14, torch.zeros(1, 128, 128, device=device)
    weight = torch.linspace(1, 2, n + 1, device=device)[1:].view(1, 128, 128).contiguous()
    before, keep = weight.double(), 1 - 1e-6
    if write is scaled:
        low_rank.add_scaled(weight, none, none[:, :1, :1].contiguous(), keep=keep, noise=None)
    elif write is product:
        low_rank.add_product(weight, none[:, :, :1], none[:, :, :1], keep=keep, noise=None)
    else:
        few = [torch.zeros(1, 128, 2, device=device) for _ in range(2)]
        low_rank.add_columns(weight, none, *few, 0, **COLUMNS | {"keep": keep}, rule="sign_sgd", noise=None)
    assert float((before - weight.double()).sum() / before.sum()) == pytest.approx(1e-6, rel=4e-3)


@PROVIDERS
@pytest.mark.parametrize("rule", ["sign_sgd", "sgd"])
def test_a_gradient_that_is_no_number_is_seen_in_the_columns_without_state(provider, rule, device):
    grad = torch.zeros(1, 9, 6, device=device)
    grad[0, 1, 5], grad[0, 2, 5], grad[0, 3, 5] = float("nan"), float("inf"), -2.0
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.ones(1, 9, 6, dtype=dtype, device=device)
        moments = [torch.zeros(1, 9, 2, device=device) for _ in range(2)]
        low_rank.add_columns(weight, grad.to(dtype), *moments, 0, **COLUMNS, rule=rule, noise=NOISE)
        assert bool(weight[0, 1, 5].isnan())
        assert int(weight.isnan().sum()) == 1
        if rule == "sign_sgd":
            assert weight[0, 2:5, 5].tolist() == [0.5, 1.5, 1.0]


def test_signs_are_torchs_but_for_nan() -> None:
    value = torch.tensor([3.0, -0.0, 0.0, -1e-40, float("inf"), -float("inf"), -3e38, -3e38])
    assert torch.equal(sign_of(value), value.sign())
    assert torch.equal(sign_of(value.bfloat16()), value.bfloat16().sign())
    value[0] = float("nan")
    assert bool(sign_of(value)[0].isnan())
    assert torch.equal(sign_of(value)[1:], value.sign()[1:])
    compiled = torch.compile(sign_of, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(value)[1:], value.sign()[1:])
    assert bool(compiled(value)[0].isnan())
    assert sign_of(torch.empty(0, 3)).shape == (0, 3)


@pytest.mark.parametrize(
    ("projection", "density"),
    # LAPACK finds no singular basis of what has a NaN
    [(p, d) for p in ("columns", "randk", "random", "blocks") for d in (0.0, 0.5)] + [("svd", 0.0)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_projection_of_frugal_passes_over_a_nan(projection, density, dtype) -> None:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(8, 6).to(dtype)) for _ in range(2)]
    optimizer = FRUGAL(
        [{"params": weights, "kind": "matrix"}], lr=0.1, density=density, projection=projection,
        state_free="sign_sgd",
    )  # fmt: skip
    for weight in weights:
        weight.grad = torch.ones_like(weight)
        weight.grad[3] = float("nan")
    optimizer.step()
    for weight in weights:
        assert bool(weight[3].isnan().all())


def test_a_matrix_as_large_as_a_vocabulary_fits_the_grid(device, monkeypatch) -> None:
    """CUDA takes 65,535 programs in the second and the third axis; the memory is not there, nor touched."""
    grids: list[tuple[int, ...]] = []

    def recorded(self: Any, grid: tuple[int, ...]) -> Any:
        grids.append(grid)
        return lambda *arguments, **options: None

    monkeypatch.setattr(KernelInterface, "__getitem__", recorded)
    one = torch.zeros(1, 1, 1, device=device)
    for rows, cols in ((1_048_576, 5376), (1_048_576, 3), (3, 40_000_000), (5, 7)):
        large = one.expand(1, rows, cols)
        low_rank_write.add_scaled(large, large, one, 1.0, None)
        few = one.expand(1, rows, 0)
        low_rank_write.columns(
            large, large, few, few, 0, keep=1.0, rate=1.0, free=1.0, rule=1, betas=(0.9, 0.99), eps=1e-8,
            step=1, noise=None,
        )  # fmt: skip
    assert len(grids) == 8
    for first, *others in grids:
        assert 0 < first < 1 << 31
        assert max(others) <= 65_535


@pytest.mark.gpu
def test_on_a_gpu_every_row_of_a_tall_matrix_is_written(monkeypatch) -> None:
    monkeypatch.setenv("SHOESTRING_OPS", "low_rank=triton")
    weight = torch.zeros(1, 600_000, 320, dtype=torch.bfloat16, device="cuda")
    grad = torch.ones_like(weight)
    low_rank.add_scaled(weight, grad, torch.ones(1, 1, 1, device="cuda"), keep=1.0, noise=None)
    assert bool((weight == 1).all())
    moments = [torch.zeros(1, 600_000, 0, device="cuda") for _ in range(2)]
    low_rank.add_columns(weight, grad, *moments, 0, **COLUMNS | {"free": 1.0}, rule="sign_sgd", noise=None)
    assert bool((weight == 0).all())
