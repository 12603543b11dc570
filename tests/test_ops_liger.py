"""Liger's functions in the place of ours: when they are taken, how they are called, and when not.

Its kernels need a GPU. Here each function is replaced by PyTorch's operations behind the signature that the
installed package has, so that another version with other arguments fails.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from shoestring.ops import liger, mlp, providers, rms_norm, use_fused
from shoestring.recipes.errors import UserError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen3Config

OPERATIONS = {"rms_norm": "liger_rms_norm", "swiglu": "liger_swiglu", "rope": "liger_rope"}


def norm(x: Tensor, w: Tensor, eps: float, offset: float, casting_mode: str, in_place: bool) -> Tensor:
    assert (offset, casting_mode, in_place) == (0.0, "llama", False)
    return rms_norm.reference(x, w, eps)


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Any, unsqueeze_dim: int, rotary_dim: Any
) -> tuple[Tensor, Tensor]:
    assert (position_ids, unsqueeze_dim, rotary_dim) == (None, 1, None)
    return liger.rotary_reference(q, k, cos, sin)


STAND_INS: dict[str, Callable[..., Any]] = {
    "liger_rms_norm": norm,
    "liger_swiglu": mlp.swiglu_reference,
    "liger_rope": rope,
}


@pytest.fixture(autouse=True)
def _tried_anew() -> Iterator[None]:
    liger._agrees.cache_clear()
    yield
    liger._agrees.cache_clear()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Liger as if this CPU could run it; the names of its functions that were called."""
    functional = pytest.importorskip("liger_kernel.transformers.functional")
    found: list[str] = []
    for name, stand_in in STAND_INS.items():
        signature = inspect.signature(getattr(functional, name))

        def call(
            *args: Any, _name: str = name, _do: Any = stand_in, _as: Any = signature, **keys: Any
        ) -> Any:
            bound = _as.bind(*args, **keys)
            bound.apply_defaults()
            found.append(_name)
            return _do(*bound.arguments.values())

        monkeypatch.setattr(functional, name, call)
    real = providers._lacks
    monkeypatch.setattr(providers, "_lacks", lambda p, device: None if p == "liger" else real(p, device))
    monkeypatch.delenv("SHOESTRING_OPS", raising=False)
    return found


