"""What a step asks of tensors before C++ or Triton reads and writes at their addresses.

PyTorch's operations raise where sizes, types or places do not fit; an address tells nothing of them. A state
from elsewhere (a checkpoint that is damaged or has another mode of writing) comes through here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor
from torch.nn import Parameter

from .codec import code_count, scale_count
from .step_call import StepSettings, StepTensors

# By `map` over whole lists, which costs a step of many small tensors the least.
_dtype = attrgetter("dtype")
_PLAIN = {Tensor, Parameter}
_CODES = (torch.int8, torch.uint8)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_step(tensors: StepTensors, settings: StepSettings) -> None:
    """Raises TypeError for tensors without numbers of their own, ValueError for lists that do not fit."""
    rule, law, weights = settings.rule, settings.law, tensors.weights
    # Grounds of everything else: a wrapper tells the size of what it stands for.
    check_tensors("weights", weights, _FLOATS, weights[0].get_device(), None)
    sizes = list(map(Tensor.numel, weights))
    lists: list[tuple[str, list[Tensor], Sequence[torch.dtype], list[int]]] = []
    if rule != "direction" or tensors.grads:
        lists.append(("grads", tensors.grads, _FLOATS, sizes))
    numbers = _FLOATS if law is None else _CODES
    counts = sizes if law is None else [code_count(n, law) for n in sizes]
    lists.append(("first", tensors.first, numbers, counts))
    if rule != "lion":
        same = (tensors.first[0].dtype,) if law is None and tensors.first else numbers
        lists.append(("second", tensors.second, same, counts))
    if law is not None:
        scales = [scale_count(n, law) for n in sizes]
        lists.append(("first_scales", tensors.first_scales, (torch.float32,), scales))
        if rule != "lion":
            lists.append(("second_scales", tensors.second_scales, (torch.float32,), scales))
    if rule != "direction" and weights[0].dtype != torch.float32 and settings.mode in ("kahan", "master"):
        kept = torch.float32 if settings.mode == "master" else weights[0].dtype
        if len(tensors.extra) != len(weights):
            raise ValueError(
                f"weights={settings.mode!r} needs the {_BESIDE[settings.mode]} of each of {len(weights)} "
                f"weights of {weights[0].dtype}, but the state has {len(tensors.extra)}: it was made with "
                "another mode or type of weights. Go on with that one, or start with a new state"
            )
        lists.append(("extra", tensors.extra, (kept,), sizes))
    place = weights[0].get_device()
    for name, column, dtypes, wanted in lists:
        check_tensors(name, column, dtypes, place, wanted)


_BESIDE = {"kahan": "compensation", "master": "float32 master"}


def check_tensors(
    name: str, column: list[Tensor], dtypes: Sequence[torch.dtype], place: int, sizes: list[int] | None
) -> None:
    """Plain contiguous tensors of one of `dtypes`, the same for all, at `place` (`get_device`), of `sizes`.

    Raises TypeError and ValueError as `check_step`.
    """
    kinds = set(map(type, column))
    if not kinds <= _PLAIN:
        found = ", ".join(sorted(kind.__name__ for kind in kinds - _PLAIN))
        raise TypeError(
            f"{name} has tensors of type {found}, which have no numbers at an address of their own; a step "
            "takes plain tensors and parameters alone (an Int8Weight is QAPOLLO's to step)"
        )
    if sizes is not None and (found_sizes := list(map(Tensor.numel, column))) != sizes:
        raise ValueError(f"{name} has {_apart(found_sizes, sizes)} as the weights beside it demand")
    held = set(map(_dtype, column))
    if len(held) > 1 or not held <= set(dtypes):
        raise ValueError(f"{name} is of {_named(held)}; allowed: one of {_named(dtypes)} for all")
    if not set(map(Tensor.get_device, column)) <= {place}:
        raise ValueError(f"{name} has tensors on another device than the first weight")
    if not all(map(Tensor.is_contiguous, column)):
        raise ValueError(f"{name} has tensors that are not contiguous; give their .contiguous()")


def _apart(found: list[int], wanted: list[int]) -> str:
    if len(found) != len(wanted):
        return f"{len(found)} tensors, not {len(wanted)}"
    i = next(i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b)
    return f"{found[i]:,} elements in tensor {i}, not {wanted[i]:,}"


def _named(dtypes: Sequence[torch.dtype] | set[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
