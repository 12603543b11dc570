"""Model folders and GGUF files from a stranger: nothing of theirs runs, nothing outside is read."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import malicious
import pytest
import tiny
import torch
from malicious import bounded
from shoestring.models import load_model, load_tokenizer, locate, read_facts
from shoestring.recipes.errors import UserError
from shoestring.recipes.model_data import ModelConfig

CODE = "import os\nos.mkdir({!r})\n"


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("stock") / "model")


@pytest.fixture
def folder(stock: Path, tmp_path: Path) -> Path:
    shutil.copytree(stock, tmp_path / "model")
    return tmp_path / "model"


def asked(folder: Path, **keys: Any) -> ModelConfig:
    return ModelConfig.model_validate({"model_name_or_path": str(folder), **keys})


def edit(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def loaded(folder: Path) -> Any:
    """The model, as a run loads it."""
    return load_model(
        read_facts(asked(folder)), asked(folder), device=torch.device("cpu"), dtype=torch.float32
    )


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught, bounded(seconds=4):
        read_facts(asked(folder))
    assert len(str(caught.value)) < 800
    return str(caught.value)


# Code


def test_code_beside_the_weights_does_not_run(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "__init__.py"):
        (folder / name).write_text(CODE.format(str(canary)))
    maps = {"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    edit(folder / "config.json", auto_map=maps, trust_remote_code=True)
    own = {"AutoTokenizer": ["tokenization_evil.T", None]}
    edit(folder / "tokenizer_config.json", auto_map=own, trust_remote_code=True)
    facts = read_facts(asked(folder))
    assert type(loaded(folder)).__name__ == "LlamaForCausalLM"
    load_tokenizer(facts, asked(folder))
    assert not canary.exists()
    edit(folder / "config.json", model_type="evil")
    assert "If you trust it: model.trust_remote_code=true" in refusal(folder)
    edit(folder / "config.json", auto_map="configuration_evil.C")
    assert "comes with its own Python code (configuration_evil.C)" in refusal(folder)
    assert not canary.exists()


def test_pickled_weights_are_refused_unread(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    malicious.torch_payload(canary, folder / "pytorch_model.bin")
    loaded(folder)  # beside safetensors it is not looked at
    (folder / "model.safetensors").unlink()
    said = refusal(folder)
    assert "has its weights as a pickle only (pytorch_model.bin)" in said
    assert "save_pretrained" in said
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model.bin"}}')
    (folder / "pytorch_model.bin").rename(folder / "x.bin")
    assert "as a pickle only" in refusal(folder)
    assert not canary.exists()
    torch.load(folder / "x.bin", weights_only=False)  # the attack is real
    assert canary.is_dir()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_configuration_cannot_ask_for_kernels_of_the_hub(folder: Path, key: str) -> None:
    edit(folder / "config.json", **{key: "kernels-community/evil"})
    assert "asks for the attention code 'kernels-community/evil' of the hub" in refusal(folder)
    edit(folder / "config.json", **{key: None}, text_config={key: {"": "evil/kernel@main"}})
    assert "which would run on this machine" in refusal(folder)


# Sizes and shapes


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"num_hidden_layers": 10**12}, "at most 10,000 are built"),
        ({"num_hidden_layers": "2"}, "refused by transformers"),
        ({"hidden_size": -64}, "refused by transformers"),
        ({"hidden_size": 10**30}, "refused by transformers"),
        ({"vocab_size": 10**18, "hidden_size": 10**6}, "refused by transformers"),
        ({"num_attention_heads": 0}, "refused by transformers"),
        ({"model_type": ["llama"]}, "does not know"),
        ({"model_type": None}, "does not know"),
    ],
)
def test_a_configuration_of_no_model(folder: Path, keys: dict[str, Any], says: str) -> None:
    edit(folder / "config.json", **keys)
    assert says in refusal(folder)


NO_OBJECTS = ["", "[]", "null", '"x"', "[" * 200_000, '{"a":' * 100_000, '{"a": ' + "9" * 10**6 + "}"]


@pytest.mark.parametrize("text", NO_OBJECTS)
def test_a_configuration_that_is_no_object(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    refusal(folder)


@pytest.mark.parametrize("name", malicious.TENSORS)
def test_hostile_weights_are_refused(folder: Path, name: str) -> None:
    (folder / "model.safetensors").write_bytes(malicious.TENSORS[name])
    with pytest.raises(UserError), bounded(seconds=4):
        loaded(folder)


def test_a_header_of_a_sparse_terabyte_is_not_read(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, 1 << 40)
    with path.open("r+b") as file:
        file.write(((1 << 40) - 8).to_bytes(8, "little"))
    assert "its header is not complete" in refusal(folder)


@pytest.mark.parametrize(
    "index",
    [
        {"weight_map": {"a": "../outside/model.safetensors"}},
        {"weight_map": {"a": "/etc/passwd"}},
        {"weight_map": {"a": "model.pkl"}},
        {"weight_map": {"a": 1}},
        {"weight_map": {"a": "a\0.safetensors"}},
        {"weight_map": []},
        {},
        [],
    ],
)
def test_an_index_names_nothing_elsewhere(folder: Path, index: Any, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (folder / "model.safetensors").rename(tmp_path / "outside" / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    said = refusal(folder)
    assert (
        "no safetensors file beside it" in said or "lists no weights" in said or "not a JSON object" in said
    )


@pytest.mark.parametrize("text", ["", "[]", "[" * 200_000, '{"base_model_name_or_path": {}}'])
def test_an_adapter_s_configuration_may_be_anything(folder: Path, text: str) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text(text)
    assert "adapter" in refusal(folder)


def test_a_package_s_path_does_not_leave_it() -> None:
    with pytest.raises(UserError, match="leads out of the package"):
        locate(ModelConfig.model_validate({"model_name_or_path": "package:yaml/../torch/x.gguf"}))


# GGUF


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


def gguf(*entries: bytes, tensors: bytes = b"", count: int | None = None, keys: int | None = None) -> bytes:
    numbers = (bool(tensors) if count is None else count, len(entries) if keys is None else keys)
    return b"GGUF" + struct.pack("<IQQ", 3, *numbers) + b"".join(entries) + tensors


def tensor(shape: list[int], kind: int, offset: int) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return struct.pack("<Q", 1) + b"a" + sizes + struct.pack("<IQ", kind, offset)


GGUF: dict[str, bytes] = {
    "keys without end": gguf(keys=2**63),
    "tensors without end": gguf(count=2**63),
    "a text without end": gguf(struct.pack("<Q", 2**63) + b"a"),
    "a list without end": gguf(entry(b"a", 9, struct.pack("<IQ", 8, 2**62))),
    "numbers without end": gguf(entry(b"a", 9, struct.pack("<IQ", 10, 2**62))),
    "lists in lists without end": gguf(entry(b"a", 9, struct.pack("<IQ", 9, 1) * 20_000)),
    "an unknown kind": gguf(entry(b"a", 99, b"")),
    "an unknown type of tensor": gguf(tensors=tensor([32], 999, 0) + bytes(64)),
    "a tensor beyond the end": gguf(tensors=tensor([2**40], 0, 0)),
    "a tensor that overflows": gguf(tensors=tensor([2**63, 2**63], 0, 2**63)),
    "dimensions without end": gguf(tensors=struct.pack("<Q", 1) + b"a" + struct.pack("<I", 2**32 - 1)),
    "an alignment of nothing": gguf(entry(b"general.alignment", 4, struct.pack("<I", 0))),
    "an alignment that is a text": gguf(entry(b"general.alignment", 8, struct.pack("<Q", 1) + b"x")),
    "a pickle": b"GGUF" + bytes(4) + b"\x80\x04\x95" + bytes(200),
}


@pytest.mark.parametrize("name", GGUF)
def test_a_hostile_gguf_file_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(GGUF[name])
    assert "model.gguf" in refusal(tmp_path / "model.gguf")


@pytest.mark.parametrize("put", [malicious.pipe, malicious.endless, malicious.listener])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.gguf"])
def test_what_is_no_file_neither_hangs_nor_is_read(
    folder: Path, name: str, put: Callable[[Path], None]
) -> None:
    put(folder / name)
    refusal(folder / name if name.endswith("gguf") else folder)
