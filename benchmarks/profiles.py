"""Held-out loss that each schedule buys with the same tokens: GSM8K, LoRA on SmolLM2-135M.

Every profile gets 25 %, 50 % and 100 % of 64 steps of 512 tokens. With a quarter it is tried with seed 0 and
three rates, and further ones until the best has worse neighbours on both sides; with half, with the two that
were best there; with all, with the best of half. The best at each budget goes on to two more seeds.
`constant` is the control: it never comes down.
LoRA of rank 16 on all linear layers, AdamW, bfloat16 base, packed rows, 10 % warm-up, norm clipped to 1.
The held-out rows are the same for all. Tokens are counted and not seconds, so what else runs on the machine
changes no loss. Each run is written to profiles.jsonl as it ends; a second start goes on from there.

    python benchmarks/profiles.py --gsm8k train.jsonl
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gsm8k
import torch
from accelerate import Accelerator
from shoestring.adapters import attach
from shoestring.data import Order, prepare, training_batches
from shoestring.models import load_model, load_tokenizer, read_facts, use_packed_attention
from shoestring.ops import keep_freed_memory, use_fused
from shoestring.optimizers import build_optimizer, set_rate
from shoestring.recipes import (
    AdamW,
    ConstantSchedule,
    CosineSchedule,
    DataConfig,
    LinearSchedule,
    LoraAdapter,
    ModelConfig,
    RexSchedule,
    SftObjective,
    UbaSchedule,
    WsdSchedule,
)
from shoestring.recipes.model_data import Source
from shoestring.schedules import Clock, Limits, Schedule, build_schedule
from shoestring.train.engine import NativeEngine
from shoestring.train.evaluation import evaluate
from shoestring.train.objectives import LossModule, build_objective

TOKENS = 512
SHARES = (0.25, 0.5, 1.0)
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FIRST = (2, 3, 4)
HELD_OUT = 48
WARMUP = 0.1
SCHEDULES = {
    "rex": build_schedule(RexSchedule(warmup_steps=WARMUP)),
    "linear": build_schedule(LinearSchedule(warmup_steps=WARMUP)),
    "cosine": build_schedule(CosineSchedule(warmup_steps=WARMUP)),
    "uba": build_schedule(UbaSchedule(warmup_steps=WARMUP)),
    "wsd": build_schedule(WsdSchedule(warmup_steps=WARMUP)),
    "constant": build_schedule(ConstantSchedule(warmup_steps=WARMUP)),
}


class Setting:
    """Model, rows and evaluation: loaded once, the adapter started anew for each run."""

    def __init__(self, train: Path) -> None:
        source = ModelConfig(model_name_or_path=str(gsm8k.base_model()))
        facts = read_facts(source)
        files = gsm8k.chats(train)
        data = DataConfig(train=[Source(path=str(files[0]))], eval=[Source(path=str(files[1]))])
        self.rows = prepare(data, load_tokenizer(facts, source), seed=0, max_length=facts.max_positions)
        base = load_model(facts, source, device=torch.device("cpu"), dtype=torch.bfloat16)
        use_packed_attention(base)
        use_fused(base)
        self.model = attach(base, LoraAdapter(), facts, seed=0)
        self.objective = build_objective(SftObjective(), self.model)

    def engine(self, seed: int) -> NativeEngine:
        """The adapter at its start for `seed`, with a fresh optimizer."""
        torch.manual_seed(seed)
        for module in self.model.modules():
            if hasattr(module, "reset_lora_parameters"):
                module.reset_lora_parameters("default", True)
        optimizer = build_optimizer(self.model, AdamW(), seed=seed)
        return NativeEngine(
            Accelerator(cpu=True), LossModule(self.model, self.objective), optimizer, autocast=False
        )

    def loss(self, engine: NativeEngine) -> float:
        """Mean loss of an answer token on the held-out rows."""
        rows = self.rows.eval.part(0, HELD_OUT)
        limits = {"micro_tokens": 4 * TOKENS, "micro_rows": None, "packed": True}
        return float(evaluate(engine, engine.accelerator, rows, compared=HELD_OUT, **limits).loss)

    def batches(self, seed: int) -> Any:
        """Micro-batches in an order that follows from the seed."""
        order = Order(self.rows.train, seed=seed, batch_tokens=TOKENS, micro_tokens=2 * TOKENS, packed=True)
        return training_batches(self.rows.train, order)


def train(setting: Setting, schedule: Schedule, rate: float, seed: int, steps: int) -> dict[str, float]:
    """One run: held-out loss, tokens seen, seconds taken."""
    began = time.perf_counter()
    engine = setting.engine(seed)
    engine.loss_module.train()
    clock = Clock(Limits(steps=steps), started=0.0, now=lambda: 0.0, warmup=schedule.warmup)
    for step, micro in setting.batches(seed):
        permit = clock.plan_step(step.tokens)
        if not permit.go:
            break
        set_rate(engine.optimizer, rate * schedule.factor(permit))
        engine.forward_backward(micro, step.trained_tokens, lambda: False)
        if not bool(torch.isfinite(engine.step(1.0))):
            return {"loss": float("inf"), "tokens": clock.tokens, "seconds": time.perf_counter() - began}
        clock.finish_step(0.0, step.tokens)
    return {"loss": setting.loss(engine), "tokens": clock.tokens, "seconds": time.perf_counter() - began}


def tuned(run: Callable[[float], dict[str, Any]]) -> dict[float, dict[str, Any]]:
    """Rows of the rates that were tried, in order: the best is no end of them, unless it is one of RATES."""
    tried = {number: run(RATES[number]) for number in FIRST}
    while True:
        best = min(tried, key=lambda number: tried[number]["loss"])
        new = [n for n in (best - 1, best + 1) if n in range(len(RATES)) and n not in tried]
        if not new:
            return {RATES[number]: tried[number] for number in sorted(tried)}
        tried[new[0]] = run(RATES[new[0]])


class Results:
    """What has been run, kept in a file of JSON lines."""

    def __init__(self, path: Path, setting: Setting) -> None:
        self.path, self.setting = path, setting
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self.found = {tuple(row["run"]): row for row in map(json.loads, lines)}

    def run(self, name: str, steps: int, rate: float, seed: int) -> dict[str, Any]:
        """The run's row: from the file, or made now and added to it."""
        key = (name, steps, rate, seed)
        if key not in self.found:
            row = {"run": key, **train(self.setting, SCHEDULES[name], rate, seed, steps)}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            self.found[key] = row
        return self.found[key]


