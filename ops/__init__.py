"""Fused operations, each beside its PyTorch reference, with one dispatch point for each."""

from .attention import packed_attention, register
from .cross_entropy import cross_entropy_sum
from .fused import use_fused
from .memory import FreedMemory, bound_kernel_cache, give_back_freed_memory, keep_freed_memory

__all__ = [
    "FreedMemory",
    "bound_kernel_cache",
    "cross_entropy_sum",
    "give_back_freed_memory",
    "keep_freed_memory",
    "packed_attention",
    "register",
    "use_fused",
]
