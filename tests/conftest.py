"""For all tests: training inside the test process must leave the process as it was."""

from __future__ import annotations

import pytest
import shoestring.train.run


@pytest.fixture(autouse=True)
def _allocator_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run keeps freed memory for its whole process: right for a run, ruinous for a thousand tests in one."""
    monkeypatch.setattr(shoestring.train.run, "keep_freed_memory", lambda: False)
