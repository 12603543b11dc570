"""Fused operations, each beside its PyTorch reference, with one dispatch point for each."""

from .attention import packed_attention, register
from .cross_entropy import cross_entropy_sum
from .fused import use_fused

__all__ = ["cross_entropy_sum", "packed_attention", "register", "use_fused"]
