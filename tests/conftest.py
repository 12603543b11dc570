"""For all tests: training inside the test process must leave the process as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import shoestring.train.run


@pytest.fixture(autouse=True, scope="session")
def _allocator_left_alone() -> Iterator[None]:
    """A run keeps freed memory for its whole process: right for a run, ruinous for a thousand tests in one.

    For the session, since fixtures of modules train too, before any fixture of a single test.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shoestring.train.run, "keep_freed_memory", lambda: False)
        yield
