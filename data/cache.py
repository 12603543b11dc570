"""The cache of prepared rows: one folder for each (content, tokenizer, template, settings, code), written
once.

A folder is written beside its place and renamed into it, so that a reader sees all of it or none. Its index
holds the size and checksum of every file; a folder that does not match it is thrown away and built again.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import xxhash

INDEX = "index.json"


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/shoestring/data`, by default below `~/.cache`."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "shoestring" / "data"


@cache
def code_version() -> str:
    """Hash of this room's own sources: other code may make other rows."""
    hasher = xxhash.xxh3_64()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        hasher.update(path.read_bytes())
    return hasher.hexdigest()


def key_of(parts: Mapping[str, Any]) -> str:
    """Name of the folder for these (JSON-able) parts."""
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode())


def checksum(path: Path) -> str:
    """XXH3 of a file."""
    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            hasher.update(block)
    return hasher.hexdigest()


def find_damage(folder: Path) -> str | None:
    """What is wrong with a cached folder, or None."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if not index:
            return f"{INDEX} is empty"
        for name, (size, digest) in index.items():
            path = folder / name
            if path.stat().st_size != size or checksum(path) != digest:
                return f"{name} is not what was written"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def store(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder beside `folder`, then rename it there. An existing folder is replaced.

    Raises:
        OSError: no space, no permission; nothing is left behind.

    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write(aside)
        index = {path.name: (path.stat().st_size, checksum(path)) for path in sorted(aside.iterdir())}
        (aside / INDEX).write_text(json.dumps(index), encoding="utf-8")
        for path in aside.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        _replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _replace(aside: Path, folder: Path) -> None:
    try:
        aside.rename(folder)
    except OSError:
        # Another process was first (its rows are the same), or a damaged one is in the way.
        if folder.is_dir() and find_damage(folder) is None:
            return
        if folder.is_dir():
            shutil.rmtree(folder)
        else:
            folder.unlink(missing_ok=True)
        aside.rename(folder)
