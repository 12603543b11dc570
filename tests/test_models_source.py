"""Finding a model: every way it can be named, and every way that can go wrong."""

import json
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from shoestring.models import locate, read_facts
from shoestring.recipes.errors import UserError
from shoestring.recipes.model_data import ModelConfig
from transformers import BertConfig, LlamaConfig, LlamaForCausalLM, T5Config

SMALL = LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=128,
)


def named(name: object, **keys: object) -> ModelConfig:
    return ModelConfig(model_name_or_path=str(name), **keys)


def refusal(name: object, **keys: object) -> str:
    with pytest.raises(UserError) as caught:
        read_facts(named(name, **keys))
    text = str(caught.value)
    assert len(text.splitlines()) <= 6
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "small-llama"
    LlamaForCausalLM(SMALL).save_pretrained(path)
    return path


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "some_models"
    path.mkdir()
    (path / "__init__.py").write_text("raise RuntimeError('a model package must not be imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    return path


def test_a_folder_is_described_without_weights(folder: Path) -> None:
    facts = read_facts(named(folder))
    model = LlamaForCausalLM.from_pretrained(folder)
    assert facts.kind == "folder"
    assert facts.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert facts.embedding_parameters == 2 * 128 * 64
    assert (facts.layers, facts.hidden_size, facts.vocab_size, facts.tied) == (2, 64, 128, False)
    assert {
        (shape.name, shape.in_features, shape.out_features, shape.count) for shape in facts.linear_modules
    } == {
        ("q_proj", 64, 64, 2),
        ("k_proj", 64, 32, 2),
        ("v_proj", 64, 32, 2),
        ("o_proj", 64, 64, 2),
        ("gate_proj", 64, 128, 2),
        ("up_proj", 64, 128, 2),
        ("down_proj", 128, 64, 2),
        ("lm_head", 64, 128, 1),
    }
    assert dict(facts.parameter_shapes)["model.layers.1.mlp.down_proj.weight"] == (64, 128)


def test_the_fingerprint_follows_the_weights_not_the_place(folder: Path, tmp_path: Path) -> None:
    first = read_facts(named(folder)).fingerprint
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert read_facts(named(copy)).fingerprint == first
    model = LlamaForCausalLM.from_pretrained(copy)
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] += 1
    model.save_pretrained(copy)
    assert read_facts(named(copy)).fingerprint != first


def test_a_misspelt_folder_gets_the_near_name(folder: Path) -> None:
    text = refusal(folder.with_name("smal-lama"))
    assert "does not exist.   Did you mean" in text
    assert "small-llama ?" in text


def test_an_empty_folder(tmp_path: Path) -> None:
    assert "is empty" in refusal(tmp_path)


def test_a_folder_of_folders_names_the_model_inside(folder: Path) -> None:
    assert f"Did you mean {folder} ?" in refusal(folder.parent)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    SMALL.save_pretrained(tmp_path)
    assert "has config.json but no weights" in refusal(tmp_path)


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    values = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    text = refusal(tmp_path)
    assert "is an adapter (LORA), not a model; its base is org/base" in text
    assert text.endswith("model: org/base")


def test_a_file_that_is_no_gguf(folder: Path) -> None:
    text = refusal(folder / "model.safetensors")
    assert "is a file, but no .gguf file" in text
    assert str(folder) in text.splitlines()[1]


def test_cut_off_safetensors(folder: Path, tmp_path: Path) -> None:
    SMALL.save_pretrained(tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1000])
    text = refusal(tmp_path)
    assert "is cut off or damaged" in text
    assert f"{len(whole) - 1000:,} of {len(whole):,} bytes" in text
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "its header is not complete" in refusal(tmp_path)


