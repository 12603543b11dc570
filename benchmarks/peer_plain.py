"""A plain transformers + PEFT loop: batch 8, padded to the longest row, the loss of the model itself."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from gsm8k import encode, rows
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Train a few steps, print one JSON line with each step's seconds and tokens."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16),
        LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    data = [encode(tokenizer, row) for row in rows(options.train)[: 8 * options.steps]]
    steps = []
    for number in range(options.steps):
        batch = data[8 * number : 8 * number + 8]
        longest = max(len(ids) for ids, _ in batch)
        ids = torch.zeros(8, longest, dtype=torch.long)
        labels = torch.full((8, longest), -100)
        mask = torch.zeros_like(ids)
        for row, (tokens, targets) in enumerate(batch):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            labels[row, : len(targets)] = torch.tensor(targets)
            mask[row, : len(tokens)] = 1
        began = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - began
        steps.append((seconds, int(mask.sum()), int((labels[:, 1:] != -100).sum())))
    print(json.dumps({"steps": steps}))


if __name__ == "__main__":
    main()
