"""Where a model comes from (hub id, folder, GGUF, package), its tokenizer, its weights, and its attention."""

from typing import TYPE_CHECKING

from .facts import LinearShape, ModelFacts, facts_of_skeleton, read_facts
from .source import Source, locate

if TYPE_CHECKING:
    from .attention import plain_attention, supports_packing, use_packed_attention
    from .gguf_export import GGUFFile, save_gguf
    from .gguf_quantize import check_quantization
    from .tokenizer import load_tokenizer
    from .weights import load_model, resolve_dtype, weight_reader

__all__ = [
    "GGUFFile",
    "LinearShape",
    "ModelFacts",
    "Source",
    "check_quantization",
    "facts_of_skeleton",
    "load_model",
    "load_tokenizer",
    "locate",
    "plain_attention",
    "read_facts",
    "resolve_dtype",
    "save_gguf",
    "supports_packing",
    "use_packed_attention",
    "weight_reader",
]

_HOMES = {
    "GGUFFile": "gguf_export",
    "save_gguf": "gguf_export",
    "check_quantization": "gguf_quantize",
    "load_model": "weights",
    "resolve_dtype": "weights",
    "weight_reader": "weights",
    "load_tokenizer": "tokenizer",
    "plain_attention": "attention",
    "supports_packing": "attention",
    "use_packed_attention": "attention",
}


def __getattr__(name: str) -> object:
    """Import what needs torch only when it is asked for: `locate` and `read_facts` start in milliseconds."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
