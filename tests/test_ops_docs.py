"""The examples of docs/kernels.md run, and the page names every operation that chooses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
BLOCKS = [part.split("```")[0] for part in PAGE.split("```python\n")[1:]]


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_the_examples_run(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block, "kernels.md", "exec"), {})
    assert "nan" not in capsys.readouterr().out


def test_every_choice_is_on_the_page() -> None:
    chosen = {
        name
        for path in (ROOT / "ops").rglob("*.py")
        for name in re.findall(r'choose\(\s*"(\w+)"', path.read_text(encoding="utf-8"))
    }
    assert len(chosen) >= 8
    assert sorted(name for name in chosen if f"`{name}`" not in PAGE and f"{name}=" not in PAGE) == []
