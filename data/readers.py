"""Readers: one file of any known kind -> its rows, streamed, each with the place it came from.

A row that cannot be read (a malformed line, bytes that are not UTF-8) is yielded with its problem, so that
the caller can count it; a file that cannot be read at all raises UserError.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..recipes.errors import UserError
from .raw import RawRow, RowProblem, alternating
from .yaml_reader import read_yaml

MAX_LINE_BYTES = 64 << 20
"""A longer line is a broken file (one without newlines, or binary), not a sample."""

_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")  # half of a character outside the first 65536, as JSON writes it
_MOST_EXPANSION = 1000
_LEAST_BOMB = 1 << 30
"""A parquet file that says it unpacks to so many times its size, and to so many bytes, is refused."""


def read_file(path: Path) -> Iterator[RawRow]:
    """Rows of one file, by its extension.

    Raises:
        UserError: the file is not what its extension says, is UTF-16, or its structure is broken.

    """
    with path.open("rb") as file:
        start = file.read(2)
    if start in _UTF16:
        raise UserError(
            f"{path}  is UTF-16 text.   Save it as UTF-8, for example: "
            f"iconv -f UTF-16 -t UTF-8 {path.name} > utf8{path.suffix}"
        )
    return READERS[path.suffix.lower()](path)


def read_jsonl(path: Path) -> Iterator[RawRow]:
    """One JSON value a line; blank lines are not rows."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{path}:{number}"
            if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                    pass
                yield RawRow(where, None, RowProblem(f"are lines above {MAX_LINE_BYTES >> 20} MiB"))
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            try:
                text = line.decode("utf-8").strip()
                if text:
                    value = json.loads(text)
                    problem = _surrogates(value) if _ESCAPED.search(text) else None
                    yield RawRow(where, None if problem else value, problem)
            except UnicodeDecodeError as error:
                yield RawRow(where, None, _not_utf8(line[error.start], error.start + 1))
            except json.JSONDecodeError as error:
                detail = f"{error.msg} at column {error.colno}"
                yield RawRow(where, None, RowProblem("are not valid JSON", detail))
            except ValueError as error:  # a number of thousands of digits
                yield RawRow(where, None, RowProblem("are not valid JSON", str(error).partition(";")[0]))
            except RecursionError:
                yield RawRow(where, None, RowProblem("are not valid JSON", "nested too deeply"))


