"""A model whose layers' weights are streamed: how it is loaded, made quick, merged and written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters import merge_in_place, merge_layers
from ..models import ModelFacts, weight_reader
from ..offload.streamed_loading import load_streamed, safetensors_reader
from ..offload.streamed_model import StreamedModel
from ..offload.streamed_saving import save_streamed
from ..ops import use_fused
from ..plan import Plan, scratch_folder
from ..recipes import DpoObjective, Recipe, SftThenDpoObjective
from ..recipes.errors import UserError, in_columns

_STARTS_FROM_WEIGHTS = ("pissa", "olora", "loftq")


def open_streamed(
    recipe: Recipe, plan: Plan, facts: ModelFacts, device: torch.device, num_processes: int
) -> StreamedModel | None:
    """The plain model with its layers where the plan wants them, None where that is the device.

    UserError: something that needs all weights at once.
    """
    tier = plan.placement.tier("weights")
    if tier == "device":
        return None
    _check(recipe, num_processes)
    reader = weight_reader(facts) if facts.kind == "gguf" else safetensors_reader(_folder(facts))
    dtype = getattr(torch, plan.dtype)
    streamed = _load(recipe, plan, device, facts.config, reader, dtype, trainable=recipe.adapter is None)
    model: Any = streamed.model
    model.config._name_or_path = model.name_or_path = facts.source
    return streamed


def reload_streamed(
    recipe: Recipe, plan: Plan, device: torch.device, folder: Path, config: Any, dtype: torch.dtype
) -> StreamedModel:
    """The exported model in `folder`, streamed as the trained one was."""
    return _load(recipe, plan, device, config, safetensors_reader(folder), dtype, trainable=False)


def _load(
    recipe: Recipe,
    plan: Plan,
    device: torch.device,
    config: Any,
    read: Callable[[str], torch.Tensor],
    dtype: torch.dtype,
    *,
    trainable: bool,
) -> StreamedModel:
    tier = plan.placement.tier("weights")
    assert tier != "device"
    return load_streamed(
        config,
        read,
        dtype=dtype,
        tier=tier,
        device=device,
        folder=scratch_folder(recipe),
        io=recipe.offload.io,
        io_threads=recipe.offload.io_threads,
        trainable=trainable,
        attn_implementation=recipe.model.attn_implementation or "sdpa",
        trust_remote_code=recipe.model.trust_remote_code,
    )


def order_arguments(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """What `Order` takes; a step has one micro-batch where weights can be stepped only in its backward pass.

    It is then larger than planned by at most a row.
    """
    whole = plan.placement.tier("weights") != "device" and recipe.adapter is None
    return plan.order_arguments() | ({"micro_tokens": None, "micro_rows": None} if whole else {})


def use_fused_streamed(streamed: StreamedModel, trained: nn.Module) -> list[str]:
    """`use_fused`, which tries a module on its own weights, layer by layer."""
    lines: list[str] = []
    for index in range(len(streamed.layers)):
        with streamed.present(index) as layer:
            found = use_fused(layer)
        lines = lines or [f"{line} in each layer" for line in found]
    return lines + use_fused(trained)


def write_merged(streamed: StreamedModel, model: nn.Module, folder: Path, dtype: torch.dtype | None) -> Any:
    """Merge the adapter, if there is one, and write the plain model, which is returned; still streamed."""
    if hasattr(model, "peft_config"):
        for index in range(len(streamed.layers)):
            with streamed.present(index, changes=True) as layer:
                merge_layers(layer)
    plain = merge_in_place(model)
    save_streamed(streamed, folder, dtype=dtype)
    return plain


def _check(recipe: Recipe, num_processes: int) -> None:
    adapter, reason = recipe.adapter, None
    if num_processes > 1:
        reason = f"{num_processes} processes were started.\nStart one"
    elif adapter is not None and adapter.use_dora:
        reason = "DoRA starts from the norms of all weights.\nSet adapter.use_dora=false"
    elif adapter is not None and str(adapter.init_lora_weights).startswith(_STARTS_FROM_WEIGHTS):
        reason = (
            f"adapter.init_lora_weights={adapter.init_lora_weights} starts from all weights.\n"
            "Set adapter.init_lora_weights=true"
        )
    elif adapter is None and isinstance(recipe.objective, DpoObjective | SftThenDpoObjective):
        reason = "preferences need a copy of the trained weights.\nTrain an adapter: adapter=lora"
    elif recipe.train.wta_crs_ratio is not None:
        reason = "sampled weight gradients are not streamed.\nSet train.wta_crs_ratio=null"
    if reason is not None:
        given = recipe.offload.weights
        raise UserError(
            in_columns([("offload.weights", f"{given} was given, but {reason}, or offload.weights=device")])
        )


def _folder(facts: ModelFacts) -> Path:
    if facts.kind == "folder":
        assert facts.location.folder is not None
        return facts.location.folder
    from huggingface_hub import snapshot_download

    kept = ["*.safetensors", "*.json"]
    return Path(snapshot_download(facts.location.name, revision=facts.location.revision, allow_patterns=kept))
