"""Files that hold any widths: read by transformers without this package, or by load_pruned."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning_models import NAMES, batches, logits, tiny
from shoestring.pruning import (
    everything,
    head_amounts_for,
    keep_counts,
    load_pruned,
    prune,
    read_anatomy,
    remove,
    save_pruned,
)
from shoestring.pruning.magnitude import magnitude_scores
from shoestring.recipes.errors import UserError
from test_pruning_heads import narrow_cut

# Each line: a folder. Nothing of ours can be imported.
READER = """
import sys, torch
sys.modules["shoestring"] = None
from transformers import AutoModelForCausalLM
ids = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
    else:
        raise AssertionError("loaded without being trusted")
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        found = {"logits": model(input_ids=ids).logits, "type": model.config.model_type}
        cached = model(input_ids=ids[:, :6], use_cache=True)
        found["past"] = model(input_ids=ids[:, 6:], past_key_values=cached.past_key_values).logits
    found["dtype"] = str(model.dtype)
    ways = {"new": {}, "static": {"cache_implementation": "static", "disable_compile": True}}
    for name, way in ways.items():
        found[name] = model.generate(ids[:1], max_new_tokens=6, do_sample=False, eos_token_id=None, **way)
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.save_pretrained(folder + "/again")
    again = AutoModelForCausalLM.from_pretrained(folder + "/again", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, found["logits"])
    torch.save(found, folder + "/found.pt")
