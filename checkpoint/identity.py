"""Is this the run that the directory holds? What must be the same for a resumed run to continue it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..recipes.errors import UserError

# Sections of the recipe that change nothing in the weights that the next step computes.
FREE_SECTIONS = frozenset({"output_dir", "track", "export", "checkpoint", "eval", "offload"})


def run_identity(recipe: Mapping[str, Any], *, data: str, base: str, world_size: int) -> dict[str, Any]:
    """A flat, JSON-able record of what determines the steps of a run; saved with every checkpoint.

    recipe: the resolved recipe as plain values (`model_dump(mode="json")`). Values, not their hash, so that a
    difference can be named. data, base: fingerprints of the token rows and of the frozen weights.
    """
    flat = {
        f"recipe.{key}": value for key, value in _flatten(recipe) if key.split(".")[0] not in FREE_SECTIONS
    }
    return {**flat, "data": data, "base": base, "world_size": world_size}


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """key -> (saved, current) where the two records differ; None stands for a key that is not there.

    Works for any flat record, such as the versions and devices of two environments.
    """
    keys = [*saved, *(key for key in current if key not in saved)]
    # Through lists, as tuples come back from JSON.
    return {
        key: (saved.get(key), current.get(key))
        for key in keys
        if _plain(saved.get(key)) != _plain(current.get(key))
    }


def check_identity(
    saved: Mapping[str, Any], current: Mapping[str, Any], *, output_dir: Path, allow: Collection[str] = ()
) -> None:
    """UserError naming what differs, unless `current` continues `saved`.

    allow: keys or sections that may differ, e.g. {"recipe.budget"} when a finished run is extended.
    """
    changed = [
        _line(key, before, now)
        for key, (before, now) in differences(saved, current).items()
        if not any(key == free or key.startswith(f"{free}.") for free in allow)
    ]
    if not changed:
        return
    shown = changed[:3]
    if len(changed) > 3:
        shown.append(f"  and {len(changed) - 3} more")
    count = "one thing differs" if len(changed) == 1 else f"{len(changed)} things differ"
    raise UserError(
        f"{output_dir}: holds the checkpoints of another run; {count}:\n"
        + "\n".join(shown)
        + f"\nUndo the change to resume; or start over with --fresh; or keep both: output_dir={output_dir}-2"
    )


def _line(key: str, before: Any, now: Any) -> str:
    match key:
        case "data":
            return "  data: the rows are not those it was trained on (files edited, or other options)"
        case "base":
            return "  model: the frozen weights are not those it was trained on"
        case "world_size":
            return f"  processes: was {before}, now {now}"
    return f"  {key.removeprefix('recipe.')}: was {_short(before)}, now {_short(now)}"


def _short(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _flatten(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            flat += _flatten(item, f"{prefix}{key}.")
        else:
            flat.append((f"{prefix}{key}", item))
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    # Not a number equals itself here: it is the same record.
    return "nan" if isinstance(value, float) and value != value else value
