"""Tests of the kernels: on a GPU as they are, without one in Triton's interpreter (set in tests/conftest.py)."""

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
