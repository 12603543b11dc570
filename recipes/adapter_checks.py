"""Checks between the keys of `adapter`, and between it and the model."""

from typing import TYPE_CHECKING, get_args

from .choices import AdapterConfig, LoraAdapter
from .model_data import ModelConfig
from .peft_adapter import NOT_ON_4BIT, PeftAdapter, PeftType
from .problem import Problem

if TYPE_CHECKING:
    from .schema import Recipe


def adapter_problems(recipe: "Recipe") -> list[Problem]:
    """What the adapter needs of the model, and options of it that exclude each other."""
    adapter, model = recipe.adapter, recipe.model
    if adapter is None:
        if not model.load_in_4bit:
            return []
        return [
            Problem(
                "model.load_in_4bit",
                "model.load_in_4bit=true needs an adapter: 4-bit weights cannot be trained.   "
                "Set adapter=lora, or model.load_in_4bit=false",
                ("adapter",),
            )
        ]
    found = _layers(adapter)
    if isinstance(adapter, LoraAdapter):
        found = [*_lora(adapter, model), *found]
    elif isinstance(adapter, PeftAdapter) and model.load_in_4bit and adapter.peft_type in NOT_ON_4BIT:
        found.append(_not_on_4bit(adapter))
    return found


def _not_on_4bit(adapter: PeftAdapter) -> Problem:
    others = ", ".join(name for name in get_args(PeftType) if name not in NOT_ON_4BIT)
    return Problem(
        "adapter.peft_type",
        f"adapter.peft_type={adapter.peft_type} cannot be trained on the packed weights of "
        f"model.load_in_4bit=true.   Set model.load_in_4bit=false, or take one of {others}",
        ("model.load_in_4bit",),
    )


def _lora(adapter: LoraAdapter, model: ModelConfig) -> list[Problem]:
    found = []
    start = adapter.init_lora_weights
    if model.load_in_4bit and isinstance(start, str):
        if start.startswith("pissa") or start in ("orthogonal", "corda"):
            found.append(
                Problem(
                    "adapter.init_lora_weights",
                    f"adapter.init_lora_weights={start} needs weights that are not quantised, and "
                    "model.load_in_4bit=true.   Set model.load_in_4bit=false, or "
                    "adapter.init_lora_weights=olora",
                    ("model.load_in_4bit",),
                )
            )
        elif start == "loftq":
            found.append(
                Problem(
                    "adapter.init_lora_weights",
                    "adapter.init_lora_weights=loftq quantises the weights itself and cannot start from "
                    "model.load_in_4bit=true.   Set model.load_in_4bit=false, or "
                    "adapter.init_lora_weights=true",
                    ("model.load_in_4bit",),
                )
            )
    if start == "orthogonal":
        ranks = {
            "adapter.r": adapter.r,
            **{f"adapter.rank_pattern {k}": v for k, v in adapter.rank_pattern.items()},
        }
        found += [
            Problem(
                key.split(" ")[0],
                f"{key}={rank} is odd, and adapter.init_lora_weights=orthogonal needs an even rank.   "
                f"Take {rank + 1}",
                ("adapter.init_lora_weights",),
            )
            for key, rank in ranks.items()
            if rank % 2
        ]
    if adapter.rank_allocation != "uniform":
        found += _allocation(adapter)
    return found


def _allocation(adapter: LoraAdapter) -> list[Problem]:
    """What else decides ranks, or needs them as they are."""
    asked = f"adapter.rank_allocation={adapter.rank_allocation}"
    reasons = {
        "adapter.rank_pattern": "gives ranks itself" if adapter.rank_pattern else "",
        "adapter.alpha_pattern": "gives scales for them itself" if adapter.alpha_pattern else "",
        "adapter.init_lora_weights": {
            "eva": "=eva shares ranks out by itself",
            "orthogonal": "=orthogonal needs even ranks",
        }.get(str(adapter.init_lora_weights), ""),
    }
    return [
        Problem(
            "adapter.rank_allocation",
            f"{asked} shares the ranks out, and {key}{reason if reason.startswith('=') else ' ' + reason}.   "
            "Set adapter.rank_allocation=uniform, or leave "
            f"{key} out",
            (key,),
        )
        for key, reason in reasons.items()
        if reason
    ]


def _layers(adapter: AdapterConfig) -> list[Problem]:
    targets = adapter.target_modules
    if adapter.layers_to_transform is None or not isinstance(targets, str) or targets == "all-linear":
        return []
    return [
        Problem(
            "adapter.layers_to_transform",
            "adapter.layers_to_transform needs adapter.target_modules as all-linear or a list of "
            "names, not as a regular expression.   Put the layers into the expression instead",
            ("adapter.target_modules",),
        )
    ]
