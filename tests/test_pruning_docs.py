"""The examples of docs/pruning.md do what the page says."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

PAGE = Path(__file__).parent.parent / "docs" / "pruning.md"


def test_the_examples_run(capsys, tmp_path):
    text = PAGE.read_text(encoding="utf-8")
    blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    assert len(blocks) == 4
    names: dict[str, object] = {"folder": tmp_path / "pruned"}
    for block in blocks:
        told = [line.removeprefix("# ") for line in block.splitlines() if line.startswith("# ")]
        exec(compile(block, str(PAGE), "exec"), names)
        printed = capsys.readouterr().out.splitlines()
        # an installed DeepSpeed logs a line to stdout when transformers first asks for it
        assert [line for line in printed if "real_accelerator" not in line] == told
        assert told


def test_every_method_and_family_is_on_the_page():
    from shoestring.pruning import Method
    from shoestring.pruning.anatomy import FAMILIES

    text = PAGE.read_text(encoding="utf-8")
    assert [name for name in get_args(Method) if f"| `{name}` |" not in text] == []
    spelled = text.replace("Gemma 2", "gemma2").replace("Gemma 3", "gemma3_text").lower()
    assert [family for family in FAMILIES if family not in spelled] == []