def test_a_missing_shard(tmp_path: Path) -> None:
    SMALL.save_pretrained(tmp_path)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.zeros(1)}, tmp_path / "model-00001-of-00002.safetensors")
    assert "lacks 1 of 2 weight files, the first is model-00002-of-00002.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (T5Config(d_model=16, num_layers=1, num_heads=2, vocab_size=32), "is an encoder-decoder model (t5)"),
        (BertConfig(hidden_size=16, architectures=["BertForMaskedLM"]), "config.json says BertForMaskedLM"),
    ],
)
def test_what_is_no_causal_language_model(tmp_path: Path, config: object, said: str) -> None:
    config.save_pretrained(tmp_path)  # type: ignore[attr-defined]
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert said in refusal(tmp_path)


def test_custom_code_is_asked_for_first(tmp_path: Path) -> None:
    values = {"model_type": "ours", "auto_map": {"AutoConfig": "code.OurConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "code.py").write_text("raise RuntimeError('must not run')")
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    text = refusal(tmp_path)
    assert "its own Python code (code.OurConfig)" in text
    assert "model.trust_remote_code=true" in text


def test_an_unknown_model_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "from-the-future"}')
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert "of model_type 'from-the-future', which the installed transformers does not know" in refusal(
        tmp_path
    )


def test_already_quantised(tmp_path: Path) -> None:
    values = SMALL.to_dict() | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert "is already quantised with gptq" in refusal(tmp_path)


def test_a_package_that_is_not_there() -> None:
    text = refusal("package:no_such_models")
    assert "the package no_such_models is not installed" in text
    assert "pip install no-such-models" in text


def test_a_package_without_models(package: Path) -> None:
    assert "holds no .gguf file" in refusal("package:some_models")


def test_a_package_with_one_model(package: Path) -> None:
    (package / "a.gguf").write_bytes(b"GGUF")
    assert locate(named("package:some_models")).gguf_file == package / "a.gguf"


def test_a_package_with_several_models_lists_them(package: Path) -> None:
    for name in ("a", "b"):
        (package / f"{name}.gguf").write_bytes(b"GGUF")
    text = refusal("package:some_models")
    assert "holds 2 models" in text
    assert "package:some_models/a.gguf" in text
    assert locate(named("package:some_models/b.gguf")).gguf_file == package / "b.gguf"
    assert "has no file c.gguf" in refusal("package:some_models/c.gguf")


def test_gguf_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"<html>")
    assert "is not a GGUF file" in refusal(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 9, 0, 0))
    assert "has GGUF version 9" in refusal(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 5, 5))
    assert "is cut off: its header is not complete" in refusal(path)


def test_a_hub_name_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "models--org--some-model").mkdir()
    text = refusal("org/some-modle")
    assert "not in the local cache, and HF_HUB_OFFLINE is set" in text
    assert "Did you mean org/some-model ?" in text
    assert "Unset HF_HUB_OFFLINE to download it" in text


def test_what_is_neither_path_nor_hub_name() -> None:
    assert "is neither a path that exists nor a hub id (OWNER/NAME)" in refusal("my model")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("GatedRepoError", "is gated: its owner asks you to accept a licence first"),
        ("RepositoryNotFoundError", "is not on the hub (or is private)"),
        ("RevisionNotFoundError", "model.revision: org/m has no revision v9"),
        ("RemoteEntryNotFoundError", "is on the hub, but has no config.json"),
        ("HfHubHTTPError", "the hub did not give org/m: 503"),
    ],
)
def test_what_the_hub_answers(monkeypatch: pytest.MonkeyPatch, kind: str, said: str) -> None:
    from huggingface_hub import errors

    def answer(*args: object, **keys: object) -> str:
        response = SimpleNamespace(headers={}, request=None, status_code=503)
        raise getattr(errors, kind)("503 busy", response=response)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", answer)
    assert said in refusal("org/m", revision="v9")


def test_a_hub_model_is_known_by_its_commit(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    snapshot = tmp_path / "0123456789abcdef"
    shutil.copytree(folder, snapshot)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a, **k: str(snapshot / "config.json"))
    source = locate(named("org/m"))
    assert (source.kind, source.revision, source.load_name) == ("hub", "0123456789abcdef", "org/m")
