"""What C++ and Triton are given is checked before they use addresses, and what they wrote is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from shoestring.ops import native, providers, quantise
from shoestring.ops.quantised_step import quantised_step

from .step_job import BF16, FP32, Job

NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(native.missing() is not None, reason=f"no C++: {native.missing()}")
)


@pytest.fixture(params=[NATIVE, "triton"])
def raw(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, device: str) -> str:
    """Where each of the two runs."""
    monkeypatch.setenv("SHOESTRING_OPS", f"quantised_step={request.param}")
    return "cpu" if request.param == "native" else device


def job(**more: Any) -> Job:
    given = {"sizes": [300, 512], "law": "companded", "weight": BF16, "grad": BF16, "mode": "kahan"}
    return Job(**{**given, **more})


def cut(lists: Any, name: str) -> None:
    lists[name][1] = lists[name][1][:-1]


def other_type(lists: Any, name: str, dtype: torch.dtype) -> None:
    lists[name][1] = lists[name][1].to(dtype)


def spread(lists: Any, name: str) -> None:
    lists[name][1] = lists[name][1].new_zeros(2 * len(lists[name][1]))[::2]


LISTS = ["weights", "grads", "first", "first_scales", "second", "second_scales", "extra"]
WRONG: list[tuple[str, Callable[[Any], None], str]] = [
    *((name, lambda lists, name=name: cut(lists, name), "elements in tensor 1") for name in LISTS[1:]),
    *((name, lambda lists, name=name: spread(lists, name), "not contiguous") for name in LISTS),
    *((name, lambda lists, name=name: lists[name].pop(), "1 tensors|has 1:") for name in LISTS[1:]),
    *(
        (name, lambda lists, name=name: other_type(lists, name, torch.float64), f"{name} is of .*float64")
        for name in LISTS
    ),
    ("grads", lambda lists: other_type(lists, "grads", FP32), "grads is of bfloat16, float32"),
    ("extra", lambda lists: other_type(lists, "extra", FP32), "extra is of bfloat16, float32"),
    ("extra", lambda lists: lists["extra"].clear(), "weights='kahan' needs the compensation of each of 2"),
]


@pytest.mark.parametrize(("name", "change", "told"), WRONG)
def test_lists_that_do_not_fit_are_refused(
    name: str, change: Callable[[Any], None], told: str, raw: str
) -> None:
    given = job(device=raw)
    tensors = given.tensors()
    lists = {field: list(getattr(tensors, field)) for field in LISTS}
    change(lists)
    before = given.bits()
    with pytest.raises(ValueError, match=told):
        quantised_step(tensors._replace(**lists), given.settings)
    assert all(torch.equal(a, b) for a, b in zip(before, given.bits(), strict=True))


def test_moments_of_two_types_are_refused(raw: str) -> None:
    given = job(law=None, moment=BF16, device=raw)
    tensors = given.tensors()
    with pytest.raises(ValueError, match="second is of float32; allowed: one of bfloat16"):
        quantised_step(tensors._replace(second=[t.float() for t in tensors.second]), given.settings)


def test_a_tensor_without_an_address_is_refused(raw: str) -> None:
    weight = quantise(torch.randn(64, 64).to(BF16), 64)
    given = job(sizes=[4096], mode="sr", device=raw)
    with pytest.raises(TypeError, match="weights has tensors of type Int8Weight, which have no numbers"):
        quantised_step(given.tensors()._replace(weights=[weight]), given.settings)


def test_a_direction_in_bfloat16_is_pytorchs() -> None:
    """C++ and Triton would write float32 at its address."""
    given, same = (Job(rule="direction", law="companded", sizes=[1000]) for _ in range(2))
    values = given.weights[0].to(BF16)
    same.weights[0].copy_(values)
    quantised_step(given.tensors()._replace(weights=[values]), given.settings)
    assert providers.used["quantised_step"] == "torch"
    same.run()
    assert torch.allclose(values.float(), same.weights[0], rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("rule", ["adamw", "direction"])
def test_autograd_is_told_what_was_written(rule: Any, raw: str) -> None:
    more = {"weight": FP32, "grad": FP32, "mode": "plain"} if rule == "direction" else {}
    given = job(rule=rule, device=raw, **more)
    tensors = given.tensors()
    before = [t._version for part in tensors.changed for t in part]
    given.run()
    after = [t._version for part in tensors.changed for t in part]
    assert all(a > b for a, b in zip(after, before, strict=True))
