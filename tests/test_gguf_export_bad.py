"""What is refused, how it is told, and what is left on the disk then; the verb as a person types it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import shoestring.models.gguf_export as export
import tiny as runs
import torch
from gguf_tokenizers import tokenizer
from pruning_models import batches, logits, tiny
from shoestring.models import load_model, read_facts, save_gguf
from shoestring.pruning import prune, save_pruned
from shoestring.recipes.errors import UserError
from shoestring.recipes.model_data import ModelConfig
from shoestring.train.cli import app
from shoestring.train.run import train_recipe
from typer.testing import CliRunner


def says(*arguments: str | Path) -> str:
    """The output of `shoestring export`, carried out in this process; its own errors are raised."""
    done = CliRunner().invoke(app, ["export", *(str(a) for a in arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def model_folder(path: Path, *, words: Any = None) -> Path:
    words = words or tokenizer("gpt-2")
    tiny(
        "llama", dtype=torch.float32, vocab_size=len(words), eos_token_id=words.eos_token_id
    ).save_pretrained(path)
    words.save_pretrained(path)
    return path


def loaded(path: Path) -> Any:
    config = ModelConfig(model_name_or_path=str(path))
    return load_model(read_facts(config), config, device=torch.device("cpu"), dtype=torch.float32)


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "type": (
        lambda: tiny(),
        {"quantize": "q3"},
        r"--quantize q3 is unknown\.  Allowed: f32, f16, bf16, q8_0",
    ),
    "k": (lambda: tiny(), {"quantize": "q4_k_m"}, r"llama-quantize model-f16\.gguf model\.gguf q4_k_m"),
    "capitals": (lambda: tiny(), {"quantize": "Q8_0"}, r"Did you mean q8_0 \?"),
    "width": (
        lambda: tiny(),
        {"quantize": "q8_0"},
        r"q8_0 stores blocks of 32 numbers, and rows of blk\.0\.ffn_down\.weight \(model\.layers\.0\.mlp\."
        r"down_proj\.weight\) have 40\.\n  Prune with multiple=32",
    ),
    "class": (lambda: other_model(), {}, r"GPT2LMHeadModel is not written as GGUF here; known are LlamaFor"),
    "rotation": (
        lambda: tiny("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        {},
        r"no rotary scaling like this for llama: dynamic",
    ),
    "activation": (lambda: tiny("llama", hidden_act="gelu"), {}, r"hidden_act is 'gelu' .* with 'silu' only"),
    "untied": (lambda: tiny("gemma", tie_word_embeddings=False), {}, r"tie_word_embeddings is False"),
    "softcap": (lambda: tiny("gemma2", final_logit_softcapping=None), {}, r"final_logit_softcapping is None"),
    "windows": (
        lambda: tiny("gemma3_text", layer_types=["full_attention", "sliding_attention", "full_attention"]),
        {},
        r"do not recur regularly, and llama\.cpp knows one period for gemma3: FwF",
    ),
    "biases": (
        lambda: tiny("qwen3", attention_bias=True),
        {},
        r"no biases for qwen3; .* k_proj, o_proj, q_proj",
    ),
    "uneven": (lambda: uneven("qwen3"), {}, r"allows for Llama, Mistral and Qwen2, not for qwen3"),
    "adapter": (lambda: with_adapter(), {}, r"q_proj as Linear; only torch\.nn\.Linear is written"),
    "large": (lambda: with_value(1e6), {}, r"q_proj\.weight holds 1e\+06, and f16 ends at 65504"),
    "nan": (
        lambda: with_value(float("nan")),
        {"quantize": "f32"},
        r"q_proj\.weight holds values that are not",
    ),
}


def other_model() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=10))


def uneven(family: str) -> Any:
    model = tiny(family, dtype=torch.float32)
    prune(model, batches(), method="flap", ratio=0.2, parts=("neurons",), widths="per_layer")
    return model


def with_adapter() -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"])).base_model.model


def with_value(value: float) -> Any:
    model = tiny("llama", dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[3, 4] = value
    return model


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_nothing_is_left(case: str, tmp_path: Path) -> None:
    make, given, message = REFUSED[case]
    (tmp_path / "m.gguf").write_text("what was there")
    with pytest.raises(UserError, match=message):
        save_gguf(make(), tmp_path / "m.gguf", **given)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    assert (tmp_path / "m.gguf").read_text() == "what was there"


def test_narrow_heads_are_refused(tmp_path: Path) -> None:
    model = tiny("llama", dtype=torch.float32)
    attention = model.model.layers[1].self_attn
    attention.v_proj = torch.nn.Linear(64, 16, bias=False)
    attention.o_proj = torch.nn.Linear(32, 64, bias=False)
    with pytest.raises(UserError, match="layer 1 has heads narrower than 8 channels"):
        save_gguf(model, tmp_path / "m.gguf")


def test_targets(tmp_path: Path) -> None:
    (tmp_path / "folder.gguf").mkdir()
    for name, what in (("folder.gguf", "is a folder"), ("model.bin", r"does not end in \.gguf")):
        with pytest.raises(UserError, match=what):
            save_gguf(tiny(), tmp_path / name)
    first = save_gguf(tiny("llama", seed=1, dtype=torch.float32), tmp_path / "new" / "m.gguf", quantize="f32")
    again = save_gguf(tiny("llama", seed=2, dtype=torch.float32), first.path, quantize="f32")
    reader = gguf.GGUFReader(again.path)  # an existing file is replaced
    (head,) = [t.data for t in reader.tensors if t.name == "output.weight"]
    assert torch.equal(torch.tensor(head), tiny("llama", seed=2, dtype=torch.float32).lm_head.weight)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save_gguf(tiny(), tmp_path / "file" / "m.gguf")


def test_the_package_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'shoestring\[gguf\]'"):
        save_gguf(tiny(), tmp_path / "m.gguf")


def test_folders_that_are_not_whole(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty is no folder of a model: it has no config\.json"):
        save_gguf(tmp_path / "empty", tmp_path / "m.gguf")
    (folder / "tokenizer.json").rename(tmp_path / "kept.json")
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer that can be loaded"):
        save_gguf(folder, tmp_path / "m.gguf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(UserError, match=r"lack model\.layers\.3\.self_attn\.q_proj\.weight"):
        save_gguf(folder, tmp_path / "m.gguf", tokenizer=tokenizer("gpt-2"))
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(
        UserError, match=r"gate_proj\.weight has the shape \[40, 64\], and the config wants \[48"
    ):
        save_gguf(folder, tmp_path / "m.gguf", tokenizer=tokenizer("gpt-2"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "kept.json", "model"]


def test_a_full_disk_before_and_while_writing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, path = tiny("llama", dtype=torch.float32), tmp_path / "m.gguf"
    path.write_text("what was there")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(export.shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"does not fit on this disk: 0 MB are needed, 0 MB are free"):
        save_gguf(model, path)
    monkeypatch.undo()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export.os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left on device\.\n  What was there before is as it was"):
        save_gguf(model, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.gguf"]
    assert path.read_text() == "what was there"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, of Linux")
def test_a_disk_that_is_full_in_earnest(tmp_path: Path) -> None:
    (tmp_path / "m.gguf.part").symlink_to("/dev/full")
    with pytest.raises(UserError, match="does not fit on this disk"):
        save_gguf(tiny("llama", dtype=torch.float32), tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_no_second_copy_of_the_weights(tmp_path: Path) -> None:
    """What numpy allocates while 67 MB of float32 are written: some blocks of 8 MB."""
    model = tiny("llama", dtype=torch.float32, vocab_size=131072, num_hidden_layers=1)
    tracemalloc.start()
    try:
        written = save_gguf(model, tmp_path / "m.gguf", quantize="f16")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert written.bytes > 33_000_000
    assert peak < 7 * 8_400_000


def test_the_verb_on_a_finished_run(tmp_path: Path) -> None:
    """The file of a run with an adapter says what the merged export says."""
    model_folder(tmp_path / "model", words=tokenizer("gpt-2"))
    recipe = runs.recipe(tmp_path, budget={"steps": 3}, adapter={"name": "lora", "r": 4})
    assert train_recipe(str(recipe), [], fresh=False, started=time.monotonic()) == 0
    run = tmp_path / "run"
    said = says(run, "--to", "gguf", "--quantize", "f32", "-o", tmp_path / "a.gguf")
    assert "f32 GGUF of architecture llama in" in said
    says(run, "--to", "merged", "-o", tmp_path / "merged")
    ids = torch.arange(40)[None]
    ours, merged, base = loaded(tmp_path / "a.gguf"), loaded(tmp_path / "merged"), loaded(tmp_path / "model")
    assert (logits(ours, ids) - logits(merged, ids)).abs().max() < 1e-4
    assert (logits(ours, ids) - logits(base, ids)).abs().max() > 1e-3
    keys = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "a.gguf").fields.items()}
    assert (keys["general.name"], keys["tokenizer.ggml.pre"]) == ("run", "gpt-2")
    says(run, "--to", "gguf")
    assert (run / "export-f16.gguf").is_file()
    with pytest.raises(UserError, match="Allowed: merged, adapter, gguf"):
        says(run, "--to", "ggml")
    with pytest.raises(UserError, match="is for --to gguf"):
        says(run, "--to", "merged", "--quantize", "f16")
    with pytest.raises(UserError, match="is unknown"):
        says(run, "--to", "gguf", "--quantize", "int8")


def test_the_verb_on_a_folder(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    said = says(folder, "--to", "gguf", "--quantize", "bf16")
    assert "bf16 GGUF of architecture llama" in said
    assert (folder / "export-bf16.gguf").is_file()


def test_the_verb_on_a_pruned_folder(tmp_path: Path) -> None:
    words = tokenizer("gpt-2")
    model = tiny("llama", dtype=torch.float32, vocab_size=len(words))
    prune(model, batches(), method="flap", ratio=0.15, parts=("neurons",), widths="per_layer")
    save_pruned(model, tmp_path / "pruned", tokenizer=words, form="per_layer")
    says(tmp_path / "pruned", "--to", "gguf", "--quantize", "f32", "-o", tmp_path / "a.gguf")
    direct = save_gguf(model, tmp_path / "b.gguf", tokenizer=words, quantize="f32", name="pruned")
    assert direct.architecture == "deci"
    assert (tmp_path / "a.gguf").read_bytes() == direct.path.read_bytes()
    with pytest.raises(UserError, match=r"load_pruned\(FOLDER\)"):
        save_gguf(tmp_path / "pruned", tmp_path / "c.gguf")
