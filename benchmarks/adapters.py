"""Held-out loss that each adapter buys with the same seconds of training: GSM8K, SmolLM2-135M.

First all methods take steps in turns, in one process; the median of the processor's seconds gives each the
number of steps that fills `--seconds`, so that what else runs on the machine changes little. (With one thread
these are the seconds of a core that does nothing else; run it so.) Then each method has a process of its own:
three rates (a third of its start, the start, three times it) for `--trial-seconds` each, on rows used
for nothing else, and `--seeds` runs with the best. Where these took a tenth more or less than the seconds,
they are repeated with the steps that their own time gives. A seed decides the order of the rows, the same for
all methods, and what an adapter draws at its start. What a method computes before its first step (a
decomposition of each matrix) is not in the seconds; the table has it beside them.

AdamW without weight decay, norm clipped to 1, a tenth of warm-up, then REX; the loss of the answers alone.
Adapters are float32 on a bfloat16 base; full fine-tuning holds float32 weights and multiplies in bfloat16.
Memory is the largest resident size of a process during its first three steps, less that before it loads the
model; the start is not in it.

Each figure goes to a file of JSON lines at once; the same command goes on where it was stopped.

    python benchmarks/adapters.py --gsm8k train.jsonl [--only lora full]
    python benchmarks/adapters.py --table [--picture adapters.png]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gsm8k
import psutil
import torch
from adapters_bench import METHODS, TOKENS, Bench, batches, train, trained_numbers
from adapters_results import Results
from adapters_table import picture, table
from shoestring.ops import give_back_freed_memory, keep_freed_memory
from shoestring.optimizers import build_optimizer, set_rate
from shoestring.recipes.optimizers import AdamW
from shoestring.train.engine import NativeEngine

from optimizers import held_bytes, peak_rss

ROUNDS = 4
TRIAL_SEED = 100
TOLERANCE = 0.1  # of the seconds


def time_steps(bench: Bench, names: list[str]) -> list[dict[str, Any]]:
    """Seconds of a step of each method, the processor's and by the clock: all have a turn, then the next."""
    engines = {name: bench.engine(name, 0) for name in names}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    step, micro = next(batches(bench.trial_train, TRIAL_SEED, 1))
    for _ in range(ROUNDS + 1):
        for name, engine in engines.items():
            set_rate(engine.optimizer, 1e-6)
            wall, processor = time.perf_counter(), time.process_time()
            engine.forward_backward(micro, step.trained_tokens, lambda: False)
            engine.step(1.0)
            taken[name].append((time.process_time() - processor, time.perf_counter() - wall))
    return [
        {
            "kind": "step",
            "method": name,
            "seconds": statistics.median(processor for processor, _ in taken[name][1:]),
            "wall": statistics.median(wall for _, wall in taken[name][1:]),
            "turns": taken[name],
            "trained": trained_numbers(engines[name]),
        }
        for name in names
    ]


class Contender:
    """One method in its own process: an engine that begins anew with each run."""

    def __init__(self, bench: Bench, name: str) -> None:
        self.bench, self.name = bench, name
        self.engine: NativeEngine | None = None
        self.start: dict[str, torch.Tensor] = {}
        self.start_seconds = 0.0

    def begin(self, seed: int) -> NativeEngine:
        """As attached, without optimizer state. A start that takes a minute and no seed is taken once."""
        if self.engine is not None and METHODS[self.name].same_start:
            module = self.engine.loss_module
            with torch.no_grad():
                for name, p in module.named_parameters():
                    if p.requires_grad:
                        p.copy_(self.start[name])
            self.engine.optimizer = build_optimizer(module.model, AdamW(weight_decay=0.0))
            return self.engine
        self.engine = None
        gc.collect()
        began = time.perf_counter()
        engine = self.bench.engine(self.name, seed)
        self.start_seconds = time.perf_counter() - began
        if METHODS[self.name].same_start:
            named = engine.loss_module.named_parameters()
            self.start = {name: p.detach().clone() for name, p in named if p.requires_grad}
        self.engine = engine
        return engine

    def trial(self, rate: float, steps: int) -> dict[str, Any]:
        """A short run, judged on rows of the trials."""
        engine = self.begin(TRIAL_SEED)
        done = train(engine, self.bench.trial_train, TRIAL_SEED, rate, steps)
        loss = self.bench.loss(engine, self.bench.trial_held_out)
        return {"kind": "trial", "method": self.name, "rate": rate, "steps": steps, "loss": loss, **done}

    def run(self, rate: float, steps: int, seed: int) -> dict[str, Any]:
        """A run, judged on the rows kept out."""
        engine = self.begin(seed)
        done = train(engine, self.bench.train, seed, rate, steps)
        return {
            "kind": "run",
            "method": self.name,
            "seed": seed,
            "rate": rate,
            "steps": steps,
            "loss": self.bench.loss(engine, self.bench.held_out),
            "trained": trained_numbers(engine),
            "start_seconds": self.start_seconds,
            **done,
        }


