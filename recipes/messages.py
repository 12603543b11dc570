"""Validation errors of pydantic, in the words of a recipe: one line for each key that is wrong."""

from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from .allowed import describe, words
from .draft import Draft, dotted
from .hints import FOREIGN, OPTIMIZERS
from .keys import dotted_keys, properties_at, sections, variants
from .problem import Problem
from .quantities import Joules, Money
from .schema import plain_schema
from .short_forms import DEFAULT_NAMES, SHORT_FORMS
from .yaml_text import KeyPath, flow

MAX_PROBLEMS = 20
MAX_OWNERS = 4
_FIXES = {
    "model": "Add a line such as   model: HuggingFaceTB/SmolLM2-135M-Instruct",
    "data": "Add a line such as   data: chats.jsonl",
    "budget": "Add a line such as   budget: 2h",
}


def explain(error: ValidationError, draft: Draft, shown: str) -> list[tuple[str, str]]:
    """Rows of (where, what), in the order of the lines."""
    rows: dict[KeyPath, tuple[str, str]] = {}
    for details in error.errors(include_url=False):
        if details["type"] == "cross_checks":
            return [_cross_check(problem, draft, shown) for problem in details["ctx"]["problems"]]
        path = _clean(details, draft.values)
        rows.setdefault(path, (draft.where(path) or shown, _sentence(details, path, draft.values)))
    # A union reports each member that did not fit; the deepest place is the one that a person can mend.
    found = [row for path, row in rows.items() if not any(_inside(other, path) for other in rows)]
    found.sort(key=lambda row: _line(row[0]))
    if len(found) > MAX_PROBLEMS:
        left = len(found) - MAX_PROBLEMS
        found = [*found[:MAX_PROBLEMS], (shown, f"has {left} more problems.")]
    return found


def _line(where: str) -> int:
    """Line of `recipe.yaml:14`; 0 for places without one."""
    line = where.rpartition(":")[2]
    return int(line) if line.isdecimal() else 0


def _inside(inner: KeyPath, outer: KeyPath) -> bool:
    return len(inner) > len(outer) and inner[: len(outer)] == outer


def _cross_check(problem: Problem, draft: Draft, shown: str) -> tuple[str, str]:
    path = _path(problem.key)
    here = draft.where(path) or shown
    others = [
        f"{key}: {draft.where(_path(key))}"
        for key in problem.others
        if draft.where(_path(key)) not in ("", here)
    ]
    text = problem.text if not others else f"{problem.text}   ({', '.join(others)})"
    return here, text


def _path(key: str) -> KeyPath:
    return tuple(int(part) if part.isdecimal() else part for part in key.split("."))


def _clean(details: ErrorDetails, values: Any) -> KeyPath:
    """Where the error is in the recipe: pydantic's location without the names of union members."""
    path: list[str | int] = []
    current = values
    location = details["loc"]
    for number, part in enumerate(location):
        inside = (isinstance(current, dict) and part in current) or (
            isinstance(current, list) and isinstance(part, int) and part < len(current)
        )
        if inside:
            path.append(part)
            current = current[part]
        elif details["type"] == "missing" and number == len(location) - 1 and isinstance(part, str):
            path.append(part)
    if details["type"] == "union_tag_invalid":
        path.append("name")
    return tuple(path)


def _sentence(details: ErrorDetails, path: KeyPath, values: dict[str, Any]) -> str:
    key = dotted(path)
    kind = details["type"]
    if kind == "extra_forbidden":
        return _unknown(path, values)
    if kind == "missing" and path[-1] == details["loc"][-1]:
        return f"{key} is missing.   {_FIXES.get(key, f'Add {path[-1]}')}"
    if kind == "amount":
        return f"{key}: {details['ctx']['sentence']}{_other_limit(path, _at(path, values))}"
    given = _at(path, values)
    schema = _schema(path, values)
    allowed = describe(schema, plain_schema()["$defs"])
    if len(path) == 1 and path[0] in SHORT_FORMS and "mapping" in allowed:
        allowed = f"text, {allowed}" if allowed.startswith("null") else f"text, or {allowed}"
    if given is None and "mapping" in allowed:
        default = "" if key in _FIXES else "leave the line out for the defaults, or "
        return f"{key} is empty; {default}give {allowed}"
    if path == ("adapter", "name"):
        allowed += ", or adapter: null to train every weight"
    if path == ("optimizer", "name") and isinstance(given, str) and given.lower() in OPTIMIZERS:
        return f"{key} is {_show(given)}; allowed: {allowed}.   It is called {OPTIMIZERS[given.lower()]} here"
    guess = get_close_matches(given, words(schema), n=3, cutoff=0.6) if isinstance(given, str) else []
    guess.sort(key=lambda word: word[0] != given[0])  # a slip of the finger seldom takes the first letter
    return f"{key} is {_show(given)}; allowed: {allowed}" + (
        f".   Did you mean {guess[0]} ?" if guess else ""
    )


