"""Fused operations, each beside its PyTorch reference, with one dispatch point for each."""

from .attention import packed_attention, register
from .cross_entropy import cross_entropy_sum
from .fused import use_fused
from .memory import keep_freed_memory

__all__ = ["cross_entropy_sum", "keep_freed_memory", "packed_attention", "register", "use_fused"]
