"""The parts of a low-rank step: both providers against the formulas in float64, on every layout and edge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shoestring.ops import low_rank, providers
from shoestring.ops.rounding import PERIOD, noise_key, noise_start, noise_tile
from torch import Tensor

from .harness import TOLERANCE, Guarded, distance

PROVIDERS = pytest.mark.parametrize("provider", ["torch", "triton"])
SHAPES = [(1, 1, 1), (1, 17, 5), (2, 5, 17), (1, 130, 70), (1, 33, 1000)]
BETAS, EPS = (0.9, 0.999), 1e-6


@pytest.fixture(autouse=True)
def _asked_for(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    wanted = getattr(request.node, "callspec", None) and request.node.callspec.params.get("provider")
    if not wanted:
        yield
        return
    monkeypatch.setenv("SHOESTRING_OPS", f"low_rank={wanted}")
    providers.used.pop("low_rank", None)
    yield
    assert providers.used["low_rank"] == wanted


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(device, dtype)


def layouts(tensor: Tensor) -> list[Tensor]:
    """The same numbers [B, m, n] in other places: transposed, and every second of a wider tensor."""
    sparse = torch.zeros(*tensor.shape[:2], 2 * tensor.shape[2] + 1, dtype=tensor.dtype, device=tensor.device)
    sparse[:, :, 1::2] = tensor
    return [tensor, tensor.mT.contiguous().mT, sparse[:, :, 1::2]]


def tall(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[1] >= matrix.shape[2] else matrix.mT


def scale_of(
    grad: Tensor, projection: Tensor, m: Tensor, v: Tensor, norm: Tensor, options: dict[str, Any]
) -> tuple[Tensor, ...]:
    """(factors, moments, norm) of `apollo_factors` in float64, of a gradient scaled before all else."""
    grad, projection, m, v, norm = (t.double() for t in (grad, projection, m, v, norm))
    (b1, b2), limit, clip = options["betas"], options["limit"], float(options.get("grad_scale", 1.0))
    grad = clip * grad
    r = tall(grad) @ projection
    m, v = b1 * m + (1 - b1) * r, b2 * v + (1 - b2) * r * r
    n = m / (v.sqrt() + options["eps"])
    over = (2,) if options["per_channel"] else (1, 2)
    s = n.square().sum(over, keepdim=True).sqrt() / (r.square().sum(over, keepdim=True).sqrt() + 1e-8)
    s = s if grad.shape[1] >= grad.shape[2] else s.mT
    now = options["before"] * (s * grad).square().sum((1, 2), keepdim=True).sqrt()
    shrink = torch.ones_like(now)
    if limit is not None and not options["first"]:
        shrink = torch.where(now > limit * norm, limit * norm / now, 1.0)
    return clip * s * shrink * options["rate"], m, v, norm if limit is None else now * shrink


def factors_of(grad: Tensor, projection: Tensor, *state: Tensor, **given: Any) -> Tensor:
    """Both halves of APOLLO's first pass, as [B, m or 1, n or 1]."""
    squares = given["limit"] is not None
    found = low_rank.apollo_factors(low_rank.first_pass(grad, projection, squares=squares), *state, **given)
    return found if grad.shape[1] >= grad.shape[2] else found.mT


def options(**changed: Any) -> dict[str, Any]:
    return {
        "betas": BETAS, "eps": EPS, "per_channel": True, "limit": 1.01, "before": 1.3, "first": False,
        "rate": -0.02, **changed,
    }  # fmt: skip


@PROVIDERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_project_is_the_product_with_the_upright_gradient(provider, dtype, device):
    for shape in SHAPES:
        short = min(shape[1:])
        for rank in sorted({1, min(3, short), min(40, short)}):
            grad, basis = (
                normal(*shape, dtype=dtype, device=device),
                normal(shape[0], short, rank, dtype=dtype),
            )
            basis = basis.to(device)
            exact = tall(grad).double() @ basis.double()
            for g in layouts(grad) if shape == (1, 130, 70) else [grad]:
                found = low_rank.project(g, basis)
                assert found.dtype == torch.float32
                assert distance(found, exact) < TOLERANCE[dtype] * (1 if provider == "torch" else 0.2) + 3e-7


@PROVIDERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_pass_finds_the_squares_of_each_channel(provider, dtype, device):
    for shape in (*SHAPES, (1, 600, 20), (1, 20, 600)):  # the last two are shared out over programs
        grad = normal(*shape, dtype=dtype, device=device)
        for g in layouts(grad) if shape == (1, 130, 70) else [grad]:
            found = low_rank.first_pass(g, normal(1, min(shape[1:]), 1, dtype=dtype, device=device))
            assert found.squares.dtype == torch.float32
            assert distance(found.squares.sum(0), tall(grad).double().square().sum(2)) < 1e-6
            whole = found.summed()
            assert torch.equal(whole.projected(), found.projected())
            assert distance(whole.squares, tall(grad).double().square().sum(2).unsqueeze(0)) < 1e-6


@PROVIDERS
@pytest.mark.parametrize("per_channel", [True, False])
def test_factors_are_those_of_the_formula_and_the_state_moves(provider, per_channel, device):
    grads = [normal(*shape, device=device) for shape in SHAPES]
    grads += [
        *layouts(grads[3])[1:],
        grads[3][:, :1].expand(1, 130, 70),
        grads[3][:, :, :1].expand(1, 130, 70),
    ]
    for i, grad in enumerate(grads):
        short, long = sorted(grad.shape[1:])
        rank = min(short, 6 if per_channel else 1)
        shared = i % 2  # one projection for all matrices of a stack
        projection = normal(1 if shared else len(grad), short, rank, device=device)
        clipped = {"grad_scale": torch.tensor(0.3, device=device)}
        for changed in ({"first": True}, {"limit": None}, clipped) if i in (1, 2) else ({},):
            m = 0.1 * normal(len(grad), long, rank, seed=1, device=device)
            v = normal(len(grad), long, rank, seed=2, device=device).square()
            norm = torch.full((len(grad), 1, 1), 1e-2 if i % 3 else 1e4, device=device)
            given = options(per_channel=per_channel, **changed)
            exact = scale_of(grad, projection, m, v, norm, given)
            found = factors_of(grad, projection, m, v, norm, **given)
            channels = (short > 0 and per_channel) * long or 1
            assert found.shape in ((len(grad), channels, 1), (len(grad), 1, channels))
            assert (grad * found).shape == grad.shape
            for ours, wanted in zip((found, m, v, norm), exact, strict=True):
                assert distance(ours, wanted) < 5e-6, (grad.shape, changed)


@PROVIDERS
def test_factors_of_a_gradient_in_bfloat16(provider, device):
    """Ranks that go to tensor cores, above one tile of them, and shared out over programs."""
    for shape, rank in (((1, 260, 264), 258), ((2, 40, 30), 16), ((1, 520, 530), 16), ((1, 520, 540), 1)):
        grad = normal(*shape, dtype=torch.bfloat16, device=device)
        short, long = sorted(shape[1:])
        projection = normal(shape[0], short, rank, dtype=torch.bfloat16, device=device)
        m, v = torch.zeros(2, shape[0], long, rank, device=device)
        norm = torch.ones(shape[0], 1, 1, device=device)
        given = options(per_channel=rank > 1)
        exact = scale_of(grad, projection, m, v, norm, given)
        found = factors_of(grad, projection, m, v, norm, **given)
        for ours, wanted in zip((found, m, v, norm), exact, strict=True):
            assert distance(ours, wanted) < (8e-3 if provider == "torch" else 1e-5)


@PROVIDERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_subspace_step_is_adam_without_correction(provider, dtype, device):
    for rows, rank in ((1, 1), (17, 5), (33, 40), (3, 1030)):
        r, m, v = (normal(2, rows, rank, seed=s, device=device) for s in range(3))
        v = v.square()
        exact_m, exact_v = 0.9 * m.double() + 0.1 * r.double(), 0.999 * v.double() + 0.001 * r.double() ** 2
        for given in (r, r.mT.contiguous().mT):
            ours_m, ours_v = m.clone(), v.clone()
            found = low_rank.subspace_step(
                given, ours_m, ours_v, betas=BETAS, eps=EPS, factor=-0.3, dtype=dtype
            )
            assert found.dtype == dtype
            assert distance(found, -0.3 * exact_m / (exact_v.sqrt() + EPS)) < TOLERANCE[dtype]
            assert max(distance(ours_m, exact_m), distance(ours_v, exact_v)) < 1e-6