"""


def uneven(model: Any) -> None:
    """Neurons, groups and heads that differ from layer to layer; 3 groups of 2 do not divide 64."""
    anatomy = read_anatomy(model)
    remove(model, keep_counts(anatomy, magnitude_scores(anatomy), [17, 31, 9], [3, 2, 1]))
    cut = narrow_cut(model)
    values = {index: values for index, values in cut.values.items() if index != 1}  # a stock layer between
    pairs = {index: pairs for index, pairs in cut.pairs.items() if index != 1}
    remove(model, dataclasses.replace(cut, values=values, pairs=pairs))


def cases() -> Any:
    """name -> model that no plain config holds."""
    for family in NAMES:
        model = tiny(family, dtype=torch.float32)
        uneven(model)
        yield family, model
    model = tiny(dtype=torch.bfloat16)
    remove(model, dataclasses.replace(narrow_cut(model), blocks=(0, 2)))
    yield "llama-bfloat16-depth", model
    for family in ("llama", "mistral"):
        plain = {"sliding_window": None} if family == "mistral" else {}
        model = tiny(family, dtype=torch.float32, **plain)
        given = {"widths": "per_layer", "compensate": True, "parts": ("neurons", "groups")}
        if family == "mistral":
            given["parts"] = ("neurons",)
        prune(model, batches(), method="flap", ratio=0.2, **given)
        yield f"{family}-biases", model
    model = tiny("qwen2", dtype=torch.float32)
    prune(model, batches(), method="modegpt", ratio=0.2, parts=("neurons", "queries", "values"))
    yield "qwen2-modegpt", model
    rope = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 16, "rope_theta": 500.0}
    model = tiny(dtype=torch.float32, rope_parameters=rope, tie_word_embeddings=True)
    uneven(model)
    yield "llama-rope-tied", model


def test_a_fresh_process_without_this_package_computes_the_same(tmp_path):
    ids = batches(seed=9)[0]
    torch.save(ids, tmp_path / "ids.pt")
    models = {}
    for name, model in cases():
        written = save_pruned(model, tmp_path / name, record={"made": name}, form="per_layer")
        assert written == f"pruned_{name.split('-')[0]}", name
        models[name] = model
    command = [sys.executable, "-c", READER, str(tmp_path / "ids.pt"), *(str(tmp_path / n) for n in models)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name, model in models.items():
        folder = tmp_path / name
        found = torch.load(folder / "found.pt")
        expected = logits(model, ids)
        assert torch.equal(found["logits"], expected), name
        exact = torch.finfo(model.dtype).eps * 64
        torch.testing.assert_close(found["past"], expected[:, 6:], rtol=exact, atol=exact)
        assert (found["type"], found["dtype"]) == (f"pruned_{name.split('-')[0]}", str(model.dtype)), name
        ours = model.generate(ids[:1], max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert found["new"].tolist() == found["static"].tolist() == ours.tolist(), name
        assert json.loads((folder / "pruning.json").read_text()) == {"made": name}
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        bytes_held = read_anatomy(model).parameters * model.dtype.itemsize
        assert bytes_held <= size < bytes_held * 1.1 + 8192, name

        again = load_pruned(folder)
        assert torch.equal(logits(again, ids), expected), name
        assert (again.dtype, again.training) == (model.dtype, False)
        assert read_anatomy(again).parameters == read_anatomy(model).parameters
        shapes = [[(b.neurons, b.groups, b.pairs, b.value_dim) for b in read_anatomy(m).blocks]
                  for m in (again, model)]  # fmt: skip
        assert shapes[0] == shapes[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tiny(dtype=torch.float32)
    uneven(model)
    save_pruned(model, tmp_path / "model", form="per_layer")
    return tmp_path / "model"


def test_a_loaded_model_is_pruned_padded_and_saved_as_any_other(folder, tmp_path):
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    model = load_pruned(folder)
    model.generation_config.max_new_tokens = 7
    before = logits(model)
    assert save_pruned(model, tmp_path / "padded", form="padded") == "mistral"
    assert torch.equal(logits(model), before)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "padded")
    torch.testing.assert_close(logits(plain), before, rtol=1e-5, atol=1e-5)
    assert plain.generation_config.max_new_tokens == 7
    assert not (tmp_path / "padded" / "modeling_pruned.py").exists()
    assert "layer_widths" not in json.loads((tmp_path / "padded" / "config.json").read_text())
    remove(model, keep_counts(read_anatomy(model), magnitude_scores(read_anatomy(model)), [8] * 3, [1] * 3))
    assert save_pruned(model, tmp_path / "smaller", form="per_layer") == "pruned_llama"
    assert torch.equal(logits(load_pruned(tmp_path / "smaller")), logits(model))
    assert load_pruned(folder).generation_config.max_new_tokens != 7

    even = tiny(dtype=torch.float32)
    prune(even, batches(), method="wanda", ratio=0.1)
    save_pruned(even, tmp_path / "even", form="per_layer")
    assert save_pruned(load_pruned(tmp_path / "even"), tmp_path / "plain") == "llama"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(again) is LlamaForCausalLM
    assert torch.equal(logits(again), logits(even))


def test_uniform_stays_the_default_and_refuses_narrow_heads(tmp_path):
    model = tiny()
    amounts = head_amounts_for(read_anatomy(model), 0.05, parts=("values",))
    assert amounts.values < 8
    prune(model, batches(), method="modegpt", ratio=0.05, parts=("values",))
    with pytest.raises(UserError, match=r"plain configs hold one head_dim.*\n.*form: per_layer, or padded"):
        save_pruned(model, tmp_path / "out")
    with pytest.raises(UserError, match=r"pruning.form: zipped is not one of uniform, per_layer, padded"):
        save_pruned(model, tmp_path / "out", form="zipped")
    assert not (tmp_path / "out").exists()
    assert save_pruned(model, tmp_path / "out", form="padded") == "llama"
    assert [b.is_narrow for b in read_anatomy(model).blocks] == [True] * 3


def test_our_loader_runs_nothing_of_the_folder(folder, tmp_path):
    """Code in every place where transformers would look for it; a pickle; an adapter; a kernel of the hub."""
    canary = tmp_path / "canary"
    evil = f"import os\nos.mkdir({str(canary)!r})\n"
    before = logits(load_pruned(folder))
    for name in ("modeling_pruned.py", "modeling_evil.py", "configuration_evil.py", "__init__.py"):
        (folder / name).write_text(evil)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(evil)
    (folder / "adapter_config.json").write_text(
        '{"base_model_name_or_path": "/nowhere", "peft_type": "LORA"}'
    )
    edit(
        folder,
        auto_map={"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"},
        attn_implementation="kernels-community/evil",
        _attn_implementation="kernels-community/evil",
        quantization_config={"quant_method": "bitsandbytes"},
        transformers_weights="elsewhere.bin",
        trust_remote_code=True,
    )
    model = load_pruned(folder)
    assert torch.equal(logits(model), before)
    assert model.generate(batches()[0][:1], max_new_tokens=2, do_sample=False).shape[1] <= 12
    assert type(model).__module__ == "shoestring.pruning.modeling_pruned"
    assert not canary.exists()
    subprocess.run([sys.executable, folder / "modeling_pruned.py"], check=True)
    assert canary.is_dir()  # the attack is real


def edit(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def entry(folder: Path, **keys: Any) -> list[dict[str, Any]]:
    """The folder's `layer_widths` with other keys in the first layer."""
    layers: list[dict[str, Any]] = json.loads((folder / "config.json").read_text())["layer_widths"]
    return [{**layers[0], **keys}, *layers[1:]]


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"neurons": 10**12}, "layer 0 has neurons 1000000000000; allowed is 1 to 31"),
        ({"neurons": True}, "layer 0 has neurons True"),
        ({"groups": 0}, "layer 0 has groups 0"),
        ({"value_width": "8"}, "layer 0 has value_width '8'; allowed is 1 to 8"),
        ({"rotary_pairs": [[0], [1]]}, "rotary_pairs of 2 heads; 3 equal lists"),
        ({"rotary_pairs": [[0], [1], []]}, "3 equal lists"),
        ({"rotary_pairs": [[0], [1], [4]]}, "rotary_pairs beyond 0 to 3"),
        ({"rotary_pairs": [[0, 0], [1, 2], [1, 2]]}, "or twice"),
        ({"rotary_pairs": 5}, "is not what was written"),
        ({"biases": ["lm_head"]}, "layer 0 has biases"),
        ({"biases": ["q_proj"]}, r"q_proj.bias has the shape none, the config says \(\d+,\)"),
        (
            {"neurons": 16},
            r"are not of its config: model.layers.0.mlp.down_proj.weight has the shape \(64, 17\)",
        ),
    ],
)
def test_widths_that_were_not_written_are_refused(folder, keys, told):
    edit(folder, layer_widths=entry(folder, **keys))
    with pytest.raises(UserError, match=told):
        load_pruned(folder)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"model_type": "llama"}, "has the model type 'llama', not one of form per_layer: pruned_llama"),
        ({"model_type": ["llama"]}, "has the model type"),
        ({"layer_widths": None}, "layer_widths is not a list of 1 to 10,000 layers"),
        ({"layer_widths": [{}] * 3}, "is not what was written"),
        ({"num_hidden_layers": 2}, "layer_widths has 3 layers, num_hidden_layers is 2"),
        ({"hidden_size": "64"}, "is not what was written"),
        ({"hidden_size": 10**30}, "is not what was written"),
        ({"head_dim": 10**12}, "head_dim is 1000000000000; allowed is 1 to 65,536"),
        ({"num_attention_heads": 0}, "is not what was written"),
        ({"rope_parameters": {"rope_type": "evil"}}, "is not what was written"),
        ({"vocab_size": 60}, "are not of its config"),
    ],
)
def test_configs_that_were_not_written_are_refused(folder, keys, told):
    edit(folder, **keys)
    with pytest.raises(UserError, match=told):
        load_pruned(folder)


