"""The header of a GGUF file: metadata and tensor table, without the token lists.

The `gguf` package's own reader makes numpy views of every string; with a 49k vocabulary that costs about two
seconds each time, and transformers opens the file several times.  This reader skips over the long arrays, and
`write_header_copy` writes a file of the same layout without them, which transformers parses in milliseconds.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..recipes.errors import UserError

_SCALARS: Final = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING: Final = 8
_ARRAY: Final = 9
_LONGEST_KEPT_ARRAY: Final = 4096  # per-layer lists stay; token, score and merge lists do not


@dataclass(frozen=True)
class TensorEntry:
    """One line of the tensor table."""

    name: str
    shape: tuple[int, ...]  # PyTorch order: rows first
    type_id: int  # a GGMLQuantizationType
    offset: int  # bytes from `GGUFHeader.data_offset`


@dataclass(frozen=True)
class GGUFHeader:
    """What a GGUF file says about itself before the weights begin."""

    path: Path
    architecture: str
    metadata: dict[str, Any]  # arrays longer than 4096 are left out
    array_lengths: dict[str, int]
    tensors: dict[str, TensorEntry]
    data_offset: int
    kept_spans: tuple[tuple[int, int], ...]  # byte ranges of the metadata entries in `metadata`
    table_span: tuple[int, int]


class _Cursor:
    """Reads values from a mapped file and remembers where it is."""

    def __init__(self, blob: mmap.mmap) -> None:
        self.blob = blob
        self.at = 0

    def number(self, code: str) -> Any:
        value = struct.unpack_from(code, self.blob, self.at)[0]
        self.at += struct.calcsize(code)
        return value

    def text(self) -> str:
        length = self.number("<Q")
        if self.at + length > len(self.blob):
            raise struct.error("string beyond the end of the file")
        value = self.blob[self.at : self.at + length].decode("utf-8", errors="replace")
        self.at += length
        return value

    def skip_texts(self, count: int) -> None:
        unpack, blob, at = struct.Struct("<Q").unpack_from, self.blob, self.at
        for _ in range(count):
            at += 8 + unpack(blob, at)[0]
        self.at = at

    def value(self, kind: int) -> tuple[Any, int | None]:
        """The value and None, or None and the length of an array too long to keep."""
        if kind == _STRING:
            return self.text(), None
        if kind != _ARRAY:
            return self.number(_SCALARS[kind]), None
        element, count = self.number("<I"), self.number("<Q")
        if count <= _LONGEST_KEPT_ARRAY:
            return [self.value(element)[0] for _ in range(count)], None
        if element == _STRING:
            self.skip_texts(count)
        else:
            self.at += count * struct.calcsize(_SCALARS[element])
        return None, count


def read_gguf_header(path: Path) -> GGUFHeader:
    """Parse the header of `path`.

    Raises:
        UserError: the file is no GGUF file, has an unknown version, or ends too early.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(
                f"model.model_name_or_path: {path} is not a GGUF file (it does not begin with 'GGUF').\n"
                "  A Git LFS pointer or an HTML page saved under that name looks like this: download it "
                "again."
            )
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as blob:
                header = _parse(blob, path)
        except (struct.error, LookupError, ArithmeticError, ValueError, TypeError, RecursionError) as error:
            raise _truncated(path, "its header is not complete") from error
    return header


def _parse(blob: mmap.mmap, path: Path) -> GGUFHeader:
    cursor = _Cursor(blob)
    cursor.at = 4
    version = cursor.number("<I")
    if version not in (2, 3):
        raise UserError(
            f"model.model_name_or_path: {path} has GGUF version {version}; versions 2 and 3 can be read.\n"
            "  Convert the model again with a current llama.cpp."
        )
    tensor_count, entry_count = cursor.number("<Q"), cursor.number("<Q")
    metadata: dict[str, Any] = {}
    array_lengths: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for _ in range(entry_count):
        begin = cursor.at
        key = cursor.text()
        value, length = cursor.value(cursor.number("<I"))
        if length is None:
            metadata[key] = value
            spans.append((begin, cursor.at))
        else:
            array_lengths[key] = length
    table_begin = cursor.at
    tensors: dict[str, TensorEntry] = {}
    for _ in range(tensor_count):
        name = cursor.text()
        shape = tuple(cursor.number("<Q") for _ in range(cursor.number("<I")))[::-1]
        tensors[name] = TensorEntry(name, shape, cursor.number("<I"), cursor.number("<Q"))
    alignment = int(metadata.get("general.alignment", 32))
    header = GGUFHeader(
        path=path,
        architecture=str(metadata.get("general.architecture", "")),
        metadata=metadata,
        array_lengths=array_lengths,
        tensors=tensors,
        data_offset=-(-cursor.at // alignment) * alignment,
        kept_spans=tuple(spans),
        table_span=(table_begin, cursor.at),
    )
    _check_complete(header, len(blob))
    return header


def tensor_bytes(entry: TensorEntry) -> int:
    """Bytes that `entry` takes in the file."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(entry.type_id)]
    elements = 1
    for size in entry.shape:
        elements *= size
    return int(elements // block * block_bytes)


def _check_complete(header: GGUFHeader, size: int) -> None:
    if not header.tensors or header.table_span[1] > size:
        raise _truncated(header.path, "it holds no tensors")
    for entry in header.tensors.values():
        end = header.data_offset + entry.offset + tensor_bytes(entry)
        if end > size:
            raise _truncated(header.path, f"{entry.name} ends at byte {end:,} of {size:,}")


def _truncated(path: Path, what: str) -> UserError:
    return UserError(
        f"model.model_name_or_path: {path} is cut off: {what}.\n"
        "  The download or copy did not finish; fetch the file again."
    )


def write_header_copy(header: GGUFHeader, target: Path) -> None:
    """Write a GGUF file with the metadata (no long arrays) and tensor table of `header`, its data a hole.

    The tensors' contents read as zeros and take no disk space; only names, types and shapes are of use.
    """
    last = max(header.tensors.values(), key=lambda entry: entry.offset)
    alignment = int(header.metadata.get("general.alignment", 32))
    with header.path.open("rb") as source, target.open("wb") as copy:
        copy.write(b"GGUF" + struct.pack("<IQQ", 3, len(header.tensors), len(header.kept_spans)))
        for begin, end in (*header.kept_spans, header.table_span):
            source.seek(begin)
            copy.write(source.read(end - begin))
        data_offset = -(-copy.tell() // alignment) * alignment
        copy.truncate(data_offset + last.offset + tensor_bytes(last) + alignment)
