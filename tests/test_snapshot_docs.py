"""The example in docs/checkpoints.md, "In memory", runs and prints what the page says."""

import re
from pathlib import Path

import pytest


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parent.parent / "docs" / "checkpoints.md").read_text()
    (example,) = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    promised = re.search(r"It says `(.*)` and `(.*)`:", page)
    assert promised is not None
    exec(compile(example, "docs/checkpoints.md", "exec"), {})
    assert capsys.readouterr().out.splitlines() == [promised[1], promised[2]]
