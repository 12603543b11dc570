"""What a snapshot of Hugging Face's Trainer holds: all that changes, by name, with nothing that stays."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from peft import PeftMixedModel, PeftModel
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_callback import ExportableState

from ..offload.stored import Stored
from ..recipes.errors import UserError
from .contents import Group
from .reading import Checkpoint
from .snapshot_reading import Snapshot
from .state import decode_tree, encode_tree

Saved = Snapshot | Checkpoint


def trainer_contents(
    trainer: Trainer, generators: Mapping[str, Any]
) -> tuple[dict[str, Group], dict[str, Any]]:
    """(tensors, json) for `Snapshotter.begin`, between two steps. generators: what `random_state` gave.

    The frozen weights are no part of it. UserError: the optimizer has something that cannot be stored.
    """
    optimizer: dict[str, Tensor | Stored] = {}
    scheduler: Any = trainer.lr_scheduler
    scaler = getattr(trainer.accelerator, "scaler", None)
    parts = {
        "optimizer": _by_name(trainer),
        "scheduler": scheduler.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
    }
    try:
        encoded = {name: encode_tree(value, name, None, optimizer, {}) for name, value in parts.items()}
    except TypeError as error:
        raise UserError(f"{error}. Leave SnapshotCallback out.") from error
    told = [*trainer.callback_handler.callbacks, trainer.control]
    exported: Any = [part for part in told if isinstance(part, ExportableState)]
    state = dataclasses.replace(
        trainer.state,
        total_flos=trainer.state.total_flos + trainer.current_flos,
        stateful_callbacks=exported,
    )
    # The loss since the last log, which the Trainer's own checkpoints lack.
    unlogged = {"loss": trainer._tr_loss.item(), "since": trainer._globalstep_last_logged}
    return {"model": _trained(model_of(trainer)), "optimizer": optimizer}, {
        **encoded,
        "trainer_state": json.loads(json.dumps(dataclasses.asdict(state))),
        "random": generators,
        "unlogged": unlogged,
    }


def model_of(trainer: Trainer) -> nn.Module:
    """The model without what it is wrapped in."""
    assert isinstance(trainer.model, nn.Module)  # a trainer that is made has one
    return trainer.model


def parameter_order(trainer: Trainer) -> list[str]:
    """Names of the parameters in the order of the optimizer's groups, by which the Trainer restores them."""
    name_of = {id(parameter): name for name, parameter in model_of(trainer).named_parameters()}
    optimizer = _inner(trainer)
    given = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if unknown := [tuple(parameter.shape) for parameter in given if id(parameter) not in name_of]:
        raise UserError(
            f"The optimizer trains a tensor of shape {unknown[0]} that is no parameter of trainer.model.\n"
            "Snapshots know state by the parameter's name: train parameters of the model, or leave "
            "SnapshotCallback out."
        )
    return [name_of[id(parameter)] for parameter in given]


def saved_order(saved: Saved) -> list[str]:
    """As `parameter_order`, when the snapshot was taken."""
    groups = decode_tree(saved.json("optimizer"), lambda leaf, key: torch.empty(0))["param_groups"]
    return [name for group in groups for name in group["params"]]


def tensors_of(saved: Saved, name: str) -> dict[str, Tensor]:
    """The tensors saved under `name`; those of a snapshot in memory are windows on its slot."""
    return saved.views(name) if isinstance(saved, Snapshot) else saved.tensors(name)


def state_dicts(saved: Saved) -> tuple[dict[str, Any], Any, Any]:
    """State dicts of optimizer, scheduler and gradient scaler (or None), in torch's form."""
    tensors = tensors_of(saved, "optimizer")
    optimizer, scheduler, scaler = (
        decode_tree(saved.json(name), lambda leaf, key: tensors[leaf["tensor"]])
        for name in ("optimizer", "scheduler", "scaler")
    )
    return _by_number(optimizer), scheduler, scaler


def _inner(trainer: Trainer) -> torch.optim.Optimizer:
    optimizer: Any = trainer.optimizer
    inner: torch.optim.Optimizer = (
        optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    )
    return inner


def _by_name(trainer: Trainer) -> dict[str, Any]:
    """The optimizer's state dict, with names where torch has numbers."""
    names = parameter_order(trainer)
    state = _inner(trainer).state_dict()
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in state["param_groups"]]
    named = {names[key] if isinstance(key, int) else key: value for key, value in state["state"].items()}
    return {**state, "state": named, "param_groups": groups}


def _by_number(state: dict[str, Any]) -> dict[str, Any]:
    """What `_by_name` was made from."""
    number: dict[str, int] = {}
    for group in state["param_groups"]:
        for name in group["params"]:
            number[name] = len(number)
    groups = [
        {**group, "params": [number[name] for name in group["params"]]} for group in state["param_groups"]
    ]
    numbered = {number.get(key, key): value for key, value in state["state"].items()}
    return {**state, "state": numbered, "param_groups": groups}


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """What the training changes: parameters with a gradient and, without PEFT, buffers that are saved.

    Buffers are copied, since a forward pass may change them; the Trainer restores none of an adapter's base.
    """
    result: dict[str, Tensor] = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    if not isinstance(model, PeftModel | PeftMixedModel):
        kept = model.state_dict().keys()
        result |= {name: buffer.clone() for name, buffer in model.named_buffers() if name in kept}
    return result


def put_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy what `trainer_contents` gave as "model" into `model`. On a mismatch UserError, nothing changed."""
    here = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    trained = _trained(model).keys()
    for name in sorted(weights.keys() ^ trained):
        whose = "the snapshot has" if name in weights else "this trainer trains"
        raise _other_model(f"only {whose} {name}")
    for name, saved in weights.items():
        if saved.shape != here[name].shape or saved.dtype != here[name].dtype:
            raise _other_model(
                f"{name} is {saved.dtype} {tuple(saved.shape)} in the snapshot, "
                f"{here[name].dtype} {tuple(here[name].shape)} here"
            )
    with torch.no_grad():
        for name, saved in weights.items():
            here[name].copy_(saved)


def _other_model(what: str) -> UserError:
    return UserError(
        f"The snapshot is of another model: {what}.\n"
        "Build the model as it was; or start over in another output_dir; or delete this one."
    )
