"""Finding and reading checkpoints: nothing is believed before every byte of it has matched the manifest."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..recipes.errors import UserError
from . import strict_json
from .aside import sweep
from .errors import BrokenCheckpoint, NewerFormat
from .files import read_inside
from .manifest import Manifest
from .tensors import FileTensor, check_header, open_tensors, read_tensors
from .whole import candidates, name_of, step_of, verify_files

__all__ = ["Checkpoint", "candidates", "name_of", "newest", "open_checkpoint", "step_of", "verify"]

_JSON_LIMIT = 100_000_000  # bytes


@dataclass(frozen=True)
class Checkpoint:
    """A directory whose every file was as the manifest says when it was opened."""

    path: Path
    step: int
    manifest: Manifest = field(repr=False)

    @property
    def name(self) -> str:
        """What it is called to a person."""
        return self.path.name

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return self.manifest.bytes

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors saved under `name`, on the CPU, in their exact dtypes. KeyError without such a file."""
        return read_tensors(self.path / self._file(f"{name}.safetensors"))

    def open_tensors(self, name: str) -> dict[str, FileTensor]:
        """As `tensors`, but each is read when and as far as it is asked for."""
        return open_tensors(self.path / self._file(f"{name}.safetensors"))

    def json(self, name: str) -> Any:
        """The value saved under `name` (tuples as lists). KeyError when there is no such file."""
        file = self._file(f"{name}.json")
        return strict_json.loads(read_inside(self.path, file, limit=_JSON_LIMIT), name=file)

    def _file(self, name: str) -> str:
        if name not in self.manifest.files:
            raise KeyError(f"{self.path} has no {name}; it has {', '.join(sorted(self.manifest.files))}")
        return name


def verify(path: Path) -> Checkpoint:
    """Read every byte of the checkpoint at `path`. BrokenCheckpoint names the file and what is wrong."""
    manifest = verify_files(path)
    for name in manifest.files:
        if name.endswith(".safetensors"):
            check_header(path, name)
    return Checkpoint(path, manifest.step, manifest)


def newest(folder: Path, on_broken: Callable[[str], None]) -> Checkpoint | None:
    """The whole checkpoint of the highest step, or None where none was ever finished.

    Also clears what processes that died have left. `on_broken` gets one line for each thing skipped or
    cleared. Raises UserError when checkpoints are there but none is whole, or the newest is of a later
    format: to start over in silence would throw the run away.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return None
    for line in sweep(folder):
        on_broken(line)
    problems: list[str] = []
    for _, path in candidates(folder):
        try:
            return verify(path)
        except NewerFormat as error:
            raise UserError(
                f"{path}: {error}.\nInstall that version, start over with --fresh, or set another output_dir."
            ) from None
        except BrokenCheckpoint as error:
            problems.append(f"{path.name} is skipped: {error}")
            on_broken(problems[-1])
        except FileNotFoundError:
            continue  # pruned by its owner while we looked
    if problems:
        more = f"\n(and {len(problems) - 2} more)" if len(problems) > 2 else ""
        raise UserError(
            f"{folder}: no checkpoint can be read, so this run cannot be resumed.\n"
            + "\n".join(problems[:2])
            + more
            + "\nStart over with --fresh, or set another output_dir."
        )
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`, verified; `best` may be given too. UserError when it is not whole."""
    path = Path(path)
    try:
        if path.is_symlink():
            target = os.readlink(path)
            if step_of(target) is None:
                raise BrokenCheckpoint(f"links to {target}, which is no checkpoint beside it")
            path = path.parent / target
        return verify(path)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such checkpoint.  {_others(path)}") from None
    except BrokenCheckpoint as error:
        raise UserError(f"{path}: {error}.\nUse another checkpoint of this run.  {_others(path)}") from None
    except OSError as error:
        if error.errno in (errno.EACCES, errno.ENOTDIR, errno.ELOOP):
            raise UserError(f"{path}: cannot be read: {error.strerror}.") from None
        raise


def _others(path: Path) -> str:
    """What else could be named in place of `path`."""
    found = sorted(other.name for other in path.parent.glob("checkpoint-*") if other.name != path.name)
    return f"There are: {', '.join(found[-5:])}" if found else f"{path.parent} has no other"
