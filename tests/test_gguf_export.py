"""GGUF files of every architecture, read back by the package gguf, by transformers, and by our own reader."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from pruning_models import OWN, batches, logits, tiny
from shoestring.models import load_model, read_facts, save_gguf
from shoestring.pruning import prune
from shoestring.recipes.model_data import ModelConfig
from transformers import AutoModelForCausalLM

FAMILIES = tuple(OWN)
ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}
QUANTIZED = ("f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
LEAVES = {
    "embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, str]]:
    """Keys, tensors as float32 and the types of the tensors, by the package gguf."""
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    return keys, tensors, {t.name: t.tensor_type.name for t in reader.tensors}


def stored_name(name: str, family: str) -> str:
    """By hand: which tensor of the file holds the parameter `name`."""
    gemma = family in ("gemma2", "gemma3_text")
    leaves = LEAVES | {"post_attention_layernorm": "post_attention_norm" if gemma else "ffn_norm"}
    (leaf,) = [leaf for key, leaf in leaves.items() if f".{key}." in f".{name}"]
    layer = f"blk.{name.split('.')[2]}." if ".layers." in name else ""
    return layer + leaf + "." + name.rpartition(".")[2]


def stored_values(name: str, value: np.ndarray, family: str, head_dim: int) -> np.ndarray:
    """By hand, row by row: rotary halves into pairs for Llama and Mistral, 1 added to Gemma's norms."""
    if "gemma" in family and "norm" in name:
        return value + np.float32(1)
    if family not in ("llama", "mistral") or not (".q_proj." in name or ".k_proj." in name):
        return value
    result = np.empty_like(value)
    for row in range(len(value)):
        head, place = divmod(row, head_dim)
        half, pair = divmod(place, head_dim // 2)
        result[head * head_dim + 2 * pair + half] = value[row]
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_and_key_is_where_llama_cpp_looks(family: str, tmp_path: Path) -> None:
    given = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    model = tiny(family, dtype=torch.float32, **given)
    written = save_gguf(model, tmp_path / "m.gguf", quantize="f32", name="small")
    keys, tensors, types = read(written.path)
    architecture = ARCHITECTURES.get(family, family)
    config = model.config
    expected = {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": "small",
        "general.file_type": 0,
        "general.quantization_version": 2,
        "tokenizer.ggml.model": "none",
    }
    here = {
        "block_count": 3,
        "context_length": 5 if family == "mistral" else 64,
        "embedding_length": 64,
        "feed_forward_length": 40,
        "attention.head_count": 8,
        "attention.head_count_kv": 4,
        "attention.key_length": config.head_dim if family != "qwen2" else 8,
        "attention.value_length": config.head_dim if family != "qwen2" else 8,
        "attention.layer_norm_rms_epsilon": pytest.approx(config.rms_norm_eps),
        "rope.dimension_count": config.head_dim if family != "qwen2" else 8,
        "rope.freq_base": 10000.0,
        "vocab_size": 61,
    }
    if family == "gemma2":
        here |= {
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "attention.sliding_window": 5,
        }
    if family == "gemma3_text":
        here |= {
            "attention.sliding_window": 5,
            "attention.sliding_window_pattern": 2,
            "rope.freq_base": 1_000_000.0,
            "rope.freq_base_swa": 10000.0,
        }
    found = {name: value for name, value in keys.items() if not name.startswith("GGUF.")}
    assert found == expected | {f"{architecture}.{name}": value for name, value in here.items()}
    parameters = dict(model.named_parameters())
    assert set(tensors) == {stored_name(name, family) for name in parameters}
    assert set(types.values()) == {"F32"}
    for name, parameter in parameters.items():
        value = stored_values(name, parameter.detach().numpy(), family, here["rope.dimension_count"])
        assert np.array_equal(tensors[stored_name(name, family)], value), name
    assert (written.error, written.architecture) == (0.0, architecture)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_transformers_reads_the_same_model(family: str, tmp_path: Path) -> None:
    given = {"sliding_window": None} if family == "mistral" else {}
    model = tiny(family, dtype=torch.float32, **given)
    save_gguf(model, tmp_path / "m.gguf", quantize="f32")
    # its reader leaves settings of these out, such as head_dim; their keys are tested above
    own = {"config": model.config} if "gemma" in family or family == "qwen3" else {}
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32, **own)
    assert (again.config.tie_word_embeddings, again.config.vocab_size) == (
        model.config.tie_word_embeddings,
        61,
    )
    assert (logits(again) - logits(model)).abs().max() < 1e-5


