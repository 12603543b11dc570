"""From the recipe's section to a model that is ready to train, and what that adds, from shapes alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from ..recipes.choices import AdapterConfig, LoraAdapter, SokaAdapter, SvfitAdapter
from ..recipes.errors import UserError
from ..recipes.peft_adapter import PeftAdapter
from .corda import start_corda
from .facts import Facts
from .layers import OwnConfig, own_layers
from .lora import check_tied, found_modules, lora_config, targeted_modules
from .ranks import allocate
from .soka import SokaConfig
from .starts import calibrate_eva, check_eva_batches, remember_start, start_loftq, start_orthogonal
from .svfit import SvfitConfig
from .targets import target_list
from .tuners import added_numbers, tuner_config, wrap

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

# said by PEFT, and answered: storage.py converts rsLoRA with patterns too, and PEFT itself uses the old name
_ANSWERED = (
    "lora with eva initialization used with low_cpu_mem_usage",
    "`is_gradient_checkpointing` is deprecated",
    "Using Rank-Stabilized LoRA with rank_pat",
)
_SAME_FACTORS = 1e-3  # of a sketch, which is of the size of 1


def peft_config(adapter: AdapterConfig, facts: Facts) -> PeftConfig:
    """PEFT's configuration of `adapter` for the model of `facts`. UserError: names that match nothing."""
    match adapter:
        case LoraAdapter():
            return lora_config(adapter, facts)
        case PeftAdapter():
            return tuner_config(adapter, facts)
        case SvfitAdapter():
            own: OwnConfig = SvfitConfig(r=adapter.r, energy=adapter.energy)
        case SokaAdapter():
            own = SokaConfig(r=adapter.r, energy=adapter.energy)
    from peft import TaskType

    skeleton = facts.skeleton()
    targets = target_list(adapter, skeleton)
    check_tied(targets, skeleton, facts)
    own.task_type = TaskType.CAUSAL_LM
    own.base_model_name_or_path = facts.source
    own.target_modules = targets if isinstance(targets, str) else set(targets)
    own.exclude_modules = adapter.exclude_modules
    own.layers_to_transform = list(adapter.layers_to_transform) if adapter.layers_to_transform else None
    found_modules(own, skeleton)
    return own


