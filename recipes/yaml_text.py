"""YAML to plain values that know their line, and back. Safe by construction, and bounded.

Scalars follow YAML 1.2: `1e-3` is a number (PyYAML's own rules, of YAML 1.1, read it as text), `1:30:00` and
dates stay text. The words true/false, yes/no and on/off are booleans. Duplicate keys, tabs, several
documents, aliases that multiply and files above the bounds are errors with their line.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from .errors import UserError

MAX_FILE_BYTES = 2**20
MAX_VALUES = 20_000
MAX_DEPTH = 32
_MAX_DIGITS = 40
_MAX_EVENTS = 3 * MAX_VALUES  # a value, its key, and what begins and ends them

KeyPath: TypeAlias = tuple[str | int, ...]

_INTEGER = re.compile(r"[-+]?[0-9][0-9_]*")
_RULES = [
    (
        "tag:yaml.org,2002:bool",
        r"true|True|TRUE|false|False|FALSE|yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF",
        "tTfFyYnNoO",
    ),
    ("tag:yaml.org,2002:int", rf"[-+]?[0-9][0-9_]{{0,{_MAX_DIGITS}}}", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:merge", r"<<", "<"),
]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - PyYAML reads this class attribute


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - PyYAML reads this class attribute

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if "\n" in text else None  # one line for one value
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
for _tag, _pattern, _first in _RULES:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), list(_first))


@dataclass
class Document:
    """Plain values of a YAML text, and the line of each one by its path."""

    values: Any
    lines: dict[KeyPath, int] = field(default_factory=dict)


def read_text(path: Path, shown: str) -> str:
    """Read a recipe's text. UserError when it is missing, too large or not UTF-8."""
    try:
        if path.is_dir():
            raise UserError(
                f"{shown}  is a folder; a recipe is a YAML file.   For example {shown}/recipe.yaml"
            )
        if not path.is_file():  # reading a pipe would wait for its writer, a device may have no end
            raise UserError(f"{shown}  is no plain file.   Save the recipe as one, such as recipe.yaml")
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            raise UserError(
                f"{shown}  is {size:,} bytes long; a recipe has at most {MAX_FILE_BYTES:,}.   Is it a data "
                "file?"
            )
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{shown}  cannot be read: {error.strerror}.") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{shown}:{line}  byte 0x{raw[error.start]:02x} is not UTF-8.   Save the file with the "
            "encoding UTF-8"
        ) from None


def parse(text: str, shown: str) -> Document:
    """Parse one YAML document. UserError with the line for everything that is not one."""
    try:
        root = _compose(text, shown)
        document = Document(None)
        if root is not None:
            document.values = _Builder(document, shown).build(root, ())
        return document
    except yaml.MarkedYAMLError as error:
        raise UserError(_syntax(error, text, shown)) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(
            f"{shown}:{line}  character U+{ord(text[error.position]):04X} is not allowed in YAML."
        ) from None


def scalar(text: str, shown: str) -> Any:
    """Read the value of an override such as `1e-3`, `null`, `[a, b]` or `{time: 2h}`."""
    return parse(text, shown).values


def flow(value: Any) -> str:
    """One line of YAML for a value; reads back as the same value."""
    text: str = yaml.dump(
        value,
        Dumper=_Dumper,
        default_flow_style=True,
        width=float("inf"),
        allow_unicode=True,
        sort_keys=False,
    )
    return text.removesuffix("\n").removesuffix("\n...")


def _compose(text: str, shown: str) -> yaml.Node | None:
    """The node tree; nesting is bounded before the recursive composer sees it."""
    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=_Loader)):
        if number > _MAX_EVENTS:  # before a composer holds them all
            raise UserError(f"{shown}:{_line(event)}  the recipe has more than {MAX_VALUES:,} values.")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise UserError(
                f"{shown}:{_line(event)}  is nested more than {MAX_DEPTH} deep; a recipe needs at most 5."
            )
    node: yaml.Node | None = yaml.compose(text, Loader=_Loader)
    return node


def _line(marked: yaml.Node | yaml.Event) -> int:
    return int(marked.start_mark.line) + 1 if marked.start_mark else 1


