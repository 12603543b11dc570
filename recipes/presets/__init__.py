"""Recipes that ship with the package; their head comments say what they are for and what they need."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..errors import UserError

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Preset:
    """One preset, with the lines `# purpose:` and `# hardware:` at the head of its file."""

    name: str
    purpose: str
    hardware: str
    path: Path


@cache
def preset_names() -> tuple[str, ...]:
    """Names of all presets, sorted."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))


def preset_path(name: str) -> Path:
    """The file of a preset. UserError if there is none of this name."""
    if name not in preset_names():
        raise UserError(f"{name}  is not a preset; allowed: {', '.join(preset_names())}")
    return _FOLDER / f"{name}.yaml"


def list_presets() -> list[Preset]:
    """All presets, sorted by name."""
    return [_read(name) for name in preset_names()]


def copy_preset(name: str, destination: str | Path | None = None, *, overwrite: bool = False) -> Path:
    """Copy a preset to `destination` (a file or a folder that exists; here if None) and return the file.

    UserError if there is no such preset, the file exists already, or it cannot be written.
    """
    origin = preset_path(name)
    target = Path(destination) if destination is not None else Path(f"{name}.yaml")
    if target.is_dir():
        target = target / f"{name}.yaml"
    if target.exists() and not overwrite:
        raise UserError(f"{target}  exists already.   Give another name: shoestring new {name} OTHER.yaml")
    try:
        target.write_bytes(origin.read_bytes())
    except OSError as error:
        raise UserError(f"{target}  cannot be written: {error.strerror}.") from None
    return target


def _read(name: str) -> Preset:
    said = {}
    path = preset_path(name)
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        key, colon, text = line.lstrip("# ").partition(":")
        if colon and key in ("purpose", "hardware"):
            said[key] = text.strip()
    return Preset(name=name, purpose=said["purpose"], hardware=said["hardware"], path=path)
