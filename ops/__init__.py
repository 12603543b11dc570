"""Fused operations, each beside its PyTorch reference, with one dispatch point for each.

What is named here is imported when it is first asked for: some of it imports PEFT, which takes longer to
import than PyTorch, and the rest is wanted without it.
"""

from typing import TYPE_CHECKING

# At once: its module has the same name, and would be what is found later.
from .token_log_probs import token_log_probs

if TYPE_CHECKING:
    from .attention import packed_attention, register
    from .cross_entropy import cross_entropy_sum
    from .distillation import TopTokens, distillation_sums, top_tokens
    from .fused import use_fused
    from .int8_weight import Int8Weight, dense_weights, make_dense, quantise, use_int8_weights
    from .memory import FreedMemory, bound_kernel_cache, give_back_freed_memory, keep_freed_memory
    from .wta_crs import use_wta_crs

__all__ = [
    "FreedMemory",
    "Int8Weight",
    "TopTokens",
    "bound_kernel_cache",
    "cross_entropy_sum",
    "dense_weights",
    "distillation_sums",
    "give_back_freed_memory",
    "keep_freed_memory",
    "make_dense",
    "packed_attention",
    "quantise",
    "register",
    "token_log_probs",
    "top_tokens",
    "use_fused",
    "use_int8_weights",
    "use_wta_crs",
]

_HOMES = {
    "FreedMemory": "memory",
    "Int8Weight": "int8_weight",
    "TopTokens": "distillation",
    "bound_kernel_cache": "memory",
    "cross_entropy_sum": "cross_entropy",
    "dense_weights": "int8_weight",
    "distillation_sums": "distillation",
    "give_back_freed_memory": "memory",
    "keep_freed_memory": "memory",
    "make_dense": "int8_weight",
    "packed_attention": "attention",
    "quantise": "int8_weight",
    "register": "attention",
    "top_tokens": "distillation",
    "use_fused": "fused",
    "use_int8_weights": "int8_weight",
    "use_wta_crs": "wta_crs",
}


def __getattr__(name: str) -> object:
    """Import a public name's home only when it is asked for."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