def written(weight: Tensor, exact: Tensor, noise: low_rank.Noise | None) -> None:
    """AssertionError where `weight` is not `exact` (float64) rounded by the bits at `noise` or to nearest."""
    if noise is None:
        assert distance(weight, exact) < TOLERANCE[weight.dtype] / 2
        return
    places = (torch.arange(exact.numel()) + noise[1]) % PERIOD
    bits = exact.float().cpu().contiguous().view(torch.int32) + noise_tile(noise[0])[places].view(exact.shape)
    wanted = (bits & -65536).view(torch.float32)
    got = weight.detach().float().cpu()
    same = got == wanted
    # what float32 computes in another order may fall on the other side of a border, and only by one place
    assert float(same.float().mean()) > 0.995 or int((~same).sum()) <= 1
    assert bool(((got - wanted).abs() <= wanted.abs() * 2**-7 + 1e-5).all())


NOISES = [None, (noise_key(3, 5), noise_start(2)), (-5, PERIOD - 3)]


def places_of(shape: tuple[int, ...], dtype: torch.dtype, device: str, guard: Guarded) -> list[Tensor]:
    """A weight to write to: by itself between guards, and inside another tensor."""
    start = normal(*shape, seed=9, dtype=dtype, device=device)
    within = layouts(start)[1:] if shape == (1, 130, 70) else []
    return [guard.like(start), *within]


@PROVIDERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_add_scaled_writes_what_the_formula_says(provider, dtype, device):
    for shape in SHAPES:
        grad = normal(*shape, dtype=dtype, device=device)
        for by in ((shape[0], 1, 1), (shape[0], shape[1], 1), (shape[0], 1, shape[2])):
            factors = 0.1 * normal(*by, device=device)
            for noise in NOISES[: 3 if by[1] > 1 else 2 : 2] if dtype == torch.bfloat16 else [None]:
                guard = Guarded()
                for weight, g in zip(places_of(shape, dtype, device, guard), layouts(grad), strict=False):
                    exact = 0.9 * weight.double() + factors.double() * g.double()
                    low_rank.add_scaled(weight, g, factors, keep=0.9, noise=noise)
                    written(weight, exact, noise)
                guard.check()


@PROVIDERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_product_writes_what_the_formula_says(provider, dtype, device):
    for shape in SHAPES:
        for rank in (1, 80) if shape[2] > 20 else (7,):
            left = normal(shape[0], shape[1], rank, device=device)
            right = 0.1 * normal(shape[0], shape[2], rank, device=device)
            for noise in NOISES[1:2] if dtype == torch.bfloat16 else [None]:
                guard = Guarded()
                for weight in places_of(shape, dtype, device, guard):
                    exact = 0.9 * weight.double() + left.double() @ right.double().mT
                    low_rank.add_product(weight, left, right, keep=0.9, noise=noise)
                    written(weight, exact, noise)
                guard.check()
    # In bfloat16 the kernel sums in float32, and PyTorch rounds the product.
    left, right = (normal(1, side, 64, dtype=torch.bfloat16, device=device) for side in (150, 140))
    weight = normal(1, 150, 140, device=device)
    exact = weight.double() + left.double() @ right.double().mT
    low_rank.add_product(weight, left, right, keep=1.0, noise=None)
    assert distance(weight, exact) < (8e-3 if provider == "torch" else 1e-6)


