"""Triton kernels, a file an operation: its `@triton.jit` functions, the launcher, and `AOT_CASES`.

Nothing here is imported before an operation runs on a CUDA device (`ops/providers.py` decides): importing
Triton takes time, and it is not installed everywhere. What a kernel computes is said, and its reference is,
in the file of the same name in `ops/`.
"""
