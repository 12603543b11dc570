"""One whole training step of a Llama-shaped model, LoRA and full fine-tuning: before and after the fused ops.

    plain   transformers' and PEFT's own modules, all logits at once, SHOESTRING_OPS=torch
    fused   use_fused and cross_entropy_sum, SHOESTRING_OPS=torch
    ours    the same, each operation by the provider that is chosen here

All three clip and step with `optimizers.AdamW` (bf16 weights rounded at random and 8-bit state in full
fine-tuning), and start from the same random weights: their first losses and norms must agree. The layers have
Llama-3-8B's shapes, there are just fewer of them; `--tiny` is for a try on a CPU. Time is the median of
steps in turns, memory the peak of a step above weights and states.

    python benchmarks/ops_whole_step.py --device cuda --trace traces
    python benchmarks/ops_whole_step.py --device cpu --tiny --trace traces
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from ops_timing import Row, extra_memory, median_seconds
from peft import LoraConfig, get_peft_model
from shoestring.ops import cross_entropy_sum, providers, use_fused
from shoestring.optimizers import AdamW, clip_by_global_norm
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONTENDERS = ("plain", "fused", "ours")
Step = Callable[[], tuple[Tensor, Tensor]]
"""Gives the loss and the gradients' norm."""


@dataclass(frozen=True)
class Size:
    """Shapes of the model and of a step of `batch` sequences of `length` tokens."""

    hidden: int = 4096
    inner: int = 14336
    vocabulary: int = 128256
    heads: int = 32
    key_value_heads: int = 8
    layers: int = 8
    batch: int = 4
    length: int = 2048

    @property
    def linears(self) -> int:
        """Weights of the layers' matrices."""
        narrow = self.hidden * self.key_value_heads // self.heads
        return self.layers * self.hidden * (2 * self.hidden + 2 * narrow + 3 * self.inner)

    @property
    def head(self) -> int:
        """Weights of the output head, and of the embedding."""
        return self.vocabulary * self.hidden

    def flops(self, lora: bool) -> float:
        """Of a step's products: a frozen weight has no gradient of its own; causal attention is half full."""
        tokens = self.batch * self.length
        attention = 6.0 * tokens * self.length * self.hidden * self.layers
        return (4.0 if lora else 6.0) * tokens * (self.linears + self.head) + attention

    def bytes(self, lora: bool) -> float:
        """Read and written at least: frozen weights twice; of trained ones also gradients and states."""
        weights = self.linears + self.head
        if lora:
            return 4.0 * weights
        # read in forward and in backward, gradient written, then the step: 10 bytes a weight, scales beside
        return 6.0 * weights + 10.06 * (weights + self.head)


TINY = Size(64, 176, 500, 4, 2, 2, 2, 32)
CPU = Size(576, 1536, 49152, 9, 3, 2, 1, 256)


def rows(device: torch.device) -> list[Row]:
    """LoRA and full fine-tuning: on CUDA 8 layers of Llama-3-8B, on a CPU 2 of SmolLM2-135M."""
    return run(Size(), device) if device.type == "cuda" else run(CPU, device, rounds=3)


def h200_rows() -> list[Row]:
    """What the steps cannot do without, for all 32 layers of Llama-3-8B."""
    return [_row(Size(layers=32), lora, {}, {}) for lora in (True, False)]


def run(size: Size, device: torch.device, trace: Path | None = None, rounds: int = 5) -> list[Row]:
    """Both steps. With `trace` each contender's step is also recorded into that folder."""
    found = []
    for lora in (True, False):
        steps = {name: _step(name, size, lora, device) for name in CONTENDERS}
        _check({name: [float(part) for part in step()] for name, step in steps.items()})
        seconds = median_seconds(steps, device, rounds=rounds)
        memory = {name: extra_memory(step, device) for name, step in steps.items()}
        found.append(_row(size, lora, seconds, memory))
        if trace is not None:
            for name, step in steps.items():
                _record(step, trace / f"{'lora' if lora else 'full'}-{name}", device)
        steps.clear()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def _check(first: dict[str, list[float]]) -> None:
    """RuntimeError where losses or norms of the first steps differ by more than bf16 explains."""
    for values, allowed in zip(zip(*first.values(), strict=True), (5e-3, 3e-2), strict=True):
        if not max(values) - min(values) <= allowed * max(values):
            raise RuntimeError(f"the contenders do not compute the same: loss and norm of {first}")


