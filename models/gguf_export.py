"""One `.gguf` file of a model: settings, vocabulary and weights, block of rows by block of rows.

No second copy of the model is made. The file is written aside as NAME.part, fsynced and renamed, so NAME is
always whole.
"""

from __future__ import annotations

import errno
import importlib.util
import math
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..recipes.errors import ShoestringError, UserError
from .gguf_arch import Layout, layout_of
from .gguf_header import read_gguf_header
from .gguf_quantize import QUANTIZATIONS, check_quantization, check_widths, type_of, write_tensor
from .gguf_tokenizer import Vocabulary, vocabulary_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Reader = Callable[[str], Tensor]


@dataclass(frozen=True)
class GGUFFile:
    """A file that was written. `error`: the largest relative error of a tensor, |stored - weight| / |weight|
    by Euclidean norms, as the reader dequantises it; `worst` is that tensor's name.
    """

    path: Path
    bytes: int
    architecture: str
    quantize: str
    error: float
    worst: str
    notes: tuple[str, ...]

    @property
    def line(self) -> str:
        """One line for the screen."""
        said = f"weights within {self.error:.2%} ({self.worst})" if self.error else "weights to the bit"
        return f"{self.quantize} GGUF of architecture {self.architecture} in {self.path}: {said}"


def save_gguf(
    model: PreTrainedModel | Path | str,
    path: Path | str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    quantize: str = "f16",
    name: str | None = None,
) -> GGUFFile:
    """Write `model` (loaded, or a local folder with config.json and safetensors) to `path` for llama.cpp.

    tokenizer: a folder has its own; a loaded model without one gives a file that has no vocabulary and takes
    token ids only. name: `general.name`, by default the folder's. An existing file is replaced.

    Raises:
        UserError: the package gguf is missing; an unknown type; an architecture, setting, width or tokenizer
            that cannot be written; weights too large for float16; no room on the disk.
    """
    path = Path(path)
    _check_target(path, quantize)
    if isinstance(model, str | Path):
        skeleton, read, own = _from_folder(Path(model), tokenizer is None)
        tokenizer = tokenizer or own
        name = name or Path(model).resolve().name
    else:
        plain: Any = model
        weights = dict(plain.named_parameters())
        skeleton, read = model, weights.__getitem__
        name = name or Path(str(getattr(plain, "name_or_path", "") or type(model).__name__)).name
    layout = layout_of(skeleton)
    check_widths(layout.tensors, quantize)
    vocabulary = None if tokenizer is None else vocabulary_of(tokenizer, layout.vocab_size)
    writer = _described(layout, vocabulary, name, quantize)
    aside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_room(writer, path)
        try:
            error, worst = _write(writer, aside, layout, read, quantize)
        finally:
            writer.close()  # on a full disk this fails too, and closes all the same
        read_gguf_header(aside)  # whole by its own table
        os.replace(aside, path)
        _sync(path.parent)
    except OSError as failure:
        raise _told(failure, path) from failure
    finally:
        with suppress(FileNotFoundError, NotADirectoryError):
            aside.unlink()
    notes = layout.notes + (vocabulary.notes if vocabulary else ("no vocabulary: it takes token ids only",))
    return GGUFFile(path, path.stat().st_size, layout.architecture, quantize, error, worst, notes)


def _check_target(path: Path, quantize: str) -> None:
    check_quantization(quantize)
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            "gguf: the package gguf is not installed.\n  Install it: pip install 'shoestring[gguf]'"
        )
    if path.suffix != ".gguf" or path.is_dir():
        what = "is a folder" if path.is_dir() else "does not end in .gguf"
        raise UserError(f"gguf: {path} {what}.\n  Give the file to write: --output model-{quantize}.gguf")


