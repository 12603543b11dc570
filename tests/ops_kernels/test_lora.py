"""LoRA's linear layer: PyTorch's path and the kernels against float64 by the formula, with dropout's mask."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from shoestring.ops import lora, lora_dropout, lora_registered, providers
from shoestring.ops.kernels import lora as kernels
from shoestring.ops.lora import Projection, lora_linear
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .harness import TOLERANCE, Guarded, distance
from .interpreter import reversed_programs

KERNELS = ("lora_down", "lora_up_backward", "lora_down_backward")
# of this p exactly 19661 of 65536 are dropped
P, SEED, SCALE = 0.3, -987_654_321, 65536 / (65536 - 19661)
SHAPES = ((20, 64), (70, 64), (70,), (2, 64), (70, 2))  # of x, W, bias, A and B


def kept(rows: int, columns: int, seed: int = SEED, dropped: int = 19661) -> Tensor:
    """The mask by its definition, float64 [rows, columns]."""
    t, k = np.meshgrid(np.arange(rows, dtype=np.uint64), np.arange(columns, dtype=np.uint64), indexing="ij")
    x = ((t * ((columns + 1) // 2) + k // 2) * 0x9E3779B1 + (seed % 2**32)) % 2**32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
    x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
    x = x ^ (x >> 16)
    half = np.where(k % 2 == 0, x & 0xFFFF, x >> 16).astype(np.int64)
    signed = np.where(half >= 32768, half - 65536, half)
    return torch.from_numpy((signed >= dropped - 32768).astype(np.float64))


def draw(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(device, dtype)


def ask_for(monkeypatch: pytest.MonkeyPatch, provider: str) -> None:
    monkeypatch.setenv("SHOESTRING_OPS", ",".join(f"{name}={provider}" for name in KERNELS))
    monkeypatch.setattr(lora_dropout, "draw_seed", lambda: torch.tensor(SEED))
    providers.used.clear()


def exact(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor, g: Tensor, p: float) -> list[Tensor]:
    """y, dx, da, db in float64, of flat x and g, with scaling 0.7."""
    x, w, bias, a, b, g = (t.detach().double().cpu() for t in (x, w, bias, a, b, g))
    mask = kept(*x.shape) * SCALE if p else torch.ones_like(x)
    seen = x * mask
    dh = 0.7 * g @ b
    return [
        x @ w.t() + bias + 0.7 * seen @ a.t() @ b.t(),
        g @ w + mask * (dh @ a),
        dh.t() @ seen,
        0.7 * g.t() @ (seen @ a.t()),
    ]


@pytest.mark.parametrize(
    ("provider", "dtype"),
    [
        ("torch", torch.float32),
        ("torch", torch.float16),
        ("torch", torch.bfloat16),
        ("triton", torch.float16),
        ("triton", torch.bfloat16),
    ],
)
@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize(
    ("rows", "width", "out", "rank"), [(17, 33, 50, 1), (66, 130, 600, 8), (1, 1000, 7, 16)]
)
def test_output_and_gradients(rows, width, out, rank, p, provider, dtype, device, monkeypatch) -> None:
    ask_for(monkeypatch, provider)
    x, w, bias = (draw(device, dtype, *shape) for shape in ((rows, width), (out, width), (out,)))
    a, b, g = (draw(device, dtype, *shape) for shape in ((rank, width), (out, rank), (rows, out)))
    for leaf in (x, a, b):
        leaf.requires_grad_()
    y = lora_linear(x, Projection(w, bias, a, b, 0.7, p))
    y.backward(g)
    ran = {"lora_down", "lora_down_backward"} if p and dtype.itemsize == 2 else set()
    ran |= {"lora_up_backward"} if rows > 1 and dtype.itemsize == 2 else set()
    assert providers.used == dict.fromkeys(ran, provider)
    for value, wanted in zip((y, x.grad, a.grad, b.grad), exact(x, w, bias, a, b, g, p), strict=True):
        assert value.dtype == dtype
        assert distance(value, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("provider", ["torch", "triton"])
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_layouts(layout, provider, device, monkeypatch) -> None:
    ask_for(monkeypatch, provider)
    dtype = torch.bfloat16
    if layout == "transposed":
        x, g = draw(device, dtype, 130, 66).t(), draw(device, dtype, 200, 66).t()
    elif layout == "sliced":
        x, g = draw(device, dtype, 66, 150)[:, 7:137], draw(device, dtype, 66, 300)[:, 50:250]
    else:
        x = draw(device, dtype, 130).expand(66, 130)
        g = draw(device, dtype, 1).expand(66, 200)
    w, bias = draw(device, dtype, 200, 130), draw(device, dtype, 200)
    a, b = (
        draw(device, torch.float32, 4, 130).requires_grad_(),
        draw(device, torch.float32, 200, 4).requires_grad_(),
    )
    leaf = x.detach().requires_grad_()
    y = lora_linear(leaf, Projection(w, bias, a, b, 0.7, P))
    y.backward(g)
    assert set(providers.used) == set(KERNELS)
    assert set(providers.used.values()) == {provider}
    for value, wanted in zip((y, leaf.grad, a.grad, b.grad), exact(x, w, bias, a, b, g, P), strict=True):
        assert distance(value, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_write_all_of_their_outputs_and_no_more(dtype, device) -> None:
    rows, columns, rank = 70, 131, 5
    x, a, dh = (draw(device, dtype, *shape) for shape in ((rows, columns), (rank, columns), (rows, rank)))
    guard = Guarded()
    h = guard.empty((rows, rank), dtype, device)
    dx, da = guard.like(x), guard.empty((1, rank, columns), torch.float32, device)
    dh_parts = guard.empty((1, rows, rank), torch.float32, device)
    db_parts = guard.empty((1, columns, rank), torch.float32, device)
    common = {"RANK": 16, "PRECISION": "ieee" if dtype == torch.float32 else "tf32"}
    least = lora_dropout.threshold(P) - 32768
    kernels.down_kernel[(2,)](
        x, a, h, rows, columns, rank, columns, SEED, least, BLOCK_T=64, BLOCK_K=64, **common
    )
    kernels.down_backward_kernel[(1, 2)](
        x, dh, a, dx, da, rows, columns, rank, columns, SEED, least,
        ROWS=128, BLOCK_T=32, BLOCK_K=128, WANTS_X=True, **common,
    )  # fmt: skip
    kernels.up_backward_kernel[(1, 1)](
        x, a.t().contiguous(), dh, dh_parts, db_parts, rows, columns, rank, columns, rank, 0.7,
        ROWS=128, BLOCK_T=32, BLOCK_N=256, **common,
    )  # fmt: skip
    guard.check()
    wide, mask = [t.double().cpu() for t in (x, a, dh)], kept(rows, columns)
    x64, a64, dh64 = wide
    bound = TOLERANCE[dtype]
    assert distance(h, (x64 * mask) @ a64.t()) < bound
    assert distance(dx, x64 + mask * (dh64 @ a64)) < bound
    assert distance(da[0], dh64.t() @ (x64 * mask)) < 1e-6
    assert distance(dh_parts[0], 0.7 * x64 @ a64.t()) < 1e-6
    assert distance(db_parts[0], 0.7 * x64.t() @ dh64) < 1e-6


def test_results_do_not_depend_on_the_order_of_programs(device, monkeypatch) -> None:
    if device != "cpu":
        pytest.skip("the order is the GPU's there")
    monkeypatch.setattr(kernels, "DOWN_ROWS", 32)
    monkeypatch.setattr(kernels, "UP_ROWS", 32)
    dtype = torch.bfloat16
    x, a, dh = (draw(device, dtype, *shape) for shape in ((70, 520), (4, 520), (70, 4)))

    def run() -> list[Tensor]:
        dx = x.clone()
        da = kernels.down_backward(x, dh, a, dx, P, SEED)
        return [kernels.down(x, a, P, SEED), da, dx, *kernels.up_backward(x, a.t().contiguous(), dh, 0.7)]

    forward = run()
    with reversed_programs():
        backward = run()
    assert all(torch.equal(one, other) for one, other in zip(forward, backward, strict=True))
    x64, dh64 = x.double(), dh.double()
    assert distance(forward[1], dh64.t() @ (x64 * kept(70, 520))) < 1e-6  # of three programs over rows
    assert distance(forward[4], 0.7 * x64.t() @ dh64) < 1e-6


@pytest.mark.parametrize("provider", ["torch", "triton"])
def test_nothing_zeros_and_what_is_not_finite(provider, device, monkeypatch) -> None:
    ask_for(monkeypatch, provider)
    dtype = torch.bfloat16
    w, a, b = draw(device, dtype, 40, 64), draw(device, dtype, 4, 64), draw(device, dtype, 40, 4)
    a.requires_grad_()
    part = Projection(w, None, a, b.requires_grad_(), 1.0, P)
    none = lora_linear(draw(device, dtype, 0, 64).requires_grad_(), part)
    none.sum().backward()
    assert none.shape == (0, 40)
    assert bool((a.grad == 0).all() & (b.grad == 0).all())
    assert bool((lora_linear(torch.zeros(3, 64, device=device, dtype=dtype), part) == 0).all())
    mask = kept(4, 64)[2]
    for bad in (float("nan"), float("inf")):
        for place, seen in ((int(mask.argmin()), False), (int(mask.argmax()), True)):
            x = draw(device, dtype, 4, 64)
            x[2, place] = bad
            _, h = lora.forward_group(x, [part], SEED)
            finite = torch.isfinite(h).all(1)
            assert finite.tolist() == [True, True, not seen, True]  # what is dropped is not looked at


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_mask_is_the_hash_by_its_definition(dtype, device, monkeypatch) -> None:
    monkeypatch.setattr(lora_dropout, "_CHUNK", 640)  # several runs of rows
    for rows, columns in ((1, 1), (17, 33), (9, 1000), (40, 64)):
        x = draw(device, dtype, rows, columns)
        for seed in (SEED, 0, 1, 2**31 - 1):
            assert torch.equal(
                lora_dropout.zeroed(x, P, seed).cpu(), x.cpu() * kept(rows, columns, seed).to(dtype)
            )
    assert torch.equal(lora_dropout.zeroed(x, 0.0, SEED), x)


def test_a_share_of_p_is_dropped_independently() -> None:
    count = 512 * 512
    for p in (0.01, 0.1, 0.5, 0.9):
        one, other = (lora_dropout.zeroed(torch.ones(512, 512), p, seed) for seed in (11, 12))
        spread = (p * (1 - p) / count) ** 0.5
        assert abs(1 - float(one.mean()) - p) < 4 * spread + 1e-5
        assert float(one.mean()) * lora_dropout.upscale(p) == pytest.approx(1, abs=5 * spread / (1 - p))
        pairs = [(one, other), (one[1:], one[:-1]), (one[:, 1:], one[:, :-1]), (one[:, ::2], one[:, 1::2])]
        for left, right in pairs:
            both = float(((left == 0) & (right == 0)).double().mean())
            assert abs(both - p * p) < 5 * (p * p / left.numel()) ** 0.5 + 1e-4


def test_seeds_come_from_the_cpu_generator() -> None:
    torch.manual_seed(3)
    first = [int(lora_dropout.draw_seed()) for _ in range(50)]
    torch.manual_seed(3)
    assert [int(lora_dropout.draw_seed()) for _ in range(50)] == first
    assert len(set(first)) == 50
    assert min(first) < -(2**30)
    assert max(first) > 2**30
    x, w, a, b = (torch.randn(shape) for shape in ((2, 8), (4, 8), (2, 8), (4, 2)))
    state = torch.get_rng_state()
    lora_linear(x, Projection(w, None, a, b))
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn without dropout
    lora_linear(x, Projection(w, None, a, b, 1.0, P))
    assert not torch.equal(torch.get_rng_state(), state)


def case(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, w, bias = draw(device, dtype, 2, 3, 6), draw(device, dtype, 5, 6), draw(device, dtype, 5)
    return (
        x.requires_grad_(),
        w,
        bias,
        draw(device, dtype, 2, 6).requires_grad_(),
        draw(device, dtype, 5, 2).requires_grad_(),
    )


@pytest.mark.parametrize("p", [0.0, P])
def test_gradients_by_differences(p, device, monkeypatch) -> None:
    seed = torch.tensor(SEED)
    monkeypatch.setattr(lora_dropout, "draw_seed", lambda: seed)
    x, w, bias, a, b = case(torch.float64, device)

    def registered(x: Tensor, part: Projection) -> Tensor:
        return lora_registered.lora_linear(x, part, seed if p else None)

    for operation in (lora_linear, registered):
        assert torch.autograd.gradcheck(
            lambda x, a, b, run=operation: run(x, Projection(w, bias, a, b, 0.7, p)), (x, a, b)
        )


@pytest.mark.parametrize("p", [0.0, P])
def test_the_operations_keep_the_rules_of_the_library(p, device) -> None:
    x, w, bias, a, b = case(torch.float32, device)
    seed = torch.tensor(SEED) if p else None
    rest: tuple[Any, ...] = (0.7, p, seed, *lora_registered._taken_apart(None))
    torch.library.opcheck(lora_registered.lora_linear_op, (x, w, bias, a, b, *rest))
    _, h = lora_registered.lora_linear_op(x, w, bias, a, b, *rest)
    plain = [t.detach() for t in (draw(device, torch.float32, 2, 3, 5), x, h, w, a, b)]
    for wants_x in (True, False):
        torch.library.opcheck(lora_registered.lora_linear_backward_op, (*plain, *rest, wants_x))


@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("provider", ["torch", "triton"])
def test_a_compiler_keeps_it_whole(provider, p, device, monkeypatch) -> None:
    monkeypatch.setenv("SHOESTRING_OPS", ",".join(f"{name}={provider}" for name in KERNELS))
    x, w, bias, a, b = (
        draw(device, torch.bfloat16, *s) for s in ((3, 20, 64), (70, 64), (70,), (2, 64), (70, 2))
    )

    def run(function: Any) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in (x, a, b)]
        torch.manual_seed(7)
        providers.used.clear()
        y = function(*leaves)
        y.square().sum().backward()
        assert set(providers.used) == (set(KERNELS) if p else {"lora_up_backward"})
        assert set(providers.used.values()) == {provider}
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    def layer(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_linear(x, Projection(w, bias, a, b, 0.7, p))

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(ours, eager) for ours, eager in zip(run(compiled), run(layer), strict=True))


def test_checkpointing_computes_the_same_mask_again(device) -> None:
    x, w, bias, a, b = (
        draw(device, torch.float32, *s) for s in ((20, 64), (70, 64), (70,), (2, 64), (70, 2))
    )
    found = []
    for kept_whole in (True, False):
        leaves = [t.detach().clone().requires_grad_() for t in (x, a, b)]

        def layer(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return lora_linear(x, Projection(w, bias, a, b, 0.7, P)).sin()

        torch.manual_seed(7)
        y = layer(*leaves) if kept_whole else checkpoint(layer, *leaves, use_reentrant=False)
        torch.randint(0, 9, (3,))
        y.square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_neither_mask_nor_dropped_x_is_kept(device) -> None:
    x, w, _, a, b = (draw(device, torch.float32, *s) for s in SHAPES)
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        lora_linear(x.requires_grad_(), Projection(w, None, a.requires_grad_(), b.requires_grad_(), 0.7, P))
    assert sorted(shapes) == sorted([(20, 64), (20, 2), (70, 64), (2, 64), (70, 2)])


def test_one_pass_over_the_gradient_is_taken_where_it_moves_fewer_bytes() -> None:
    def once(rows: int, columns: int, rank: int, dtype: torch.dtype = torch.bfloat16) -> bool:
        return lora._reads_once(
            torch.empty(rows, columns, dtype=dtype, device="meta"), torch.empty(rows, rank)
        )

    assert once(8192, 4096, 16)
    assert once(8192, 14336, 8)
    assert not once(8192, 4096, 17)  # too many registers
    assert not once(8192, 64, 16)  # the partial sums of dh outweigh g
    assert not once(8, 4096, 16)
    assert not once(8192, 4096, 16, torch.float32)


@pytest.mark.gpu
def test_more_elements_than_int32_counts() -> None:
    rows, columns = (1 << 31) // 4096 + 64, 4096
    x = torch.zeros(rows, columns, device="cuda", dtype=torch.bfloat16)
    x[-1] = 1
    a = torch.ones(1, columns, device="cuda", dtype=torch.bfloat16)
    h = kernels.down(x, a, 0.5, SEED)
    assert 1800 < float(h[-1]) < 2300
    assert float(h[:-1].abs().max()) == 0
    dh = torch.zeros(rows, 1, device="cuda", dtype=torch.bfloat16)
    dh[-1] = 1
    da = kernels.down_backward(x, dh, a, x, 0.5, SEED)
    assert float(da.sum()) == float(x[-1].sum() - columns)
