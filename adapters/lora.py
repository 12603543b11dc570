"""LoRA and its relatives through PEFT: from the recipe's section to a model that is ready to train."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from ..recipes.errors import UserError
from .facts import Facts
from .starts import (
    InitialAdapter,
    calibrate_eva,
    check_eva_batches,
    remember_start,
    start_loftq,
    start_orthogonal,
)
from .targets import adaptable_modules, check_patterns, target_list

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

    from ..recipes.choices import LoraAdapter

_EMBEDDINGS = ("embed_tokens", "lm_head")
# said by PEFT, and answered: storage.py converts rsLoRA with patterns too, and PEFT itself uses the old name
_ANSWERED = (
    "lora with eva initialization used with low_cpu_mem_usage",
    "`is_gradient_checkpointing` is deprecated",
    "Using Rank-Stabilized LoRA with rank_pat",
)


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
    _check_tied(adapter, targets, skeleton, facts)
    start = adapter.init_lora_weights
    # LoftQ and orthogonal are started in starts.py: PEFT's LoftQ needs CUDA and leaves the scale out, and its
    # orthogonal start is rounded to the base's type, so that A and B no longer cancel
    peft_start: Any = True if start in ("loftq", "orthogonal") else start
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
    targeted = targeted_modules(config, skeleton)
    if not targeted:
        raise UserError(
            "adapter: target_modules, exclude_modules and layers_to_transform together leave no module to "
            "adapt.\n"
            "  Leave exclude_modules or layers_to_transform out."
        )
    check_patterns(adapter, targeted)
    return config


def targeted_modules(config: LoraConfig, skeleton: nn.Module) -> list[str]:
    """Full names of the modules that PEFT will wrap, by PEFT's own rule."""
    from peft.tuners.tuners_utils import check_target_module_exists

    check: Any = (
        check_target_module_exists  # returns a match, a bool, or a falsy marker for an excluded module
    )
    return [name for name, _ in skeleton.named_modules() if name and check(config, name)]


def attach(
    model: Any,
    adapter: LoraAdapter | None,
    facts: Facts,
    *,
    seed: int,
    eva_batches: Sequence[Mapping[str, torch.Tensor]] | None = None,
    original_weight: Callable[[str], torch.Tensor] | None = None,
    saved: Mapping[str, Any] | None = None,
    checkpointing: Literal["none", "non_reentrant", "reentrant"] = "none",
) -> nn.Module:
    """Make `model` trainable: with an adapter in float32 on the frozen base (a PeftModel), or whole.

    The same seed gives the same adapter, whatever was drawn before; the global generators are left as they
    were. eva_batches: for `init_lora_weights: eva`, dictionaries of input_ids [B, L] with attention_mask and
    labels. original_weight: for `loftq` on a 4-bit base, unquantised weights by parameter name
    (`models.weight_reader`). saved: adapter_config.json of an adapter that will be loaded into this one; EVA
    then takes its ranks in place of batches. checkpointing: "reentrant" needs inputs that ask for a gradient;
    others do not and are cheaper without.

    Raises:
        UserError: options that do not go together, or with a 4-bit base.
    """
    four_bit = bool(getattr(model, "is_loaded_in_4bit", False))
    if adapter is None:
        if four_bit:
            raise UserError(
                "adapter: null trains all weights, but model.load_in_4bit holds them in 4 bits.\n"
                "  adapter=lora, or model.load_in_4bit=false"
            )
        model.requires_grad_(True)
        model.train()
        whole: nn.Module = model
        return whole
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    config = lora_config(adapter, facts)
    start = adapter.init_lora_weights
    if start == "eva" and saved is not None:
        config = PeftLoraConfig.from_peft_type(**saved)  # type: ignore[no-untyped-call]
        config.inference_mode = False
        config.init_lora_weights = True
    elif start == "eva":
        check_eva_batches(adapter, eva_batches)
    if four_bit and isinstance(start, str) and start.startswith(("pissa", "olora")):
        raise UserError(
            f"adapter.init_lora_weights: {start} takes a part out of the base weights, which 4 bits cannot "
            "hold.\n"
            "  With model.load_in_4bit use loftq (made for it), eva or true; or model.load_in_4bit=false"
        )
    model.name_or_path = facts.source  # PEFT writes this into adapter_config.json
    with torch.random.fork_rng(), warnings.catch_warnings():
        for said in _ANSWERED:
            warnings.filterwarnings("ignore", message=said)
        torch.manual_seed(seed)
        wrapped: PeftModel = get_peft_model(model, config, autocast_adapter_dtype=True)
        if start == "loftq":
            start_loftq(wrapped, adapter, original_weight)
        elif start == "orthogonal":
            start_orthogonal(wrapped)
        elif start == "eva" and saved is None:
            assert eva_batches is not None
            calibrate_eva(wrapped, eva_batches)
    for parameter in wrapped.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    # one round of LoftQ leaves a 4-bit base as it was loaded: the adapter fits that as it is
    keeps_base = start == "loftq" and four_bit and adapter.loftq_iter == 1
    if isinstance(start, str) and start.startswith(("pissa", "olora", "loftq")) and not keeps_base:
        whole_adapter: Any = wrapped
        whole_adapter.initial_adapter = remember_start(wrapped)
    if checkpointing == "reentrant":
        wrapped.enable_input_require_grads()
    wrapped.train()
    return wrapped


def trainable_parameters(adapter: LoraAdapter | None, facts: Facts) -> int:
    """Number of trained parameters, from shapes alone (PEFT's own rules on the meta device).

    EVA moves ranks between modules after looking at data; what is said for it is the count before that.
    """
    if adapter is None:
        return facts.parameters
    from peft import get_peft_model

    plain = adapter.model_copy(update={"init_lora_weights": True})
    with torch.device("meta"):
        model = get_peft_model(facts.skeleton(), lora_config(plain, facts))
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


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


def _check_tied(adapter: LoraAdapter, targets: str | list[str], skeleton: nn.Module, facts: Facts) -> None:
    """LoRA on one end of tied embeddings would change the other end too at the merge."""
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
                "tied), so LoRA "
                "on it would change both when merged.\n  Train the matrix "
                "whole:  adapter.modules_to_save=[embed_tokens]"
            )


__all__ = ["InitialAdapter", "attach", "lora_config", "targeted_modules", "trainable_parameters"]
