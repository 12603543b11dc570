"""Sources: what a recipe names -> the files or the hub data set behind it, and their rows.

chats.jsonl   folder/   logs/*.jsonl      files; a folder is read with everything below it, in sorted order
package:NAME/relative/*.yml               files inside an installed Python package, found without importing it
org/name                                  a data set of the Hugging Face hub, through the `datasets` library
"""

import difflib
import glob
import importlib.util
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from ..recipes.errors import UserError
from ..recipes.model_data import Source
from .raw import RawRow
from .readers import READERS, read_file

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_KINDS = ", ".join(READERS)


@dataclass(frozen=True)
class Input:
    """One resolved source: either files or a hub data set."""

    label: str
    """What the user wrote."""
    files: tuple[Path, ...] = ()
    dataset: Any = None

    def rows(self) -> Iterator[RawRow]:
        """All rows in order."""
        if self.dataset is not None:
            for number, row in enumerate(self.dataset, 1):
                yield RawRow(f"{self.label} row {number}", row)
        for path in self.files:
            yield from read_file(path)

    def identity(self) -> str:
        """Hash of the content: of the bytes of each file, or of what the hub delivered."""
        hasher = xxhash.xxh3_128()
        if self.dataset is not None:
            hasher.update(f"{self.dataset.num_rows} {self.dataset.features}".encode())
            for file in self.dataset.cache_files:
                status = os.stat(file["filename"])
                hasher.update(f"{file['filename']} {status.st_size} {status.st_mtime_ns}".encode())
        for path in self.files:
            # The reader goes by the extension and reports by the name.
            hasher.update(f"\0{path}\0".encode())
            with path.open("rb") as content:
                while block := content.read(1 << 20):
                    hasher.update(block)
        return hasher.hexdigest()


def open_source(source: Source) -> Input:
    """Find what a source names; files are not read yet.

    Raises:
        UserError: nothing is there, the kind of file is unknown, or the hub refuses.

    """
    given = source.path
    if given.startswith("package:"):
        return Input(given, _package_files(given))
    if "://" in given:
        # Whatever stands before the @ may be a password, and messages end in logs.
        shown = re.sub(r"(?<=://)[^/\s]*@", "***@", given.partition("?")[0])
        raise UserError(
            f"data: {shown} is a URL; rows are read from files, folders and hub data sets.\n"
            "  Download it first, then give the file."
        )
    path = Path(given).expanduser()
    if path.is_file():
        return Input(given, (_known(path),))
    if path.is_dir():
        return Input(given, _below(path))
    if glob.has_magic(given):
        found = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        files = tuple(_known(match) for match in found if match.is_file())
        if not files:
            raise UserError(f"data: no file matches {given}   (looked from {Path.cwd()})")
        return Input(given, files)
    if path.suffix.lower() in READERS or not _HUB_ID.fullmatch(given):
        raise UserError(f"data: {given} does not exist   (looked from {Path.cwd()}){_nearby(path)}")
    return Input(given, dataset=_from_hub(source))


def _known(path: Path) -> Path:
    if path.suffix.lower() not in READERS:
        raise UserError(f"{path}  is a kind of file that shoestring does not read.   Known: {_KINDS}")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}  may not be read by this user.   chmod u+r {path}")
    return path


def _below(folder: Path) -> tuple[Path, ...]:
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in READERS and path.is_file())
    if not found:
        raise UserError(f"data: the folder {folder} has no file of a known kind ({_KINDS})")
    return tuple(_known(path) for path in found)


def _nearby(path: Path) -> str:
    folder = path.parent
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=2)
    return f"\n  Did you mean {' or '.join(str(folder / name) for name in near)} ?" if near else ""


def _package_files(given: str) -> tuple[Path, ...]:
    name, _, pattern = given.removeprefix("package:").partition("/")
    # Only a top-level name: looking up `a.b` would import `a`.
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"data: {given}: no package {name!r} is installed.   pip install {name.replace('_', '-')}"
        )
    if Path(pattern).is_absolute() or ".." in Path(pattern).parts or not pattern:
        raise UserError(f"data: {given}: wanted a path below the package, such as package:{name}/data/*.yml")
    root = Path(next(iter(spec.submodule_search_locations))).resolve()
    matches = sorted(root.glob(pattern))
    if len(matches) == 1 and matches[0].is_dir():
        matches = sorted(path for path in matches[0].rglob("*") if path.suffix.lower() in READERS)
    # A link that leads out of the package is not a file of the package.
    files = tuple(_known(path) for path in matches if path.is_file() and path.resolve().is_relative_to(root))
    if not files:
        raise UserError(f"data: no file matches {given}   (looked in {root})")
    return files


def _from_hub(source: Source) -> Any:
    import datasets

    split = source.split or "train"
    try:
        dataset = datasets.load_dataset(source.path, name=source.name, split=split)
    except (
        Exception
    ) as error:  # whatever the library raises, it is about this id, this split or the connection
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        raise UserError(
            f"data: {source.path} (split {split}) is no file or folder here, and the hub did not give it:\n"
            f"  {type(error).__name__}: {reason}\n"
            "  Check id, split and connection, or give a local file, folder or glob."
        ) from error
    return dataset
