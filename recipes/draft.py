"""A recipe on its way to the schema: plain values, and for each one where it came from."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import UserError
from .short_forms import OLD_NAMES, SHORT_FORMS, expand_section
from .yaml_text import KeyPath, flow, scalar

COMMAND_LINE = "command line"
ENVIRONMENT = {"WANDB_PROJECT": ("track", "project"), "WANDB_NAME": ("track", "run_name")}
"""Variables of the environment that stand for a key; the recipe beats them."""


def dotted(path: KeyPath) -> str:
    """`("data", "train", 0, "path")` -> `data.train.0.path`."""
    return ".".join(map(str, path))


@dataclass
class Draft:
    """Values with their origins (`recipe.yaml:14`, `command line`, `environment WANDB_NAME`), sections spelled out."""

    values: dict[str, Any]
    origins: dict[KeyPath, str]
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for section in list(self.values):
            self._spell_out(section)

    def where(self, path: KeyPath) -> str:
        """Origin of a value, or of the nearest thing around it."""
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins.get(path, "")

    def set(self, path: KeyPath, value: Any, origin: str) -> None:
        """Put a value at a path, making the mappings on the way; what was there before is forgotten."""
        parent: Any = self.values
        for depth, part in enumerate(path[:-1], 1):
            parent = self._step(parent, path, depth, part)
        last = path[-1]
        if isinstance(parent, list):
            last = self._index(parent, path, len(path), last)
            path = (*path[:-1], last)
        elif not isinstance(parent, dict):
            key = dotted(path[:-1])
            raise UserError(
                f"{origin}  {dotted(path)} is not a key: {key} is {flow(parent)}, which has no keys."
            )
        parent[last] = value
        self.origins = {known: was for known, was in self.origins.items() if known[: len(path)] != path}
        for known in _paths(value, path):
            self.origins[known] = origin
        self._spell_out(str(path[0]))

    def override(self, text: str) -> None:
        """Apply `optimizer.learning_rate=1e-3`; the value is read as YAML."""
        key, equals, given = text.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts) or any(part != part.strip() for part in parts):
            raise UserError(
                f"{COMMAND_LINE}  {text!r} is not an override; allowed: KEY=VALUE, such as "
                "optimizer.learning_rate=1e-4"
            )
        try:
            value = scalar(given, COMMAND_LINE)
        except UserError:
            raise UserError(
                f"{COMMAND_LINE}  {text!r}: the value is not YAML.   Put it into quotes: {key}='\"...\"'"
            ) from None
        self.set(tuple(int(part) if part.isdecimal() else part for part in parts), value, COMMAND_LINE)

    def read_environment(self, environment: Mapping[str, str]) -> None:
        """Take what the recipe leaves open from the environment."""
        for variable, path in ENVIRONMENT.items():
            section = self.values.get(path[0], {})
            if environment.get(variable) and isinstance(section, dict) and path[1] not in section:
                self.set(path, environment[variable], f"environment {variable}")

    def _step(self, parent: Any, path: KeyPath, depth: int, part: str | int) -> Any:
        """The container at path[:depth], made if it is not there."""
        if isinstance(parent, list):
            return parent[self._index(parent, path, depth, part)]
        if not isinstance(parent, dict):
            key = dotted(path[: depth - 1])
            raise UserError(
                f"{COMMAND_LINE}  {dotted(path)} is not a key: {key} is {flow(parent)}, which has no keys."
            )
        if part == "adapter" and depth == 1 and parent.get(part, {}) is None:
            raise UserError(
                f"{COMMAND_LINE}  {dotted(path)} needs an adapter, and adapter is null "
                f"({self.where(('adapter',))}).   Put adapter=lora before it"
            )
        if parent.get(part) is None:
            parent[str(part)] = {}
            self.origins.setdefault(path[:depth], COMMAND_LINE)
        return parent[part]

    def _index(self, parent: list[Any], path: KeyPath, depth: int, part: str | int) -> int:
        if not isinstance(part, int) or part >= len(parent):
            key = dotted(path[: depth - 1])
            last = len(parent) - 1
            allowed = (
                f"{key}.0" if last == 0 else f"{key}.0 to {key}.{last}" if last > 0 else "none, it is empty"
            )
            raise UserError(
                f"{COMMAND_LINE}  {dotted(path)} is not a key: {key} is a list of {len(parent)}; allowed: "
                f"{allowed}"
            )
        return part

    def _spell_out(self, section: str) -> None:
        """Replace a section's short form by the long one, and give the new paths their origins."""
        given = self.values.get(section)
        if section in SHORT_FORMS and isinstance(given, str | list):
            self._move((section,), (section, SHORT_FORMS[section]))
        if section == "data":
            for key in ("train", "eval"):
                sources = given.get(key) if isinstance(given, dict) else given if key == "train" else None
                if isinstance(sources, str | dict):
                    self._move(("data", key), ("data", key, 0))
                    sources = [sources]
                for number, source in enumerate(sources if isinstance(sources, list) else ()):
                    if isinstance(source, str):
                        self._move(("data", key, number), ("data", key, number, "path"))
        for old, new in OLD_NAMES.get(section, {}).items():
            if isinstance(given, dict) and old in given and new not in given:
                self.notes.append(
                    f"{self.where((section, old))}  {section}.{old} is an old name; the key is "
                    f"{section}.{new}"
                )
                self._move((section, old), (section, new))
        if section in self.values:
            self.values[section] = expand_section(section, given)

    def _move(self, old: KeyPath, new: KeyPath) -> None:
        """Copy the origin of `old` to `new`, and move those of everything below."""
        moved = {}
        for path, origin in self.origins.items():
            below = path[: len(old)] == old
            moved[(*new, *path[len(old) :]) if below else path] = origin
            if path == old and new[: len(old)] == old:
                moved[path] = origin
        self.origins = moved


def _paths(value: Any, path: KeyPath) -> Iterator[KeyPath]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        yield from _paths(below, (*path, key))
