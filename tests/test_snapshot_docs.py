"""The examples in docs/checkpoints.md, "In memory" and "Several processes", print what the page says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parent.parent / "docs" / "checkpoints.md").read_text()
    (example,) = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    promised = re.search(r"It says `(.*)` and `(.*)`:", page)
    assert promised is not None
    exec(compile(example, "docs/checkpoints.md", "exec"), {})
    assert capsys.readouterr().out.splitlines() == [promised[1], promised[2]]


def test_the_example_of_several_processes_runs() -> None:
    page = (Path(__file__).parent.parent / "docs" / "checkpoints.md").read_text()
    example = re.findall(r"```python3\n(.*?)```", page, re.DOTALL)[0]
    promised = re.search(r"It says `(snapshot-.*)`", page)
    assert promised is not None
    # A process of its own, since it makes the process group.
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [promised[1]]
