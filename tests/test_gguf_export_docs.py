"""The examples of docs/gguf.md do what the page says, and the page names what can be written."""

from __future__ import annotations

from pathlib import Path

import pytest
from shoestring.models.gguf_pretokenizers import _NAMES
from shoestring.models.gguf_quantize import QUANTIZATIONS

PAGE = Path(__file__).parent.parent / "docs" / "gguf.md"


def test_the_example_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (block,) = [part.split("```")[0] for part in PAGE.read_text("utf-8").split("```python\n")[1:]]
    told = [line.removeprefix("# ") for line in block.splitlines() if line.startswith("# ")]
    exec(compile(block, str(PAGE), "exec"), {"folder": tmp_path})
    printed = capsys.readouterr().out.splitlines()
    # an installed DeepSpeed logs a line to stdout when transformers first asks for it
    assert [line for line in printed if "real_accelerator" not in line] == told
    assert len(told) == 4


def test_every_type_and_way_of_cutting_text_is_on_the_page() -> None:
    text = PAGE.read_text("utf-8")
    assert [name for name in (*QUANTIZATIONS, *_NAMES.values()) if f"`{name}`" not in text] == []
