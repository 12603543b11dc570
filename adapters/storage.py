"""An adapter on disk, in PEFT's own layout: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..recipes.errors import UserError

_WEIGHTS = "adapter_model.safetensors"


def save_adapter(model: Any, folder: Path, *, portable: bool = False) -> None:
    """Write the adapter of a PeftModel to `folder`.

    portable: the adapter must fit the base as it was published. PiSSA, OLoRA and LoftQ changed their base, so
    theirs is written as a plain one of twice the rank (trained minus initial). For checkpoints leave it off:
    they are loaded into a model that was built the same way.
    """
    initial = getattr(model, "initial_adapter", None)
    if not portable or initial is None:
        model.save_pretrained(folder)
        return
    config = model.peft_config["default"]
    if config.use_rslora and (config.rank_pattern or config.alpha_pattern):
        raise UserError(
            f"adapter: {config.init_lora_weights} with use_rslora and a rank or alpha pattern cannot be "
            "written as an "
            "adapter for the unchanged base.\n  Export the merged model:  export=merged"
        )
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory(prefix="shoestring-") as start:
        save_file(initial, Path(start) / _WEIGHTS)
        values = config.to_dict() | {"init_lora_weights": True, "inference_mode": False}
        type(config)(
            **{key: value for key, value in values.items() if key in _fields(config)}
        ).save_pretrained(start)
        model.save_pretrained(folder, path_initial_model_for_weight_conversion=start)


def _fields(config: Any) -> set[str]:
    from dataclasses import fields

    return {field.name for field in fields(config) if field.init}


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
    expected = get_peft_model_state_dict(model)
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