@pytest.mark.parametrize("quantize", QUANTIZED)
def test_types_round_as_their_formulas_say(quantize: str, tmp_path: Path) -> None:
    """A block of 32 numbers has one scale: the error of each is at most half a step of its block."""
    model = tiny("llama", dtype=torch.float32, intermediate_size=96)
    written = save_gguf(model, tmp_path / "m.gguf", quantize=quantize)
    plain = read(save_gguf(model, tmp_path / "p.gguf", quantize="f32").path)[1]
    _, tensors, types = read(written.path)
    largest = 0.0
    for name, value in plain.items():
        finer = quantize[:2] in ("q4", "q5") and name in ("token_embd.weight", "output.weight")
        kind = "f32" if value.ndim == 1 else "q8_0" if finer else quantize
        assert types[name] == kind.upper()
        off = np.abs(tensors[name] - value)
        largest = max(largest, float(np.linalg.norm(off) / np.linalg.norm(value)))
        assert (off <= allowed(value, kind)).all(), name
    assert written.error == pytest.approx(largest, rel=1e-4)
    assert largest > 1e-5
    assert written.bytes == written.path.stat().st_size


def allowed(value: np.ndarray, kind: str) -> np.ndarray:
    """The largest error of each number; scales are stored in float16, hence the last per mille."""
    if kind in ("f32", "f16", "bf16"):
        return np.abs(value) * {"f32": 0, "f16": 2**-11, "bf16": 2**-8}[kind] + (kind == "f16") * 2**-24
    blocks = value.reshape(-1, 32)
    reach, span = np.abs(blocks).max(1), blocks.max(1) - blocks.min(1)
    # with an offset the levels span the block; without, they go from -2^(bits-1) steps to one step less
    step = {
        "q8_0": reach / 127 / 2,
        "q5_1": span / 31 / 2,
        "q5_0": reach / 16,
        "q4_1": span / 15 / 2,
        "q4_0": reach / 8,
    }[kind]
    return np.repeat(step * 1.01 + reach * 2e-3, 32).reshape(value.shape)


@pytest.mark.parametrize(("quantize", "tolerance"), [("f16", 2e-3), ("q8_0", 0.03), ("q4_0", 0.4)])
def test_quantised_logits_stay_near(quantize: str, tolerance: float, tmp_path: Path) -> None:
    model = tiny("llama", dtype=torch.float32, intermediate_size=96)
    path = save_gguf(model, tmp_path / "m.gguf", quantize=quantize).path
    config = ModelConfig(model_name_or_path=str(path))
    again = load_model(read_facts(config), config, device=torch.device("cpu"), dtype=torch.float32)
    difference = (logits(again) - logits(model)).norm() / logits(model).norm()
    assert tolerance / 100 < difference < tolerance


