"""A recipe with the origin of each value."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .draft import dotted
from .model_data import Source
from .schema import Recipe
from .section import Section
from .yaml_text import KeyPath, flow


@dataclass(frozen=True)
class Resolved:
    """What a run is asked to do, and who asked.

    `origins` maps each leaf of the recipe, such as `optimizer.learning_rate`, to `recipe.yaml:14`,
    `command line`, `environment WANDB_PROJECT` or `default`. `source` is the path or the preset, `text` its
    text. `notes` are lines to show once, such as an old name that was understood.
    """

    recipe: Recipe
    origins: dict[str, str]
    source: str
    text: str
    notes: tuple[str, ...] = ()

    def to_yaml(self) -> str:
        """Every value with its origin as a trailing comment; loads back to the same recipe."""
        lines = [f"# Every value of the run and where it came from. Made from {self.source}"]
        self._write(self.recipe, self.recipe.model_dump(mode="json"), (), lines)
        return "\n".join(lines) + "\n"

    def _write(self, model: Section, dump: dict[str, Any], path: KeyPath, lines: list[str]) -> None:
        first = len(lines)
        for key, value in in_order(model):
            indent = "  " * len(path)
            here = (*path, key)
            if isinstance(value, Section):
                lines.append(f"{indent}{key}:")
                self._write(value, dump[key], here, lines)
            elif _is_models(value):
                lines.append(f"{indent}{key}:")
                for number, (item, item_dump) in enumerate(zip(value, dump[key], strict=True)):
                    start = len(lines)
                    self._write(item, item_dump, (*here, number), lines)
                    # The path of an item is two longer than its list's, so its keys already stand under `- `.
                    lines[start] = f"{indent}  - {lines[start].lstrip()}"
            else:
                lines.append(f"{indent}{key}: {flow(dump[key])}  # {self.origins[dotted(here)]}")
        assert len(lines) > first


def in_order(model: Section) -> list[tuple[str, Any]]:
    """(key, value) of a section; the `name` of a choice first."""
    keys = list(type(model).model_fields)
    if "name" in keys and not isinstance(model, Source):
        keys.sort(key=lambda key: key != "name")
    return [(key, getattr(model, key)) for key in keys]


def leaves(model: Section, path: KeyPath = ()) -> Iterator[KeyPath]:
    """The path of every value that is not itself a section."""
    for key, value in in_order(model):
        here = (*path, key)
        if isinstance(value, Section):
            yield from leaves(value, here)
        elif _is_models(value):
            for number, item in enumerate(value):
                yield from leaves(item, (*here, number))
        else:
            yield here


def _is_models(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Section)
