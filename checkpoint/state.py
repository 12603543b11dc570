"""The state of an optimizer by parameter name: tensors in their exact dtypes, everything else as JSON.

torch's own `state_dict` numbers the parameters, so that a changed order loads in silence, and its
`load_state_dict` casts moments to the parameter's dtype (fp32 moments of a bf16 model lose bits). Here each
state is keyed by name, placed as it is, and checked against the parameter before anything changes. Works for
every optimizer whose state is made of tensors, plain numbers and text, and lists, tuples and dicts of these:
torch's, bitsandbytes', our own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..offload.optimizer import OffloadedOptimizer
from ..offload.stored import Stored, in_memory
from ..recipes.errors import UserError
from .generators import random_state as random_state
from .generators import set_random_state as set_random_state

Names = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


def optimizer_state(
    optimizer: torch.optim.Optimizer, names: Names
) -> tuple[dict[str, Tensor | Stored], dict[str, Any]]:
    """(tensors, JSON-able rest) of `optimizer`. names: `model.named_parameters()`, or such a dict.

    The tensors are the optimizer's own, not copies: save them before the next step. Those that lie on another
    tier are `Stored`, to be read by ranges. One that several
    parameters share (the 8-bit maps of bitsandbytes) is stored once. TypeError names a value that cannot be
    stored.
    """
    name_of = {id(parameter): name for name, parameter in _pairs(names)}
    tensors: dict[str, Tensor | Stored] = {}
    stored: dict[int, str] = {}
    groups = []
    parameters: dict[str, Any] = {}
    for index, group in enumerate(optimizer.param_groups):
        members = []
        for parameter in group["params"]:
            if id(parameter) not in name_of:
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} in group {index} has no name"
                )
            name = name_of[id(parameter)]
            members.append(name)
            parameters[name] = {
                "shape": list(parameter.shape),
                "dtype": str(parameter.dtype),
                "state": encode_tree(optimizer.state.get(parameter, {}), name, parameter, tensors, stored),
            }
        values = {key: value for key, value in group.items() if key != "params"}
        options = encode_tree(values, f"group {index}", None, tensors, stored)
        groups.append({"parameters": members, "options": options})
    return tensors, {"optimizer": _class_name(optimizer), "groups": groups, "parameters": parameters}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    names: Names,
    tensors: Mapping[str, Tensor | Stored],
    json: Mapping[str, Any],
) -> None:
    """Put what `optimizer_state` gave into `optimizer`, which may be fresh. UserError names the first
    mismatch.

    All is checked before anything is changed. Tensors go to their parameter's device (or stay on the CPU
    where they were kept there), in the dtype they were saved in; on the CPU the given tensors are used, not
    copied. `Stored` ones are read, by ranges where the state lies on another tier.
    """
    if json["optimizer"] != _class_name(optimizer):
        raise _mismatch(f"was saved by {json['optimizer']}, this run uses {_class_name(optimizer)}")
    name_of = {id(parameter): name for name, parameter in _pairs(names)}
    saved_groups = json["groups"]
    if len(saved_groups) != len(optimizer.param_groups):
        raise _mismatch(
            f"has {len(saved_groups)} parameter groups, this run has {len(optimizer.param_groups)}"
        )
    for index, (saved, group) in enumerate(zip(saved_groups, optimizer.param_groups, strict=True)):
        _check_members(index, saved["parameters"], [name_of.get(id(p), "(no name)") for p in group["params"]])
        for parameter in group["params"]:
            _check_parameter(name_of[id(parameter)], parameter, json["parameters"], tensors)

    placed: dict[tuple[str, torch.device], Tensor] = {}
    for saved, group in zip(saved_groups, optimizer.param_groups, strict=True):
        for parameter in group["params"]:
            place = _placer(optimizer, parameter, tensors, placed)
            state = decode_tree(json["parameters"][name_of[id(parameter)]]["state"], place)
            if isinstance(optimizer, OffloadedOptimizer):
                optimizer.put_state(parameter, state)
            elif state:
                optimizer.state[parameter] = state
            else:
                optimizer.state.pop(parameter, None)
        group.update(decode_tree(saved["options"], _option_placer(group, tensors)))


def _check_members(index: int, saved: list[str], here: list[str]) -> None:
    if saved == here:
        return
    for name in saved:
        if name not in here:
            raise _mismatch(f"has the parameter {name} in group {index}; this run does not train it there")
    for name in here:
        if name not in saved:
            raise _mismatch(f"has no state for the parameter {name}, which this run trains in group {index}")


def _check_parameter(
    name: str, parameter: Tensor, saved: Mapping[str, Any], tensors: Mapping[str, Tensor | Stored]
) -> None:
    entry = saved[name]
    if entry["shape"] != list(parameter.shape):
        raise _mismatch(
            f"holds {name} of shape {tuple(entry['shape'])}, this run has {tuple(parameter.shape)}"
        )
    if entry["dtype"] != str(parameter.dtype):
        raise _mismatch(f"holds {name} in {entry['dtype']}, this run has it in {parameter.dtype}")
    for leaf in _leaves(entry["state"]):
        tensor = tensors.get(leaf["tensor"])
        if tensor is None:
            raise _mismatch(f"lacks the tensor {leaf['tensor']} of {name}")
        if str(tensor.dtype) != leaf["dtype"] or list(tensor.shape) != leaf["shape"]:
            raise _mismatch(
                f"has {leaf['tensor']} as {tensor.dtype} {tuple(tensor.shape)}, not as its record says"
            )


def _placer(
    optimizer: torch.optim.Optimizer,
    parameter: Tensor,
    tensors: Mapping[str, Tensor | Stored],
    placed: dict[tuple[str, torch.device], Tensor],
) -> Callable[[Mapping[str, Any], str], Tensor | Stored]:
    # bitsandbytes' paged optimizers keep large states in memory that the driver moves by itself; only the
    # optimizer can allocate it, and a state loaded elsewhere would stay on the device for good (bitsandbytes
    # issue 782).
    allocate = getattr(optimizer, "get_state_buffer", None) if getattr(optimizer, "is_paged", False) else None

    def place(leaf: Mapping[str, Any], key: str) -> Tensor | Stored:
        tensor = tensors[leaf["tensor"]]
        if isinstance(optimizer, OffloadedOptimizer):
            return tensor
        tensor = in_memory(tensor)
        if allocate is not None and key in ("state1", "state2") and tensor.shape == parameter.shape:
            buffer: Tensor = allocate(parameter, dtype=tensor.dtype)
            return buffer.copy_(tensor)
        device = parameter.device if leaf["follows"] else torch.device("cpu")
        return placed.setdefault((leaf["tensor"], device), tensor.to(device))

    return place


def _option_placer(
    group: Mapping[str, Any], tensors: Mapping[str, Tensor | Stored]
) -> Callable[[Mapping[str, Any], str], Tensor]:
    """A rate kept as a tensor goes to the device of the one it replaces."""

    def place(leaf: Mapping[str, Any], key: str) -> Tensor:
        here = group.get(key)
        saved = tensors[leaf["tensor"]]
        tensor = in_memory(saved)
        return tensor.to(here.device) if isinstance(here, Tensor) else tensor

    return place


def encode_tree(
    value: Any,
    where: str,
    parameter: Tensor | None,
    tensors: dict[str, Tensor | Stored],
    stored: dict[int, str],
) -> Any:
    """A tree of {"tensor"|"value"|"list"|"tuple"|"dict": ...}; tensors go to `tensors` under their path."""
    if isinstance(value, Tensor):
        key = stored.setdefault(id(value), where)
        tensors[key] = value.detach()
        follows = parameter is not None and value.device == parameter.device
        return {"tensor": key, "dtype": str(value.dtype), "shape": list(value.shape), "follows": follows}
    if isinstance(value, Stored):
        tensors[where] = value
        return {"tensor": where, "dtype": str(value.dtype), "shape": list(value.shape), "follows": True}
    if value is None or type(value) in (bool, int, float, str):
        return {"value": value}
    if type(value) in (list, tuple):
        items = [
            encode_tree(item, f"{where}/{index}", parameter, tensors, stored)
            for index, item in enumerate(value)
        ]
        return {type(value).__name__: items}
    if isinstance(value, dict) and all(type(key) in (str, int) for key in value):
        pairs = [
            [key, encode_tree(item, f"{where}/{key}", parameter, tensors, stored)]
            for key, item in value.items()
        ]
        return {"dict": pairs}
    raise TypeError(f"the optimizer's state {where} is a {type(value).__name__}: it cannot be saved")


def decode_tree(
    tree: Mapping[str, Any], place: Callable[[Mapping[str, Any], str], Tensor | Stored], key: str = ""
) -> Any:
    """What `encode_tree` took apart; `place` gives the tensor of a leaf, which has the given key."""
    if "tensor" in tree:
        return place(tree, key)
    if "value" in tree:
        return tree["value"]
    if "dict" in tree:
        return {name: decode_tree(item, place, str(name)) for name, item in tree["dict"]}
    kind = tuple if "tuple" in tree else list
    return kind(decode_tree(item, place, key) for item in tree[kind.__name__])


def _leaves(tree: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    if "tensor" in tree:
        yield tree
    for item in [*tree.get("list", ()), *tree.get("tuple", ()), *(pair[1] for pair in tree.get("dict", ()))]:
        yield from _leaves(item)


def _pairs(names: Names) -> Iterable[tuple[str, Tensor]]:
    return names.items() if isinstance(names, Mapping) else names


def _class_name(optimizer: torch.optim.Optimizer) -> str:
    if isinstance(optimizer, OffloadedOptimizer):  # where the state lives is no part of what it is
        optimizer = optimizer.inner
    return f"{type(optimizer).__module__.split('.')[0]}.{type(optimizer).__qualname__}"


def _mismatch(what: str) -> UserError:
    return UserError(
        f"The optimizer state in the checkpoint {what}.\n"
        "The model or the optimizer of this run is another one: undo the change, or start over with --fresh."
    )
