"""A tiny Trainer of transformers, with what makes resuming hard: dropout, accumulation, a short last step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

STEPS, PER_EPOCH = 14, 6  # 11 batches an epoch, two a step


def model(kind: str, hidden: int = 32) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=40,
        max_position_embeddings=32,
        attention_dropout=0.2,
        tie_word_embeddings=kind == "all weights",
        bos_token_id=None,
        eos_token_id=None,
    )
    base = LlamaForCausalLM(config)
    if kind == "all weights":
        return base
    return get_peft_model(base, LoraConfig(r=4, lora_dropout=0.2, target_modules=["q_proj", "v_proj"]))


def rows(count: int) -> list[dict[str, list[int]]]:
    draw = torch.Generator().manual_seed(1)
    texts = [torch.randint(40, (12,), generator=draw).tolist() for _ in range(count)]
    return [{"input_ids": text, "labels": text} for text in texts]


def trainer(
    folder: Path,
    kind: str,
    callbacks: list[Any],
    *,
    of: type[Trainer] = Trainer,
    hidden: int = 32,
    **more: Any,
) -> Trainer:
    torch.set_num_threads(1)
    given: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        # Logged in the midst of what a killed process has done, too.
        "logging_steps": 1 if kind == "lora" else 4,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        **more,
    }
    arguments = TrainingArguments(output_dir=str(folder), **given)
    evaluated = rows(4) if more.get("eval_strategy") else None
    return of(
        model(kind, hidden), arguments, train_dataset=rows(22), eval_dataset=evaluated, callbacks=callbacks
    )