def _from_folder(folder: Path, wants_tokenizer: bool) -> tuple[PreTrainedModel, Reader, Any]:
    """The model without weights, a reader of its safetensors, and its tokenizer."""
    from safetensors import safe_open

    from ..recipes.model_data import ModelConfig
    from .facts import read_facts
    from .tokenizer import load_tokenizer
    from .weight_files import read_object

    given = ModelConfig(model_name_or_path=str(folder))
    if not (folder / "config.json").is_file():
        raise UserError(
            f"gguf: {folder} is no folder of a model: it has no config.json.\n"
            "  Give a run directory, or a folder with config.json, safetensors and tokenizer.json."
        )
    if str(read_object(folder / "config.json").get("model_type")).startswith("pruned_"):
        raise UserError(
            f"gguf: the layers of {folder} differ in width, which its own classes load.\n"
            "  Give save_gguf the loaded model and its tokenizer: shoestring.pruning.load_pruned(FOLDER)"
        )
    facts = read_facts(given)
    tokenizer = load_tokenizer(facts, given) if wants_tokenizer else None
    index = folder / "model.safetensors.index.json"
    places: dict[str, str] | None = read_object(index)["weight_map"] if index.is_file() else None

    def read(name: str) -> Tensor:
        file = folder / ("model.safetensors" if places is None else places.get(name, ""))
        if file.is_file():
            with safe_open(file, framework="pt") as weights:
                if name in weights.keys():  # noqa: SIM118, it is no dict
                    found: Tensor = weights.get_tensor(name)
                    return found
        raise UserError(f"gguf: the weights in {folder} lack {name}.\n  Fetch or export the model again.")

    return facts.skeleton(), read, tokenizer


def _described(layout: Layout, vocabulary: Vocabulary | None, name: str, quantize: str) -> Any:
    """A GGUFWriter that knows all settings and the table of tensors, and no weights."""
    import gguf

    writer = gguf.GGUFWriter(None, layout.architecture)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(int(gguf.LlamaFileType[QUANTIZATIONS[quantize]]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in layout.settings.items():
        _add(writer, f"{layout.architecture}.{key}", value)
    _add_vocabulary(writer, vocabulary)
    for tensor in layout.tensors:
        kind = type_of(tensor, quantize)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        size = math.prod(tensor.shape) // block * block_bytes
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, kind)
    for constant, values in layout.constants.items():
        writer.add_tensor_info(constant, values.shape, values.dtype, values.nbytes)
    return writer


def _add_vocabulary(writer: Any, vocabulary: Vocabulary | None) -> None:
    if vocabulary is None:
        writer.add_tokenizer_model("none")
        return
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.pieces)
    writer.add_token_types(vocabulary.types)
    writer.add_array("tokenizer.ggml.merges", vocabulary.merges)
    writer.add_array("tokenizer.ggml.scores", vocabulary.scores)
    for key, value in {**vocabulary.special, **vocabulary.flags}.items():
        _add(writer, f"tokenizer.ggml.{key}", value)
    if vocabulary.template is not None:
        writer.add_chat_template(vocabulary.template)


def _add(writer: Any, key: str, value: int | float | bool | str | list[int]) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)


def _write(writer: Any, aside: Path, layout: Layout, read: Reader, quantize: str) -> tuple[float, str]:
    """All of the file, fsynced; the largest relative error and its tensor."""
    writer.write_header_to_file(aside)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    error, worst = 0.0, ""
    for tensor in layout.tensors:
        found = write_tensor(writer, file, tensor, read(tensor.source).detach(), quantize)
        if found > error:
            error, worst = found, tensor.name
    for values in layout.constants.values():
        file.write(values.tobytes())
        writer.write_padding(file, values.nbytes)
    file.flush()
    os.fsync(file.fileno())
    return error, worst


def _check_room(writer: Any, path: Path) -> None:
    needed = sum(info.nbytes for table in writer.tensors for info in table.values())
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free")


def _told(failure: OSError, path: Path) -> ShoestringError:
    """A disk's refusal as a message for a person."""
    reason = failure.strerror or str(failure)
    if failure.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"gguf: {path} does not fit on this disk: {reason}.\n"
            "  What was there before is as it was. Free some space, or write elsewhere: --output"
        )
    if failure.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return UserError(f"gguf: {path} cannot be written: {reason}.\n  Give another place: --output")
    return ShoestringError(
        f"gguf: {path} could not be written: {reason}.  The disk may be failing (see dmesg)."
    )


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