def read_json(path: Path) -> Iterator[RawRow]:
    """A list of rows; or an object with one such list in it; or, as many files of that name are, JSON
    lines.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}:{line}  is not UTF-8 text (byte 0x{error.object[error.start]:02x}).   "
            "Save the file as UTF-8."
        ) from None
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text[: error.pos].count("\n") > 0:
            yield from read_jsonl(path)
            return
        raise UserError(
            f"{path}:{error.lineno}  is not valid JSON: {error.msg} at column {error.colno}"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}  is not valid JSON: {str(error).partition(';')[0]}") from None
    except RecursionError:
        raise UserError(f"{path}  is not valid JSON: nested too deeply") from None
    if isinstance(value, dict):
        lists = [part for part in value.values() if isinstance(part, list)]
        value = lists[0] if len(lists) == 1 else [value]
    if not isinstance(value, list):
        raise UserError(f"{path}:1  holds a single {type(value).__name__}.   A list of objects is needed.")
    escaped = _ESCAPED.search(text) is not None
    for number, row in enumerate(value, 1):
        is_turns = isinstance(row, list) and bool(row) and not isinstance(row[0], dict)
        if isinstance(row, list):
            row = {"messages": alternating(row) if is_turns else row}
        problem = _surrogates(row) if escaped else None
        yield RawRow(f"{path} row {number}", None if problem else row, problem)


def read_csv(path: Path) -> Iterator[RawRow]:
    """A header line, then one row each; the separator is the tab in .tsv, otherwise what the header line
    shows.
    """
    csv.field_size_limit(MAX_LINE_BYTES)
    # Undecodable bytes become lone surrogates, so that one bad row does not end the file.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        first = file.readline(MAX_LINE_BYTES)
        file.seek(0)
        separator = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=first.count)
        reader = csv.reader(file, delimiter=separator, strict=True)
        line = 1
        try:
            header = [name.strip() for name in next(reader, [])]
            if header and (not all(header) or len(set(header)) < len(header)):
                raise UserError(
                    f"{path}:1  the header line has empty or repeated names: "
                    f"{', '.join(map(repr, header))}.\n  Give each column its own name: prompt,completion"
                )
            line = reader.line_num + 1
            for fields in reader:
                where, line = f"{path}:{line}", reader.line_num + 1
                if not fields:
                    continue
                if len(fields) != len(header):
                    detail = f"{len(fields)} instead of {len(header)}"
                    yield RawRow(where, None, RowProblem("do not have the header's number of fields", detail))
                    continue
                bad = next((byte for field in fields if (byte := _undecodable(field)) is not None), None)
                if bad is not None:
                    yield RawRow(where, None, _not_utf8(bad))
                    continue
                yield RawRow(where, dict(zip(header, fields, strict=True)))
        except csv.Error as error:
            raise UserError(f"{path}:{line}  is not valid CSV: {error} (row starts on line {line})") from None


def read_parquet(path: Path) -> Iterator[RawRow]:
    """Apache Parquet, a batch of rows at a time."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
            unpacked = sum(group.total_byte_size for group in groups)
            if unpacked > max(_LEAST_BOMB, _MOST_EXPANSION * path.stat().st_size):
                raise UserError(
                    f"{path}  has {path.stat().st_size:,} bytes and unpacks to {unpacked:,}: too many.\n"
                    "  If it is yours, write its rows as .jsonl"
                )
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield RawRow(f"{path} row {number}", row)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        after = f" after row {number}" if number else ""
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path}  cannot be read as parquet{after}: {reason[:200]}\n"
            f"  the file has {path.stat().st_size:,} bytes; was it copied whole?"
        ) from None


def read_text(path: Path) -> Iterator[RawRow]:
    """Plain text: one row for each block between blank lines, as {"text": ...}."""
    with path.open("rb") as file:
        block: list[str] = []
        start, problem = 1, None
        for number, line in enumerate(_bounded_lines(file, path), 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            try:
                text = line.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                text, problem = "?", _not_utf8(line[error.start], error.start + 1)
            if text.strip():
                start = start if block else number
                block.append(text)
            elif block:
                yield RawRow(f"{path}:{start}", {"text": "\n".join(block)}, problem)
                block, problem = [], None
        if block:
            yield RawRow(f"{path}:{start}", {"text": "\n".join(block)}, problem)


def _bounded_lines(file: Any, path: Path) -> Iterator[bytes]:
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise UserError(
                f"{path}:{number}  the line is above {MAX_LINE_BYTES >> 20} MiB.   Is this a text file?"
            )
        yield line


def _surrogates(value: Any) -> RowProblem | None:
    """The problem of a value with half a character in a text: no encoding can write it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return RowProblem(
            "hold half a character", f"the lone surrogate \\u{ord(error.object[error.start]):04x}"
        )
    return None


def _not_utf8(byte: int, column: int | None = None) -> RowProblem:
    place = f" at column {column}" if column else ""
    return RowProblem("are not UTF-8 text", f"byte 0x{byte:02x}{place}")


def _undecodable(field: str) -> int | None:
    """First byte that `surrogateescape` could not decode, if any (U+DC80..U+DCFF stand for 0x80..0xFF)."""
    if field.isascii():
        return None
    return next((ord(char) - 0xDC00 for char in field if "\udc80" <= char <= "\udcff"), None)


READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".yml": read_yaml,
    ".yaml": read_yaml,
    ".txt": read_text,
}
"""Extension -> reader. All other files are refused, or passed over inside a folder."""
