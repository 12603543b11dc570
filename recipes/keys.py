"""All keys of the schema by their dotted path, for suggestions and for the reference."""

from functools import cache
from typing import Any

from .schema import plain_schema


def variants(section: str) -> dict[str, dict[str, Any]]:
    """Definitions that a section may have: {"adamw": {...}, ...} for a choice by name, else {"": {...}}."""
    schema = plain_schema()
    declared = schema["properties"][section]
    kinds = [declared, *declared.get("anyOf", [])]  # a choice that may be null is inside an anyOf
    references = [reference for kind in kinds for reference in (kind, *kind.get("oneOf", []))]
    found = {}
    for reference in references:
        if "$ref" in reference:
            definition = schema["$defs"][reference["$ref"].rsplit("/", 1)[-1]]
            declared_name = definition["properties"].get("name", {})
            name = declared_name.get("const", declared_name.get("x-allowed", ""))
            found[name] = definition
    return found


@cache
def sections() -> tuple[str, ...]:
    """Names of the sections, in order."""
    return tuple(plain_schema()["properties"])


@cache
def dotted_keys() -> tuple[str, ...]:
    """`model`, `model.model_name_or_path`, ..., each once."""
    found: dict[str, None] = {}
    for section in sections():
        found[section] = None
        for definition in variants(section).values():
            found.update(dict.fromkeys(f"{section}.{key}" for key in definition["properties"]))
    return tuple(found)


def properties_at(path: tuple[str | int, ...], name: str | None = None) -> dict[str, Any]:
    """Properties of the mapping at a path: () is the recipe, then such as ("data", "train", 0)."""
    schema = plain_schema()
    if not path:
        found: dict[str, Any] = schema["properties"]
        return found
    if path[-1] == "columns":
        return dict(schema["$defs"]["Columns"]["properties"])
    if len(path) > 1 and path[0] == "data" and path[1] in ("train", "eval", "preferences"):
        return dict(schema["$defs"]["Source"]["properties"])
    if path == ("engine", "aio"):
        return dict(schema["$defs"]["AioConfig"]["properties"])
    if path[:2] == ("schedule", "pieces") and len(path) == 3:
        return dict(schema["$defs"]["Piece"]["properties"])
    if len(path) == 1 and isinstance(path[0], str) and path[0] in sections():
        menu = variants(path[0])
        chosen = menu.get(name or "", next(iter(menu.values()), {}))
        return dict(chosen.get("properties", {}))
    return {}
