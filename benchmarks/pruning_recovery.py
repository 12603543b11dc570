"""What a short LoRA brings back of a pruned SmolLM2-135M, and what the smaller files cost to run.

Each criterion removes `--ratios` of all parameters. The model is saved in bfloat16 and loaded again by plain
transformers; everything is measured on that: perplexity on windows of GSM8K's rows kept out, before and after
a recovery of `--tokens` training tokens (LoRA of rank 16 on all linear layers, AdamW, one rate for all, REX),
and time, in turns with the unpruned model: a prefill of 256 tokens, and greedy decoding after it. One more
row for each of two variations: ranks by importance of the layers (the angle by which a layer turns its
input), and learning from the unpruned model (half of the loss).
`--seed` decides the calibration rows, what `random` draws, and rows and start of the recovery.

Times are the processor's seconds with one thread: those of a core that does nothing else. Memory is the
largest resident size during the pruning less that before, with the model loaded in float32.

Each figure goes to a file of JSON lines at once; the same command goes on where it was stopped.

    python benchmarks/pruning_recovery.py --gsm8k train.jsonl [--ratios 0.2 0.3 0.5] [--seed 0]
    python benchmarks/pruning_recovery.py --table [--picture pruning.png]
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gsm8k
import numpy as np
import psutil
import torch
from accelerate import Accelerator
from pruning_recovery_table import picture, table
from shoestring.adapters import attach
from shoestring.data import Order, TokenRows, make_rows, training_batches
from shoestring.models import read_facts, use_packed_attention
from shoestring.ops import cross_entropy_sum, give_back_freed_memory, keep_freed_memory, use_fused
from shoestring.optimizers import build_optimizer, set_rate
from shoestring.pruning import prune, save_pruned
from shoestring.recipes import DistillObjective, LoraAdapter, ModelConfig, SftObjective
from shoestring.recipes.optimizers import AdamW
from shoestring.recipes.schedules import RexSchedule
from shoestring.schedules import build_schedule
from shoestring.train.engine import NativeEngine
from shoestring.train.objectives import LossModule, build_objective
from shoestring.train.teacher import OnlineTeacher
from torch import Tensor
from transformers import AutoModelForCausalLM

from optimizers import peak_rss
from pruning import LENGTH, conversations, load, windows

BATCH = 512  # tokens of a step of the recovery
DECODED = 16
TURNS = 5
GATE_STEPS = 24  # of 256 tokens each


@dataclass(frozen=True)
class Case:
    """A way to prune, None for the unpruned model, and the recoveries that follow it."""

    name: str
    options: dict[str, Any] | None
    recoveries: tuple[str, ...] = ("lora",)
    calibration_rows: int = 4  # windows in a batch
    timed: bool = False  # the other neuron-pruned models have the shape of `random`'s, and its times


CASES = (
    Case("random", {"method": "random"}, timed=True),
    Case("wanda", {"method": "wanda"}),
    Case("flap", {"method": "flap"}),
    Case("cfsp", {"method": "cfsp"}),
    Case("cfsp, refit", {"method": "cfsp", "refit": True}, ("lora", "ranks", "distill")),
    Case("shortgpt", {"method": "shortgpt"}, timed=True),
    Case("magnitude", {"method": "magnitude"}),
    Case("cfsp_weighted", {"method": "cfsp_weighted"}),
    Case("modegpt", {"method": "modegpt"}),
    Case("foldgpt", {"method": "foldgpt", "gate_steps": GATE_STEPS}, calibration_rows=1),
)
UNPRUNED = Case("unpruned", None, timed=True)


@dataclass(frozen=True)
class Text:
    """Windows [n, LENGTH] to calibrate on, to recover with and to measure on."""

    calibration: Tensor
    recovery: Tensor
    held_out: Tensor


def read_text(path: Path, options: argparse.Namespace) -> Text:
    """Each seed has calibration and recovery windows of its own; those kept out are the same."""
    train, held_out = gsm8k.split(path)
    recovered = options.tokens // LENGTH
    each = options.calibration + recovered
    own = windows(conversations(train), (options.seed + 1) * each)[options.seed * each :]
    kept_out = windows(conversations(held_out), options.windows)
    return Text(own[: options.calibration], own[options.calibration :], kept_out)


@torch.no_grad()
def perplexity(model: Any, ids: Tensor) -> float:
    """exp of the mean loss of the next token, with an adapter or without."""
    model.eval()
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    total = 0.0
    for window in ids:
        hidden = plain.model(input_ids=window[None], use_cache=False).last_hidden_state[0, :-1]
        total += float(cross_entropy_sum(hidden, plain.lm_head.weight, window[1:]))
    return math.exp(total / (ids.numel() - len(ids)))


@torch.no_grad()
def timed(model: Any, ids: Tensor) -> tuple[float, float]:
    """Seconds of a prefill of `ids` [1, n], and of a decoded token after it."""
    began = time.process_time()
    found = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    prefilled = time.process_time()
    for _ in range(DECODED):
        token = found.logits[:, -1].argmax(dim=-1, keepdim=True)
        found = model(input_ids=token, past_key_values=found.past_key_values, use_cache=True)
    return prefilled - began, (time.process_time() - prefilled) / DECODED


def times(model: Any, dense: Any, ids: Tensor) -> dict[str, float]:
    """Medians of both models, which take turns; the first turn is not counted."""
    taken = [(*timed(model, ids), *timed(dense, ids)) for _ in range(TURNS + 1)][1:]
    names = ("prefill", "decode", "dense_prefill", "dense_decode")
    return dict(zip(names, map(statistics.median, zip(*taken, strict=True)), strict=True))


def as_rows(ids: Tensor) -> TokenRows:
    """Windows as rows whose tokens are all trained, the first excepted: nothing predicts it."""
    trained = np.ones(LENGTH, np.bool_)
    trained[0] = False
    return make_rows([row.numpy().astype(np.int32) for row in ids], [trained] * len(ids))


def recover(folder: Path, kind: str, text: Text, options: argparse.Namespace, dense: Any) -> dict[str, Any]:
    """Perplexity of a saved model after the recovery, its seconds, and the steps."""
    source = ModelConfig(model_name_or_path=str(folder))
    facts = read_facts(source)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    use_packed_attention(model)
    adapter = LoraAdapter(rank_allocation="angular_distance" if kind == "ranks" else "uniform")
    looked_at = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in text.calibration.split(4)
    ]
    model = attach(model, adapter, facts, seed=options.seed, batches=looked_at)
    use_fused(model)
    if kind == "distill":
        use_packed_attention(dense)
        teacher = OnlineTeacher(dense, top_k=None, temperature=1.0)
        objective = build_objective(DistillObjective(teacher="dense"), model, teacher=teacher)
    else:
        objective = build_objective(SftObjective(), model)
    optimizer = build_optimizer(model, AdamW(weight_decay=0.0))
    engine = NativeEngine(Accelerator(cpu=True), LossModule(model, objective), optimizer, autocast=False)
    rows = as_rows(text.recovery)
    order = Order(rows, seed=options.seed, batch_tokens=BATCH, micro_tokens=BATCH, packed=True)
    profile, began = build_schedule(RexSchedule()), time.process_time()
    steps = order.steps_per_epoch
    batches = training_batches(rows, order, stop=steps, collate=objective.collate)
    for number, (step, micro) in enumerate(batches):
        rise = min(1.0, (number + 1) / max(1, round(0.1 * steps)))
        set_rate(engine.optimizer, options.rate * rise * profile(number / steps))
        engine.forward_backward(micro, step.trained_tokens, lambda: False)
        engine.step(1.0)
    seconds = time.process_time() - began
    return {"recovered": perplexity(model, text.held_out), "steps": steps, "recovery_seconds": seconds}


def carry_out(case: Case, ratio: float, text: Text, options: argparse.Namespace) -> None:
    """One way to prune, in a process of its own: a record for each recovery."""
    record: dict[str, Any] = {"kind": "case", "method": case.name, "wanted": ratio, "seed": options.seed}
    model = load()
    if case.options is not None:
        batches = list(text.calibration.split(case.calibration_rows))
        give_back_freed_memory()
        before = psutil.Process().memory_info().rss
        Path("/proc/self/clear_refs").write_text("5")  # the highest resident size starts anew, see proc(5)
        began = time.process_time()
        result = prune(model, batches, ratio=ratio, seed=options.seed, **case.options)
        record |= {"prune_seconds": time.process_time() - began, "prune_peak": peak_rss() - before}
        record |= {"ratio": result.ratio, "parameters": result.after}
    else:
        record |= {"ratio": 0.0, "parameters": sum(p.numel() for p in model.parameters())}
    keep_freed_memory()  # from here on: what pruning takes is measured without
    with TemporaryDirectory(dir=gsm8k.WORK) as place:
        folder = Path(place)
        record["form"] = save_pruned(model.to(torch.bfloat16), folder)
        record["bytes"] = (folder / "model.safetensors").stat().st_size
        del model
        again: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        dense: Any = AutoModelForCausalLM.from_pretrained(gsm8k.base_model(), dtype=torch.bfloat16).eval()
        record["perplexity"] = perplexity(again, text.held_out)
        if case.timed:
            record |= times(again, dense, text.held_out[:1])
        del again
        for kind in case.recoveries:
            found = recover(folder, kind, text, options, dense)
            add(options.results, {**record, "recovery": kind, **found})


def missing(case: Case, ratio: float, options: argparse.Namespace) -> tuple[str, ...]:
    """The recoveries of a case that are asked for and not in the file."""
    wanted = {"kind": "case", "method": case.name, "wanted": ratio, "seed": options.seed}
    done = {r["recovery"] for r in gsm8k.rows(options.results) if wanted.items() <= r.items()}
    return tuple(kind for kind in case.recoveries if kind in options.recoveries and kind not in done)


def main() -> None:
    parser = gsm8k.arguments(__doc__)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.3, 0.5])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=6144, help="of the recovery")
    parser.add_argument("--rate", type=float, default=1e-3, help="of the recovery")
    parser.add_argument("--calibration", type=int, default=16, help="windows of 256 tokens")
    parser.add_argument("--windows", type=int, default=8, help="to measure perplexity on")
    parser.add_argument("--only", nargs="*", choices=[case.name for case in CASES])
    parser.add_argument("--recoveries", nargs="*", default=["lora", "ranks", "distill"])
    parser.add_argument("--results", type=Path, default=gsm8k.WORK / "pruning-recovery.jsonl")
    parser.add_argument("--table", action="store_true", help="print what the file holds, and run nothing")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    if options.table:
        records = gsm8k.rows(options.results)
        print(table(records))
        if options.picture:
            picture(records, options.picture)
        return
    same = {name: getattr(options, name) for name in ("tokens", "rate", "calibration", "windows")}
    if not options.results.exists():
        add(options.results, {"kind": "setting", **same})
    if gsm8k.rows(options.results)[0] != {"kind": "setting", **same}:
        sys.exit(f"{options.results} was begun with other settings.  Give the same, or another --results")
    text = read_text(options.gsm8k, options)
    todo = [(UNPRUNED, 0.0)]
    todo += [(case, ratio) for ratio in options.ratios for case in CASES]
    for case, ratio in todo:
        left = missing(case, ratio, options)
        if not left or (options.only is not None and case.name not in options.only):
            continue
        # a fork has the libraries and the text, and memory that no other case has grown
        child = multiprocessing.get_context("fork").Process(
            target=carry_out,
            args=(replace(case, recoveries=left), ratio, text, options),
        )
        child.start()
        child.join()
        if child.exitcode:
            sys.exit(f"{case.name} at {ratio} ended with {child.exitcode}")


def add(path: Path, record: dict[str, Any]) -> None:
    print(json.dumps(record), flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
