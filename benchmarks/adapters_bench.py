"""What the processes of benchmarks/adapters.py share: methods, model, rows, training steps, held-out loss."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gsm8k
import torch
from accelerate import Accelerator
from shoestring.adapters import attach
from shoestring.data import Batch, Order, Step, TokenRows, prepare, training_batches
from shoestring.models import load_model, load_tokenizer, read_facts, use_packed_attention
from shoestring.ops import use_fused
from shoestring.optimizers import build_optimizer, set_rate
from shoestring.recipes import DataConfig, LoraAdapter, ModelConfig, SftObjective, SokaAdapter, SvfitAdapter
from shoestring.recipes.model_data import Source
from shoestring.recipes.optimizers import AdamW
from shoestring.recipes.schedules import RexSchedule
from shoestring.schedules import build_schedule
from shoestring.train.engine import NativeEngine
from shoestring.train.evaluation import evaluate
from shoestring.train.objectives import LossModule, build_objective

TOKENS = 512
HELD_OUT = 24
TRIAL_ROWS = 800  # the last training rows, for nothing but the choice of a rate
TRIAL_HELD_OUT = 12  # of these


@dataclass(frozen=True)
class Method:
    """An adapter, or none, and the middle one of its three rates."""

    adapter: LoraAdapter | SvfitAdapter | SokaAdapter | None
    rate: float

    @property
    def same_start(self) -> bool:
        """Whether it starts from the weights alone, whatever the seed."""
        return isinstance(self.adapter, SvfitAdapter | SokaAdapter)


METHODS = {
    "lora": Method(LoraAdapter(), 1.5e-3),
    # by default alpha is such that rank 16 would be LoRA to the bit
    "rslora r64": Method(LoraAdapter(r=64, use_rslora=True), 1.5e-3),
    "dora": Method(LoraAdapter(use_dora=True), 1.5e-3),
    "pissa": Method(LoraAdapter(init_lora_weights="pissa_niter_16"), 5e-4),
    "svfit": Method(SvfitAdapter(), 3e-2),
    "soka": Method(SokaAdapter(), 1.5e-3),
    "full": Method(None, 1.5e-4),
}


class Bench:
    """Model, rows and evaluation of one process."""

    def __init__(self, train: Path) -> None:
        self.source = ModelConfig(model_name_or_path=str(gsm8k.base_model()))
        self.facts = read_facts(self.source)
        tokenizer = load_tokenizer(self.facts, self.source)
        files = gsm8k.chats(train)
        data = DataConfig(train=[Source(path=str(files[0]))], eval=[Source(path=str(files[1]))])
        rows = prepare(data, tokenizer, seed=0, max_length=self.facts.max_positions)
        count = len(rows.train)
        self.train = rows.train.part(0, count - TRIAL_ROWS)
        self.held_out = rows.eval.part(0, HELD_OUT)
        self.trial_train = rows.train.part(count - TRIAL_ROWS, count - TRIAL_HELD_OUT)
        self.trial_held_out = rows.train.part(count - TRIAL_HELD_OUT, count)

    def engine(self, name: str, seed: int) -> NativeEngine:
        """A fresh model that is ready to train."""
        adapter = METHODS[name].adapter
        dtype = torch.float32 if adapter is None else torch.bfloat16
        model: Any = load_model(self.facts, self.source, device=torch.device("cpu"), dtype=dtype)
        use_packed_attention(model)
        model = attach(model, adapter, self.facts, seed=seed)
        use_fused(model)
        loss = LossModule(model, build_objective(SftObjective(), model))
        optimizer = build_optimizer(model, AdamW(weight_decay=0.0))
        return NativeEngine(Accelerator(cpu=True), loss, optimizer, autocast=adapter is None)

    def loss(self, engine: NativeEngine, rows: TokenRows) -> float:
        """Mean loss of an answer's token."""
        engine.loss_module.eval()
        found = evaluate(
            engine,
            engine.accelerator,
            rows,
            compared=len(rows),
            micro_tokens=2 * TOKENS,
            micro_rows=None,
            packed=True,
        )
        engine.loss_module.train()
        return found.loss


def batches(rows: TokenRows, seed: int, steps: int) -> Iterator[tuple[Step, list[Batch]]]:
    """Steps of about TOKENS tokens, in the same order for all methods."""
    order = Order(rows, seed=seed, batch_tokens=TOKENS, micro_tokens=2 * TOKENS, packed=True)
    return iter(training_batches(rows, order, stop=steps))


def train(engine: NativeEngine, rows: TokenRows, seed: int, rate: float, steps: int) -> dict[str, Any]:
    """What `steps` steps took by the clock and of the processor, and their tokens."""
    profile = build_schedule(RexSchedule())
    rise = max(1, round(0.1 * steps))
    engine.loss_module.train()
    tokens, began, processor = 0, time.perf_counter(), time.process_time()
    for number, (step, micro) in enumerate(batches(rows, seed, steps)):
        set_rate(engine.optimizer, rate * min(1.0, (number + 1) / rise) * profile(number / steps))
        engine.forward_backward(micro, step.trained_tokens, lambda: False)
        engine.step(1.0)
        tokens += step.tokens
    return {
        "wall": time.perf_counter() - began,
        "seconds": time.process_time() - processor,
        "tokens": tokens,
    }


def trained_numbers(engine: NativeEngine) -> int:
    return sum(p.numel() for p in engine.loss_module.parameters() if p.requires_grad)
