"""Makes Triton 3.6's interpreter compute what a GPU does where it does not, and lets a test look inside.

It cuts float32 to bfloat16 instead of rounding, multiplies and compares the bit patterns of bfloat16, and
fails in `range` over a number known at run time with NumPy 2.4. All of that is mended here, for tests alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, interpreter_builder


def install() -> None:
    """Patch the interpreter of this process; harmless when repeated."""
    if getattr(InterpreterBuilder, "_shoestring", False):
        return
    InterpreterBuilder._shoestring = True
    _patch_casts()
    _patch_arithmetic()
    _patch_index()


@contextmanager
def reversed_programs() -> Iterator[None]:
    """Inside, the programs of a launch run from the last to the first."""
    forward = interpreter_builder.set_grid_idx

    def backward(x: int, y: int, z: int) -> None:
        nx, ny, nz = interpreter_builder.grid_dim
        forward(nx - 1 - x, ny - 1 - y, nz - 1 - z)

    interpreter_builder.set_grid_idx = backward
    try:
        yield
    finally:
        del interpreter_builder.set_grid_idx


def _widen(data: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (data.astype(np.uint32) << 16).view(np.float32)


def _narrow(data: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(data), np.uint32(0x7FC0), rounded).astype(np.uint16)


def _patch_casts() -> None:
    cast, between = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp

    def through_float32(src: Any, dst_type: Any, other: Callable[[], Any]) -> Any:
        to = dst_type.scalar
        if src.dtype.scalar == tl.bfloat16 and to != tl.bfloat16:
            return TensorHandle(_widen(src.data).astype(interpreter._get_np_dtype(to)), to)
        if to == tl.bfloat16 and src.dtype.scalar != tl.bfloat16:
            return TensorHandle(_narrow(src.data.astype(np.float32)), to)
        return other()

    InterpreterBuilder.cast_impl = lambda self, src, to: through_float32(src, to, lambda: cast(self, src, to))
    InterpreterBuilder.create_fp_to_fp = lambda self, src, to, mode: through_float32(
        src, to, lambda: between(self, src, to, mode)
    )


def _patch_arithmetic() -> None:
    binary, dot = InterpreterBuilder.binary_op, InterpreterBuilder.create_dot

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if lhs.dtype.scalar != tl.bfloat16:
            return binary(self, lhs, rhs, op)
        value = op(_widen(lhs.data), _widen(rhs.data))
        if value.dtype == np.bool_:
            return TensorHandle(value, tl.int1)
        return TensorHandle(_narrow(value), tl.bfloat16)

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, inexact: Any) -> Any:
        wide = [
            TensorHandle(_widen(side.data), tl.float32) if side.dtype.scalar == tl.bfloat16 else side
            for side in (a, b)
        ]
        return dot(self, *wide, d, precision, inexact)

    InterpreterBuilder.binary_op = binary_op
    InterpreterBuilder.create_dot = create_dot


def _patch_index() -> None:
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))

    interpreter._patch_lang_tensor = patched
