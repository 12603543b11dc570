"""The example of docs/offload.md does what the page says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "offload.md"


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = [part.split("```")[0] for part in PAGE.read_text(encoding="utf-8").split("```python\n")[1:]]
    names: dict[str, Any] = {}
    exec(compile(block, str(PAGE), "exec"), names)
    assert "optimizer state on disk: 4 MB in" in capsys.readouterr().out
    assert names["optimizer"].traffic[1] > 0
    assert not any(path.is_file() for path in (tmp_path / "scratch").rglob("*"))