def memory(bench: Bench, name: str) -> dict[str, Any]:
    """Largest resident bytes in three steps, in a process that did nothing before, and those of the state."""
    give_back_freed_memory()
    before = psutil.Process().memory_info().rss
    engine = bench.engine(name, 0)
    give_back_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size starts anew, see proc(5)
    train(engine, bench.trial_train, TRIAL_SEED, 1e-6, 3)
    peak, state = peak_rss() - before, held_bytes(engine.optimizer)
    return {"kind": "memory", "method": name, "peak": peak, "state": state}


def one(bench: Bench, name: str, results: Results, options: argparse.Namespace) -> None:
    """All that is missing of one method."""
    contender = Contender(bench, name)
    seconds = results.all("step", method=name)[0]["seconds"]
    middle = METHODS[name].rate
    if name in ("lora", "full") and not results.all("untrained", method=name):
        loss = bench.loss(contender.begin(0), bench.held_out)
        results.add({"kind": "untrained", "method": name, "loss": loss})
    for rate in (middle / 3, middle, 3 * middle):
        if not results.all("trial", method=name, rate=rate):
            results.add(contender.trial(rate, max(2, round(options.trial_seconds / seconds))))
    best = min(results.all("trial", method=name), key=lambda record: float(record["loss"]))["rate"]
    for _ in range(2):
        steps = max(2, round(options.seconds / seconds))
        for seed in range(options.seeds):
            if not results.all("run", method=name, seed=seed, steps=steps):
                results.add(contender.run(best, steps, seed))
        runs = results.all("run", method=name, steps=steps)
        seconds = statistics.median(run["seconds"] / steps for run in runs)
        if abs(steps * seconds / options.seconds - 1) <= TOLERANCE:
            break


def main() -> None:
    parser = gsm8k.arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=40.0, help="of training, of each run")
    parser.add_argument("--trial-seconds", type=float, default=15.0, help="of training, of each rate")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--results", type=Path, default=gsm8k.WORK / "adapters.jsonl")
    parser.add_argument("--table", action="store_true", help="print what the file holds, and run nothing")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--one", choices=("steps", "memory", "runs"), help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.table:
        records = gsm8k.rows(options.results)
        print(table(records))
        if options.picture:
            picture(records, options.picture)
        return
    keep_freed_memory()
    setting = {"seconds": options.seconds, "trial_seconds": options.trial_seconds, "tokens": TOKENS}
    results = Results(options.results, setting)
    untimed = [name for name in options.only if not results.all("step", method=name)]
    if options.one == "steps":
        for record in time_steps(Bench(options.gsm8k), untimed):
            results.add(record)
        return
    if options.one == "memory":
        results.add(memory(Bench(options.gsm8k), options.method))
        return
    if options.one:
        one(Bench(options.gsm8k), options.method, results, options)
        return
    parts = [["steps"]] if untimed else []
    for name in options.only:
        parts += [] if results.all("memory", method=name) else [["memory", "--method", name]]
        parts += [["runs", "--method", name]]
    for part in parts:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--one", *part], check=True)


if __name__ == "__main__":
    main()
