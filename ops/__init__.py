"""Fused operations, each beside its PyTorch reference, with one dispatch point for each."""

from .attention import packed_attention, register
from .cross_entropy import cross_entropy_sum
from .distillation import TopTokens, distillation_sums, top_tokens
from .fused import use_fused
from .int8_weight import Int8Weight, dense_weights, make_dense, quantise, use_int8_weights
from .memory import FreedMemory, bound_kernel_cache, give_back_freed_memory, keep_freed_memory
from .token_log_probs import token_log_probs
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
