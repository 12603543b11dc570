"""The files that hold a model's weights: which are accepted, and whether they are whole."""

from __future__ import annotations

import json
import math
import operator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..recipes.errors import UserError

KEY = "model.model_name_or_path"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_HEADER_LIMIT = 100_000_000  # bytes, the safetensors library's own bound
_INDEX_LIMIT = 100_000_000
_MOST_ELEMENTS = 2**59  # of eight bytes and more, their bytes still have a number


def check_weights(name: str, folder: Path) -> None:
    """Weight files are there and whole, without reading the weights.

    UserError where they are not, or where they are pickles. A header is bounded before it is read, and an
    index may name nothing but files beside it.
    """
    present = [folder / file for file in _WEIGHTS if (folder / file).is_file()]
    if not present and any((folder / file).is_file() for file in PICKLED):
        raise pickled_weights(name)
    if not present:
        raise UserError(
            f"{KEY}: the folder {name} has config.json but no weights ({_WEIGHTS[0]} or {_WEIGHTS[1]}).\n"
            "  The copy or download did not finish, or the run that wrote it stopped before saving."
        )
    first = present[0]
    files = [first]
    if first.name.endswith(".index.json"):
        listed = _listed_files(first)
        missing = sorted(file for file in listed if not (folder / file).is_file())
        if missing:
            raise UserError(
                f"{KEY}: {name} lacks {len(missing)} of {len(listed)} weight files, the first is "
                f"{missing[0]}.\n"
                "  Fetch the model again."
            )
        files = [folder / file for file in sorted(listed)]
    for file in files:
        _check_safetensors(file)


def pickled_weights(name: str) -> UserError:
    """The refusal of weights whose file could hold any Python object."""
    return UserError(
        f"{KEY}: {name} has its weights as a pickle only ({PICKLED[0]}), a format that can hold code.\n"
        "  Only safetensors are read.  If you trust its author, convert it once, by transformers:\n"
        "  AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW), and the same for AutoTokenizer"
    )


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object. UserError when the file is something else."""
    try:
        if path.stat().st_size > _INDEX_LIMIT:
            raise ValueError(f"{path.stat().st_size:,} bytes")
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _cut_off(path, f"it cannot be read ({str(error)[:100]})") from error
    if not isinstance(value, dict):
        raise _cut_off(path, "it is not a JSON object")
    return value


def _listed_files(index: Path) -> set[str]:
    """The weight files that an index names: plain names of safetensors files beside it."""
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise _cut_off(index, "it lists no weights")
    for file in places.values():
        if not isinstance(file, str) or "/" in file or "\0" in file or not file.endswith(".safetensors"):
            raise _cut_off(index, f"it names {str(file)[:80]!r}, which is no safetensors file beside it")
    return set(places.values())


def _check_safetensors(file: Path) -> None:
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_LIMIT):
            raise _cut_off(file, "its header is not complete")
        try:
            header = json.loads(opened.read(length))
            tensors = [entry for key, entry in header.items() if key != "__metadata__"]
            end = max((operator.index(entry["data_offsets"][1]) for entry in tensors), default=0)
            elements = max((math.prod(max(1, n) for n in entry["shape"]) for entry in tensors), default=0)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise _cut_off(file, "its header cannot be read") from error
    if 8 + length + end > size:
        raise _cut_off(file, f"it has {size:,} of {8 + length + end:,} bytes")
    if elements > _MOST_ELEMENTS:
        raise _cut_off(file, "it has a tensor of a shape that cannot be")
    try:
        with safe_open(file, framework="np") as checked:
            checked.keys()
    except SafetensorError as error:
        raise _cut_off(file, str(error)[:200]) from error


def _cut_off(file: Path, what: str) -> UserError:
    return UserError(
        f"{KEY}: {file} is cut off or damaged: {what}.\n"
        "  The download or copy did not finish (or it is a Git LFS pointer); fetch the file again."
    )