@PROVIDERS
@pytest.mark.parametrize(
    ("rule", "dtype"),
    [
        ("sign_sgd", torch.float32),
        ("sign_sgd", torch.bfloat16),
        ("sgd", torch.bfloat16),
        ("none", torch.float32),
    ],
)
def test_add_columns_is_adam_on_a_run_of_columns(provider, rule, dtype, device):
    given = {"keep": 0.9, "rate": 0.02, "free": 0.005, "rule": rule, "betas": BETAS, "eps": 1e-8, "step": 4}
    clip = 0.25 if rule != "sign_sgd" or dtype == torch.bfloat16 else 1.0
    if clip != 1.0:
        given["grad_scale"] = torch.tensor(clip, device=device)
    for shape, first, count in (
        ((1, 1, 1), 0, 1), ((2, 5, 17), 3, 4), ((1, 17, 5), 4, 3), ((1, 130, 70), 60, 70),
        ((1, 33, 300), 7, 0), ((1, 20, 70), 69, 5),
    ):  # fmt: skip
        grad = normal(*shape, dtype=dtype, device=device)
        active = [(first + j) % shape[2] for j in range(count)]
        order = sorted(active)
        for noise in NOISES[1:2] if dtype == torch.bfloat16 else [None]:
            guard = Guarded()
            for weight, g in zip(places_of(shape, dtype, device, guard), layouts(grad), strict=False):
                m = guard.like(normal(shape[0], shape[1], count, seed=1, device=device))
                v = guard.like(normal(shape[0], shape[1], count, seed=2, device=device).square())
                part = clip * g.double()[:, :, order]
                exact_m, exact_v = 0.9 * m.double() + 0.1 * part, 0.999 * v.double() + 0.001 * part**2
                step = exact_m / (1 - 0.9**4) / ((exact_v / (1 - 0.999**4)).sqrt() + 1e-8)
                rest = {"sign_sgd": g.double().sign(), "sgd": clip * g.double(), "none": 0 * g.double()}[rule]
                exact = 0.9 * weight.double() - 0.005 * rest
                exact[:, :, order] = 0.9 * weight.double()[:, :, order] - 0.02 * step
                low_rank.add_columns(weight, g, m, v, first, **given, noise=noise)
                written(weight, exact, noise)
                assert max(distance(m, exact_m), distance(v, exact_v)) < 1e-6
            guard.check()


@PROVIDERS
def test_zeros_stay_zeros_and_what_is_not_finite_is_seen(provider, device):
    projection = normal(1, 30, 4, device=device)
    for bad, per_channel in ((0.0, True), (float("nan"), True), (float("inf"), False)):
        grad = torch.zeros(1, 40, 30, device=device)
        grad[0, 3, 7] = bad
        m, v = torch.zeros(2, 1, 40, 4, device=device)
        norm = torch.ones(1, 1, 1, device=device)
        found = factors_of(grad, projection, m, v, norm, **options(per_channel=per_channel))
        weight = torch.ones(1, 40, 30, dtype=torch.bfloat16, device=device)
        low_rank.add_scaled(weight, grad, found, keep=1.0, noise=NOISES[1])
        assert bool((weight == 1).all()) == (bad == 0)
        assert bool(torch.isfinite(norm)) == (bad == 0)
        if bad != 0:
            assert not bool(torch.isfinite(weight[0, 3, 7]))
    weight = torch.ones(1, 3, 5, dtype=torch.bfloat16, device=device)
    m, v = torch.zeros(2, 1, 3, 2, device=device)
    low_rank.add_columns(
        weight, 0 * weight, m, v, 1, keep=1.0, rate=1.0, free=1.0, rule="sign_sgd", betas=BETAS, eps=1e-8,
        step=1, noise=None,
    )  # fmt: skip
    assert bool((weight == 1).all())


@PROVIDERS
def test_nothing_is_done_to_nothing(provider, device):
    none = torch.empty(0, 4, 3, device=device)
    low_rank.add_scaled(none, none, torch.empty(0, 4, 1, device=device), keep=1.0, noise=None)
    low_rank.add_product(none, none[:, :, :2], none[:, :3, :2], keep=1.0, noise=None)
    assert low_rank.project(none, none[:, :3, :2]).shape == (0, 4, 2)


def test_the_order_of_programs_does_not_matter(device, monkeypatch):
    if device == "cuda":
        pytest.skip("the interpreter alone has an order")
    from .interpreter import reversed_programs

    monkeypatch.setenv("SHOESTRING_OPS", "low_rank=triton")

    def everything() -> list[Tensor]:
        grad, projection = normal(1, 265, 260), normal(1, 260, 20)  # shared out over two programs
        m, v, m2, v2 = torch.zeros(4, 1, 265, 20)
        norm, weight = torch.ones(1, 1, 1), normal(1, 140, 150, dtype=torch.bfloat16)
        found = factors_of(grad, projection, m, v, norm, **options())
        low_rank.add_scaled(weight, grad[:, :140, :150], found[:, :140], keep=0.9, noise=NOISES[1])
        r = low_rank.project(grad, projection)
        step = low_rank.subspace_step(r, m2, v2, betas=BETAS, eps=EPS, factor=1.0, dtype=torch.float32)
        low_rank.add_product(weight, projection[:, :140], step[:, :150], keep=0.9, noise=NOISES[1])
        return [found, m, v, norm, weight, m2, v2]

    forward = everything()
    with reversed_programs():
        backward = everything()
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))


