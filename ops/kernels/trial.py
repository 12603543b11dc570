"""Whether Triton can launch anything on this machine: it compiles C for that, with what containers leave out.

The first launch of a kernel builds a module of Triton's driver and a launcher, which takes a C compiler,
Python's headers and libcuda. Both are kept in Triton's cache, so this takes a second or two once a machine,
and milliseconds in later processes.
"""

from __future__ import annotations

import torch
import triton


@triton.jit
def nothing_kernel(number):
    """Nothing."""


def launch(index: int) -> None:
    """Launch a kernel that reads and writes nothing on GPU `index`; whatever Triton raises is raised."""
    with torch.cuda.device(index):
        nothing_kernel[(1,)](1)