def main() -> None:
    """Print the table."""
    parser = gsm8k.arguments(__doc__)
    parser.add_argument("--steps", type=int, default=64, help="the whole budget, in steps of 512 tokens")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=list(SCHEDULES), default=list(SCHEDULES))
    options = parser.parse_args()
    keep_freed_memory()
    setting = Setting(options.gsm8k)
    results = Results(gsm8k.WORK / "profiles.jsonl", setting)
    print(f"untrained {setting.loss(setting.engine(0)):.4f}; {HELD_OUT} held-out rows")
    print("| profile | budget | steps | best rate | loss by rate | median | each seed | seconds each |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    promising: dict[str, list[float]] = {}
    for share in SHARES:
        for name in options.only:
            steps = max(1, round(share * options.steps))
            run = partial(results.run, name, steps, seed=0)
            tried = {rate: run(rate) for rate in promising[name]} if name in promising else tuned(run)
            kept = 2 if share == SHARES[0] else 1
            promising[name] = sorted(sorted(tried, key=lambda rate: tried[rate]["loss"])[:kept])
            rate = min(tried, key=lambda rate: tried[rate]["loss"])
            seeds = [results.run(name, steps, rate, seed=seed) for seed in range(options.seeds)]
            losses = [row["loss"] for row in seeds]
            by_rate = ", ".join(f"{tried_rate:.0e}: {row['loss']:.3f}" for tried_rate, row in tried.items())
            times = statistics.median(row["seconds"] for row in [*tried.values(), *seeds[1:]])
            each = ", ".join(f"{loss:.4f}" for loss in losses)
            print(
                f"| {name} | {share:.0%} | {steps} | {rate:.0e} | {by_rate} | "
                f"{statistics.median(losses):.4f} | {each} | {times:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
