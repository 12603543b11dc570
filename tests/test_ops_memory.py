"""What the C heap keeps and gives back, in processes of their own: it is told once and for all."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

pytestmark = pytest.mark.skipif(
    not (sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")),
    reason="glibc's heap",
)

BEGIN = """
import psutil, torch
from shoestring.ops import give_back_freed_memory, keep_freed_memory
from shoestring.ops.memory import map_large_blocks
MB = 1 << 20

def resident():
    return psutil.Process().memory_info().rss / MB

def holes(size, count=16):  # two in three are freed, so that the heap cannot shrink from its end
    blocks = [torch.ones(size * MB, dtype=torch.uint8) for _ in range(count)]
    kept = blocks[2::3]
    return kept

assert keep_freed_memory()
"""


def outcome(script: str) -> list[float]:
    done = subprocess.run([sys.executable, "-c", BEGIN + script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [float(line) for line in done.stdout.split()]


GROWTH = """
before = resident()
kept = holes({size})
print(resident() - before)
give_back_freed_memory()
print(resident() - before)
"""


def test_a_kept_heap_has_holes_until_they_are_given_back() -> None:
    with_holes, without = outcome(GROWTH.format(size=40))
    assert with_holes > 16 * 40 - 20
    assert without < 5 * 40 + 20


def test_large_blocks_leave_no_holes() -> None:
    with_holes, _ = outcome("assert map_large_blocks()\n" + GROWTH.format(size=40))
    assert with_holes < 5 * 40 + 20


def test_smaller_blocks_are_kept_all_the_same() -> None:
    with_holes, _ = outcome("assert map_large_blocks()\n" + GROWTH.format(size=24))
    assert with_holes > 16 * 24 - 20


LOADING = """
from shoestring.models import load_model, read_facts
from shoestring.recipes.model_data import ModelConfig
config = ModelConfig(model_name_or_path={folder!r})
facts = read_facts(config)
load_model(facts, config, device=torch.device("cpu"), dtype=torch.float32)
before = resident()
kept = holes(40)
load_model(facts, config, device=torch.device("cpu"), dtype=torch.float32)
print(resident() - before)
"""


def test_a_model_is_loaded_without_the_holes_of_what_came_before(tmp_path: Path) -> None:
    (grown,) = outcome(LOADING.format(folder=str(tiny.model_folder(tmp_path / "model"))))
    assert grown < 5 * 40 + 20