class _Builder:
    """Turns nodes into plain values, writing down lines; counts values so that aliases cannot multiply."""

    def __init__(self, document: Document, shown: str) -> None:
        self.document, self.shown = document, shown
        self.count = 0
        self.open: set[int] = set()
        self.constructor = _Loader("")

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        self.count += 1
        line = _line(node)
        if self.count > MAX_VALUES:
            raise UserError(
                f"{self.shown}:{line}  the recipe has more than {MAX_VALUES:,} values, aliases written out."
            )
        if id(node) in self.open:
            raise UserError(f"{self.shown}:{line}  an alias refers to a value that contains it.")
        self.document.lines.setdefault(path, line)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, line)
        if node.tag not in ("tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"):
            raise self._bad_tag(node.tag, line)
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.build(item, (*path, n)) for n, item in enumerate(node.value)]
            assert isinstance(node, yaml.MappingNode)
            return self._mapping(node, path)
        finally:
            self.open.discard(id(node))

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        seen: dict[str, int] = {}
        own = []
        for key_node, value_node in node.value:
            line = _line(key_node)
            if key_node.tag == "tag:yaml.org,2002:merge":
                values = {**self._merged(value_node, path), **values}
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise UserError(f"{self.shown}:{line}  a key must be a word, not a list or a mapping.")
            key = str(key_node.value)
            if key in seen:
                name = ".".join(map(str, (*path, key)))
                raise UserError(
                    f"{self.shown}:{line}  {name} is given twice, first in line {seen[key]}.   Remove one "
                    "of them"
                )
            seen[key] = line
            own.append((key, line, value_node))
        # After the merged ones, so that a mapping's own keys and lines win.
        for key, line, value_node in own:
            values[key] = self.build(value_node, (*path, key))
            self.document.lines[(*path, key)] = line
        return values

    def _merged(self, node: yaml.Node, path: KeyPath) -> dict[str, Any]:
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        values: dict[str, Any] = {}
        for inherited in nodes:
            if not isinstance(inherited, yaml.MappingNode):
                raise UserError(f"{self.shown}:{_line(inherited)}  << merges mappings only.")
            values = {**self.build(inherited, path), **values}
        return values

    def _scalar(self, node: yaml.ScalarNode, line: int) -> Any:
        tag, text = node.tag, str(node.value)
        if "\0" in text:  # no path, no name and no prompt can hold one
            raise UserError(f"{self.shown}:{line}  {text[:60]!r} holds the character NUL.   Remove it")
        try:
            if tag == "tag:yaml.org,2002:int":
                if not _INTEGER.fullmatch(text):
                    raise ValueError(text)
                return int(text.replace("_", ""))
            if tag == "tag:yaml.org,2002:float":
                return float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
            if tag in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:bool", "tag:yaml.org,2002:null"):
                return self.constructor.construct_object(node)
        except (ValueError, KeyError, yaml.YAMLError):
            raise UserError(
                f"{self.shown}:{line}  {text[:60]!r} does not have the type its tag says."
            ) from None
        raise self._bad_tag(tag, line)

    def _bad_tag(self, tag: str, line: int) -> UserError:
        return UserError(
            f"{self.shown}:{line}  the tag {tag} is not allowed; a recipe has plain values only.   Remove it"
        )


def _syntax(error: yaml.MarkedYAMLError, text: str, shown: str) -> str:
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    lines = text.splitlines()
    if "\\t" in str(error.problem) or any(
        _tab_indents(lines[n]) for n in range(max(0, line - 2), min(line, len(lines)))
    ):
        tabbed = next((n + 1 for n, row in enumerate(lines) if _tab_indents(row)), line)
        return f"{shown}:{tabbed}  is indented with a tab; YAML allows only spaces.   Replace each tab by two"
    if "but found another document" in str(error.problem):
        return (
            f"{shown}:{line}  a second document starts here; a recipe is one document.   Remove the line ---"
        )
    if error.problem and "undefined alias" in error.problem:
        return f"{shown}:{line}  {error.problem}."
    given = lines[line - 1].strip()[:60] if line <= len(lines) else "the end of the file"
    return f"{shown}:{line}  is not YAML: {error.problem or error.context}, at: {given}"


def _tab_indents(row: str) -> bool:
    return "\t" in row[: len(row) - len(row.lstrip())]
