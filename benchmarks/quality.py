"""Held-out loss that each optimizer buys with the same seconds: GSM8K, all weights of SmolLM2-135M.

Every optimizer gets `--seconds` of wall clock on two cores: as many steps of 512 tokens as its own step time
(from benchmarks/optimizers.py, which runs first) and the measured forward and backward pass allow, so that
the figures do not change when something else runs on the machine. Each is tried with two rates, one and
three times its start from the table in optimizers/rates.py; the better goes on to two more seeds.
Linear decay to zero, 10 % warm-up, norm clipped to 1, float32 weights, bfloat16 products.

    python benchmarks/optimizers.py && python benchmarks/quality.py --gsm8k train.jsonl
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gsm8k
import torch
from accelerate import Accelerator
from shoestring.data import Order, prepare, training_batches
from shoestring.models import load_model, load_tokenizer, read_facts, use_packed_attention
from shoestring.ops import keep_freed_memory, use_fused, use_int8_weights
from shoestring.optimizers import build_optimizer, rate_over_adamw, set_rate
from shoestring.recipes import DataConfig, ModelConfig, SftObjective
from shoestring.recipes.model_data import Source
from shoestring.train.engine import NativeEngine
from shoestring.train.evaluation import evaluate
from shoestring.train.objectives import LossModule, build_objective

from optimizers import config_of, held_bytes

ADAMW_RATE = 1e-4
TOKENS = 512
HELD_OUT = 24
NAMES = [
    "adamw",
    "adamw 8-bit",
    "lion",
    "apollo",
    "apollo_mini",
    "q_apollo",
    "galore",
    "natural_galore",
    "frugal",
    "frugal svd",
    "cosmos",
    "muon",
    "soap",
    "badam",
    "lomo",
    "adalomo",
    "adafactor",
    "adam_mini",
    "came",
    "schedule_free_adamw",
]


class Setting:
    """Model, rows and evaluation of one process."""

    def __init__(self, train: Path) -> None:
        source = ModelConfig(model_name_or_path=str(gsm8k.base_model()))
        self.facts = read_facts(source)
        tokenizer = load_tokenizer(self.facts, source)
        files = gsm8k.chats(train)
        data = DataConfig(train=[Source(path=str(files[0]))], eval=[Source(path=str(files[1]))])
        self.rows = prepare(data, tokenizer, seed=0, max_length=self.facts.max_positions)
        self.source = source

    def engine(self, name: str, seed: int) -> NativeEngine:
        """A fresh model with its optimizer."""
        torch.manual_seed(seed)
        model = load_model(self.facts, self.source, device=torch.device("cpu"), dtype=torch.float32)
        use_packed_attention(model)
        use_fused(model)
        config = config_of(name)
        if config.name == "q_apollo":
            use_int8_weights(model, config.group_size)
        optimizer = build_optimizer(model, config, seed=seed)
        objective = build_objective(SftObjective(), model)
        return NativeEngine(Accelerator(cpu=True), LossModule(model, objective), optimizer, autocast=True)

    def loss(self, engine: NativeEngine) -> float:
        """Mean loss of an answer token on held-out rows."""
        engine.loss_module.eval()
        rows = self.rows.eval.part(0, HELD_OUT)
        found = evaluate(
            engine,
            engine.accelerator,
            rows,
            compared=HELD_OUT,
            micro_tokens=2048,
            micro_rows=None,
            packed=True,
        )
        engine.loss_module.train()
        return float(found.loss)

    def batches(self, seed: int) -> Any:
        """Micro-batches in a random order."""
        order = Order(self.rows.train, seed=seed, batch_tokens=TOKENS, micro_tokens=2 * TOKENS, packed=True)
        return training_batches(self.rows.train, order)


def train(setting: Setting, name: str, rate: float, seed: int, steps: int) -> dict[str, float]:
    """One run: its held-out loss, and what the state weighs."""
    engine = setting.engine(name, seed)
    engine.loss_module.train()
    constant = name == "schedule_free_adamw"
    for number, (step, micro) in enumerate(setting.batches(seed)):
        if number == steps:
            break
        warm = min(1.0, (number + 1) / max(1, round(0.1 * steps)))
        set_rate(engine.optimizer, rate * warm * (1.0 if constant else 1 - number / steps))
        engine.forward_backward(micro, step.trained_tokens, lambda: False)
        norm = engine.step(1.0)
        if not bool(torch.isfinite(norm)):
            return {"loss": float("nan"), "state": 0.0}
    state = held_bytes(engine.optimizer)
    return {"loss": setting.loss(engine), "state": state / setting.facts.parameters}


def forward_backward_seconds(setting: Setting) -> float:
    """Median seconds of a forward and backward pass of a step."""
    engine = setting.engine("lomo", 0)
    engine.loss_module.train()
    times = []
    for number, (step, micro) in enumerate(setting.batches(0)):
        if number == 8:
            break
        began = time.perf_counter()
        engine.forward_backward(micro, step.trained_tokens, lambda: False)
        times.append(time.perf_counter() - began)
        engine.optimizer.zero_grad(set_to_none=True)
    return statistics.median(times[1:])


def one(setting: Setting, name: str, steps: int, seeds: int) -> dict[str, Any]:
    """Two rates with seed 0, then the better with the other seeds."""
    start = ADAMW_RATE * rate_over_adamw(config_of(name).name)
    tried = {rate: train(setting, name, rate, 0, steps) for rate in (start, 3 * start)}
    finite = {rate: found["loss"] for rate, found in tried.items() if math.isfinite(found["loss"])}
    best = min(finite, key=lambda rate: finite[rate])
    losses = [tried[best]["loss"]]
    losses += [train(setting, name, best, seed, steps)["loss"] for seed in range(1, seeds)]
    return {
        "steps": steps,
        "rate": best,
        "tried": {f"{rate:.1e}": found["loss"] for rate, found in tried.items()},
        "losses": losses,
        "state": tried[best]["state"],
    }


def main() -> None:
    """Print the table."""
    parser = gsm8k.arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=18.0, help="wall clock of each run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=NAMES)
    parser.add_argument("--one", help="for the processes that this one starts")
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    keep_freed_memory()
    setting = Setting(options.gsm8k)
    if options.one:
        print(json.dumps(one(setting, options.one, options.steps, options.seeds)))
        return
    step_times = json.loads((gsm8k.WORK / "optimizers.json").read_text())
    passes = forward_backward_seconds(setting)
    base = setting.loss(setting.engine("lomo", 0))
    print(
        f"forward and backward of {TOKENS} tokens {passes:.2f} s; untrained {base:.4f}; "
        f"{options.seconds:.0f} s each; 2 rates, then {options.seeds} seeds"
    )
    print(
        "| optimizer | steps | best rate | loss by rate | held-out loss, median | each seed | state B/param |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in options.only:
        steps = max(2, int(options.seconds / (passes + step_times[name]["step"] / 1e3)))
        command = [sys.executable, __file__, "--gsm8k", str(options.gsm8k), "--one", name]
        command += ["--steps", str(steps), "--seeds", str(options.seeds)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"| {name} | failed: {done.stderr.strip().splitlines()[-1]} |", flush=True)
            continue
        found = json.loads(done.stdout.strip().splitlines()[-1])
        print(
            f"| {name} | {steps} | {found['rate']:.1e} | "
            + ", ".join(f"{rate}: {loss:.3f}" for rate, loss in found["tried"].items())
            + f" | {statistics.median(found['losses']):.4f} | "
            + ", ".join(f"{loss:.4f}" for loss in found["losses"])
            + f" | {found['state']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