def _schema(path: KeyPath, values: dict[str, Any]) -> dict[str, Any]:
    """JSON schema of the key at a path, or of the nearest key around it."""
    for end in range(len(path), 0, -1):
        parent, last = path[: end - 1], path[end - 1]
        if len(parent) == 1 and last == "name" and (menu := variants(str(parent[0]))) and "" not in menu:
            return {"enum": list(menu)}
        properties = properties_at(parent, _name(parent, values))
        if last in properties:
            return _below(properties[last], path[end:])
    return {}


def _below(schema: dict[str, Any], rest: KeyPath) -> dict[str, Any]:
    """Schema of an item of a list or a mapping with free keys."""
    if not rest:
        return schema
    for kind in [schema, *schema.get("anyOf", [])]:
        for items in ("items", "additionalProperties"):
            if isinstance(kind.get(items), dict):
                inner: dict[str, Any] = kind[items]
                source = str(inner.get("$ref", "")).endswith("/Source")
                return {"anyOf": [{"x-allowed": "a path or hub id"}, inner]} if source else inner
        if "prefixItems" in kind:
            return dict(kind["prefixItems"][0])
    return schema


def _other_limit(path: KeyPath, given: Any) -> str:
    """`budget: 10 epochs` is not a duration, but budget.epochs=10 is what was meant."""
    if path != ("budget", "time") or not isinstance(given, str):
        return ""
    amount, _, unit = given.partition(" ")
    if unit in ("epochs", "steps", "tokens") or unit + "s" in ("epochs", "steps", "tokens"):
        return f".   Did you mean budget.{unit.rstrip('s')}s={amount} ?"
    for key, kind in (("cost", Money), ("energy", Joules)):
        if kind.read(given):
            return f'.   Did you mean budget.{key}="{given}" ?'
    return ""


def _unknown(path: KeyPath, values: dict[str, Any]) -> str:
    """An unknown key, with what was probably meant: another tool's name, a key elsewhere, a near spelling."""
    key, section, leaf = dotted(path), path[:-1], str(path[-1])
    name = _name(section, values)
    if name is not None and (owners := _owners(str(section[0]), leaf)):
        verb = "has" if len(owners) == 1 else "have"
        if len(owners) > MAX_OWNERS:
            owners = [*owners[: MAX_OWNERS - 1], f"{len(owners) - MAX_OWNERS + 1} others"]
        return f"{key} is not a key of {name}; {_either(owners, 'and')} {verb} it."
    if not section and leaf in dotted_keys():
        outer, _, inner = leaf.partition(".")
        return f"{key} with a dot is for the command line.   Write {outer}: {{{inner}: ...}}"
    mine = list(properties_at(section, name))
    if near := get_close_matches(leaf, mine, n=1, cutoff=0.8):
        return f"{key} is not a key.   Did you mean {dotted((*section, near[0]))} ?"
    if hint := FOREIGN.get(key.lower()) or FOREIGN.get(leaf.lower()):
        if hint.startswith("nothing: "):
            return f"{key} is not a key.   Leave it out: {hint.removeprefix('nothing: ')}"
        return f"{key} is not a key.   It is called {hint} here"
    elsewhere = [known for known in dotted_keys() if known.rpartition(".")[2] == leaf]
    if elsewhere:
        return f"{key} is not a key.   Did you mean {_either(elsewhere)} ?"
    if near := get_close_matches(leaf, mine, n=1, cutoff=0.6):
        return f"{key} is not a key.   Did you mean {dotted((*section, near[0]))} ?"
    leaves = {known.rpartition(".")[2]: known for known in reversed(dotted_keys())}
    if near := get_close_matches(leaf, list(leaves), n=1, cutoff=0.75):
        return f"{key} is not a key.   Did you mean {leaves[near[0]]} ?"
    return f"{key} is not a key; allowed: {', '.join(mine if section else sections())}"


def _owners(section: str, leaf: str) -> list[str]:
    """Choices of a section that have a key, such as polynomial for power."""
    return [name for name, definition in variants(section).items() if leaf in definition["properties"]]


def _name(section: KeyPath, values: dict[str, Any]) -> str | None:
    """The chosen `name` of a section that is a choice by name."""
    if len(section) != 1 or section[0] not in DEFAULT_NAMES:
        return None
    chosen = values.get(str(section[0]))
    name = chosen.get("name") if isinstance(chosen, dict) else None
    return name if isinstance(name, str) else None


def _at(path: KeyPath, values: Any) -> Any:
    for part in path:
        values = values[part]
    return values


def _show(given: Any) -> str:
    text = repr(given) if isinstance(given, str) else flow(given)
    return text if len(text) <= 60 else text[:57] + "..."


def _either(keys: list[str], join: str = "or") -> str:
    return keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + f" {join} " + keys[-1]
