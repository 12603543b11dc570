"""Whatever a recipe or an override holds, loading ends in a Recipe or in one UserError with a text."""

import random
from pathlib import Path

import pytest
from shoestring.recipes import UserError, load_recipe
from shoestring.recipes.keys import dotted_keys

VALUES = (
    (
        "1 0 -1 x null true [] {} [1,a] {a: b} 1e-3 2h 10% auto '' .inf !!int &a *a [[x]] {path: a} '{x}' "
        "$20 lora é 99999999999999999999999 1e400 2024-01-01 {name: cosine} {name: {a: b}} {<<: {a: 1}}"
    )
    .replace(": ", ":~")
    .split()
)
NOISE = "\t:{}[]&*!|>#'\"%@`\n- ,?\x00\u2028\ufeff"


def test_no_recipe_crashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pick = random.Random(0)
    values = [value.replace("~", " ") for value in VALUES]
    keys = dotted_keys()
    loaded = refused = 0
    texts = set()
    for _ in range(1500):
        text = "model: m\ndata: a\nbudget: 1h\n"
        for _ in range(pick.choice((0, 0, 1, 2))):
            text += f"{pick.choice(keys).split('.')[0]}: {pick.choice(values)}\n"
        if pick.random() < 0.2:
            place = pick.randrange(len(text))
            text = text[:place] + pick.choice(NOISE) + text[place + pick.randint(0, 2) :]
        overrides = [
            f"{pick.choice(keys)}{pick.choice(('', '', '.0', '.x', '.0.path'))}={pick.choice(values)}"
            for _ in range(pick.randint(0, 2))
        ]
        Path("recipe.yaml").write_text(text, encoding="utf-8")
        try:
            resolved = load_recipe("recipe.yaml", overrides, env={"WANDB_NAME": "q"})
        except UserError as error:
            refused += 1
            texts.add(str(error).strip())
            continue
        loaded += 1
        Path("resolved.yaml").write_text(resolved.to_yaml(), encoding="utf-8")
        assert load_recipe("resolved.yaml", env={}).recipe == resolved.recipe, (text, overrides)
    assert loaded > 100
    assert refused > 500
    assert "" not in texts
