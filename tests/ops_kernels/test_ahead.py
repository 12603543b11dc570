"""Every kernel compiles for the GPUs that we name: no spills, few registers, offsets of 64 bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_within_their_limits(capability: int, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("ahead.py")), str(capability)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert results
    wrong = []
    for result in results:
        registers, shared, wide, dots = result["limits"]
        if result["spilled"] or result["registers"] > registers or result["shared"] > shared:
            wrong.append(f"{result['name']}: {result}")
        if not result["id_is_wide"]:
            wrong.append(f"{result['name']}: a program id is multiplied in 32 bits")
        if wide and not result["wide"]:
            wrong.append(f"{result['name']}: no load of 128 bits")
        if dots and not result["dots"]:
            wrong.append(f"{result['name']}: no tensor cores")
    assert not wrong, "\n".join(wrong)
