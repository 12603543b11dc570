"""A tiny random model, a tokenizer and conversations in a folder: real files, trained in milliseconds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

SENTENCE = "a bee has five eyes and a cat has two while the sun is one star of many so we count them all day"
WORDS = SENTENCE.split(" ")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def model_folder(path: Path, *, layers: int = 2, seed: int = 0) -> Path:
    """A float32 LlamaForCausalLM of 64 channels with a word-level chat tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    pieces = [
        "<|unk|>",
        "<|im_start|>",
        "<|im_end|>",
        "system",
        "user",
        "assistant",
        "\n",
        *sorted(set(WORDS)),
    ]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<|unk|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = TEMPLATE
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=len(pieces),
            max_position_embeddings=256,
            bos_token_id=None,
            eos_token_id=2,
        )
    )
    model.save_pretrained(path)
    fast.save_pretrained(path)
    return path


def chats(path: Path, rows: int = 64, seed: int = 0) -> Path:
    """A JSON-lines file of conversations of one or two turns."""
    draw = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))

    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            turns = []
            for _ in range(draw.randint(1, 2)):
                turns.append({"role": "user", "content": words(2, 8)})
                turns.append({"role": "assistant", "content": words(2, 12)})
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def recipe(folder: Path, **sections: Any) -> Path:
    """A recipe in `folder` for the tiny model: 12 steps of about 128 tokens; `sections` replace its own."""
    model, data = folder / "model", folder / "chats.jsonl"
    if not model.exists():
        model_folder(model)
    if not data.exists():
        chats(data)
    given: dict[str, Any] = {
        "model": {"model_name_or_path": str(model), "dtype": "float32"},
        "data": {"train": str(data), "eval": 0.1},
        "budget": {"steps": 12},
        "adapter": {"name": "lora", "r": 4},
        "optimizer": {"name": "adamw", "learning_rate": 1e-2},
        "train": {"batch_tokens": 128},
        "eval": {"samples": 1, "max_new_tokens": 4},
        "checkpoint": {"every": 4, "keep_best": False, "in_memory": False},
        "output_dir": str(folder / "run"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**given, **sections}), encoding="utf-8")
    return path
