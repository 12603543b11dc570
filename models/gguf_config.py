"""transformers' configuration of a GGUF file, read from its header alone."""

from __future__ import annotations

import importlib.util
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..recipes.errors import UserError
from .gguf_header import GGUFHeader, write_header_copy
from .quiet import quiet_libraries
from .source import KEY

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def require_gguf(path: Path) -> None:
    """Raise UserError when the package `gguf` is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            f"{KEY}: {path.name} needs the package gguf to be read.\n  Install it: pip install "
            "'shoestring[gguf]'"
        )


def gguf_config(header: GGUFHeader) -> PretrainedConfig:
    """The configuration, with what transformers leaves out: vocabulary, width of a head, Llama 3's rotation.

    Raises:
        UserError: transformers cannot read this architecture, or its rotary frequencies are scaled in an
            unknown way.
    """
    from transformers import AutoConfig

    with tempfile.TemporaryDirectory(prefix="shoestring-") as folder, quiet_libraries():
        write_header_copy(header, Path(folder) / "header.gguf")
        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(folder, gguf_file="header.gguf")
        except (ValueError, KeyError) as error:
            raise UserError(
                f"{KEY}: {header.path} has the GGUF architecture {header.architecture!r}, which "
                "transformers cannot "
                f"read: {error}\n  Give the original model (hub id or folder) in its place."
            ) from error
    embedding = header.tensors.get("token_embd.weight")
    if embedding is not None:
        config.get_text_config().vocab_size = embedding.shape[0]
    head_dim = header.metadata.get(f"{header.architecture}.attention.key_length")
    if head_dim is not None and hasattr(config.get_text_config(), "head_dim"):
        config.get_text_config().head_dim = head_dim
    if "rope_freqs.weight" in header.tensors and header.architecture == "llama":
        _set_llama3_rotary(config, header)
    return config


def _set_llama3_rotary(config: PretrainedConfig, header: GGUFHeader) -> None:
    """Llama 3.1 and later store divisors of the frequencies; transformers wants the rule behind them."""
    entry = header.tensors["rope_freqs.weight"]
    stored = np.fromfile(
        header.path, dtype="<f4", count=math.prod(entry.shape), offset=header.data_offset + entry.offset
    )
    theta = float(config.rope_parameters["rope_theta"])
    rule: dict[str, float | str] = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": float(stored.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    if not np.allclose(stored, llama3_divisors(rule, len(stored)), rtol=1e-4):
        raise UserError(
            f"{KEY}: {header.path} scales its rotary frequencies in a way that transformers cannot read "
            "from GGUF.\n"
            "  Give the original model (hub id or folder) in its place."
        )
    config.rope_parameters = dict(rule)


def llama3_divisors(rule: dict[str, float | str], count: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """What each rotary frequency is divided by: 1 for short waves, `factor` for long, blended between."""
    factor, low, high = (float(rule[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(rule["original_max_position_embeddings"])
    wavelengths = 2 * math.pi * float(rule["rope_theta"]) ** (np.arange(count) / count)
    blend = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - blend) / factor + blend)
