"""The schema: closed, described, frozen, and the same in code, JSON schema and docs/recipe.md."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest
import shoestring.recipes as recipes
from shoestring.recipes import Every, LoraAdapter, Recipe, json_schema
from shoestring.recipes.hints import FOREIGN, OPTIMIZERS
from shoestring.recipes.keys import dotted_keys, variants
from shoestring.recipes.reference import reference
from shoestring.recipes.section import Section

SHORT: dict[str, Any] = {"model": "m", "data": "a.jsonl", "budget": "1h"}


def subclasses(kind: type[Section]) -> Iterator[type[Section]]:
    for sub in kind.__subclasses__():
        yield sub
        yield from subclasses(sub)


def test_public_names_are_sorted_and_there() -> None:
    assert recipes.__all__ == sorted(recipes.__all__)
    for name in recipes.__all__:
        assert getattr(recipes, name) is not None


@pytest.mark.parametrize("section", sorted(subclasses(Section), key=lambda kind: kind.__name__))
def test_every_key_is_described_and_every_section_closed(section: type[Section]) -> None:
    assert section.model_config["extra"] == "forbid"
    assert section.model_config["frozen"]
    for name, declared in section.model_fields.items():
        assert declared.description, name
        assert declared.description.strip()[-1] in ".`", name


def test_the_recipe_in_python() -> None:
    recipe = Recipe(**SHORT)
    assert recipe.data.train[0].path == "a.jsonl"
    assert Recipe(**recipe.model_dump(mode="json")) == recipe
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    with pytest.raises(pydantic.ValidationError):
        recipe.train.seed = 3  # type: ignore[misc]
    with pytest.raises(pydantic.ValidationError, match="exclude each other"):
        Recipe(**SHORT, train={"batch_tokens": 8, "per_device_train_batch_size": 2})


def test_auto_is_none_and_back() -> None:
    recipe = Recipe(**SHORT, train={"batch_tokens": "auto", "per_device_train_batch_size": 4})
    assert recipe.train.batch_tokens is None
    dumped = recipe.model_dump(mode="json")["train"]
    assert (dumped["batch_tokens"], dumped["per_device_train_batch_size"]) == ("auto", 4)


@pytest.mark.parametrize("r", [4, 16, 64])
def test_default_alpha_does_not_follow_the_rank(r: int) -> None:
    assert LoraAdapter(r=r).lora_alpha == 32
    assert LoraAdapter(r=r, use_rslora=True).lora_alpha == 8
    assert LoraAdapter(r=r, lora_alpha=r).lora_alpha == r


def test_default_intervals() -> None:
    recipe = Recipe(**SHORT)
    assert recipe.eval.every == Every(share=0.25)
    assert recipe.checkpoint.every == Every(seconds=300)


def test_json_schema_knows_short_forms_and_says_auto() -> None:
    schema = json_schema()
    assert schema["required"] == ["model", "data", "budget"]
    assert schema["additionalProperties"] is False
    for section in (
        "model",
        "data",
        "budget",
        "objective",
        "adapter",
        "optimizer",
        "schedule",
        "track",
        "export",
    ):
        assert {"type": "string"} in schema["properties"][section]["anyOf"], section
    train = schema["$defs"]["TrainConfig"]["properties"]["batch_tokens"]
    assert train["default"] == "auto"
    assert {"const": "auto"} in train["anyOf"]
    assert schema["$defs"]["CheckpointConfig"]["properties"]["every"]["default"] == "5min"
    references = set(_references(schema))
    assert references <= {f"#/$defs/{name}" for name in schema["$defs"]}


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"]
        for value in schema.values():
            yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)


def test_hints_point_to_keys_that_exist() -> None:
    keys = set(dotted_keys())
    for foreign, ours in FOREIGN.items():
        target = ours.split("=")[0].split(" ")[0]
        assert target in keys or ours.startswith("nothing:"), (foreign, ours)
        leaves = {key.rpartition(".")[2] for key in keys}
        assert foreign not in leaves or foreign in ("rank", "alpha"), foreign  # LoRA's elsewhere
    for foreign, ours in OPTIMIZERS.items():
        name, *settings = ours.replace(",", "").split(" ")
        assert name in variants("optimizer"), (foreign, ours)
        assert foreign not in variants("optimizer"), foreign
        for setting in settings:
            key = setting.partition("=")[0]
            assert "=" not in setting or key in keys, (foreign, ours)


def test_the_reference_page_is_up_to_date() -> None:
    page = Path(__file__).parents[1] / "docs" / "recipe.md"
    assert page.read_text(encoding="utf-8") == reference(), (
        "run: python -m shoestring.recipes.reference > docs/recipe.md"
    )


def test_the_reference_page_has_every_key() -> None:
    page = reference()
    for key in dotted_keys():
        assert f"`{key.rpartition('.')[2]}`" in page or f"## {key}" in page, key