def arguments(operation: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    if operation == "rms_norm":
        return [torch.randn(2, 5, 32).to(dtype), torch.rand(32).to(dtype)]
    return [torch.randn(2, 5, 32).to(dtype) for _ in range(2)]


def run(operation: str, *tensors: Tensor) -> Tensor:
    if operation == "rms_norm":
        return rms_norm.rms_norm(*tensors, 1e-5)
    return mlp.swiglu(*tensors)


@pytest.mark.parametrize("operation", ["rms_norm", "swiglu"])
def test_liger_is_taken_where_it_runs_and_gives_the_same(operation: str, calls: list[str]) -> None:
    ours = [t.requires_grad_() for t in arguments(operation)]
    theirs = [t.requires_grad_() for t in arguments(operation)]
    y = run(operation, *theirs)
    y.square().sum().backward()
    assert providers.used[operation] == "liger"
    assert set(calls) == {OPERATIONS[operation]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOESTRING_OPS", "torch")
        expected = run(operation, *ours)
    assert providers.used[operation] == "torch"
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected)
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("operation", ["rms_norm", "swiglu"])
def test_without_liger_or_a_gpu_ours_is_used(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHOESTRING_OPS", raising=False)
    run(operation, *arguments(operation))
    assert providers.used[operation] == "torch"
    monkeypatch.setenv("SHOESTRING_OPS", f"{operation}=liger")
    with pytest.raises(UserError, match="Liger's kernels need a CUDA device"):
        run(operation, *arguments(operation))
    monkeypatch.setattr(providers, "_has_liger", lambda: False)
    reason = providers._lacks("liger", torch.device("cuda"))
    assert reason is not None
    assert "pip install 'shoestring[liger]'" in reason


@pytest.mark.parametrize("operation", ["rms_norm", "swiglu"])
def test_types_that_differ_and_float64_stay_with_ours(operation: str, calls: list[str]) -> None:
    first, second = arguments(operation)
    run(operation, first.double(), second.double())
    assert providers.used[operation] == "torch"
    run(operation, first.bfloat16(), second)
    assert providers.used[operation] == "torch"
    run(operation, first[:0], second if operation == "rms_norm" else second[:0])
    assert providers.used[operation] == "torch"
    assert calls == []


@pytest.mark.parametrize("fault", ["other numbers", "an error"])
def test_a_liger_that_computes_something_else_is_not_used(
    fault: str, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(x: Tensor, w: Tensor, eps: float, **keys: Any) -> Tensor:
        if fault == "an error":
            raise RuntimeError("no such kernel")
        return rms_norm.reference(x, w, eps) * (1 + 1e-3)

    monkeypatch.setattr("liger_kernel.transformers.functional.liger_rms_norm", wrong)
    says = {
        "other numbers": "gives other numbers here",
        "an error": "failed with RuntimeError: no such kernel",
    }
    with pytest.warns(UserWarning, match=f"Liger's rms_norm {says[fault]}"):
        run("rms_norm", *arguments("rms_norm"))
    assert providers.used["rms_norm"] == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        run("rms_norm", *arguments("rms_norm"))


def test_a_second_backward_through_ligers_swiglu_is_an_error(calls: list[str]) -> None:
    gate, up = (t.requires_grad_() for t in arguments("swiglu"))
    loss = mlp.swiglu(gate, up).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="no second backward through one graph"):
        loss.backward()


def model(kind: Any = LlamaConfig, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    config = kind(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=50,
        pad_token_id=0,
        **settings,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def gradients(of: nn.Module) -> dict[str, Tensor]:
    ids = torch.arange(20)[None] % 50
    of.zero_grad()
    of(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in of.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
def test_a_model_with_ligers_functions_has_the_same_gradients(kind: Any, calls: list[str]) -> None:
    plain, fused = model(kind), model(kind)
    attention = type(fused.model.layers[0].self_attn)
    before = attention.forward
    lines = use_fused(fused)
    assert "fused: 2 rotary embeddings" in lines
    assert attention.forward is before  # the class of transformers is as it was
    assert isinstance(fused.model.layers[0].self_attn, attention)
    assert use_fused(fused) == []
    calls.clear()
    found, expected = gradients(fused), gradients(plain)
    assert set(calls) == set(OPERATIONS.values())
    assert calls.count("liger_rope") == 3  # the trial, and two layers
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-4, atol=1e-6)


def test_another_rotation_is_left_alone(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fused = model(LlamaConfig)
    names = type(fused.model.layers[0].self_attn).forward.__globals__
    real = names["apply_rotary_pos_emb"]
    monkeypatch.setitem(names, "apply_rotary_pos_emb", lambda q, k, cos, sin: real(q, k, cos, -sin))
    liger._rotary_forward.cache_clear()
    assert not any("rotary" in line for line in use_fused(fused))
    liger._rotary_forward.cache_clear()


def test_norms_that_count_from_one_are_left_alone(calls: list[str]) -> None:
    assert not any("RMSNorm" in line for line in use_fused(model(Gemma2Config)))


def test_on_a_cpu_the_attention_keeps_its_own() -> None:
    assert not any("rotary" in line for line in use_fused(model()))


@pytest.mark.parametrize("operation", ["rms_norm", "swiglu"])
def test_a_compiler_gets_the_formula_whole(operation: str, calls: list[str]) -> None:
    inputs = [t.requires_grad_() for t in arguments(operation)]
    compiled = torch.compile(lambda *t: run(operation, *t), fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    assert calls == []
    for a, b in zip(found, torch.autograd.grad(run(operation, *inputs).square().sum(), inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("operation", ["rms_norm", "swiglu"])
def test_gradients_by_finite_differences(operation: str) -> None:
    inputs = [t.double().requires_grad_() for t in arguments(operation)]
    assert torch.autograd.gradcheck(lambda *t: run(operation, *t), inputs)


def test_importing_the_operations_asks_for_no_package() -> None:
    code = (
        "import sys, shoestring.ops\n"
        "from shoestring.ops import cross_entropy_sum, liger, rms_norm, token_log_probs\n"
        "print([name for name in ('triton', 'liger_kernel', 'peft', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.gpu
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ligers_kernels_give_what_ours_give(operation: str, dtype: torch.dtype) -> None:
    pytest.importorskip("liger_kernel")
    assert liger._agrees(operation, torch.device("cuda", 0), dtype)


def test_a_wish_for_all_operations_is_for_those_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOESTRING_OPS", "native")
    run("rms_norm", *arguments("rms_norm"))
    assert providers.used["rms_norm"] == "torch"
    monkeypatch.setenv("SHOESTRING_OPS", "rms_norm=native")
    with pytest.raises(UserError, match="it has none for these arguments"):
        run("rms_norm", *arguments("rms_norm"))