def attach(
    model: Any,
    adapter: AdapterConfig | None,
    facts: Facts,
    *,
    seed: int,
    batches: Sequence[Mapping[str, torch.Tensor]] | None = None,
    original_weight: Callable[[str], torch.Tensor] | None = None,
    saved: Mapping[str, Any] | None = None,
    checkpointing: Literal["none", "non_reentrant", "reentrant"] = "none",
    from_weights: bool = True,
) -> nn.Module:
    """Make `model` trainable: with an adapter in float32 on the frozen base (a PeftModel), or whole.

    The same seed gives the same adapter, whatever was drawn before; the global generators are left as they
    were. batches: where `looks_at_rows` says so, dictionaries of input_ids [B, L] with attention_mask and
    labels; in a resumed run too, since CorDA's start is computed again. original_weight: for `loftq` on a
    4-bit base, unquantised weights by parameter name (`models.weight_reader`). saved: adapter_config.json of
    an adapter that will be loaded into this one; the ranks that were found in data or weights are then taken
    from it. checkpointing: "reentrant" needs inputs that ask for a gradient; others do not and are cheaper
    without. from_weights: off for a model that is only measured, where what SVFit and SoKA start from need
    not be computed; ranks are then the largest there are.

    Raises:
        UserError: options that do not go together, or with a 4-bit base; singular vectors that are not those
            that training started with; what PEFT refuses of `adapter.options`.
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
    from peft import get_peft_model

    config: Any = peft_config(adapter, facts)
    if isinstance(adapter, LoraAdapter):
        config = _with_ranks(config, adapter, model, batches, saved, four_bit=four_bit)
    elif not isinstance(adapter, PeftAdapter):
        config.ranks = dict(saved["ranks"]) if saved is not None else {}
        config.init_weights = from_weights
    model.name_or_path = facts.source  # PEFT writes this into adapter_config.json
    start = adapter.init_lora_weights if isinstance(adapter, LoraAdapter) else None
    with torch.random.fork_rng(), warnings.catch_warnings():
        for said in _ANSWERED:
            warnings.filterwarnings("ignore", message=said)
        torch.manual_seed(seed)
        if isinstance(adapter, PeftAdapter):
            wrapped: PeftModel = wrap(model, config, adapter)
        else:
            wrapped = get_peft_model(model, config, autocast_adapter_dtype=True)
        if isinstance(adapter, LoraAdapter) and start == "loftq":
            start_loftq(wrapped, adapter, original_weight)
        elif start == "orthogonal":
            start_orthogonal(wrapped)
        elif isinstance(adapter, LoraAdapter) and start == "corda":
            start_corda(wrapped, adapter.corda_method, batches)
        elif start == "eva" and saved is None:
            assert batches is not None
            calibrate_eva(wrapped, batches)
    if saved is not None and isinstance(adapter, SvfitAdapter | SokaAdapter):
        _check_factors(config, saved)
    for parameter in wrapped.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    # one round of LoftQ leaves a 4-bit base as it was loaded: the adapter fits that as it is
    keeps_base = start == "loftq" and four_bit and getattr(adapter, "loftq_iter", 0) == 1
    if isinstance(start, str) and start.startswith(("pissa", "olora", "loftq", "corda")) and not keeps_base:
        whole_adapter: Any = wrapped
        whole_adapter.initial_adapter = remember_start(wrapped)
    if checkpointing == "reentrant":
        wrapped.enable_input_require_grads()
    wrapped.train()
    return wrapped


def _with_ranks(
    config: Any,
    adapter: LoraAdapter,
    model: Any,
    batches: Sequence[Mapping[str, torch.Tensor]] | None,
    saved: Mapping[str, Any] | None,
    *,
    four_bit: bool,
) -> Any:
    """The configuration with the ranks that data decide, from the saved one where there is one."""
    from peft import LoraConfig as PeftLoraConfig

    start, score = adapter.init_lora_weights, adapter.rank_allocation
    if start == "eva" and saved is not None:
        config = PeftLoraConfig.from_peft_type(**saved)  # type: ignore[no-untyped-call]
        config.inference_mode = False
        config.init_lora_weights = True
    elif start == "eva":
        check_eva_batches(adapter, batches)
    if four_bit and isinstance(start, str) and start.startswith(("pissa", "olora", "corda")):
        raise UserError(
            f"adapter.init_lora_weights: {start} takes a part out of the base weights, which 4 bits cannot "
            "hold.\n"
            "  With model.load_in_4bit use loftq (made for it), eva or true; or model.load_in_4bit=false"
        )
    if score == "uniform":
        return config
    if saved is not None:
        config.rank_pattern, config.alpha_pattern = dict(saved["rank_pattern"]), dict(saved["alpha_pattern"])
    else:
        allocate(config, model, targeted_modules(config, model), batches or (), score)
    return config


def _check_factors(config: OwnConfig, saved: Mapping[str, Any]) -> None:
    """What is trained is a change along the frozen factors, so they must be those of before."""
    for name, value in dict(saved["fingerprints"]).items():
        if abs(config.fingerprints.get(name, float("inf")) - value) > _SAME_FACTORS:
            raise UserError(
                f"adapter: the singular vectors of {name} are not those that this training started with: "
                "the base\nweights have changed, or two singular values are equal and another machine turns "
                "their vectors.\n  Resume where the run began, or start anew with --fresh"
            )


def looks_at_rows(adapter: AdapterConfig | None) -> bool:
    """Whether `attach` needs batches of training rows."""
    return isinstance(adapter, LoraAdapter) and (
        adapter.init_lora_weights in ("eva", "corda") or adapter.rank_allocation != "uniform"
    )


def on_meta(adapter: AdapterConfig, facts: Facts) -> PeftModel:
    """The adapted model in shapes alone. Ranks that data or weights decide are as given, or the largest."""
    from peft import get_peft_model

    if isinstance(adapter, LoraAdapter):  # its start needs weights, its shapes do not
        adapter = adapter.model_copy(update={"init_lora_weights": True})
    config = peft_config(adapter, facts)
    with torch.device("meta"):
        if isinstance(adapter, PeftAdapter):
            tuned: PeftModel = wrap(facts.skeleton(), config, adapter)
            return tuned
        return get_peft_model(facts.skeleton(), config)


def trainable_parameters(adapter: AdapterConfig | None, facts: Facts) -> int:
    """Number of trained parameters, from shapes alone (PEFT's own rules on the meta device).

    EVA moves ranks between modules after looking at data; what is said for it is the count before that. For
    ranks that SVFit and SoKA find in the weights it is the most that they may find.
    """
    if adapter is None:
        return facts.parameters
    return sum(p.numel() for p in on_meta(adapter, facts).parameters() if p.requires_grad)


def frozen_factors(model: nn.Module) -> int:
    """Numbers that an adapter holds beside the base without training them; of LoRA there are none."""
    config = getattr(model, "peft_config", {}).get("default")
    if config is not None and not isinstance(config, OwnConfig):
        return 0 if str(config.peft_type.value) == "LORA" else added_numbers(model)
    return sum(
        parameter.numel()
        for _, layer in own_layers(model)
        for parameter in layer.parameters(recurse=False)
        if not parameter.requires_grad
    )


def adapter_lines(model: Any, adapter: AdapterConfig | None) -> list[str]:
    """What was found in weights or data when the adapter was attached, a line for the log."""
    found = getattr(model, "peft_config", None)
    if adapter is None or found is None:
        return []
    config = found["default"]
    if isinstance(adapter, LoraAdapter):
        if adapter.rank_allocation == "uniform":
            return []
        ranks = [config.r, *config.rank_pattern.values()]
        return [f"adapter.rank_allocation={adapter.rank_allocation}: ranks of {min(ranks)} to {max(ranks)}"]
    if isinstance(adapter, PeftAdapter):
        held = frozen_factors(model)
        beside = f", {held:,} numbers held beside it" if held else ""
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return [f"{adapter.peft_type}: {trained:,} trained numbers{beside}"]
    ranks = sorted(config.ranks.values())
    what = "singular values" if isinstance(adapter, SvfitAdapter) else "Kronecker terms"
    return [
        f"{adapter.name}: {ranks[0]} to {ranks[-1]} {what} in each of {len(ranks)} matrices, "
        f"{frozen_factors(model):,} numbers in frozen factors"
    ]


__all__ = [
    "adapter_lines",
    "attach",
    "frozen_factors",
    "looks_at_rows",
    "on_meta",
    "peft_config",
    "trainable_parameters",
]
