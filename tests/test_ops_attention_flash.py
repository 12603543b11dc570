"""Packed attention by torch's variable-length kernel, with stand-ins of the three signatures it has had."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from shoestring.ops import attention, attention_flash
from torch import Tensor


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Any:
    attention_flash.varlen_attn.cache_clear()
    yield
    attention_flash.varlen_attn.cache_clear()


def of_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    raise AssertionError("has no scale")


def of_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert query.shape[1] == key.shape[1], "as the real one, which repeats no head"
    return rows(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def of_2_12(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    assert enable_gqa or query.shape[1] == key.shape[1], "Try setting enable_gqa=True for GQA"
    return rows(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def rows(q, k, v, starts, others, longest, other, scale, window_size) -> Tensor:
    """What the kernel computes of [T, heads, d]: causal with (n, 0), a query seeing n keys before its own."""
    assert starts.dtype == torch.int32
    assert torch.equal(starts, others)
    assert longest == other == int(starts.diff().max())
    before, after = window_size
    assert after == 0
    segments, window = tuple(starts.tolist()), None if before < 0 else before + 1
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    return attention.reference(q, k, v, segments, scale, window)[0]


def has(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("torch.nn.attention.varlen")
    if function is not None:
        module.varlen_attn = function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    attention_flash.varlen_attn.cache_clear()


def on_a_gpu(heads: int = 4, width: int = 64, **changed: Any) -> Any:
    """What `takes` looks at of a tensor of an Ampere GPU."""
    given = {"is_cuda": True, "dtype": torch.bfloat16, "device": torch.device("cuda", 0)}
    return SimpleNamespace(**given | {"shape": (1, heads, 12, width)} | changed)


@pytest.mark.parametrize(
    ("function", "alone", "grouped"),
    [(None, False, False), (of_2_10, False, False), (of_2_11, True, False), (of_2_12, True, True)],
)
def test_a_signature_is_looked_at_before_it_is_called(function, alone, grouped, monkeypatch) -> None:
    has(function, monkeypatch)
    monkeypatch.setattr(attention_flash, "_capability", lambda index: (9, 0))
    query = on_a_gpu()
    assert attention_flash.takes(query, query, query) is alone
    assert attention_flash.takes(query, on_a_gpu(2), on_a_gpu(2)) is grouped
    said = attention_flash.missing()
    assert said is None if grouped else said is not None and torch.__version__ in said


def test_the_torch_of_this_machine_has_all_that_is_used() -> None:
    taken = inspect.signature(attention_flash.varlen_attn()).parameters
    assert {"scale", "window_size", "enable_gqa"} <= set(taken)
    assert list(taken)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]


def test_what_the_kernel_refuses_does_not_reach_it(monkeypatch) -> None:
    has(of_2_12, monkeypatch)
    capability = [(8, 0)]
    monkeypatch.setattr(attention_flash, "_capability", lambda index: capability[0])
    monkeypatch.setattr(torch.version, "hip", None)

    def takes(**changed: Any) -> bool:
        return attention_flash.takes(*[on_a_gpu(**changed)] * 3)

    assert takes()
    assert takes(dtype=torch.float16, width=256)
    assert not takes(is_cuda=False)
    assert not takes(dtype=torch.float32)
    assert not takes(width=20)
    assert not takes(width=264)
    assert not takes(shape=(2, 4, 12, 64))
    assert not attention_flash.takes(on_a_gpu(), on_a_gpu(), on_a_gpu(width=32))
    capability[0] = (7, 5)  # a T4: half precision, no flash attention
    assert not takes(dtype=torch.float16)
    monkeypatch.setattr(torch.version, "hip", "6.4")  # whose numbers are other ones
    assert takes(dtype=torch.float16)


@pytest.mark.parametrize(("function", "heads"), [(of_2_11, 6), (of_2_12, 6), (of_2_12, 2)])
@pytest.mark.parametrize("window", [None, 3, 1])
def test_rows_are_those_of_the_reference(function, heads, window, monkeypatch) -> None:
    has(function, monkeypatch)
    monkeypatch.setattr(attention, "takes", lambda *tensors: True)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, n, 17, 8) for n in (6, heads, heads))
    given = {"scaling": 0.3, "sliding_window": window}
    ours = attention.packed_attention(query, key, value, (0, 5, 16, 17), **given)
    wanted = attention.reference(query, key, value, (0, 5, 16, 17), 0.3, window)
    assert torch.equal(ours, wanted)


def test_boundaries_are_sent_once_for_all_layers_and_may_be_saved() -> None:
    device = torch.device("cpu")
    with torch.inference_mode():
        first = attention_flash._starts((0, 5, 1234567), device)
    assert not first.is_inference()  # or the training step after an evaluation could not save it
    assert attention_flash._starts((0, 5, 1234567), device) is first
    assert attention_flash._starts((0, 6, 1234567), device).tolist() == [0, 6, 1234567]


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "window"), [(8, None), (2, None), (2, 50), (8, 1)])
def test_on_a_gpu_output_and_gradients_are_those_of_the_reference(heads, window) -> None:
    segments = (0, 5, 300, 301, 512)
    torch.manual_seed(0)
    leaves = [torch.randn(1, n, 512, 64, device="cuda", dtype=torch.bfloat16) for n in (8, heads, heads)]
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        tensors = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        if dtype == torch.bfloat16:
            assert attention_flash.takes(*tensors) or attention_flash.missing()
            output = attention.packed_attention(*tensors, segments, scaling=0.1, sliding_window=window)
        else:
            output = attention.reference(*tensors, segments, 0.1, window)
        output.double().square().sum().backward()
        found.append([output.detach().double(), *(t.grad.double() for t in tensors)])
    for ours, exact in zip(*found, strict=True):
        assert float((ours - exact).norm() / exact.norm()) < 2e-2
