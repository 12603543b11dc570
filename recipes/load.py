"""Load a recipe: command line beats recipe beats environment beats default."""

import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

from pydantic import ValidationError

from .draft import Draft, dotted
from .errors import UserError, in_columns
from .messages import explain
from .presets import preset_names, preset_path
from .resolved import Resolved, leaves
from .schema import Recipe
from .yaml_text import parse, read_text

__all__ = ["Resolved", "load_recipe"]


def load_recipe(
    source: str | Path, overrides: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> Resolved:
    """Read a YAML file or a preset by name, apply environment and overrides, and check everything.

    `overrides` are texts such as `optimizer.learning_rate=1e-3`, their values read as YAML; `env` is
    `os.environ` unless given. Raises UserError with one line for each problem found.
    """
    shown, path = _find(source)
    text = read_text(path, shown)
    document = parse(text, shown)
    if document.values is None:
        raise UserError(f"{shown}  is empty; a recipe has model, data and budget.   See shoestring new")
    if not isinstance(document.values, dict):
        kind = "a list" if isinstance(document.values, list) else "one value"
        raise UserError(
            f"{shown}:{document.lines[()]}  is {kind}; a recipe is a mapping such as model: ID.   See "
            "shoestring new"
        )
    origins = {place: f"{shown}:{line}" for place, line in document.lines.items() if place}
    draft = Draft(document.values, origins)
    draft.read_environment(os.environ if env is None else env)
    for override in overrides:
        draft.override(override)
    draft.values.setdefault("output_dir", f"runs/{path.stem}")
    try:
        recipe = Recipe.model_validate(draft.values)
    except ValidationError as error:
        raise UserError(in_columns(explain(error, draft, shown))) from None
    return Resolved(
        recipe=recipe,
        origins={dotted(leaf): draft.origins.get(leaf, "default") for leaf in leaves(recipe)},
        source=shown,
        text=text,
        notes=tuple(draft.notes),
    )


def _find(source: str | Path) -> tuple[str, Path]:
    """(how messages call it, the file)."""
    path = Path(source).expanduser()
    if path.exists():
        return str(source), path
    name = str(source)
    if name in preset_names():
        return f"preset {name}", preset_path(name)
    near = get_close_matches(name, preset_names(), n=1, cutoff=0.6)
    files = [entry.name for entry in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    near_file = get_close_matches(path.name, files, n=1, cutoff=0.6)
    guess = str(path.parent / near_file[0]) if near_file else near[0] if near else ""
    hint = f"Did you mean {guess} ?" if guess else "See shoestring new for presets"
    raise UserError(f"{name}  no such file, and no preset has this name.   {hint}")
