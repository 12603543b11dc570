"""Saving a checkpoint: written aside, fsynced, the manifest last, then renamed. A crash
leaves the old or the new one.

Order, with what a loss of power at that point leaves behind:

    1  room on the disk is checked          the older checkpoints
    2  files into run/.aside-x/new, fsynced the older ones, and a directory for `sweep` to clear
    3  MANIFEST.json, fsynced               the same
    4  the directory, fsynced               the same
    5  rename to run/checkpoint-001200      the older ones, or the new one as well
    6  run/, fsynced                        the new one: `save` returns
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import __version__
from ..offload.stored import Stored
from ..recipes.errors import UserError
from . import strict_json
from .aside import aside, publish, sweep
from .errors import explain, no_room
from .files import FileFacts, settle_file, sync_directory, write_file
from .manifest import MANIFEST, Manifest, check_name, encode
from .reading import name_of
from .tensors import encode_header, tensor_chunks

_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MARGIN = 1 << 20  # bytes for directories, the manifest and the file system's own


def save(
    folder: Path,
    *,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor | Stored]],
    json: Mapping[str, Any],
    copy: Callable[[Path], object] | None = None,
    copy_bytes: int = 0,
) -> Path:
    """Write folder/checkpoint-<step> and return its path once it is on the disk.

    tensors: {"optimizer": {...}} becomes optimizer.safetensors. They are read where they lie, one at a time:
    they
        must not change before `save` returns.
    json: {"trainer": {...}} becomes trainer.json; not-a-number and infinities are kept.
    copy: called with the unfinished directory, first of all, to add files of its own (PEFT, transformers).
    copy_bytes: how much `copy` will write, for the check of free space.

    A checkpoint of the same step is replaced. Raises UserError when there is no room or no permission and
    ShoestringError when the disk fails; then every older checkpoint is untouched and nothing unfinished is
    left. TypeError or ValueError name a value that cannot be stored. One process writes; on several, rank 0
    calls this.
    """
    folder = Path(folder)
    if type(step) is not int or step < 0:
        raise ValueError(f"step must be a whole number, not {step!r}")
    texts = {part_name(name, ".json"): strict_json.dumps(json[name], name=name) for name in json}
    groups = {part_name(name, ".safetensors"): tensors[name] for name in tensors}
    headers = {name: encode_header(groups[name]) for name in groups}
    needed = (
        copy_bytes
        + sum(len(data) for data in chain(texts.values(), headers.values()))
        + sum(tensor.nbytes for group in groups.values() for tensor in group.values())
    )
    try:
        _make(folder)
        sweep(folder)  # for its space; `newest` is where its lines are told
        if shutil.disk_usage(folder).free < needed + _MARGIN:
            raise no_room(folder, step, needed=needed)
        with aside(folder) as private:
            new = private / "new"
            os.mkdir(new, 0o700)
            if copy is not None:
                copy(new)
            files = _settle(new)
            for name, data in texts.items():
                files[name] = _write(new / name, [data])
            for name, header in headers.items():
                files[name] = _write(new / name, chain([header], tensor_chunks(groups[name])))
            manifest = Manifest(step, f"shoestring {__version__}", time.time(), files)
            write_file(new / MANIFEST, [encode(manifest)])
            sync_directory(new)
            final = folder / name_of(step)
            publish(private, new, final)
    except Exception as error:
        if told := explain(error, folder, step, needed=needed):
            raise told from error
        raise
    return final


def part_name(name: str, suffix: str) -> str:
    """The file of part `name`. ValueError for a name that cannot be one."""
    if not _PART.fullmatch(name):
        raise ValueError(f"{name!r} cannot name a part of a checkpoint: letters, digits, . _ - only")
    return name + suffix


def _make(folder: Path) -> None:
    if folder.is_dir():
        return
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{folder}: a file is in the way.  Set output_dir to a folder.") from None
    for path in missing:
        sync_directory(path.parent)


def _write(path: Path, chunks: Any) -> FileFacts:
    if os.path.lexists(path):
        raise ValueError(
            f"`copy` has already written {path.name}: give that part of the checkpoint another name"
        )
    return write_file(path, chunks)


def _settle(new: Path) -> dict[str, FileFacts]:
    """Hash and fsync everything that `copy` has written, in whatever subdirectories."""
    files = {}
    for root, directories, names in os.walk(new, topdown=False):
        for name in names + directories:
            path = Path(root, name)
            relative = path.relative_to(new).as_posix()
            check_name(relative)
            if path.is_symlink():
                raise ValueError(f"{relative} is a symbolic link: it cannot be part of a checkpoint")
            if name in names:
                files[relative] = settle_file(path)
        if Path(root) != new:
            os.chmod(root, 0o700)
            sync_directory(Path(root))
    return files