def test_files_that_are_missing_or_broken_are_told(folder, tmp_path):
    with pytest.raises(UserError, match=r"nowhere/config.json cannot be read"):
        load_pruned(tmp_path / "nowhere")
    weights = folder / "model.safetensors"
    shutil.copy(weights, tmp_path / "kept")
    weights.write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match=r"model.safetensors cannot be read"):
        load_pruned(folder)
    weights.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"model.safetensors cannot be read"):
        load_pruned(folder)
    index = folder / "model.safetensors.index.json"
    for named in ({"a": "../kept"}, {"a": "/etc/passwd"}, {"a": "model.bin"}, [], {}):
        index.write_text(json.dumps({"weight_map": named}))
        with pytest.raises(UserError, match="names no safetensors files beside it"):
            load_pruned(folder)
    shutil.copy(tmp_path / "kept", folder / "part.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "part.safetensors"}}))
    assert load_pruned(folder, dtype=torch.float64).dtype == torch.float64
    (folder / "generation_config.json").write_text('{"cache_implementation": "evil"}')
    with pytest.raises(UserError, match=r"generation_config.json is not what was written"):
        load_pruned(folder)
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"config.json cannot be read"):
        load_pruned(folder)


def test_a_whole_model_can_be_written_in_this_form(tmp_path):
    model = tiny("qwen3", dtype=torch.float32)
    remove(model, everything(read_anatomy(model)))
    save_pruned(model, tmp_path / "whole", form="per_layer")
    assert torch.equal(logits(load_pruned(tmp_path / "whole")), logits(model))


def test_a_recipe_takes_the_folder_only_when_it_is_trusted(folder, monkeypatch, tmp_path):
    from shoestring.models import load_model, read_facts
    from shoestring.recipes.model_data import ModelConfig

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(UserError, match=r"own Python code.*\n?.*model\.trust_remote_code=true"):
        read_facts(ModelConfig.model_validate({"model_name_or_path": str(folder)}))
    asked = ModelConfig.model_validate({"model_name_or_path": str(folder), "trust_remote_code": True})
    facts = read_facts(asked)
    model = load_model(facts, asked, device=torch.device("cpu"), dtype=torch.float32)
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    assert torch.equal(logits(model), logits(load_pruned(folder)))
