"""C++ for the CPU, where PyTorch has no operation for what an optimizer's step does in one pass.

The sources in this folder become one library with a plain C interface, compiled for this very processor by
the machine's own compiler when it is first wanted (some seconds, once) and kept in the user's cache
(`build.py`). No headers of PyTorch, nothing to install: where there is no compiler, PyTorch's own operations
do the work. ctypes releases Python's lock while a function runs.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache


def missing() -> str | None:
    """Why there is no library, in a few words; None where there is one. Compiles it when first asked."""
    return _built()[1]


def library() -> ctypes.CDLL:
    """The compiled library. Raises RuntimeError where `missing` says why there is none."""
    found, reason = _built()
    if found is None:
        raise RuntimeError(f"the C++ operations are not available: {reason}")
    return found


@cache
def _built() -> tuple[ctypes.CDLL | None, str | None]:
    if os.name != "posix":
        return None, "the C++ operations are compiled on Linux and macOS alone"
    from . import build

    try:
        return build.built(), None
    except build.NotBuilt as error:
        return None, str(error)
    except OSError as error:
        return None, f"the compiled library could not be written or loaded: {error}"
