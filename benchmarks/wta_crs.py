"""What sampled activations (WTA-CRS) save and cost: bytes kept, error of the gradient, time of a step.

SmolLM2-135M trained whole, on real text: one sequence of this repository's documentation. The bytes are those
that the layers keep between the forward and the backward pass (the loss works in chunks and keeps no logits).
The error is the distance of the sampled gradient of all sampled weights from the exact one, relative to the
exact one's norm; beside it stands the distance between the gradients of two other sequences, the noise
that every training step has anyway. The ratios take turns in one process; medians are printed.
Processor seconds are printed too: on a machine that other programs use they are the steadier figure.

With `--steps` each ratio also trains that many steps (AdamW, one sequence a step, float32 weights under bf16
autocast) from the same start on the same sequences, and the loss on the last four sequences is printed.

    python benchmarks/wta_crs.py [--tokens 1024] [--rounds 3] [--layers 30] [--steps 0] [--rate 5e-5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from gsm8k import base_model
from shoestring.ops import cross_entropy_sum, keep_freed_memory, use_fused, use_wta_crs
from shoestring.ops.wta_crs import SampledLinear
from shoestring.plan.live_bytes import LiveBytes
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

RATIOS = (1.0, 0.5, 0.3, 0.1)


def load(layers: int, dtype: torch.dtype) -> nn.Module:
    """The model, ready to train."""
    model = AutoModelForCausalLM.from_pretrained(base_model(), dtype=dtype)
    model.model.layers = model.model.layers[:layers]
    use_fused(model)
    return model.train()


def documentation() -> Tensor:
    """All tokens of docs/."""
    pages = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    ids: Tensor = AutoTokenizer.from_pretrained(base_model())(text, return_tensors="pt")["input_ids"][0]
    return ids


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Next-token loss of one sequence [T], mean."""
    hidden = model.model(input_ids=ids[None], use_cache=False).last_hidden_state[0, :-1]
    return cross_entropy_sum(hidden, model.lm_head.weight, ids[1:]) / (len(ids) - 1)


def gradient(model: nn.Module, ids: Tensor) -> Tensor:
    """Of all sampled weights, as one float32 vector."""
    model.zero_grad()
    loss_of(model, ids).backward()
    layers = [m for m in model.modules() if isinstance(m, SampledLinear)]
    return torch.cat([m.weight.grad.flatten().float() for m in layers])


def kept(model: nn.Module, ids: Tensor) -> int:
    """Bytes alive after the layers' forward pass."""
    with LiveBytes(ids.device) as live:
        hidden = model.model(input_ids=ids[None], use_cache=False).last_hidden_state
        found = live.now
        del hidden
    return found


def timed(model: nn.Module, ids: Tensor) -> tuple[float, float]:
    """(wall, processor) seconds of forward and backward."""
    wall, processor = time.perf_counter(), time.process_time()
    loss_of(model, ids).backward()
    return time.perf_counter() - wall, time.process_time() - processor


def loss_after(ratio: float, steps: int, rate: float, layers: int, rows: list[Tensor]) -> tuple[float, float]:
    """Held-out loss before and after `steps` steps; the same rows in the same order for every ratio."""
    model = load(layers, torch.float32)
    train, held_out = rows[:-4], rows[-4:]
    use_wta_crs(model, ratio)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)

    def score() -> float:
        model.eval()
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            found = statistics.mean(loss_of(model, row).item() for row in held_out)
        model.train()
        return found

    before = score()
    torch.manual_seed(0)
    for step in range(steps):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, train[step % len(train)])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return before, score()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--steps", type=int, default=0, help="also train so many steps with each ratio")
    parser.add_argument("--rate", type=float, default=5e-5)
    given = parser.parse_args()
    torch.manual_seed(0)
    keep_freed_memory()
    model, text = load(given.layers, torch.bfloat16), documentation()
    ids = text[: given.tokens]
    use_wta_crs(model, 1.0)
    exact = gradient(model, ids)
    others = [gradient(model, text[n * given.tokens :][: given.tokens]) for n in (1, 2)]
    noise = (others[0] - others[1]).norm() / (others[0].norm() + others[1].norm()) * 2
    del others
    bytes_, errors = {}, {}
    seconds: dict[float, list[tuple[float, float]]] = {ratio: [] for ratio in RATIOS}
    for ratio in RATIOS:
        use_wta_crs(model, ratio)
        bytes_[ratio] = kept(model, ids)
        errors[ratio] = float((gradient(model, ids) - exact).norm() / exact.norm())
    for _ in range(given.rounds):
        for ratio in RATIOS:
            use_wta_crs(model, ratio)
            seconds[ratio].append(timed(model, ids))
    print(f"{given.layers} layers, {len(ids)} tokens, {next(model.parameters()).dtype}")
    print(f"gradients of two other sequences differ by {noise:.2f} of their norm")
    print(f"{'ratio':>6} {'kept MB':>9} {'of all':>7} {'error':>7} {'seconds':>8} {'CPU s':>6}")
    for ratio in RATIOS:
        share = bytes_[ratio] / bytes_[1.0]
        wall, processor = (statistics.median(column) for column in zip(*seconds[ratio], strict=True))
        print(
            f"{ratio:6} {bytes_[ratio] / 1e6:9.1f} {share:7.0%} {errors[ratio]:7.2f} {wall:8.2f} "
            f"{processor:6.2f}",
            flush=True,
        )
    del model, exact
    rows = list(text.split(given.tokens)[:-1])
    for ratio in RATIOS if given.steps else ():
        before, after = loss_after(ratio, given.steps, given.rate, given.layers, rows)
        print(f"{ratio:6} held-out loss {before:.3f} -> {after:.3f} after {given.steps} steps", flush=True)


if __name__ == "__main__":
    main()
