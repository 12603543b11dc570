"""LoRA and its relatives: from the recipe's section to PEFT's configuration."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import nn

from ..recipes.errors import UserError
from .facts import Facts
from .targets import adaptable_modules, check_patterns, target_list

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig

    from ..recipes.choices import LoraAdapter

_EMBEDDINGS = ("embed_tokens", "lm_head")


def lora_config(adapter: LoraAdapter, facts: Facts) -> LoraConfig:
    """PEFT's configuration of `adapter` for the model of `facts`.

    Raises:
        UserError: a name that matches nothing, or options that exclude each other.
    """
    from peft import EvaConfig
    from peft import LoraConfig as PeftLoraConfig
    from transformers.pytorch_utils import Conv1D

    skeleton = facts.skeleton()
    targets = target_list(adapter, skeleton)
    _check_options(adapter)
    check_tied(targets, skeleton, facts)
    start = adapter.init_lora_weights
    # LoftQ and orthogonal are started in starts.py: PEFT's LoftQ needs CUDA and leaves the scale out, and its
    # orthogonal start is rounded to the base's type, so that A and B no longer cancel. Its CorDA (here in
    # corda.py) takes padding for input and wants a package that it does not ask for
    peft_start: Any = True if start in ("loftq", "orthogonal", "corda") else start
    config = PeftLoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=facts.source,
        r=adapter.r,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=adapter.lora_dropout,
        target_modules=targets,
        exclude_modules=adapter.exclude_modules,
        modules_to_save=list(adapter.modules_to_save) if adapter.modules_to_save else None,
        layers_to_transform=list(adapter.layers_to_transform) if adapter.layers_to_transform else None,
        rank_pattern=dict(adapter.rank_pattern),
        alpha_pattern=dict(adapter.alpha_pattern),
        bias=adapter.bias,
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        init_lora_weights=peft_start,
        eva_config=EvaConfig(rho=adapter.eva_rho) if start == "eva" else None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in adaptable_modules(skeleton).values()),
        ensure_weight_tying=facts.tied and bool(set(adapter.modules_to_save or ()) & set(_EMBEDDINGS)),
    )
    check_patterns(adapter, found_modules(config, skeleton))
    return config


def found_modules(config: PeftConfig, skeleton: nn.Module) -> list[str]:
    """`targeted_modules`, of which there must be one. UserError: there is none."""
    targeted = targeted_modules(config, skeleton)
    if not targeted:
        raise UserError(
            "adapter: target_modules, exclude_modules and layers_to_transform together leave no module to "
            "adapt.\n"
            "  Leave exclude_modules or layers_to_transform out."
        )
    return targeted


def targeted_modules(config: PeftConfig, skeleton: nn.Module) -> list[str]:
    """Full names of the modules that PEFT will wrap, by PEFT's own rule."""
    from peft.tuners.tuners_utils import check_target_module_exists

    check: Any = (
        check_target_module_exists  # returns a match, a bool, or a falsy marker for an excluded module
    )
    return [name for name, _ in skeleton.named_modules() if name and check(config, name)]


def _check_options(adapter: LoraAdapter) -> None:
    if adapter.init_lora_weights == "orthogonal":
        odd = [rank for rank in (adapter.r, *adapter.rank_pattern.values()) if rank % 2]
        if odd:
            raise UserError(
                f"adapter.init_lora_weights: orthogonal needs even ranks, {odd[0]} is "
                f"odd.   adapter.r={odd[0] + 1}"
            )
    if adapter.init_lora_weights in ("loftq", "orthogonal") and adapter.use_dora:
        raise UserError(
            f"adapter.use_dora and adapter.init_lora_weights={adapter.init_lora_weights} exclude each "
            "other.\n"
            "  DoRA goes with true, gaussian, olora, pissa and eva."
        )


def check_tied(targets: str | list[str], skeleton: nn.Module, facts: Facts) -> None:
    """An adapter on one end of tied embeddings would change the other end too at the merge."""
    if not facts.tied:
        return
    probe: Any = skeleton
    ends = {id(probe.get_input_embeddings()), id(probe.get_output_embeddings())}
    named = [name for name, module in skeleton.named_modules() if id(module) in ends]
    wanted = {targets} if isinstance(targets, str) else set(targets)
    for name in named:
        short = name.rpartition(".")[2]
        if short in wanted or name in wanted or (isinstance(targets, str) and re.fullmatch(targets, name)):
            raise UserError(
                f"adapter.target_modules: {short} shares its matrix with the other embedding (they are "
                "tied), so an adapter on it would change both when merged.\n  Leave it out; LoRA can train "
                "the matrix whole:  adapter=lora adapter.modules_to_save=[embed_tokens]"
            )
