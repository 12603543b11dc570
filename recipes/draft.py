"""A recipe on its way to the schema: plain values, and for each one where it came from."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import UserError
from .short_forms import OLD_NAMES, SHORT_FORMS, expand_section, is_short
from .yaml_text import KeyPath, flow, scalar

COMMAND_LINE = "command line"
ENVIRONMENT = {"WANDB_PROJECT": "track.project", "WANDB_NAME": "track.run_name"}
"""Variables of the environment that stand for a key; the recipe beats them."""


def dotted(path: KeyPath) -> str:
    """`("data", "train", 0, "path")` -> `data.train.0.path`."""
    return ".".join(map(str, path))


@dataclass
class Draft:
    """Values with their origins (`recipe.yaml:14`, `command line`, ...), sections spelled out."""

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

    def set(self, key: str, value: Any, origin: str) -> None:
        """Put a value at a dotted key, making the mappings on the way; what was there before is forgotten."""
        *outer, last = key.split(".")
        parent: Any = self.values
        path: KeyPath = ()
        for part in outer:
            inside = self._enter(parent, path, part, key)
            if path == () and inside == "adapter" and parent.get("adapter", {}) is None:
                raise UserError(
                    f"{COMMAND_LINE}  {key} needs an adapter, and adapter is null "
                    f"({self.where(('adapter',))}).   Put adapter=lora before it"
                )
            path = (*path, inside)
            if isinstance(parent, dict) and parent.get(inside) is None:
                parent[inside] = {}
                self.origins.setdefault(path, origin)
            parent = parent[inside]
        inside = self._enter(parent, path, last, key)
        path = (*path, inside)
        parent[inside] = value
        self.origins = {known: was for known, was in self.origins.items() if known[: len(path)] != path}
        for known in _paths(value, path):
            self.origins[known] = origin
        self._spell_out(str(path[0]))

    def _enter(self, parent: Any, path: KeyPath, part: str, key: str) -> Any:
        """`part` as a key of the container at `path`. UserError if the container cannot have it."""
        if isinstance(parent, dict):
            return part
        here = dotted(path)
        if not isinstance(parent, list):
            raise UserError(
                f"{COMMAND_LINE}  {key} is not a key: {here} is {flow(parent)}, which has no keys."
            )
        if not part.isdecimal() or int(part) >= len(parent):
            count = len(parent)
            allowed = "none, it is empty" if not count else f"{here}.0"
            allowed += f" to {here}.{count - 1}" if count > 1 else ""
            raise UserError(
                f"{COMMAND_LINE}  {key} is not a key: {here} is a list of {count}; allowed: {allowed}"
            )
        return int(part)

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
        self.set(key.strip(), value, COMMAND_LINE)

    def read_environment(self, environment: Mapping[str, str]) -> None:
        """Take what the recipe leaves open from the environment."""
        for variable, key in ENVIRONMENT.items():
            section, _, leaf = key.partition(".")
            given = self.values.get(section, {})
            if environment.get(variable) and isinstance(given, dict) and leaf not in given:
                self.set(key, environment[variable], f"environment {variable}")

    def _spell_out(self, section: str) -> None:
        """Replace a section's short form by the long one, and give the new paths their origins."""
        given = self.values.get(section)
        if is_short(section, given):
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
