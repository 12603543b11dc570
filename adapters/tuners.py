"""PEFT's other tuners: from the recipe's section to PEFT's configuration, options checked by their fields."""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from typing import TYPE_CHECKING, Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import nn

from ..recipes.errors import UserError
from ..recipes.peft_adapter import NOT_ON_4BIT, PeftAdapter
from .facts import Facts
from .lora import check_tied, found_modules
from .targets import target_list

if TYPE_CHECKING:
    from peft import PeftConfig

_DECIDED = (
    "bias",
    "exclude_modules",
    "fan_in_fan_out",
    "init_ia3_weights",
    "init_weights",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "target_modules",
)
"""Fields that the recipe's own keys decide, or that would train the base or start away from it."""

_AT_THE_BASE: dict[str, dict[str, Any]] = {"c3a": {"init_weights": True}, "fourierft": {"init_weights": True}}
"""By type: what PEFT has to be told so that the adapter starts as no change."""


def option_fields(peft_type: str) -> dict[str, Any]:
    """Type by name of the fields that `adapter.options` may give for a PEFT type."""
    from peft import PeftConfig

    kind = _config_class(peft_type)
    common = {field.name for field in dataclasses.fields(PeftConfig)}
    hints = get_type_hints(kind)
    return {
        field.name: hints[field.name]
        for field in dataclasses.fields(kind)
        if field.init and field.name not in common | {*_DECIDED} and not field.name.startswith("save_")
    }


def tuner_config(adapter: PeftAdapter, facts: Facts) -> PeftConfig:
    """PEFT's configuration of `adapter` for the model of `facts`.

    Raises:
        UserError: an option that the type does not have or of another type, values that PEFT refuses, or
            names that match nothing.
    """
    from peft import TaskType

    _check_options(adapter)
    kind: Any = _config_class(adapter.peft_type)
    skeleton = facts.skeleton()
    targets = target_list(adapter, skeleton)
    check_tied(targets, skeleton, facts)
    given: dict[str, Any] = {
        "task_type": TaskType.CAUSAL_LM,
        "base_model_name_or_path": facts.source,
        "target_modules": _names(adapter, targets, skeleton, facts),
        **_AT_THE_BASE.get(adapter.peft_type, {}),
        **adapter.options,
    }
    try:
        config: PeftConfig = kind(**given)
    except (ValueError, TypeError, NotImplementedError, ArithmeticError) as error:
        raise _refused(adapter, error) from error
    return config


def wrap(model: Any, config: PeftConfig, adapter: PeftAdapter) -> Any:
    """`get_peft_model` for a tuner. UserError: options that do not go with the shapes, or a 4-bit base."""
    from peft import get_peft_model

    if getattr(model, "is_loaded_in_4bit", False) and adapter.peft_type in NOT_ON_4BIT:
        raise UserError(
            f"adapter.peft_type: {adapter.peft_type} cannot be trained on packed 4-bit weights.\n"
            "  model.load_in_4bit=false, or adapter=lora"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on types that are experimental, and on Conv1D
            return get_peft_model(model, config, autocast_adapter_dtype=True)
    except (ValueError, TypeError, NotImplementedError, ArithmeticError) as error:
        raise _refused(adapter, error) from error


def added_numbers(model: nn.Module) -> int:
    """What a tuner holds beside the base without training it, in numbers of four bytes: buffers (projections,
    indices) and frozen parameters. Shapes alone are read.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    base: set[int] = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            layer = module.get_base_layer()
            base |= {id(tensor) for tensor in (*layer.parameters(), *layer.buffers())}
    held = {
        id(tensor): tensor.numel() * tensor.element_size()
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
        for tensor in (*module.parameters(), *module.buffers())
        if id(tensor) not in base and not tensor.requires_grad
    }
    return sum(held.values()) // 4


def _names(
    adapter: PeftAdapter, targets: str | list[str], skeleton: nn.Module, facts: Facts
) -> str | set[str]:
    """The modules as PEFT takes them; whole names where some are left out, which not every type can do."""
    from peft import LoraConfig

    selection = LoraConfig(
        target_modules=targets,
        exclude_modules=adapter.exclude_modules,
        layers_to_transform=list(adapter.layers_to_transform) if adapter.layers_to_transform else None,
    )
    found = found_modules(selection, skeleton)
    narrowed = adapter.exclude_modules is not None or adapter.layers_to_transform is not None
    if narrowed:
        return set(found)
    return targets if isinstance(targets, str) else set(targets)


def _check_options(adapter: PeftAdapter) -> None:
    fields = option_fields(adapter.peft_type)
    rank = adapter.options.get("r")
    if adapter.peft_type == "hra" and isinstance(rank, int) and rank % 2:
        raise UserError(
            f"adapter.options.r is {rank}; hra starts at the base model only with an even one.\n"
            f"  adapter.options.r={rank + 1}"
        )
    for name, value in adapter.options.items():
        key = f"adapter.options.{name}"
        if name not in fields:
            raise _unknown(key, name, adapter.peft_type, fields)
        try:
            strict = ConfigDict(strict=True, arbitrary_types_allowed=True)
            TypeAdapter(fields[name], config=strict).validate_python(value)
        except ValidationError as error:
            said = "; ".join(dict.fromkeys(one["msg"] for one in error.errors(include_url=False)))
            default = _default(adapter.peft_type, name)
            raise UserError(
                f"{key} is {value!r}, which does not suit this field of PEFT's {adapter.peft_type}: {said}.\n"
                f"  Its default is {default!r}; leave it out for that"
            ) from None


def _unknown(key: str, name: str, peft_type: str, fields: dict[str, Any]) -> UserError:
    there = {field.name for field in dataclasses.fields(_config_class(peft_type))}
    if name in there:
        instead = f"adapter.{name}" if name in PeftAdapter.model_fields else "nothing: leave it out"
        return UserError(
            f"{key} is decided by shoestring for every type; it is no option.\n"
            f"  In its place there is {instead}.   The options of {peft_type}: {', '.join(fields) or 'none'}"
        )
    near = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
    hint = f"   Did you mean {near[0]} ?" if near else ""
    return UserError(
        f"{key} is no option of {peft_type}.{hint}\n"
        f"  Its options, with PEFT's names: {', '.join(fields) or 'none'}"
    )


def _default(peft_type: str, name: str) -> Any:
    (field,) = (one for one in dataclasses.fields(_config_class(peft_type)) if one.name == name)
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def _refused(adapter: PeftAdapter, error: Exception) -> UserError:
    given = ", ".join(f"{key}: {value}" for key, value in adapter.options.items()) or "its defaults"
    return UserError(
        f"adapter: PEFT's {adapter.peft_type} does not take {given} for this model: {error}\n"
        f"  Change adapter.options ({', '.join(option_fields(adapter.peft_type)) or 'it has none'}) or "
        "adapter.target_modules"
    )


def _config_class(peft_type: str) -> type[Any]:
    import peft  # noqa: F401 - fills the mapping
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    classes: Any = PEFT_TYPE_TO_CONFIG_MAPPING
    kind: type[Any] = classes[peft_type.upper()]
    return kind
