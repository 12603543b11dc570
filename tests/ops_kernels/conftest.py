"""Tests of the kernels: as they are on a GPU, else in Triton's interpreter (tests/conftest.py sets it)."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> str:
    """Where the kernels run: the same test bodies in both cases."""
    if torch.cuda.is_available():
        return "cuda"
    from . import interpreter

    interpreter.install()
    return "cpu"
