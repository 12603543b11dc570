"""Does the published order hold from scratch? A 14M Llama over bytes, trained on the text of GSM8K.

AdamW, GaLore, APOLLO, APOLLO-Mini, FRUGAL and COSMOS with the same number of steps and tokens, each at the
better of two rates: an AdamW rate of 3e-3 times its factor in optimizers/rates.py, and a third of that.
Linear warm-up over a tenth, cosine to a tenth of the peak, norm clipped to 1, as in the papers' runs, which
are a thousand times longer: this shows what a run of minutes can, and no more.

    python benchmarks/pretrain.py --gsm8k train.jsonl
"""

from __future__ import annotations

import math
import time
from typing import Any

import gsm8k
import torch
from pydantic import TypeAdapter
from shoestring.optimizers import (
    build_optimizer,
    clip_by_global_norm,
    rate_over_adamw,
    set_rate,
    slots,
    state_bytes,
)
from shoestring.recipes.optimizers import OptimizerConfig
from torch import Tensor, nn

LENGTH, ROWS = 256, 8
ADAMW_RATE = 3e-3
CHOICES: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw"},
    "galore": {"name": "galore", "update_proj_gap": 50},
    "apollo": {"name": "apollo", "update_proj_gap": 50},
    "apollo_mini": {"name": "apollo_mini", "update_proj_gap": 50},
    "frugal": {"name": "frugal", "update_proj_gap": 50, "state_free_scale": 1.0},
    "cosmos": {"name": "cosmos"},
}


def model() -> nn.Module:
    """A Llama of 14M parameters with random weights, always the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=6,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def batch(text: Tensor, generator: torch.Generator) -> Tensor:
    """[ROWS, LENGTH + 1] bytes from random places."""
    starts = torch.randint(len(text) - LENGTH - 1, (ROWS,), generator=generator)
    return torch.stack([text[s : s + LENGTH + 1] for s in starts.tolist()])


def loss_of(net: Any, tokens: Tensor) -> Tensor:
    """Mean loss of a byte."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = net(input_ids=tokens[:, :-1]).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def train(name: str, rate: float, steps: int, text: Tensor, held_out: Tensor) -> tuple[float, float]:
    """Held-out loss after `steps`, and seconds of a step."""
    net = model()
    optimizer = build_optimizer(net, TypeAdapter(OptimizerConfig).validate_python(CHOICES[name]))
    generator = torch.Generator().manual_seed(1)
    began = time.perf_counter()
    for step in range(steps):
        warm = max(1, steps // 10)
        progress = (step - warm) / max(1, steps - warm)
        factor = (step + 1) / warm if step < warm else 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
        set_rate(optimizer, rate * factor)
        loss_of(net, batch(text, generator)).backward()
        clip_by_global_norm(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    seconds = (time.perf_counter() - began) / steps
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        losses = [float(loss_of(net, batch(held_out, generator))) for _ in range(8)]
    return sum(losses) / len(losses), seconds


def main() -> None:
    """Print the table."""
    parser = gsm8k.arguments(__doc__)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    rows = gsm8k.rows(options.gsm8k)
    texts = [row["question"] + "\n" + row["answer"] + "\n\n" for row in rows]
    cut = int(0.95 * len(texts))
    text, held_out = (
        torch.tensor(list("".join(part).encode()), dtype=torch.long) for part in (texts[:cut], texts[cut:])
    )
    net = model()
    count = sum(p.numel() for p in net.parameters())
    print(f"{count / 1e6:.1f}M parameters, {options.steps} steps of {ROWS * LENGTH} bytes")
    print("| optimizer | held-out loss by rate | best | state B/param | s/step |")
    print("|---|---|---|---|---|")
    for name, given in CHOICES.items():
        start = ADAMW_RATE * rate_over_adamw(given["name"])
        found = {rate: train(name, rate, options.steps, text, held_out) for rate in (start / 3, start)}
        best = min(found.values())
        config = TypeAdapter(OptimizerConfig).validate_python(given)
        held = state_bytes(config, slots(net), torch.float32) / count
        print(
            f"| {name} | "
            + ", ".join(f"{rate:.1e}: {loss:.3f}" for rate, (loss, _) in found.items())
            + f" | {best[0]:.3f} | {held:.2f} | {best[1]:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
