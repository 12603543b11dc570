"""An adapter on disk, in PEFT's own layout: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch

from ..recipes.errors import UserError
from .starts import lora_layers
from .svfit import SvfitConfig, save_as_lora

_WEIGHTS = "adapter_model.safetensors"
# else PEFT asks the hub whether the vocabulary has grown; here it never does, and modules_to_save are kept
# anyway
_OWN_LAYERS: dict[str, Any] = {"save_embedding_layers": False}


def adapter_config(model: Any) -> dict[str, Any] | None:
    """What PEFT writes as adapter_config.json, from which `attach` builds the same again, or None."""
    found = getattr(model, "peft_config", None)
    if found is None:
        return None
    values = found["default"].to_dict()
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}
    read: dict[str, Any] = json.loads(json.dumps(plain))
    return read


def save_adapter(model: Any, folder: Path, *, portable: bool = False) -> None:
    """Write the adapter of a PeftModel to `folder`.

    portable: the adapter must fit the base as it was published, and need PEFT alone where it can. PiSSA,
    OLoRA, CorDA and LoftQ changed their base, so theirs is written as a plain one of twice the rank:
    s (B A - B0 A0) = s [B, -B0] [A; A0], with A0 and B0 where it started. SVFit is written as LoRA of the
    same change. For checkpoints leave it off: they are loaded into a model that was built the same way.
    """
    if portable and isinstance(model.peft_config["default"], SvfitConfig):
        save_as_lora(model, folder)
        return
    initial = getattr(model, "initial_adapter", None)
    if not portable or initial is None:
        model.save_pretrained(folder, **_OWN_LAYERS)
        return
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    state = dict(get_peft_model_state_dict(model, **_OWN_LAYERS))
    for name, start in initial.items():
        now = state[name].detach().cpu()
        if ".lora_A." in name:
            state[name] = torch.cat([now, start]).contiguous()
        elif ".lora_B." in name:
            state[name] = torch.cat([now, -start], dim=1).contiguous()
    config = copy.deepcopy(model.peft_config["default"])
    ranks = {name: 2 * layer.r["default"] for name, layer in lora_layers(model)}
    scales = {name: layer.scaling["default"] for name, layer in lora_layers(model)}
    config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha
    config.rank_pattern = {name: rank for name, rank in ranks.items() if rank != config.r}
    # rsLoRA divides by the root of the rank, which has changed: written as plain alpha / rank
    config.alpha_pattern = {
        name: scale * ranks[name]
        for name, scale in scales.items()
        if config.use_rslora or scale * ranks[name] != config.lora_alpha
    }
    config.use_rslora, config.init_lora_weights, config.inference_mode = False, True, True
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in state.items()}, folder / _WEIGHTS)
    config.save_pretrained(folder)


def load_adapter_state(model: Any, folder: Path) -> None:
    """Load the weights that `save_adapter` wrote into the adapter of `model`, which must be built alike.

    Raises:
        UserError: the file is missing or does not fit: keys or shapes differ.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    file = folder / _WEIGHTS
    if not file.is_file():
        raise UserError(f"{folder} has no {_WEIGHTS}, so it holds no adapter.")
    saved = load_file(file)
    expected = get_peft_model_state_dict(model, **_OWN_LAYERS)
    missing, unexpected = sorted(set(expected) - set(saved)), sorted(set(saved) - set(expected))
    if missing or unexpected:
        first = f"{missing[0]} is missing" if missing else f"{unexpected[0]} is not in the model"
        raise _does_not_fit(
            file, f"{len(missing)} tensors missing, {len(unexpected)} unexpected; {first}", folder
        )
    for name, value in expected.items():
        if value.shape != saved[name].shape:
            raise _does_not_fit(
                file, f"{name} is {tuple(saved[name].shape)}, not {tuple(value.shape)}", folder
            )
    with torch.no_grad():
        set_peft_model_state_dict(model, saved)


def _does_not_fit(file: Path, what: str, folder: Path) -> UserError:
    config = folder / "adapter_config.json"
    of = json.loads(config.read_text("utf-8")) if config.is_file() else {}
    return UserError(
        f"{file} does not fit the adapter of the recipe: {what}.\n"
        f"  It was trained with r={of.get('r')}, use_dora={of.get('use_dora')} on "
        f"{of.get('base_model_name_or_path')}; "
        "set the recipe's adapter back to that, or start anew with --fresh"
    )
