"""MANIFEST.json: written last, it says which files make the checkpoint and what each must be.

Checksums catch accidents, not attackers; what an attacker could do with a manifest (name files outside the
directory, ask for endless memory) is refused before anything is opened.
All later formats keep `format`, `writer` and `sha256` as they are here, so that an old program can tell new
from broken.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeGuard

from . import strict_json
from .errors import BrokenCheckpoint, NewerFormat
from .files import FileFacts, read_inside

MANIFEST = "MANIFEST.json"
FORMAT = 1
_LIMIT_BYTES = 16 << 20
_LIMIT_FILES = 10_000
_LIMIT_NUMBER = 10**40  # it is shown, and made a float; more than any size
_END = re.compile(rb',\n "sha256": "([0-9a-f]{64})"\n}\n\Z')


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of. `saved_at`: seconds since 1970, for people; never used for order."""

    step: int
    writer: str
    saved_at: float
    files: Mapping[str, FileFacts]

    @property
    def bytes(self) -> int:
        """Bytes of all files, without the manifest."""
        return sum(facts.bytes for facts in self.files.values())


def encode(manifest: Manifest) -> bytes:
    """The file's content, with a checksum of the manifest itself."""
    body = {
        "format": FORMAT,
        "step": manifest.step,
        "writer": manifest.writer,
        "saved_at": manifest.saved_at,
        "files": {name: asdict(manifest.files[name]) for name in sorted(manifest.files)},
    }
    text = strict_json.dumps(body, name=MANIFEST).removesuffix(b"\n}")
    return text + b',\n "sha256": "' + hashlib.sha256(text).hexdigest().encode() + b'"\n}\n'


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a directory, believed only if its own checksum, its shape and all names in it hold.

    Raises BrokenCheckpoint, or NewerFormat when a later version of the program wrote it.
    """
    data = read_inside(checkpoint, MANIFEST, limit=_LIMIT_BYTES)
    end = _END.search(data)
    # Over the bytes as they lie there, before they are parsed: two texts can mean the same number.
    if end is None or hashlib.sha256(data[: end.start()]).hexdigest().encode() != end[1]:
        raise BrokenCheckpoint(f"{MANIFEST} does not match its own checksum")
    content = strict_json.loads(data, name=MANIFEST)
    if not isinstance(content, dict):
        raise BrokenCheckpoint(f"{MANIFEST} is not an object")
    version = content.get("format")
    if type(version) is not int:
        raise BrokenCheckpoint(f"{MANIFEST} has no format version")
    step, writer, saved_at, files = (content.get(key) for key in ("step", "writer", "saved_at", "files"))
    if not isinstance(writer, str) or not writer.isprintable():  # it is shown on a terminal
        raise BrokenCheckpoint(f"{MANIFEST} does not name its writer")
    if FORMAT < version < _LIMIT_NUMBER:
        raise NewerFormat(f"written by {writer:.60} in format {version}, this version reads up to {FORMAT}")
    if version != FORMAT:
        raise BrokenCheckpoint(f"{MANIFEST} has no format version")
    saved_at = float(saved_at) if _is_number(saved_at) else saved_at
    if not _is_number(step) or not isinstance(saved_at, float):
        raise BrokenCheckpoint(f"{MANIFEST} lacks step or saved_at")
    if not isinstance(files, dict) or len(files) > _LIMIT_FILES:
        raise BrokenCheckpoint(f"{MANIFEST} must list at most {_LIMIT_FILES:,} files")
    return Manifest(step, writer, saved_at, {name: _facts(name, files[name]) for name in files})


def check_name(name: str) -> None:
    """ValueError unless `name` is a relative path that stays inside its directory on every system."""
    parts = name.split("/")
    if (
        not name
        or not name.isprintable()  # nor half characters, nor what turns the direction of writing
        or len(name) > 500
        or name.split("/")[0] == MANIFEST
        or any(part in ("", ".", "..") or len(part.encode()) > 255 for part in parts)
        or any(character in "\\:" for character in name)
    ):
        raise ValueError(f"{name[:80]!r} is not a name that a file in a checkpoint may have")


def _facts(name: str, value: Any) -> FileFacts:
    try:
        check_name(name)
    except ValueError as error:
        raise BrokenCheckpoint(f"{MANIFEST}: {error}") from None
    match value:
        case {"bytes": size, "xxh3_128": str(checksum), **rest} if _is_number(size) and not rest:
            return FileFacts(size, checksum)
    raise BrokenCheckpoint(f"{MANIFEST}: the entry of {name} is not a size and a checksum")


def _is_number(value: Any) -> TypeGuard[int]:
    """A whole number that a size or a step can be; JSON's may have thousands of digits."""
    return type(value) is int and 0 <= value < _LIMIT_NUMBER
