"""Which implementation of an operation runs: the one place where that is decided.

    triton   our kernels in ops/kernels, on a CUDA device (under TRITON_INTERPRET=1 on a CPU, for tests)
    native   our C++ in ops/native, on a CPU, compiled once a machine where a compiler is at hand
    liger    functions of the package Liger, on a CUDA device where it is installed: see liger.py
    torch    PyTorch's own operations: everywhere, and what the others are held to

An operation asks `choose(name, device, [what it has])` and gets the first of these that can run there. The
variable SHOESTRING_OPS overrides it: `SHOESTRING_OPS=torch`, or for single operations
`SHOESTRING_OPS=quantised_step=torch,grad_pack=triton`. What is asked for by name and cannot run is an error,
never replaced; `used` remembers what ran, so that a test sees which one it tested.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch

from ..recipes.errors import UserError
from . import attention_flash

Provider = Literal["triton", "native", "liger", "torch"]
Operation = Literal[
    "codec", "grad_pack", "loss_head", "lora_down", "lora_down_backward", "lora_up_backward", "lossless",
    "low_rank", "quantised_step", "rms_norm", "rope", "swiglu", "token_log_probs", "writing", "wta_crs",
]  # fmt: skip
"""All that ask `choose`: what SHOESTRING_OPS may name."""

used: dict[str, Provider] = {}
"""What the last call of each operation ran."""


def choose(
    operation: Operation, device: torch.device, offered: Sequence[Provider], by_name: Sequence[Provider] = ()
) -> Provider:
    """The provider of `operation` for tensors on `device`, among those that it has for these arguments.

    `offered` in any order; "torch" is always one. `by_name`: those that run only where they are asked for.
    Raises UserError where SHOESTRING_OPS asks for one that is not offered or cannot run there.
    """
    asked = _wanted(os.environ.get("SHOESTRING_OPS", ""))
    wanted = asked.get(operation)
    if wanted is None and asked.get("") in (*offered, *by_name, "torch"):  # for all that have it
        wanted = asked[""]
    if wanted is None:
        chosen: Provider = next(
            p for p in get_args(Provider) if p in (*offered, "torch") and _idle(p, device)
        )
    else:
        has = (*offered, *by_name, "torch")
        reason = "it has none for these arguments" if wanted not in has else _lacks(wanted, device)
        if reason:
            raise UserError(
                f"SHOESTRING_OPS asks for {wanted} where {operation} runs on {device.type}, but {reason}.\n"
                f"  Unset SHOESTRING_OPS, or set SHOESTRING_OPS={operation}=torch."
            )
        chosen = wanted
    used[operation] = chosen
    return chosen


def check_asked() -> str:
    """The value of SHOESTRING_OPS, empty where it is not set. Raises UserError where it is not understood."""
    asked = os.environ.get("SHOESTRING_OPS", "")
    _wanted(asked)
    return asked


def lines(device: torch.device) -> list[str]:
    """What to tell at the start of a run: what was asked for, or what something faster lacks.

    Raises UserError where SHOESTRING_OPS is not understood.
    """
    asked = check_asked()
    if asked:
        return [f"ops: SHOESTRING_OPS={asked}"]
    if device.type == "cuda" and (reason := _lacks("triton", device)):
        return [f"ops: PyTorch's own operations are used, since {reason}"]
    if device.type == "cuda" and (reason := attention_flash.missing()):
        return [f"ops: packed rows get their attention one by one, since {reason}; torch 2.12 has all of it"]
    if device.type == "cpu" and (reason := _lacks("native", device)):
        return [f"ops: PyTorch's own operations are used for optimizer steps, since {reason}"]
    return []


def runs(provider: Provider, device: torch.device) -> bool:
    """Whether `provider` can run on `device`."""
    return _lacks(provider, device) is None


def interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _idle(provider: Provider, device: torch.device) -> bool:
    """Whether `provider` is one to take unasked: the interpreter is slow, so only by name."""
    if provider == "triton" and device.type != "cuda":
        return False
    return _lacks(provider, device) is None


def _lacks(provider: Provider, device: torch.device) -> str | None:
    """Why `provider` cannot run on `device`."""
    if provider == "triton":
        if find_spec("triton") is None:
            return "Triton is not installed; pip install 'shoestring[kernels]'"
        if device.type != "cuda" and not (device.type == "cpu" and interpreting()):
            return "Triton's kernels need a CUDA device"
        if device.type == "cuda" and torch.version.hip is None and _capability(device.index or 0) < (8, 0):
            return "the kernels are made for GPUs of compute capability 8.0 (Ampere) and newer"
        if device.type == "cuda" and (failed := _fails(device.index or 0)):
            return failed
    if provider == "native":
        if device.type != "cpu":
            return "the C++ kernels are for the CPU"
        from . import native

        return native.missing()
    if provider == "liger":
        if device.type != "cuda":
            return "Liger's kernels need a CUDA device"
        if not _has_liger():
            return "Liger is not installed; pip install 'shoestring[liger]'"
    return None


@cache
def _has_liger() -> bool:
    return find_spec("liger_kernel") is not None and find_spec("triton") is not None


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@cache
def _fails(index: int) -> str | None:
    """Why Triton launches nothing on GPU `index`, tried once: torch brings the package, but no compiler."""
    try:
        from .kernels.trial import launch

        launch(index)
    except Exception as error:  # of a compiler, a linker, a loader or a driver: any sort
        said = next(iter(str(error).strip().splitlines()), "")
        return (
            f"Triton cannot launch a kernel ({type(error).__name__}: {said[:200]}); "
            "it needs a C compiler and Python's headers, as apt-get install gcc python3-dev brings"
        )
    return None


@cache
def _wanted(text: str) -> dict[str, Provider]:
    found: dict[str, Provider] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        operation, _, name = entry.rpartition("=")
        if name not in get_args(Provider):
            raise UserError(
                f"SHOESTRING_OPS has {entry!r}; allowed: {', '.join(get_args(Provider))}, "
                "or OPERATION=one of them"
            )
        if operation and operation not in get_args(Operation):
            near = get_close_matches(operation, get_args(Operation), n=1, cutoff=0.5)
            raise UserError(
                f"SHOESTRING_OPS has {entry!r}, but no operation is called {operation!r}"
                + (f"; did you mean {near[0]}={name}?\n" if near else "\n")
                + f"  Operations: {', '.join(get_args(Operation))}."
            )
        found[operation] = name  # type: ignore[assignment]
    return found
