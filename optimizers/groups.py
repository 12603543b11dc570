"""Which parameters share a rule, a weight decay and a rate.

Weight decay is for matrices: not for biases, norms and other vectors (DoRA's magnitudes among them), as in
transformers. The two factors of LoRA are matrices and decay: towards zero they are towards the base model.
LoRA+ (arXiv:2402.12354) trains B, which starts at zero, at a multiple of A's rate.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .roles import Role, roles

_B = (".lora_B.", ".lora_embedding_B.")


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    loraplus_lr_ratio: float | None = None,
    matrices: bool = False,
    rank: int | None = None,
) -> list[dict[str, Any]]:
    """Groups of the trained parameters, in the model's order, empty ones left out.

    Each has `params`, `name` ("decay", "no_decay", with "lora_B_" before it under LoRA+), `weight_decay`, and
    `rate_scale`, by which `set_rate` multiplies the rate. matrices: weights of linear layers are groups of
    their own, named "matrix...", with `kind` "matrix" and the others with "adamw"; with a `rank`, matrices
    whose smaller side is below it have that side as theirs. Raises ValueError when nothing is trained.
    """
    groups: dict[str, dict[str, Any]] = {}
    found: dict[str, Role] = roles(model) if matrices else {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        faster = loraplus_lr_ratio is not None and any(part in f".{name}" for part in _B)
        decays = parameter.ndim >= 2
        key = ("lora_B_" if faster else "") + ("decay" if decays else "no_decay")
        options: dict[str, Any] = {"kind": "adamw"} if matrices else {}
        if found.get(name) == "matrix":
            key, options = key.replace("decay", "matrix"), {"kind": "matrix"}
            if rank is not None:
                options["rank"] = min(rank, *parameter.shape[-2:])
                key += f"_rank_{options['rank']}"
        group = groups.setdefault(
            key,
            {
                "params": [],
                "name": key,
                "weight_decay": weight_decay if decays else 0.0,
                "rate_scale": loraplus_lr_ratio if faster else 1.0,
                **options,
            },
        )
        group["params"].append(parameter)
    if not groups:
        raise ValueError("no parameter of the model requires a gradient")
    return list(groups.values())
