"""The example in docs/checkpoints.md runs and prints what the page says."""

import re
from pathlib import Path

import pytest


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parent.parent / "docs" / "checkpoints.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (promised,) = re.findall(r"It prints `(.*)`", page)
    exec(compile(example, "docs/checkpoints.md", "exec"), {})
    assert capsys.readouterr().out.strip() == promised
