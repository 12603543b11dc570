"""Saved models load in a fresh process with plain transformers and compute the same."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from pruning_models import NAMES, batches, logits, tiny
from shoestring.pruning import everything, keep_uniform, prune, read_anatomy, remove, save_pruned
from shoestring.pruning.magnitude import magnitude_scores
from shoestring.recipes.errors import UserError

# Each line: a folder. Nothing of ours is imported, and no code of the folder is trusted.
READER = """
import sys, torch
from transformers import AutoModelForCausalLM
assert "shoestring" not in sys.modules
for folder in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    ids = torch.load(sys.argv[1])
    with torch.no_grad():
        found = {"logits": model(input_ids=ids).logits, "type": model.config.model_type}
    found["dtype"] = str(model.dtype)
    found["new"] = model.generate(ids[:1], max_new_tokens=6, do_sample=False, eos_token_id=None)
    torch.save(found, folder + "/found.pt")
"""


def cases():
    """name -> (model, what is done to it, model type of the file)."""
    for family in NAMES:
        # a Llama with 6 of 8 heads is written as a mistral; the gemmas of that rule keep theirs
        written = "mistral" if family == "llama" else family
        yield f"{family}-width", tiny(family, dtype=torch.float32), "width", written
        yield f"{family}-depth", tiny(family, dtype=torch.float32), "depth", family
    plain = {"sliding_window": None, "dtype": torch.float32}
    yield "llama-bfloat16", tiny(dtype=torch.bfloat16), "neurons", "llama"
    yield "llama-heads", tiny(dtype=torch.float32), "heads", "mistral"
    yield "qwen2-heads", tiny("qwen2", dtype=torch.float32), "heads", "qwen2"
    yield "qwen3-heads", tiny("qwen3", dtype=torch.float32), "heads", "qwen3"
    yield "llama-bias", tiny(dtype=torch.float32), "bias", "llama"
    yield "mistral-bias", tiny("mistral", **plain), "bias", "llama"
    yield "qwen2-bias", tiny("qwen2", dtype=torch.float32), "bias", "llama"
    yield "gemma2-bias", tiny("gemma2", dtype=torch.float32), "head_bias", "gemma2"
    rope = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 16, "rope_theta": 500.0}
    scaled = tiny(dtype=torch.float32, rope_parameters=rope, tie_word_embeddings=True)
    yield "llama-rope-heads", scaled, "heads", "mistral"


def carry_out(model, action):
    match action:
        case "width":
            prune(model, batches(), method="wanda", ratio=0.2, parts=("neurons", "groups"))
        case "neurons":
            prune(model, batches(), method="modegpt", ratio=0.2)
        case "depth":
            prune(model, batches(), method="shortgpt", ratio=0.25)
        case "heads":  # 3 groups of 2 heads: 6 do not divide 64
            anatomy = read_anatomy(model)
            remove(model, keep_uniform(anatomy, magnitude_scores(anatomy), 31, 3))
        case "bias":
            prune(model, batches(), method="flap", ratio=0.1, compensate=True)
        case "head_bias":
            prune(model, batches(), method="flap", ratio=0.08, parts=("groups",), compensate=True)


def test_a_fresh_process_computes_the_same(tmp_path):
    ids = batches(seed=9)[0]
    torch.save(ids, tmp_path / "ids.pt")
    expected = {}
    for name, model, action, written in cases():
        carry_out(model, action)
        assert save_pruned(model, tmp_path / name, record={"made": name}) == written, name
        expected[name] = (logits(model, ids), written, model)
    command = [sys.executable, "-c", READER, str(tmp_path / "ids.pt"), *(str(tmp_path / n) for n in expected)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, (want, written, model) in expected.items():
        found = torch.load(tmp_path / name / "found.pt")
        assert torch.equal(found["logits"], want), name
        assert (found["type"], found["dtype"]) == (written, str(model.dtype)), name
        ours = model.generate(ids[:1], max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert found["new"].tolist() == ours.tolist(), name
        assert json.loads((tmp_path / name / "pruning.json").read_text()) == {"made": name}
        # counted from the file's config, it is as small as the model in memory
        size = sum(path.stat().st_size for path in (tmp_path / name).glob("*.safetensors"))
        bytes_held = read_anatomy(model).parameters * (2 if "bfloat16" in name else 4)
        assert bytes_held <= size < bytes_held * 1.1 + 8192, name


def test_the_model_in_memory_is_not_changed_by_saving(tmp_path):
    model = tiny("qwen2", dtype=torch.float32)
    carry_out(model, "bias")
    before = (model.config.to_dict(), set(model.state_dict()), logits(model))
    save_pruned(model, tmp_path / "out")
    assert (model.config.to_dict(), set(model.state_dict())) == before[:2]
    assert torch.equal(logits(model), before[2])
    assert not (tmp_path / "out" / "pruning.json").exists()


def test_what_belongs_to_a_model_is_saved_with_it(tmp_path):
    from tiny import model_folder
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    folder = str(model_folder(tmp_path / "model"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.max_new_tokens = 7
    tokenizer = AutoTokenizer.from_pretrained(folder)
    result = prune(model, [torch.arange(20)[None]], method="wanda", ratio=0.1)
    save_pruned(model, tmp_path / "out", tokenizer=tokenizer, record=result.record)
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.chat_template == tokenizer.chat_template
    assert again("a bee has").input_ids == tokenizer("a bee has").input_ids
    assert GenerationConfig.from_pretrained(tmp_path / "out").max_new_tokens == 7
    saved = json.loads((tmp_path / "out" / "pruning.json").read_text(encoding="utf-8"))
    assert saved == result.record
    assert [len(kept) for kept in saved["neurons"]] == [width_in(tmp_path / "out")] * 2


def width_in(folder) -> int:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["intermediate_size"]


def test_widths_that_differ_are_refused(tmp_path):
    model = tiny()
    whole = everything(read_anatomy(model))
    remove(model, dataclasses.replace(whole, neurons=tuple(torch.arange(n) for n in (10, 20, 15))))
    with pytest.raises(UserError, match=r"neurons 10 to 20, groups of heads 4 to 4.*\n.*widths: uniform"):
        save_pruned(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "told"),
    [
        ("gemma2", r"gemma2 needs its hidden size \(64\) divisible by its heads \(6\)"),
        ("gemma3_text", r"gemma3_text needs its hidden size \(64\) divisible by its heads \(6\)"),
    ],
)
def test_heads_that_no_class_holds_are_refused(family, told, tmp_path):
    model = tiny(family)
    carry_out(model, "heads")
    with pytest.raises(UserError, match=f"(?s){told}.*groups of heads that one holds: 1, 2;"):
        save_pruned(model, tmp_path / "out")


def test_heads_and_biases_together_are_refused_for_llama(tmp_path):
    model = tiny()
    carry_out(model, "bias")
    carry_out(model, "heads")
    with pytest.raises(
        UserError, match=r"llama needs its hidden size.*; mistral has no attention biases|MLP biases"
    ):
        save_pruned(model, tmp_path / "out")
