"""Quantised optimizer steps: PyTorch's and the kernel's, both against the formulas in float64."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from shoestring.ops import codec, providers
from shoestring.ops.codec import LAWS, block_of, threshold_at
from shoestring.ops.quantised_step import quantised_step_op
from shoestring.ops.rounding import PERIOD, noise_tile
from shoestring.ops.step_call import folded
from torch import Tensor

from .harness import distance
from .step_job import BF16, FP32, SIZES, Job, codes_of, exact, top_of

PROVIDERS = ["torch", "native", "triton"]


def assert_kept(job: Job, i: int, value: Tensor, signed: bool) -> None:
    """The moment of tensor i is `value` (float64), in its type or in the code that the law demands."""
    found = job.moments(i, signed)
    if job.law is None:
        assert distance(found, value) < (1e-6 if job.moment == FP32 else 3e-3)
        return
    codes, scales = (job.first, job.first_scales) if signed else (job.second, job.second_scales)
    scale = torch.stack([b.abs().max() for b in value.split(block_of(job.law))])
    assert torch.allclose(scales[i].double().cpu(), scale, rtol=1e-6)
    share = value / scale.repeat_interleave(block_of(job.law))[: len(value)]
    got = codes_of(codes[i], len(value), job.law, signed)
    if job.law == "four" and len(value) % 2:
        assert int(codes[i][-1]) & 0xF0 == 0  # half a byte that nobody reads, the same from everyone
    threshold = 0.5 if signed else threshold_at(job.step)
    if job.law == "dynamic":
        table = codec.dynamic_table(signed).double()
        low = (torch.searchsorted(table, share, right=True) - 1).clamp(0, 254)
        place = low + (share - table[low]) / (table[low + 1] - table[low])
        lowest, highest = 0 if signed else 1, 255
    else:
        power = (1 if job.law == "linear" else 2) if signed else (2 if job.law == "linear" else 4)
        highest = top_of(job.law, signed)
        lowest = -highest if signed else 1
        place = share.sign() * share.abs() ** (1 / power) * highest
    # To the very code, but for values at the edge between two.
    low, high = ((place + threshold + d).floor().clamp(lowest, highest) for d in (-1e-3, 1e-3))
    assert bool(((got == low) | (got == high)).all())


CASES = [
    {"law": None},
    {"law": None, "moment": BF16, "weight": BF16, "grad": BF16},
    {"law": "companded"},
    {"law": "linear", "grad": BF16},
    {"law": "dynamic"},
    {"law": "four"},
    {"law": "companded", "weight": BF16, "grad": BF16, "mode": "sr"},
    {"law": "companded", "weight": BF16, "grad": BF16, "mode": "kahan"},
    {"law": "companded", "weight": BF16, "grad": FP32, "mode": "master"},
    {"law": "four", "weight": BF16, "grad": BF16, "mode": "sr"},
    {"law": None, "weight": BF16, "grad": BF16, "mode": "kahan"},
    {"law": None, "rule": "lion"},
    {"law": "companded", "rule": "lion", "weight": BF16, "grad": BF16, "mode": "sr"},
    {"law": "linear", "rule": "lion", "weight": BF16, "grad": BF16, "mode": "master"},
]


def named(case: dict[str, Any]) -> str:
    return " ".join(str(v).removeprefix("torch.") for v in case.values())


@pytest.fixture(params=PROVIDERS)
def provider(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SHOESTRING_OPS", f"quantised_step={request.param}")
    providers.used.pop("quantised_step", None)
    return request.param


@pytest.mark.parametrize("case", CASES, ids=named)
def test_a_step_is_the_formula(case, provider, device):
    job = Job(**case, device=device)
    before = [[t.clone() for t in part] for part in job.lists]
    wanted = [exact(job, i) for i in range(len(SIZES))]
    job.run()
    assert providers.used["quantised_step"] == provider
    tile = noise_tile(job.key).repeat(2)
    for i, (update, m, v) in enumerate(wanted):
        if not SIZES[i]:
            continue
        assert_kept(job, i, m, True)
        if job.rule == "adamw":
            assert_kept(job, i, v, False)
        old, new = before[0][i].double().cpu(), job.weights[i].double().cpu()
        noise = tile[job.starts[i] :][: SIZES[i]]
        if job.weight == FP32:
            assert distance(new, old + update) < 1e-6
        elif job.mode == "master":
            assert distance(job.extra[i], before[6][i].double().cpu() + update) < 1e-6
            assert torch.equal(job.weights[i], job.extra[i].to(BF16))
        elif job.mode == "kahan":
            target = before[6][i].double().cpu() + update
            assert share(job.weights[i], (old + target).float().to(BF16)) > 0.995
            rest = target - (new - old)
            assert share(job.extra[i], dithered(rest, noise)) > 0.9  # float32 of a difference
            assert distance(new + job.extra[i].double().cpu(), old + target) < 2e-5
        elif job.mode == "sr":
            assert share(job.weights[i], dithered(old + update, noise)) > 0.995
        else:
            assert share(job.weights[i], (old + update).float().to(BF16)) > 0.995


def dithered(value: Tensor, noise: Tensor) -> Tensor:
    """bfloat16 next to `value` (float64), away from zero where its cut part and the noise carry."""
    bits = value.float().view(torch.int32)
    return ((bits + noise) & -65536).view(torch.float32).to(BF16)


def share(ours: Tensor, other: Tensor) -> float:
    return float((ours.cpu() == other.cpu()).double().mean()) if len(ours) > 100 else 1.0


@pytest.mark.parametrize("law", [None, *LAWS])
def test_a_direction_is_the_formula(law, provider, device):
    job = Job(rule="direction", law=law, device=device)
    wanted = [exact(job, i) for i in range(len(SIZES))]
    job.run()
    assert providers.used["quantised_step"] == provider
    for i, (value, m, v) in enumerate(wanted):
        if SIZES[i]:
            assert distance(job.weights[i], value) < 2e-6
            assert_kept(job, i, m, True)
            assert_kept(job, i, v, False)


MIXED = [
    {"law": "companded", "weight": BF16, "grad": BF16, "mode": "sr"},
    {"law": "four", "weight": BF16, "grad": BF16, "mode": "kahan"},
]


@pytest.mark.parametrize("case", MIXED, ids=named)
def test_the_launch_leaves_no_trace(case, device, monkeypatch):
    """In any order of programs, together or each alone, aligned or not, however it is cut: the same bits."""
    from shoestring.ops.kernels import quantised_step as launcher

    monkeypatch.setenv("SHOESTRING_OPS", "quantised_step=triton")
    together = Job(**case, device=device)
    together.run()
    alone, askew = Job(**case, device=device), Job(**case, device=device, off=4)
    for i in range(len(SIZES)):
        alone.run(slice(i, i + 1))
    askew.run()
    cut = Job(**case, device=device)
    monkeypatch.setattr(launcher, "CHUNKS", 1)
    cut.run()
    others = [alone, askew, cut]
    if device == "cpu":
        from .interpreter import reversed_programs

        backward = Job(**case)
        with reversed_programs():
            backward.run()
        others.append(backward)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(together.bits(), other.bits(), strict=True))


def test_a_tensor_of_several_programs_is_stepped_whole(device, monkeypatch):
    from shoestring.ops.kernels.quantised_step import CHUNKS, TILE

    monkeypatch.setenv("SHOESTRING_OPS", "quantised_step=triton")
    job = Job(law="companded", sizes=[TILE * CHUNKS + 16, 16], device=device)
    wanted = [w.double().cpu() + exact(job, i)[0] for i, w in enumerate(job.weights)]
    job.run()
    assert all(distance(w, value) < 1e-6 for w, value in zip(job.weights, wanted, strict=True))


def test_rounding_at_random_is_right_on_average(provider, device):
    """A weight whose step is a tenth of its last place, at all places and seeds, moves by that on average."""
    size, found = 2048, []
    for seed in range(8):
        job = Job(sizes=[size], weight=BF16, mode="sr", device=device, seed=seed, weight_decay=0.0)
        job.weights[0].fill_(1.0)
        job.grads[0].fill_(1.0)
        job.first[0].fill_(1.0)
        job.second[0].fill_(1.0)
        job.betas, job.step = (0.0, 0.0), 1
        job.lr = 0.1 * 2.0**-8  # below 1 the places are 2^-8 apart
        job.run()
        assert set(job.weights[0].double().tolist()) <= {1.0, 1 - 2.0**-8}
        found.append((1.0 - job.weights[0].double()).mean())
    mean, sigma = float(torch.stack(found).mean()), 2.0**-8 * (0.09 / (8 * size)) ** 0.5
    assert abs(mean - 0.1 * 2.0**-8) < 4 * sigma


@pytest.mark.parametrize("decay", [2e-8, 2e-7, 1e-3])
def test_kahan_keeps_decays_below_a_weights_digits(decay, provider, device):
    """Also where 1 - decay is 1 to float32, or rounded to a multiple of 6e-8."""
    job = Job(weight=BF16, mode="kahan", sizes=[2048], weight_decay=decay / 1e-3, lr=1e-3, device=device)
    for tensor in (job.grads[0], job.first[0], job.extra[0]):
        tensor.zero_()
    job.weights[0].fill_(1.5)
    job.run()
    found = job.weights[0].double() + job.extra[0].double() - 1.5
    assert float(found.mean()) == pytest.approx(-1.5 * decay, rel=2e-3)


@pytest.mark.parametrize("beta", [0.999, 0.99999, 0.999999])
def test_what_a_gradient_adds_has_all_digits(beta, provider, device):
    """1 - beta in float32 is 1.3 % off at the last of these."""
    for rule, betas in (("adamw", (beta, beta)), ("lion", (0.9, beta))):
        job = Job(rule=rule, sizes=[600], betas=betas, device=device)
        for part in (*job.first, *job.second):
            part.zero_()
        job.run()
        assert distance(job.first[0], (1 - beta) * job.grads[0].double().cpu()) < 1e-6
        for second in job.second:
            assert distance(second, (1 - beta) * job.grads[0].double().cpu().square()) < 1e-6


def test_lion_does_not_take_what_is_no_number_for_a_zero(provider, device):
    job = Job(rule="lion", sizes=[400], device=device)
    job.grads[0][3], job.grads[0][5] = float("nan"), float("-inf")
    wanted = float(job.weights[0][5]) * (1 - job.lr * job.weight_decay) + job.lr
    job.run()
    assert job.weights[0].isnan().nonzero().tolist() == [[3]]
    assert float(job.weights[0][5]) == pytest.approx(wanted)


def test_pytorchs_step_writes_by_pytorch(monkeypatch):
    """Or what is compared with C++ would be C++."""
    monkeypatch.setenv("SHOESTRING_OPS", "quantised_step=torch")
    providers.used.pop("writing", None)
    for mode in ("sr", "kahan", "master", "plain"):
        Job(weight=BF16, grad=BF16, law="companded", mode=mode).run()
    assert "writing" not in providers.used


@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.int32])
def test_skip_leaves_every_bit(kind, provider, device):
    case: dict[str, Any] = {"law": "companded", "weight": BF16, "mode": "kahan", "sizes": [17, 256]}
    job, same = Job(**case, device=device), Job(**case, device=device)
    before = job.bits()
    job.run(skip=torch.ones((), dtype=kind, device=device))
    assert all(torch.equal(a, b) for a, b in zip(before, job.bits(), strict=True))
    job.run(skip=torch.zeros((), dtype=kind, device=device))
    same.run()
    assert all(torch.equal(a, b) for a, b in zip(same.bits(), job.bits(), strict=True))


def test_gradients_are_scaled_by_a_number_on_the_device(provider, device):
    scaled, plain = (Job(law="companded", sizes=[1000], device=device) for _ in range(2))
    scaled.run(grad_scale=torch.tensor(0.25, device=device))
    for grad in plain.grads:
        grad.mul_(0.25)
    plain.run()
    for a, b in zip(scaled.weights + scaled.first, plain.weights + plain.first, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("law", [None, *LAWS])
def test_what_is_not_finite_is_seen_where_it_is_and_zeros_stay(law, provider, device):
    for mode in ("sr", "kahan", "master", "plain"):
        job = Job(law=law, weight=BF16, grad=BF16, mode=mode, sizes=[1000], device=device)
        job.grads[0].zero_()
        for part in (job.first, job.second):
            part[0].zero_()
        for part in (job.first_scales, job.second_scales):
            if part:
                part[0].zero_()
        job.weights[0].fill_(1.0)
        for extra in job.extra:
            extra.fill_(1.0 if mode == "master" else 0.0)
        job.grads[0][7], job.grads[0][8] = float("nan"), float("inf")
        job.run()
        assert bool(job.weights[0][7:9].isnan().all())
        kept = torch.cat([job.weights[0][:7], job.weights[0][9:]]).double()
        assert bool(((kept - (1 - job.lr * job.weight_decay)).abs() < 2.0**-7).all())
        blocks = job.moments(0, True).split(block_of(law or "companded"))
        assert not bool(torch.isfinite(blocks[0]).all())
        assert all(bool((b == 0).all()) for b in blocks[1:])


def test_twenty_steps_in_eight_bits_stay_near_adam(provider, device):
    """New gradients, at new addresses, each step; and no mean square falls to zero."""
    job = Job(law="companded", sizes=[2000], device=device, weight_decay=0.0, lr=0.01, betas=(0.9, 0.999))
    for part in (job.first, job.second, job.first_scales, job.second_scales):
        part[0].zero_()
    start = job.weights[0].double().cpu()
    w, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    generator = torch.Generator().manual_seed(1)
    size = torch.logspace(-3, 0, 2000)
    size[5::16] = 0.0
    for step in range(1, 21):
        g = (torch.randn(2000, generator=generator) + 0.5) * size
        m, v = 0.9 * m + 0.1 * g.double(), 0.999 * v + 0.001 * g.double() ** 2
        w -= 0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + job.eps)
        job.step, job.grads = step, [g.to(device)]
        job.run()
    assert distance(job.weights[0].double().cpu() - start, w - start) < 0.02
    assert bool((job.second[0] != 0).all())


def test_nothing_is_done_to_nothing(provider, device):
    Job(sizes=[], device=device).run_unguarded()
    Job(sizes=[0, 0], law="companded", device=device).run()


def test_half_precision_is_rounded_to_nearest(device):
    from shoestring.ops.kernels.quantised_step import step

    half = torch.float16
    job = Job(law="companded", weight=half, grad=half, mode="sr", sizes=[273], device=device)
    wanted = [job.weights[0].double().cpu() + exact(job, 0)[0]]
    step(job.tensors(), job.settings)
    for weight, value in zip(job.weights, wanted, strict=True):
        assert share(weight, value.float().half()) > 0.995


COMPILED = [
    {"law": "companded", "weight": BF16, "mode": "sr"},
    {"law": None, "rule": "lion", "weight": BF16, "mode": "kahan"},
    {"law": "four", "rule": "direction"},
]


@pytest.mark.parametrize("case", COMPILED, ids=named)
def test_it_is_an_operation_that_a_compiler_can_keep(case, device):
    """One graph, and the bits of the uncompiled call."""
    job, same = (Job(**case, sizes=[1000, 5], device=device) for _ in range(2))
    scale = torch.tensor(0.5, device=device)
    torch.compile(job.run_unguarded, fullgraph=True, backend="aot_eager")(grad_scale=scale)
    same.run(grad_scale=scale)
    assert all(torch.equal(a, b) for a, b in zip(job.bits(), same.bits(), strict=True))
    torch.library.opcheck(quantised_step_op, (*job.tensors(grad_scale=scale), *job.settings))


def test_what_is_laid_out_flat_is_put_together_again():
    job = Job(sizes=[3], law="companded")
    tensors, settings = job.tensors(skip=torch.zeros(())), job.settings
    assert folded((*tensors, *settings)) == (tensors, settings)


@pytest.mark.gpu
def test_places_beyond_two_billion(monkeypatch):
    """The end of a tensor of 2^31 + 4096 elements goes as it would alone."""
    monkeypatch.setenv("SHOESTRING_OPS", "quantised_step=triton")
    tail, size = 4096, (1 << 31) + 4096
    small = Job(sizes=[tail], law="companded", weight=BF16, grad=BF16, mode="sr", device="cuda")
    large = Job(sizes=[tail], law="companded", weight=BF16, grad=BF16, mode="sr", device="cuda")
    for part in large.lists[:6]:
        whole = torch.zeros(size // (tail // len(part[0])), dtype=part[0].dtype, device="cuda")
        whole[-len(part[0]) :] = part[0]
        part[0] = whole
    assert size % PERIOD == tail
    small.run()
    large.run()
    for a, b in zip(small.lists[:6], large.lists[:6], strict=True):
        assert torch.equal(a[0], b[0][-len(a[0]) :])


def test_the_benchmark_runs_what_it_times(monkeypatch):
    """Each case by PyTorch's operations, tiny, and the formulas that a compiler is given."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    bench = importlib.import_module("ops_step_cuda")
    device, shapes = torch.device("cpu"), [(16, 16), (512,)]
    assert bench.rows(device) == []
    assert [round(row.bytes / 8.03e9, 3) for row in bench.h200_rows()][:4] == [10.062, 14.062, 10.062, 8.125]
    for case, _ in bench.CASES.values():
        bench.ours(shapes, device, **case)["PyTorch's operations"]()
        assert providers.used["quantised_step"] == "torch"
    bench.compiled(shapes, device, backend="eager")()
