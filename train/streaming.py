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
from ..ops import give_back_freed_memory, use_fused
from ..ops.memory import map_large_blocks
from ..plan import Plan, scratch_folder
from ..plan.sizes import steps_in_backward
from ..recipes import Recipe
from ..recipes.errors import UserError, in_columns


def open_streamed(
    recipe: Recipe, plan: Plan, facts: ModelFacts, device: torch.device, num_processes: int
) -> StreamedModel | None:
    """The plain model with its layers where the plan wants them, None where that is the device.

    UserError: several processes; what else cannot be streamed, the plan has refused.
    """
    if not plan.placement.all_on_device:
        map_large_blocks()  # memory is short
    tier = plan.placement.tier("weights")
    if tier == "device":
        return None
    if num_processes > 1:
        reason = f"{num_processes} processes were started.\nStart one, or offload.weights=device"
        raise UserError(in_columns([("offload.weights", f"{tier} was given, but {reason}")]))
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
    give_back_freed_memory()  # see `models.load_model`
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
        coded=plan.placement.coded,
        attn_implementation=recipe.model.attn_implementation or "sdpa",
        trust_remote_code=recipe.model.trust_remote_code,
    )


def order_arguments(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """What `Order` takes; a step that is taken inside the backward pass has one micro-batch."""
    whole = steps_in_backward(recipe)
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


def _folder(facts: ModelFacts) -> Path:
    if facts.kind == "folder":
        assert facts.location.folder is not None
        return facts.location.folder
    from huggingface_hub import snapshot_download

    kept = ["*.safetensors", "*.json"]
    return Path(snapshot_download(facts.location.name, revision=facts.location.revision, allow_patterns=kept))