def test_bfloat16_weights_are_kept_to_the_bit(tmp_path: Path) -> None:
    model = tiny("qwen3", dtype=torch.bfloat16)
    path = save_gguf(model, tmp_path / "m.gguf", quantize="bf16").path
    config = ModelConfig(model_name_or_path=str(path))
    again = load_model(read_facts(config), config, device=torch.device("cpu"), dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name


def test_a_folder_gives_the_same_bytes_as_the_model(tmp_path: Path) -> None:
    from gguf_tokenizers import tokenizer

    model = tiny("llama", dtype=torch.bfloat16, vocab_size=430)
    words = tokenizer("llama-bpe")
    words.pad_token = "<|im_start|>"
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    files = [save_gguf(model, tmp_path / "0.gguf", tokenizer=words, name="x")]
    for number, folder in enumerate(("one", "many"), 1):
        words.save_pretrained(tmp_path / folder)
        files.append(save_gguf(tmp_path / folder, tmp_path / f"{number}.gguf", name="x"))
    first, second, third = (file.path.read_bytes() for file in files)
    assert first == second == third


def test_many_blocks_give_the_same_bytes_as_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny("llama", dtype=torch.float32, attention_bias=True, intermediate_size=96)
    one = save_gguf(model, tmp_path / "one.gguf", quantize="q8_0", name="x")
    monkeypatch.setattr("shoestring.models.gguf_quantize._BLOCK_ELEMENTS", 192)  # three rows of 64, two of 96
    many = save_gguf(model, tmp_path / "many.gguf", quantize="q8_0", name="x")
    assert many.path.read_bytes() == one.path.read_bytes()
    assert many.error == pytest.approx(one.error)


def test_llama3_divisors_come_from_the_models_own_frequencies(tmp_path: Path) -> None:
    rule = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    model = tiny("llama", dtype=torch.float32, rope_parameters=rule, head_dim=16)
    _, tensors, _ = read(save_gguf(model, tmp_path / "m.gguf", quantize="f32").path)
    plain = 500000.0 ** -(np.arange(8) / 8)
    assert np.allclose(
        tensors["rope_freqs.weight"], plain / model.model.rotary_emb.inv_freq.numpy(), rtol=1e-5
    )
    assert tensors["rope_freqs.weight"].max() == pytest.approx(8)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
            {"type": "yarn", "factor": 4.0, "original_context_length": 16},
        ),
    ],
)
def test_rotary_scaling_keys(rule: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    model = tiny("qwen2", dtype=torch.float32, rope_parameters={"rope_theta": 10000.0, **rule})
    keys, _, _ = read(save_gguf(model, tmp_path / "m.gguf", quantize="f32").path)
    found = {key.rpartition(".")[2]: value for key, value in keys.items() if ".rope.scaling." in key}
    assert found == expected


@pytest.mark.parametrize(
    ("family", "layers", "scalar", "fixed"),
    # 46 and 62 layers are the 27B models to llama.cpp, whose queries it scales by hidden size / heads
    [("gemma2", 3, 40, 16), ("gemma2", 46, 16, 8), ("gemma3_text", 3, 40, 16), ("gemma3_text", 62, 16, 8)],
)
def test_the_scale_of_attention_goes_into_queries(
    family: str, layers: int, scalar: int, fixed: int, tmp_path: Path
) -> None:
    given = {"num_hidden_layers": layers, "query_pre_attn_scalar": scalar, "layer_types": None}
    model = tiny(family, dtype=torch.float32, **given)
    _, tensors, _ = read(save_gguf(model, tmp_path / "m.gguf", quantize="f32").path)
    attention = model.model.layers[1].self_attn
    if family == "gemma2":
        name, value = "blk.1.attn_q.weight", attention.q_proj.weight
    else:
        name, value = "blk.1.attn_q_norm.weight", 1 + attention.q_norm.weight
    expected = value.detach().double().numpy() / math.sqrt(scalar) * math.sqrt(fixed)
    assert np.allclose(tensors[name], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "kinds", "expected"),
    [
        ("gemma2", "wFw", (64, {"sliding_window": 5})),
        ("gemma2", "FFF", (64, {"sliding_window": 64, "sliding_window_pattern": 4})),
        ("gemma2", "wwF", (64, {"sliding_window": 5, "sliding_window_pattern": 3})),
        ("gemma2", "FwF", (5, {"sliding_window": 5})),
        ("gemma3_text", "www", (64, {"sliding_window": 5})),
        ("gemma3_text", "FFF", (64, {})),
        ("gemma3_text", "wwwwF", (64, {"sliding_window": 5, "sliding_window_pattern": 5})),
        ("gemma3_text", "wwwwwF", (64, {"sliding_window": 5})),
        ("gemma3_text", "wwF", (64, {"sliding_window": 5, "sliding_window_pattern": 3})),
        ("qwen2", "FFw", (5, {})),
    ],
)
def test_attention_windows(
    family: str, kinds: str, expected: tuple[int, dict[str, int]], tmp_path: Path
) -> None:
    types = ["sliding_attention" if kind == "w" else "full_attention" for kind in kinds]
    extra = {"use_sliding_window": True, "sliding_window": 5} if family == "qwen2" else {}
    model = tiny(family, dtype=torch.float32, layer_types=types, num_hidden_layers=len(kinds), **extra)
    keys, _, _ = read(save_gguf(model, tmp_path / "m.gguf", quantize="f32").path)
    prefix = keys["general.architecture"]
    found = {key.rpartition(".")[2]: value for key, value in keys.items() if "sliding_window" in key}
    assert (keys[f"{prefix}.context_length"], found) == expected


@pytest.mark.parametrize("compensate", [False, True])
def test_layers_of_different_widths_go_out_as_deci(compensate: bool, tmp_path: Path) -> None:
    model = tiny("llama", dtype=torch.float32)
    options: dict[str, Any] = {"parts": ("neurons", "groups"), "widths": "per_layer"}
    prune(model, batches(), method="flap", ratio=0.2, compensate=compensate, **options)
    written = save_gguf(model, tmp_path / "m.gguf", quantize="f32")
    keys, tensors, _ = read(written.path)
    layers = model.model.layers
    neurons = [layer.mlp.down_proj.weight.shape[1] for layer in layers]
    groups = [layer.self_attn.k_proj.weight.shape[0] // 8 for layer in layers]
    assert len(set(neurons)) > 1
    assert len(set(groups)) > 1
    assert keys["general.architecture"] == "deci"
    assert keys["deci.feed_forward_length"] == neurons
    assert keys["deci.attention.head_count_kv"] == groups
    assert keys["deci.attention.head_count"] == [2 * count for count in groups]
    assert ("blk.1.attn_output.bias" in tensors) == compensate
    for name, parameter in model.named_parameters():
        value = stored_values(name, parameter.detach().numpy(), "llama", 8)
        assert np.array_equal(tensors[stored_name(name, "llama")], value), name
    assert any("deci" in note for note in written.notes)


def test_qwen2_with_fewer_heads_is_written_as_llama(tmp_path: Path) -> None:
    """llama.cpp wants heads · head_dim = hidden size for qwen2; a llama with biases computes the same."""
    model = tiny("qwen2", dtype=torch.float32)
    prune(model, batches(), method="flap", ratio=0.2, parts=("groups",))
    keys, tensors, _ = read(save_gguf(model, tmp_path / "m.gguf", quantize="f32").path)
    assert keys["general.architecture"] == "llama"
    bias = model.model.layers[0].self_attn.q_proj.bias.detach().numpy()
    assert np.array_equal(tensors["blk.0.attn_q.bias"], stored_values("x.q_proj.bias", bias, "llama", 8))
