"""Recipes from a stranger: plain values and nothing else, bounded before they are taken apart."""

from __future__ import annotations

import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import malicious
import pytest
from shoestring.recipes import load_recipe
from shoestring.recipes.errors import UserError
from shoestring.recipes.yaml_text import MAX_FILE_BYTES, parse

RECIPE = "model: m\ndata: d.jsonl\nbudget: {steps: 1}\n"
LEVELS = "abcdefghijklmnop"
BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 8)}]\n" for old, new in pairwise(LEVELS)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [*{old}, *{old}, *{old}, *{old}]}}\n" for old, new in pairwise(LEVELS)
)
HOSTILE: dict[str, tuple[str, str]] = {
    "a call": ("model: !!python/object/apply:os.system ['touch canary']\n", "is not allowed"),
    "a new object": ("model: !!python/object/new:os.mkdir [canary]\n", "is not allowed"),
    "a module": ("model: !!python/module:antigravity\n", "is not allowed"),
    "a name": ("model: !!python/name:os.system\n", "is not allowed"),
    "a tag of its own": ("model: !run canary\n", "is not allowed"),
    "binary": ("model: !!binary Y2FuYXJ5\n", "is not allowed"),
    "a tag in a key": ("? !!python/object/apply:os.mkdir [canary]\n: x\n", "a key must be a word"),
    "aliases that multiply": (BOMB, "more than 20,000 values"),
    "merges that multiply": (MERGES, "more than 20,000 values"),
    "an alias of itself": ("a: &a [*a]\n", "contains it"),
    "lists without end": ("a: " + "[" * 500_000, "nested more than 32 deep"),
    "mappings without end": ("{a: " * 200_000, "nested more than 32 deep"),
    "dashes without end": ("- " * 400_000, "nested more than 32 deep"),
    "values without end": ("- a\n" * 250_000, "more than 20,000 values"),
    "a key twice": (RECIPE + "model: n\n", "is given twice"),
    "a character that ends paths": ('model: "a\\0b"\n', "holds the character NUL"),
    "two documents": (RECIPE + "---\n" + RECIPE, "a second document"),
    "an environment variable": (RECIPE + 'output_dir: "${HF_TOKEN}"\nx: 1\n', "x"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_recipe_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, says = HOSTILE[name]
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    began = time.process_time()
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert time.process_time() - began < 5  # some seconds of the slow parser, not of the attack
    assert says in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert [entry.name for entry in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_huge_recipe_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"# a comment\n" * 900_000)
    with malicious.bounded(), pytest.raises(UserError, match=f"at most {MAX_FILE_BYTES:,}"):
        load_recipe(path)


@pytest.mark.parametrize("put", [malicious.pipe, malicious.endless, malicious.listener])
def test_what_is_no_file_neither_hangs_nor_is_read(tmp_path: Path, put) -> None:
    put(tmp_path / "recipe.yaml")
    with malicious.bounded(), pytest.raises(UserError, match="is no plain file"):
        load_recipe(tmp_path / "recipe.yaml")


def test_the_environment_is_not_put_into_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE + 'output_dir: "${HF_TOKEN}/$HF_TOKEN"\n')
    loaded = load_recipe(path)
    assert loaded.recipe.output_dir == "${HF_TOKEN}/$HF_TOKEN"
    assert "canary" not in loaded.to_yaml()


def test_overrides_are_held_to_the_same_rules(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    for value in ("!!python/name:os.system", "[" * 100, '"a\\0b"'):
        with pytest.raises(UserError):
            load_recipe(path, [f"model={value}"])


def test_code_that_comes_with_a_model_is_off_until_its_own_key_is_set(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    assert load_recipe(path).recipe.model.trust_remote_code is False
    for value in ("1", "'true'", "[true]"):
        with pytest.raises(UserError, match="trust_remote_code"):
            load_recipe(path, [f"model.trust_remote_code={value}"])
    for name in ("HF_TRUST_REMOTE_CODE", "TRUST_REMOTE_CODE", "SHOESTRING_MODEL_TRUST_REMOTE_CODE"):
        assert load_recipe(path, env={name: "1"}).recipe.model.trust_remote_code is False


def test_reading_a_recipe_imports_nothing_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "hostile.py").write_text("import os\nos.mkdir('canary')\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE + "objective: hostile:it\n")
    code = (
        "from shoestring.recipes import load_recipe; print(load_recipe('recipe.yaml').recipe.objective.name)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert said.stdout == "hostile:it\n"
    assert not (tmp_path / "canary").exists()


def test_bounds_leave_room_for_real_recipes() -> None:
    values = parse("".join(f"k{index}: {{a: 1, b: [x, y]}}\n" for index in range(3000)), "r").values
    assert len(values) == 3000
