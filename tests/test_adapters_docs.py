"""The example of docs/adapters.md does what the page says, and its recipes are read."""

from pathlib import Path
from typing import Any

import yaml
from shoestring.adapters import save_as_lora
from shoestring.recipes import Recipe

PAGE = Path(__file__).parent.parent / "docs" / "adapters.md"


def blocks(kind: str) -> list[str]:
    text = PAGE.read_text(encoding="utf-8")
    return [part.split("```")[0] for part in text.split(f"```{kind}\n")[1:]]


def test_the_example_runs(capsys: Any, tmp_path: Path) -> None:
    (example,) = blocks("python")
    names: dict[str, Any] = {}
    exec(compile(example, str(PAGE), "exec"), names)
    assert capsys.readouterr().out == "16\n"
    assert "It prints `16`." in PAGE.read_text(encoding="utf-8")
    save_as_lora(names["model"], tmp_path / "out")
    assert (tmp_path / "out/adapter_config.json").is_file()


def test_the_recipes_are_read() -> None:
    found = []
    for block in blocks("yaml"):
        recipe = Recipe(model="m", data="a.jsonl", budget="1h", **yaml.safe_load(block))  # type: ignore[arg-type]
        assert recipe.adapter is not None
        found.append(recipe.adapter.name)
    assert found == ["svfit", "soka", "peft", "lora", "lora"]
