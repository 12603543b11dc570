"""Which implementation runs, what overrides it, and what is said about it."""

from __future__ import annotations

import pytest
import torch
from shoestring.ops import providers
from shoestring.recipes.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_the_first_that_can_run_is_taken_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHOESTRING_OPS", raising=False)
    monkeypatch.setattr(providers, "_lacks", lambda provider, device: None)
    assert providers.choose("op", CPU, ["triton", "native"]) == "native"  # the interpreter is never unasked
    assert providers.choose("op", CUDA, ["triton"]) == "triton"
    assert providers.choose("op", CUDA, [], by_name=["triton"]) == "torch"
    assert providers.used["op"] == "torch"


def test_what_is_asked_for_runs_or_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOESTRING_OPS", "one=torch, two=triton")
    assert providers.choose("one", CPU, ["native"]) == "torch"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UserError, match=r"triton where two runs on cpu, but Triton's kernels need a CUDA"):
        providers.choose("two", CPU, ["triton"])
    with pytest.raises(UserError, match="it has none for these arguments"):
        providers.choose("two", CPU, ["native"])
    monkeypatch.setenv("SHOESTRING_OPS", "fast")
    with pytest.raises(UserError, match=r"SHOESTRING_OPS has 'fast'; allowed: triton, native, liger, torch"):
        providers.choose("one", CPU, [])


def test_a_run_says_what_it_lacks_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHOESTRING_OPS", raising=False)
    monkeypatch.setattr(providers, "find_spec", lambda name: None)
    (line,) = providers.lines(CUDA)
    assert line == (
        "ops: PyTorch's own operations are used, since Triton is not installed; "
        "pip install 'shoestring[kernels]'"
    )
    monkeypatch.setattr(providers, "find_spec", lambda name: object())
    monkeypatch.setattr(providers, "_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    assert "compute capability 8.0" in providers.lines(CUDA)[0]
    monkeypatch.setenv("SHOESTRING_OPS", "torch")
    assert providers.lines(CPU) == ["ops: SHOESTRING_OPS=torch"]
