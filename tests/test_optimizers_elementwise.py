"""AdamW and Lion of our own: few bits of state, C++ and PyTorch's operations alike, state that comes back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from shoestring.offload import offload_optimizer
from shoestring.ops import providers
from shoestring.ops.codec import LAWS
from shoestring.optimizers import AdamW, Lion, Slot, clip_by_global_norm, clip_for_step, state_bytes
from shoestring.recipes import AdamW as AdamWConfig
from shoestring.recipes import Lion as LionConfig
from torch import Tensor, nn

RULES: dict[str, tuple[Any, Any]] = {"adamw": (AdamW, AdamWConfig), "lion": (Lion, LionConfig)}
SHAPES = [(130, 67), (4096,), (3,), (70, 64)]


def problem(dtype: torch.dtype, steps: int = 6) -> tuple[list[Tensor], list[list[Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda shape: torch.randn(shape, generator=generator)  # noqa: E731
    weights = [draw(shape).to(dtype) for shape in SHAPES]
    return weights, [[(draw(shape) * 0.1).to(dtype) for shape in SHAPES] for _ in range(steps)]


def run(optimizer: torch.optim.Optimizer, parameters: list[Any], grads: list[list[Tensor]]) -> None:
    for step in grads:
        for p, g in zip(parameters, step, strict=True):
            p.grad = g.clone()
        optimizer.step()


def trained(rule: str, dtype: torch.dtype, steps: int = 6, **options: Any) -> tuple[Any, list[nn.Parameter]]:
    weights, grads = problem(dtype, steps)
    parameters = [nn.Parameter(w.clone()) for w in weights]
    optimizer = RULES[rule][0](parameters, lr=1e-2, weight_decay=0.1, **options)
    run(optimizer, parameters, grads)
    return optimizer, parameters


def exact(rule: str, dtype: torch.dtype, steps: int = 6) -> list[Tensor]:
    """Both rules in float64, by the formulas."""
    weights, grads = problem(dtype, steps)
    result = []
    for i, w in enumerate(weights):
        w, m, v = w.double(), torch.zeros(w.shape).double(), torch.zeros(w.shape).double()
        for t, step in enumerate(grads, start=1):
            g = step[i].double()
            w = w * (1 - 1e-2 * 0.1)
            if rule == "lion":
                w = w - 1e-2 * torch.sign(0.9 * m + 0.1 * g)
                m = 0.99 * m + 0.01 * g
            else:
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
                w = w - 1e-2 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        result.append(w)
    return result


def off(parameters: list[nn.Parameter], wanted: list[Tensor]) -> float:
    """|found - wanted| / |wanted - start| over all: 0 is exact, 1 has learned nothing."""
    starts, _ = problem(torch.float32)
    miss = sum(
        float((p.detach().double() - w).square().sum()) for p, w in zip(parameters, wanted, strict=True)
    )
    way = sum(float((w - s.double()).square().sum()) for s, w in zip(starts, wanted, strict=True))
    return (miss / way) ** 0.5


@pytest.mark.parametrize("provider", ["torch", "native"])
@pytest.mark.parametrize("rule", RULES)
def test_few_bits_stay_near_the_rule(rule: str, provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOESTRING_OPS", f"quantised_step={provider}")
    wanted = exact(rule, torch.float32, 20)
    # Lion's step is a sign: a moment off by a little turns the few signs that are near zero.
    limits = (
        {32: 1e-5, 16: 0.02, 8: 0.03, 4: 0.25} if rule == "adamw" else {32: 0.02, 16: 0.1, 8: 0.1, 4: 0.4}
    )
    found = {}
    for bits, limit in limits.items():
        _, parameters = trained(rule, torch.float32, 20, state_bits=bits)
        found[bits] = off(parameters, wanted)
        assert found[bits] < limit, found
        if bits < 32 or rule == "lion":
            assert providers.used["quantised_step"] == provider
    for code in ("linear", "dynamic"):
        _, parameters = trained(rule, torch.float32, 20, state_bits=8, state_code=code)
        assert off(parameters, wanted) < limits[8] * 1.5


@pytest.mark.parametrize("mode", ["sr", "kahan", "master", "plain"])
@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.parametrize("rule", RULES)
def test_c_and_pytorch_do_the_same(rule: str, bits: int, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for provider in ("torch", "native"):
        monkeypatch.setenv("SHOESTRING_OPS", f"quantised_step={provider}")
        found.append(trained(rule, torch.bfloat16, state_bits=bits, weights=mode)[1])
        assert providers.used["quantised_step"] == provider
    for p, q in zip(*found, strict=True):
        # the same random bits: what differs is where float32 differs in its last digit at a rounding's edge
        assert float((p != q).float().mean()) < 0.02
        assert float((p.float() - q.float()).abs().max()) <= float(p.detach().abs().max()) * 2**-6


@pytest.mark.parametrize("rule", RULES)
def test_how_many_threads_work_does_not_matter(rule: str) -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(trained(rule, torch.bfloat16, state_bits=8)[1])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(p, q) for other in found[1:] for p, q in zip(found[0], other, strict=True))


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.parametrize("rule", RULES)
def test_state_has_the_bytes_stated_and_comes_back(rule: str, bits: int) -> None:
    kind, config = RULES[rule]
    optimizer, parameters = trained(rule, torch.bfloat16, state_bits=bits, weights="kahan")
    held = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    slots = [Slot(str(i), shape, "matrix") for i, shape in enumerate(SHAPES)]
    assert held == state_bytes(config(state_bits=bits, weights="kahan"), slots, torch.bfloat16)

    again = [nn.Parameter(p.detach().clone()) for p in parameters]
    second = kind(again, lr=1e-2, weight_decay=0.1, state_bits=bits, weights="kahan")
    second.load_state_dict(optimizer.state_dict())
    _, more = problem(torch.bfloat16, 9)
    run(optimizer, parameters, more[6:])
    run(second, again, more[6:])
    assert all(torch.equal(p, q) for p, q in zip(parameters, again, strict=True))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rule", RULES)
def test_state_on_disk_is_state_in_memory(rule: str, bits: int, tmp_path: Path) -> None:
    _, wanted = trained(rule, torch.bfloat16, state_bits=bits)
    weights, grads = problem(torch.bfloat16)
    parameters = [nn.Parameter(w.clone()) for w in weights]
    inner = RULES[rule][0](parameters, lr=1e-2, weight_decay=0.1, state_bits=bits)
    moved, _ = offload_optimizer(
        inner, tier="nvme", folder=tmp_path, buffer_size=1 << 16, buffer_count=3, io="threads"
    )
    run(moved, parameters, grads)
    moved.close()
    assert all(torch.equal(p, q) for p, q in zip(parameters, wanted, strict=True))


def test_options_out_of_range_are_refused() -> None:
    p = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"state_bits is 5; allowed: 32, 16, 8, 4"):
        Lion([p], state_bits=5)
    with pytest.raises(ValueError, match=r"state_code is 'four'; allowed: 'companded', 'linear', 'dynamic'"):
        AdamW([p], state_bits=8, state_code="four")
    assert "four" in LAWS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "reason"),
    [("", "there is no C++ compiler"), ("broken", "could not compile them"), ("whole", "None")],
)
def test_without_a_compiler_pytorch_steps_and_one_line_says_so(
    path: str, reason: str, tmp_path: Path
) -> None:
    """In a process of its own: the library is made once a process."""
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'x.cpp:1: error: no such flag' >&2\nexit 1\n")
    broken.chmod(0o755)
    program = (
        "import torch\n"
        "from shoestring.ops import native, providers\n"
        "from shoestring.optimizers import AdamW\n"
        "p = torch.nn.Parameter(torch.ones(5000)); p.grad = torch.ones(5000)\n"
        "AdamW([p], lr=0.1, state_bits=8).step()\n"
        "print(providers.used['quantised_step'], float(p.detach().mean()))\n"
        "print(native.missing()); print(providers.lines(torch.device('cpu')))\n"
    )
    compiler = {"": "/nowhere/c++", "broken": str(broken), "whole": "c++"}[path]
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={
            "PATH": "/usr/bin:/bin",
            "CXX": compiler,
            "XDG_CACHE_HOME": str(tmp_path),
            "HOME": str(tmp_path),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    used, missing, lines = done.stdout.splitlines()[-3:]
    assert used.startswith("native " if path == "whole" else "torch ")
    assert float(used.split()[1]) == pytest.approx(0.899, abs=1e-4)
    assert reason in missing
    assert lines == "[]" if path == "whole" else reason in lines
    made = list((tmp_path / "shoestring").rglob("*.so"))
    assert len(made) == (path == "whole")


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("rule", RULES)
def test_a_step_that_clips_is_a_step_on_clipped_gradients(rule: str, bits: int) -> None:
    weights, grads = problem(torch.float32, 1)
    whole = torch.cat([g.flatten() for g in grads[0]]).norm()
    for limit in (0.5 * float(whole), 2 * float(whole)):
        found = []
        for clip in (clip_for_step, lambda _, parameters, norm: clip_by_global_norm(parameters, norm)):
            parameters = [nn.Parameter(w.clone()) for w in weights]
            more = {"eps": 1e-3} if rule == "adamw" else {}
            optimizer = RULES[rule][0](parameters, lr=1e-2, state_bits=bits, **more)
            for p, g in zip(parameters, grads[0], strict=True):
                p.grad = g.clone()
            assert float(clip(optimizer, parameters, limit)) == pytest.approx(float(whole), rel=1e-6)
            optimizer.step()
            assert optimizer.grad_scale is None
            found.append((parameters, [s["exp_avg"].float() for s in optimizer.state.values()]))
        for (ps, ms), (qs, ns) in [found]:
            for a, b in zip([*ps, *ms], [*qs, *ns], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
