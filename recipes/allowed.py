"""The allowed values of a key in a person's words, from the JSON schema; for errors and docs/recipe.md."""

from typing import Any

MAX_KEYS = 6


def describe(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """One phrase such as `auto, or a whole number of at least 1`."""
    kinds = _kinds(schema, definitions)
    if "null" in kinds and any("," in kind for kind in kinds):
        kinds = ["null", *(kind for kind in kinds if kind != "null")]  # no list of examples before it
    return kinds[0] if len(kinds) == 1 else ", ".join(kinds[:-1]) + " or " + kinds[-1]


def _kinds(schema: dict[str, Any], definitions: dict[str, Any]) -> list[str]:
    if "x-allowed" in schema:
        return [schema["x-allowed"]]
    if "$ref" in schema:
        return [_mapping(schema, definitions)]
    for union in ("anyOf", "oneOf"):
        if union in schema:
            found: list[str] = []
            for kind in schema[union]:
                found += [text for text in _kinds(kind, definitions) if text not in found]
            return found
    if "const" in schema:
        return [_word(schema["const"])]
    if "enum" in schema:
        return [_word(value) for value in schema["enum"]]
    if schema.get("type") == "boolean":
        return ["true", "false"]
    return [_plain(schema, definitions)]


def _mapping(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    keys = list(definitions[schema["$ref"].rsplit("/", 1)[-1]]["properties"])
    shown = ", ".join(keys if len(keys) <= MAX_KEYS else [*keys[:MAX_KEYS], "..."])
    return f"a mapping with {shown}"


def _plain(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    kind = schema.get("type")
    if kind == "array":
        if "prefixItems" in schema:
            first = describe(schema["prefixItems"][0], definitions)
            return f"a list of {len(schema['prefixItems'])}, each {first}"
        if "$ref" in schema["items"]:
            return f"a path or hub id, {_mapping(schema['items'], definitions)}, or a list of these"
        items = describe(schema["items"], definitions)
        return f"a list, each {items}" if items.startswith("a ") else f"a list of {items}"
    if kind == "object":
        return f"a mapping from text to {describe(schema['additionalProperties'], definitions)}"
    if kind in ("integer", "number"):
        name = "a whole number" if kind == "integer" else "a number"
        return name + _range(schema)
    return {"string": "text", "null": "null"}.get(str(kind), "any value")


def _range(schema: dict[str, Any]) -> str:
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    lower = f" of at least {low}" if low is not None else f" above {above}" if above is not None else ""
    upper = ""
    # Bounds of the machine's integers are no help to a person.
    if high is not None:
        upper = f" and at most {high}" if lower else f" of at most {high}"
    elif below is not None and below < 2**63:
        upper = f" and below {below}" if lower else f" below {below}"
    return lower + upper


def _word(value: Any) -> str:
    return {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def words(schema: dict[str, Any]) -> list[str]:
    """The words that a key allows, for suggestions."""
    found = [_word(value) for value in schema.get("enum", [])]
    if "const" in schema:
        found.append(_word(schema["const"]))
    for union in ("anyOf", "oneOf"):
        for kind in schema.get(union, []):
            found += words(kind)
    return found
