"""Which modules an adapter touches, checked by name before anything is built.

PEFT stays silent when one of several targets matches nothing; here each name must match.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from ..recipes.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..recipes.choices import AdapterConfig, LoraAdapter


def adaptable_modules(skeleton: PreTrainedModel) -> dict[str, nn.Module]:
    """Modules that LoRA can wrap: linear layers (GPT-2's Conv1D too) and embeddings, by full name."""
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, Conv1D, nn.Embedding)
    return {name: module for name, module in skeleton.named_modules() if isinstance(module, kinds)}


def target_list(adapter: AdapterConfig, skeleton: PreTrainedModel) -> str | list[str]:
    """`adapter.target_modules` as PEFT takes it; `all-linear` becomes names, which go with layer numbers.

    Raises:
        UserError: a target, an excluded module, a module to save or a layer number matches nothing.
    """
    adaptable = adaptable_modules(skeleton)
    every = [name for name, _ in skeleton.named_modules()]
    targets: str | list[str] = adapter.target_modules
    if targets == "all-linear":
        untyped: Any = skeleton
        head = untyped.get_output_embeddings()
        linears = (
            name
            for name, module in adaptable.items()
            if module is not head and not isinstance(module, nn.Embedding)
        )
        targets = list(dict.fromkeys(_short_names(linears)))
    elif isinstance(targets, str):
        _check_expression("adapter.target_modules", targets, list(adaptable), every)
        if adapter.layers_to_transform is not None:
            raise UserError(
                "adapter.layers_to_transform and a regular expression in adapter.target_modules exclude "
                "each other.\n"
                "  Put the layer numbers into the expression, or give target_modules as a list of names."
            )
    else:
        for target in targets:
            if not _ends_with(target, adaptable):
                raise _no_match("adapter.target_modules", target, adaptable, every)
    _check_excluded(adapter, every)
    for name in getattr(adapter, "modules_to_save", None) or ():  # of LoRA alone
        if not _ends_with(name, every):
            raise _no_match("adapter.modules_to_save", name, every, every)
    _check_layers(adapter, skeleton)
    return targets


def check_patterns(adapter: LoraAdapter, targeted: Sequence[str]) -> None:
    """Each key of `rank_pattern` and `alpha_pattern` must match a targeted module.

    Raises:
        UserError: a key matches none, or is no regular expression.
    """
    for key, pattern in (("rank_pattern", adapter.rank_pattern), ("alpha_pattern", adapter.alpha_pattern)):
        for name in pattern:
            expression = _compiled(f"adapter.{key}", rf"(.*\.)?({name})$", shown=name)
            if not any(expression.match(module) for module in targeted):
                raise _no_match(f"adapter.{key}", name, targeted, targeted)


def _short_names(names: Iterable[str]) -> list[str]:
    return [name.rpartition(".")[2] for name in names]


def _ends_with(name: str, modules: Iterable[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for module in modules)


def _compiled(key: str, expression: str, shown: str | None = None) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise UserError(
            f"{key}: {shown or expression!r} is not a regular expression: {error}.\n"
            "  Names are written as a list: [q_proj, v_proj]"
        ) from error


def _check_expression(key: str, expression: str, adaptable: Sequence[str], every: Sequence[str]) -> None:
    compiled = _compiled(key, expression)
    if not any(compiled.fullmatch(name) for name in adaptable):
        short = dict.fromkeys(_short_names(adaptable))
        meant = [part for part in expression.split("|") if part in short]
        names = ", ".join(meant) or _nearest(expression, short)
        raise UserError(
            f"{key}: the regular expression {expression!r} matches no module; it must match a whole name, "
            "such "
            f"as {adaptable[-1]!r}.\n  Did you mean a list?  target_modules: [{names}]"
        )
    wrong = [name for name in every if name and compiled.fullmatch(name) and name not in adaptable]
    if wrong:
        raise UserError(
            f"{key}: the regular expression {expression!r} also matches {wrong[0]}, which is no linear "
            "layer.\n"
            "  Let it end in the layer's name, such as  .*self_attn\\.[qv]_proj"
        )


def _check_excluded(adapter: AdapterConfig, every: Sequence[str]) -> None:
    excluded = adapter.exclude_modules
    if isinstance(excluded, str):
        compiled = _compiled("adapter.exclude_modules", excluded)
        if not any(compiled.fullmatch(name) for name in every):
            raise _no_match("adapter.exclude_modules", excluded, every, every)
        return
    for name in excluded or ():
        if not _ends_with(name, every):
            raise _no_match("adapter.exclude_modules", name, every, every)


def _check_layers(adapter: AdapterConfig, skeleton: PreTrainedModel) -> None:
    layers = int(skeleton.config.get_text_config().num_hidden_layers)
    beyond = [number for number in adapter.layers_to_transform or () if number >= layers]
    if beyond:
        raise UserError(
            f"adapter.layers_to_transform: there is no layer {beyond[0]}; the model has {layers}, numbered "
            "from 0 to "
            f"{layers - 1}."
        )


def _no_match(key: str, given: str, candidates: Iterable[str], every: Iterable[str]) -> UserError:
    short = dict.fromkeys(_short_names(candidates))
    if _ends_with(given, every) and key == "adapter.target_modules":
        inside = [name for name in candidates if f".{given}." in f".{name}"]
        hint = ", ".join(dict.fromkeys(_short_names(inside))) or ", ".join(list(short)[:8])
        return UserError(f"{key}: {given} is no linear layer, so LoRA cannot wrap it.\n  Inside it: {hint}")
    return UserError(
        f"{key}: {given!r} matches no module of the model.   Did you mean {_nearest(given, short)} ?"
    )


def _nearest(given: str, names: Iterable[str]) -> str:
    named = list(names)
    near = difflib.get_close_matches(given, named, n=3, cutoff=0.5)
    return ", ".join(near or [name for name in named if not name.isdigit()][:8])