def _row(size: Size, lora: bool, seconds: dict[str, float], memory: dict[str, int]) -> Row:
    kind, tokens = "LoRA" if lora else "full", f"{size.batch}x{size.length}"
    name = f"{kind} step, {size.layers} layers of {size.hidden}, {tokens} tokens"
    rate = f"; {size.batch * size.length / seconds['ours']:.0f} tokens/s" if seconds else ""
    note = f"memory above weights and states{rate}"
    return Row(name, seconds, bytes=size.bytes(lora), flops=size.flops(lora), memory=memory, note=note)


def _model(size: Size, lora: bool, device: torch.device) -> nn.Module:
    """Random weights in bf16, the same at each call."""
    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        vocab_size=size.vocabulary,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        num_hidden_layers=size.layers,
        rope_theta=500000.0,
        tie_word_embeddings=False,
        use_cache=False,
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model: nn.Module = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    if lora:
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS))
    return model.train()


def _step(name: str, size: Size, lora: bool, device: torch.device) -> Step:
    """A whole step of a model of its own: forward, loss, backward, clip, optimizer."""
    model = _model(size, lora, device)
    if name != "plain":
        use_fused(model)
    causal = model.get_base_model() if lora else model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(trained, lr=1e-5, state_bits=32 if lora else 8, weights="sr")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(size.vocabulary, (size.batch, size.length), generator=generator).to(device)
    labels = ids[:, 1:].reshape(-1)

    def step() -> tuple[Tensor, Tensor]:
        with nullcontext() if name == "ours" else _pytorchs_own():
            hidden = causal.model(input_ids=ids).last_hidden_state[:, :-1].reshape(len(labels), -1)
            head = causal.lm_head.weight
            if name == "plain":
                loss = nn.functional.cross_entropy((hidden @ head.t()).float(), labels)
            else:
                loss = cross_entropy_sum(hidden, head, labels) / len(labels)
            loss.backward()
            norm = clip_by_global_norm(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach(), norm

    return step


@contextmanager
def _pytorchs_own() -> Iterator[None]:
    """Inside, every operation is PyTorch's."""
    before = os.environ.get("SHOESTRING_OPS")
    os.environ["SHOESTRING_OPS"] = "torch"
    try:
        yield
    finally:
        del os.environ["SHOESTRING_OPS"]
        if before is not None:
            os.environ["SHOESTRING_OPS"] = before


def _record(step: Step, path: Path, device: torch.device) -> None:
    """One step as a Chrome trace (chrome://tracing, ui.perfetto.dev), and its longest operations as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    profile.export_chrome_trace(f"{path}.json.gz")
    longest = f"self_{'cuda' if device.type == 'cuda' else 'cpu'}_time_total"
    table = profile.key_averages().table(sort_by=longest, row_limit=25, max_name_column_width=70)
    path.with_suffix(".txt").write_text(table, encoding="utf-8")


def main() -> int:
    whole = Size()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--layers", type=int, default=whole.layers)
    parser.add_argument("--batch", type=int, default=whole.batch, help="sequences a step")
    parser.add_argument("--length", type=int, default=whole.length, help="tokens a sequence")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--trace", type=Path, help="folder for a Chrome trace and a table of each step")
    parser.add_argument("--tiny", action="store_true", help="a model of 2 layers of 64, for a try")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; --device cpu --tiny tries the same steps on a CPU", file=sys.stderr)
        return 2
    size = TINY if given.tiny else Size(layers=given.layers, batch=given.batch, length=given.length)
    device = torch.device(given.device)
    for row in run(size, device, given.trace, given.rounds):
        print(f"{row.name}: {row.flops / 1e12:.3g} TFLOP; {row.note}")
        for name, seconds in row.seconds.items():
            faster = row.seconds["plain"] / seconds
            memory = row.memory[name] / 1e9
            print(f"  {name:8} {seconds * 1e3:10.2f} ms  x{faster:5.2f}  {memory:8.4f} GB above", flush=True)
    print("ran last: " + ", ".join(f"{name} by {by}" for name, by in sorted(providers.used.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
