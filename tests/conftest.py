"""For all tests: training inside the test process must leave the process as it was; long files come first."""

from __future__ import annotations

import functools
import gc
import os
import sys
from collections.abc import Iterator
from typing import Any

import jinja2
import pytest
import torch

# Before anything imports Triton: without a GPU its kernels run in its interpreter.
assert "triton" not in sys.modules
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import shoestring.plan.machine  # noqa: E402
import shoestring.plan.measure  # noqa: E402
import shoestring.train.run  # noqa: E402
from measured_rates import rates_once  # noqa: E402


@pytest.fixture(autouse=True, scope="session")
def _allocator_left_alone() -> Iterator[None]:
    """A run keeps freed memory for its whole process: right for a run, ruinous for a thousand tests in one.

    For the session, since fixtures of modules train too, before any fixture of a single test.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shoestring.train.run, "keep_freed_memory", lambda: False)
        yield


@pytest.fixture(autouse=True, scope="session")
def _measured_once() -> Iterator[None]:
    """The same model with the same settings is measured once a process, as is the machine.

    That is half of a tiny run's time. What tests the measurement itself calls it by the name that it has
    imported, and gets the real one.
    """
    real, found = shoestring.plan.measure.measure, {}

    def once(recipe: Any, facts: Any, device: Any, setting: Any) -> Any:
        others = {"data", "budget", "eval", "checkpoint", "track", "export", "output_dir", "optimizer"}
        kept = recipe.model_dump_json(exclude={"model": {"model_name_or_path"}} | dict.fromkeys(others, True))
        config = facts.config.to_dict() | {"_name_or_path": ""}
        key = (kept, str(config), device, setting, torch.get_num_threads())
        if key not in found:
            found[key] = real(recipe, facts, device, setting)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shoestring.plan.measure, "measure", once)
        patch.setattr(shoestring.plan.machine, "measure_rates", rates_once)
        yield


@pytest.fixture(autouse=True, scope="session")
def _templates_compiled_once() -> Iterator[None]:
    """Jinja compiles the page of an adapter's folder anew each time that one is saved."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jinja2.Environment, "compile", functools.lru_cache(jinja2.Environment.compile))
        yield


def pytest_collection_finish() -> None:
    """What imports and collection have made stays to the end: the garbage collector need not look again."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files with slow tests first: with several workers, the last one to end then ends with short ones."""
    if not torch.cuda.is_available():
        left_out = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
