"""Conversations in YAML: `conversations:` with lists of turns that alternate between user and assistant.

The nodes are read, not the values: a turn written as `yes`, `42` or `1984-01-24` is the text that was
written, not a bool, a number or a date, and each row knows its line. No tag is ever resolved, so nothing in a
file can run code.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ..recipes.errors import UserError
from .raw import RawRow, RowProblem, alternating

MAX_DEPTH = 8
"""Of nested lists and mappings in one row: an alias that contains itself must not run for ever."""
_FILE_DEPTH = 32  # the composer is recursive, and in C: too deep would end the process
_VALUE_BYTES = 600  # what a value costs beside its text, about
_LEAST_BOMB, _MOST_EXPANSION = 64 << 20, 700
"""Bytes that the rows of any file may come to, and how many for each of its own: only aliases make more."""


def read_yaml(path: Path) -> Iterator[RawRow]:
    """Rows of a file whose top is `conversations: [[turn, ...], ...]`, or a list of mappings.

    Raises:
        UserError: not YAML, not UTF-8, or neither of the two layouts.

    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        text = path.read_bytes().decode("utf-8-sig")
        _check_depth(path, text, loader)
        root = yaml.compose(text, Loader=loader)
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}  is not UTF-8 text.   Save the file as UTF-8.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{path}{place}  is not valid YAML: {what}") from None
    if root is None:
        return
    items: Any = root
    if isinstance(root, yaml.MappingNode):
        parts = {key.value: value for key, value in root.value if isinstance(key, yaml.ScalarNode)}
        items = parts.get("conversations")
        if items is None:
            raise UserError(
                f"{path}:1  has the keys {', '.join(parts)}.   "
                "Wanted: `conversations:` with lists of turns, or a list of mappings."
            )
    if not isinstance(items, yaml.SequenceNode):
        raise UserError(f"{path}:{items.start_mark.line + 1}  a list of conversations is wanted here")
    size = _Size(path, _LEAST_BOMB + _MOST_EXPANSION * len(text))
    for item in items.value:
        where = f"{path}:{item.start_mark.line + 1}"
        try:
            yield RawRow(where, _row(item, size))
        except RowProblem as problem:
            yield RawRow(where, None, problem)


def _row(item: Any, size: "_Size") -> Any:
    if isinstance(item, yaml.MappingNode):
        return _value(item, 0, size)
    if not isinstance(item, yaml.SequenceNode):
        raise RowProblem("are not a list of turns", f"the text {item.value[:60]!r}")
    if item.value and all(isinstance(turn, yaml.MappingNode) and len(turn.value) > 1 for turn in item.value):
        return {"messages": _value(item, 0, size)}
    return {"messages": alternating([_turn(turn, size) for turn in item.value])}


def _turn(node: Any, size: "_Size") -> str:
    """The text of one turn; `Note: this` is a mapping to YAML and a sentence to whoever wrote it."""
    if isinstance(node, yaml.ScalarNode):
        size.add(node)
        return str(node.value)
    if isinstance(node, yaml.MappingNode) and len(node.value) == 1:
        key, value = node.value[0]
        if isinstance(key, yaml.ScalarNode) and isinstance(value, yaml.ScalarNode):
            return f"{key.value}: {value.value}"
    raise RowProblem("have a turn that is not text", f"line {node.start_mark.line + 1}")


def _value(node: Any, depth: int, size: "_Size") -> Any:
    if depth > MAX_DEPTH:
        raise RowProblem("are nested too deeply", f"line {node.start_mark.line + 1}")
    size.add(node)
    if isinstance(node, yaml.ScalarNode):
        return node.value
    if isinstance(node, yaml.SequenceNode):
        return [_value(child, depth + 1, size) for child in node.value]
    return {str(key.value): _value(value, depth + 1, size) for key, value in node.value}


def _check_depth(path: Path, text: str, loader: Any) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=loader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _FILE_DEPTH:
            line = event.start_mark.line + 1 if event.start_mark else 1
            raise UserError(
                f"{path}:{line}  is nested more than {_FILE_DEPTH} deep: these are no conversations."
            )


class _Size:
    """Counts what the rows of a file come to, aliases written out."""

    def __init__(self, path: Path, limit: int) -> None:
        self.path, self.left = path, limit

    def add(self, node: Any) -> None:
        """UserError once the file has come to more than its limit."""
        self.left -= _VALUE_BYTES + (len(node.value) if isinstance(node, yaml.ScalarNode) else 0)
        if self.left < 0:
            raise UserError(
                f"{self.path}:{node.start_mark.line + 1}  has aliases that multiply its size without end."
            )
