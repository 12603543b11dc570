"""Fused operations, each beside its PyTorch reference, with one dispatch point for each."""

from .attention import packed_attention, register
from .cross_entropy import cross_entropy_sum
from .fused import use_fused
from .int8_weight import Int8Weight, dense_weights, make_dense, quantise, use_int8_weights
from .memory import FreedMemory, bound_kernel_cache, give_back_freed_memory, keep_freed_memory
from .wta_crs import use_wta_crs

__all__ = [
    "FreedMemory",
    "Int8Weight",
    "bound_kernel_cache",
    "cross_entropy_sum",
    "dense_weights",
    "give_back_freed_memory",
    "keep_freed_memory",
    "make_dense",
    "packed_attention",
    "quantise",
    "register",
    "use_fused",
    "use_int8_weights",
    "use_wta_crs",
]
