"""What each pruning criterion leaves of SmolLM2-135M: perplexity without any training after the cut.

Calibration: windows of 256 tokens of GSM8K's training rows. Perplexity is measured on windows of the rows
kept out and, as another kind of text, of this repository's documentation. `uniform` and `per_layer` widths
stand beside each other, as do the updates of the weights that stay.

    python benchmarks/pruning.py --gsm8k train.jsonl [--ratio 0.1] [--calibration 16] [--windows 8]
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gsm8k
import torch
from shoestring.ops import cross_entropy_sum, keep_freed_memory
from shoestring.pruning import prune
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

LENGTH = 256
CASES: tuple[dict[str, Any], ...] = (
    {"method": "random"},
    {"method": "magnitude"},
    {"method": "wanda"},
    {"method": "flap"},
    {"method": "flap", "compensate": True},
    {"method": "flap", "widths": "per_layer"},
    {"method": "cfsp"},
    {"method": "cfsp", "widths": "per_layer"},
    {"method": "cfsp_weighted"},
    *({"method": "wanda", "refit": True, "ridge": ridge} for ridge in (1e-6, 1e-3, 1e-2, 0.1, 1.0)),
    {"method": "cfsp", "refit": True},
    {"method": "cfsp", "widths": "per_layer", "refit": True},
    {"method": "modegpt"},
    {"method": "flap", "parts": ("neurons", "groups")},
    {"method": "shortgpt"},
)


def windows(text: str, count: int) -> Tensor:
    """The first `count` windows of a text, int64 [count, LENGTH]."""
    ids = AutoTokenizer.from_pretrained(gsm8k.base_model())(text, return_tensors="pt")["input_ids"][0]
    return ids[: count * LENGTH].reshape(count, LENGTH)


def conversations(path: Path) -> str:
    """Questions and answers as plain text."""
    return "\n\n".join(f"{row['question']}\n{row['answer']}" for row in gsm8k.rows(path))


def documentation() -> str:
    """All of docs/."""
    pages = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
    return "\n".join(page.read_text(encoding="utf-8") for page in pages)


@torch.no_grad()
def perplexity(model: Any, ids: Tensor) -> float:
    """exp of the mean loss of the next token."""
    total = 0.0
    for window in ids:
        hidden = model.model(input_ids=window[None], use_cache=False).last_hidden_state[0, :-1]
        total += float(cross_entropy_sum(hidden, model.lm_head.weight, window[1:]))
    return math.exp(total / (ids.numel() - len(ids)))


def load() -> Any:
    return AutoModelForCausalLM.from_pretrained(gsm8k.base_model(), dtype=torch.float32).eval()


def row(name: str, left: float, values: Sequence[float], seconds: float) -> None:
    cells = "".join(f"{value:>12.2f}" for value in values)
    print(f"{name:<38}{left:>8.1%}{cells}{seconds:>9.0f}", flush=True)


def main() -> None:
    parser = gsm8k.arguments(__doc__)
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--calibration", type=int, default=16)
    parser.add_argument("--windows", type=int, default=8)
    options = parser.parse_args()
    keep_freed_memory()
    train, held_out = gsm8k.split(options.gsm8k)
    calibration = list(windows(conversations(train), options.calibration).split(4))
    texts = [windows(text, options.windows) for text in (conversations(held_out), documentation())]
    print(f"{'':<38}{'removed':>8}{'held out':>12}{'docs':>12}{'seconds':>9}")
    row("unpruned", 0.0, [perplexity(load(), ids) for ids in texts], 0)
    for case in CASES:
        model = load()
        began = time.perf_counter()
        result = prune(model, calibration, ratio=options.ratio, **case)
        seconds = time.perf_counter() - began
        extras = [str(value) if key != "parts" else "+".join(value) for key, value in case.items()]
        extras = [key if value == "True" else value for key, value in zip(case, extras, strict=True) if value]
        row(", ".join(extras), result.ratio, [perplexity(model, ids) for ids in texts], seconds)


if __name__ == "__main__":
    main()
