"""Checkpoint folders of Hugging Face's Trainer: which are whole, and how a snapshot becomes one.

The layout is the Trainer's own, with its pickles (optimizer.pt, scheduler.pt, scaler.pt, rng_state.pth), as
it reads nothing else. They are made of verified data, and none is ever unpickled here.
"""

from __future__ import annotations

import json
import os
import random
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import safe_open
from torch import Tensor
from transformers import Trainer

from ..recipes.errors import UserError
from .aside import aside, publish
from .errors import BrokenCheckpoint, explain
from .files import settle_file, sync_directory
from .generators import random_state, set_random_state
from .tensors import check_header
from .trainer_contents import Saved, model_of, put_weights, state_dicts, tensors_of

_NAME = re.compile(r"checkpoint-(\d+)")
_PICKLES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
_OLD_WEIGHTS = ("pytorch_model.bin", "adapter_model.bin")


def newest_folder(output_dir: Path, say: Callable[[str], None]) -> tuple[int, Path] | None:
    """(step, path) of the newest whole checkpoint of the Trainer; one line for each newer one that is not."""
    found = [
        (int(match[1]), path)
        for path in output_dir.iterdir()
        if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    ]
    for step, path in sorted(found, reverse=True):
        try:
            check_folder(path, step)
        except BrokenCheckpoint as error:
            say(f"{path.name} is skipped: {error}")
            continue
        return step, path
    return None


def check_folder(path: Path, step: int) -> None:
    """BrokenCheckpoint unless the Trainer can resume from `path`, as far as the files' structure tells.

    The Trainer writes into the folder of its final name, trainer_state.json last, so a process that is killed
    meanwhile leaves one that looks like a checkpoint (huggingface/transformers issue 35782).
    """
    try:
        state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BrokenCheckpoint(
            "it has no trainer_state.json, which is written last: the Trainer was killed while saving it"
        ) from None
    except ValueError:
        raise BrokenCheckpoint("its trainer_state.json is cut off or damaged") from None
    if not isinstance(state, dict) or state.get("global_step") != step:
        raise BrokenCheckpoint("its trainer_state.json is of another step")
    weights = [file.relative_to(path).as_posix() for file in path.rglob("*.safetensors")]
    for name in weights:
        check_header(path, name)
    for index in path.glob("*.safetensors.index.json"):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BrokenCheckpoint(f"its {index.name} is cut off or damaged") from None
        if missing := sorted(shards - set(weights)):
            raise BrokenCheckpoint(f"it has no {missing[0]}")
    old = [name for name in _OLD_WEIGHTS if (path / name).is_file()]
    if not weights and not old:
        raise BrokenCheckpoint("it has no weights")
    for name in (*_PICKLES, *old):
        if not (path / name).is_file():
            raise BrokenCheckpoint(f"it has no {name}")
        if not zipfile.is_zipfile(path / name):
            raise BrokenCheckpoint(f"its {name} is cut off or damaged")


def write_folder(trainer: Trainer, saved: Saved, output_dir: Path) -> Path:
    """Write `saved` as output_dir/checkpoint-<step>, durably, and return its path; one there is replaced.

    The weights are put into `trainer.model`, and the trainer writes them as it always does. UserError when
    they are those of another model, when there is no room, or when the trainer does not write them as they
    are.
    """
    try:
        with aside(output_dir) as private:
            new = private / "new"
            os.mkdir(new, 0o700)
            weights = tensors_of(saved, "model")
            put_weights(model_of(trainer), weights)
            trainer.save_model(str(new), _internal_call=True)
            _check_written(new, weights)
            _write_rest(new, saved)
            _settle(new)
            final = output_dir / f"checkpoint-{saved.step}"
            publish(private, new, final)
    except Exception as error:
        if told := explain(error, output_dir, saved.step, needed=saved.bytes):
            raise told from error
        raise
    return final


def _check_written(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """UserError unless each of `weights` is in the folder's files, bit for bit, under whatever name."""
    written = {_digest(tensor) for tensor in _written(folder)}
    for name, tensor in weights.items():
        if _digest(tensor) not in written:
            raise UserError(
                f"The Trainer does not save {name} as it is trained, so it could not resume exactly.\n"
                "With PEFT, name what is trained besides the adapter in modules_to_save; "
                "or leave SnapshotCallback out."
            )


def _written(folder: Path) -> Iterator[Tensor]:
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                yield file.get_tensor(name)


def _digest(tensor: Tensor) -> tuple[torch.dtype, torch.Size, str]:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return tensor.dtype, tensor.shape, xxhash.xxh3_128(data).hexdigest()


def _write_rest(folder: Path, saved: Saved) -> None:
    optimizer, scheduler, scaler = state_dicts(saved)
    torch.save(optimizer, folder / "optimizer.pt")
    torch.save(scheduler, folder / "scheduler.pt")
    if scaler is not None:
        torch.save(scaler, folder / "scaler.pt")
    torch.save(_rng_state(saved.json("random")), folder / "rng_state.pth")
    text = json.dumps(saved.json("trainer_state"), indent=2, sort_keys=True) + "\n"
    (folder / "trainer_state.json").write_text(text, encoding="utf-8")


def _rng_state(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The generators in the Trainer's form. They are set for a moment: each library knows its own form."""
    here = random_state()
    set_random_state(saved)
    try:
        result = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "cpu": torch.get_rng_state(),
        }
        if torch.cuda.is_available():
            result["cuda"] = torch.cuda.get_rng_state()
        return result
    finally:
        set_random_state(here)


def _settle(folder: Path) -> None:
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            settle_file(Path(root, name))
        sync_directory(Path(root))