def test_they_are_operations_that_a_compiler_can_keep(device):
    grad, projection = normal(1, 12, 20, device=device), normal(1, 12, 3, device=device)
    m, v = torch.zeros(2, 1, 20, 3, device=device)
    norm, weight = torch.ones(1, 1, 1, device=device), normal(1, 12, 20, seed=1, device=device)
    m2, v2 = torch.zeros(2, 1, 12, 4, device=device)
    for op, given in (
        (low_rank.first_pass_op, (grad, projection, True)),
        (low_rank.first_pass_op, (grad, projection, False)),
        (
            low_rank.apollo_factors_op,
            (m + 1, m[:, :, 0] + 1, m, v, norm, *BETAS, EPS, True, 1.01, 1.0, False, 1.0, None),
        ),
        (
            low_rank.apollo_factors_op,
            (m + 1, m[:, 0, :0], m, v, norm, *BETAS, EPS, False, None, 1.0, True, 1.0, norm[0, 0, 0]),
        ),
        (low_rank.subspace_step_op, (m + 1, m, v, *BETAS, EPS, 1.0, torch.bfloat16)),
        (low_rank.add_scaled_op, (weight, grad, norm, 0.9, None)),
        (low_rank.add_product_op, (weight.bfloat16(), projection, m + 1, 0.9, [3, 5])),
        (
            low_rank.add_columns_op,
            (weight, grad, m2, v2, 3, 1.0, 0.1, 0.1, "sgd", *BETAS, EPS, 2, None, None),
        ),
    ):
        torch.library.opcheck(op, given)

    def step(
        weight: Tensor, grad: Tensor, m: Tensor, v: Tensor, norm: Tensor, m2: Tensor, v2: Tensor
    ) -> Tensor:
        found = factors_of(grad, projection, m, v, norm, **options())
        low_rank.add_scaled(weight, grad, found, keep=0.9, noise=None)
        r = low_rank.project(grad, projection)
        inside = low_rank.subspace_step(r, m, v, betas=BETAS, eps=EPS, factor=0.1, dtype=torch.float32)
        low_rank.add_product(weight, projection, inside, keep=0.9, noise=None)
        low_rank.add_columns(
            weight, grad, m2, v2, 3, keep=1.0, rate=0.1, free=0.1, rule="sign_sgd", betas=BETAS, eps=EPS,
            step=2, noise=None,
        )  # fmt: skip
        return weight

    state = (weight, grad, m, v, norm, m2, v2)
    eager, compiled = ([t.clone() for t in state] for _ in range(2))
    step(*eager)
    torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


@pytest.mark.gpu
def test_offsets_pass_two_to_the_thirty_first(monkeypatch):
    monkeypatch.setenv("SHOESTRING_OPS", "low_rank=triton")
    rows = (1 << 31) // 16384 + 64
    grad = torch.zeros(1, rows, 16384, dtype=torch.bfloat16, device="cuda")
    grad[:, -64:] = 1.0
    weight = torch.ones_like(grad)
    low_rank.add_scaled(weight, grad, torch.ones(1, rows, 1, device="cuda"), keep=1.0, noise=None)
    assert bool((weight[:, -64:] == 2).all() & (weight[:, :-64:4096] == 1).all())
    ones = torch.ones(1, 16384, 16, dtype=torch.bfloat16, device="cuda")
    found = low_rank.project(grad, ones)
    assert bool((found[:, -64:] == 16384).all() & (found[:, :-64] == 0).all())
    left = torch.ones(1, rows, 16, dtype=torch.bfloat16, device="cuda")
    low_rank.add_product(weight, left, ones, keep=1.0, noise=None)
    assert bool((weight[:, -64:] == 18).all() & (weight[:, :-64:4096] == 17).all())
