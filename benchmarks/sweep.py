"""A sweep against a grid at the same tokens in all: six rates, SmolLM2-135M with LoRA on GSM8K.

The grid gives each rate a sixth of the tokens and takes it to its end; the sweep stops the worse ones early
and takes the best one to its end on what that leaves. Both are measured on the same held-out rows. At a pause
the rate has not come down, which favours low rates: the places of the trials at the pauses stand beside those
of the grid, and `--schedule constant` is the comparison without that bias.

    python benchmarks/sweep.py --gsm8k train.jsonl                # about 25 minutes on 2 quiet cores
    python benchmarks/sweep.py --gsm8k train.jsonl --schedule constant
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gsm8k
import yaml

VERB = "from shoestring.train.cli import main; main()"


def recipe(options: argparse.Namespace) -> Path:
    """What both ways share. The batch is fixed: a larger budget would choose a larger one."""
    train, every = gsm8k.chats(options.gsm8k)
    held_out = every.with_name(f"{every.stem}-{options.rows}.jsonl")
    lines = every.read_text(encoding="utf-8").splitlines(keepends=True)
    held_out.write_text("".join(lines[: options.rows]), encoding="utf-8")
    path = gsm8k.WORK / f"sweep-{options.schedule}.yaml"
    values = {
        "model": str(gsm8k.base_model()),
        "data": {"train": str(train), "eval": str(held_out)},
        "budget": {"tokens": options.tokens},
        "adapter": {"name": "lora", "r": 16, "target_modules": "all-linear"},
        "schedule": options.schedule,
        "train": {"batch_tokens": 512},
        "eval": {"samples": 0, "every": "100%"},
        "export": "none",
    }
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def run(arguments: list[str]) -> float:
    """`shoestring ARGUMENTS`; seconds."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", VERB, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def sweep(source: Path, options: argparse.Namespace) -> tuple[dict[str, Any], float]:
    """sweep.json and the seconds it took."""
    output = gsm8k.WORK / f"sweep-{options.schedule}"
    over = f"optimizer.learning_rate={','.join(options.rates)}"
    arguments = ["sweep", str(source), f"output_dir={output}", "--over", over, "--fresh"]
    seconds = run([*arguments, "--reduction", str(options.reduction)])
    return json.loads((output / "sweep.json").read_text()), seconds


def grid(source: Path, options: argparse.Namespace) -> tuple[dict[str, dict[str, Any]], float]:
    """summary.json of each rate with its share of the tokens, and the seconds of all."""
    share, total, found = options.tokens // len(options.rates), 0.0, {}
    for rate in options.rates:
        output = gsm8k.WORK / f"grid-{options.schedule}" / rate
        shutil.rmtree(output, ignore_errors=True)
        arguments = ["train", str(source), f"output_dir={output}", f"optimizer.learning_rate={rate}"]
        total += run([*arguments, f"budget.tokens={share}"])
        found[rate] = json.loads((output / "summary.json").read_text())
        print(f"grid   {rate:>8}  {found[rate]['eval_loss']:.4f}", file=sys.stderr, flush=True)
    return found, total


def places(losses: dict[str, float | None]) -> dict[str, int]:
    """1 for the lowest loss."""
    order = sorted((loss, rate) for rate, loss in losses.items() if loss is not None)
    return {rate: place for place, (_, rate) in enumerate(order, 1)}


def main() -> None:
    """Run both and print the tables as markdown."""
    parser = gsm8k.arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=200_000, help="of the sweep, and of the grid in all")
    parser.add_argument("--rates", nargs="+", default=["1e-4", "3e-4", "1e-3", "2e-3", "4e-3", "8e-3"])
    parser.add_argument("--schedule", default="rex")
    parser.add_argument("--reduction", type=int, default=3)
    parser.add_argument("--rows", type=int, default=48, help="held-out rows")
    options = parser.parse_args()
    source = recipe(options)

    state, sweep_seconds = sweep(source, options)
    trials = {trial["values"]["optimizer.learning_rate"]: trial for trial in state["trials"]}
    full, grid_seconds = grid(source, options)

    pauses = sorted({leg["until"] for trial in trials.values() for leg in trial["legs"]})
    at = {
        pause: {
            rate: next((leg["loss"] for leg in trial["legs"] if leg["until"] == pause), None)
            for rate, trial in trials.items()
        }
        for pause in pauses
    }
    in_full = {rate: summary["eval_loss"] for rate, summary in full.items()}
    heads = [f"sweep at {pause:.0%}" for pause in pauses]
    print(f"\n{options.schedule}, {options.tokens:,} tokens each way, loss (place)\n")
    print(f"| rate | {' | '.join(heads)} | tokens | grid, in full |")
    print(f"|---|{'---|' * (len(heads) + 2)}")
    for rate, trial in trials.items():
        cells = []
        for losses in (*at.values(), in_full):
            loss = losses[rate]
            cells.append("" if loss is None else f"{loss:.4f} ({places(losses)[rate]})")
        spent = sum(leg["spent"] for leg in trial["legs"])
        print(f"| {rate} | {' | '.join(cells[:-1])} | {spent:,.0f} | {cells[-1]} |")

    winner = state["trials"][[trial["state"] for trial in state["trials"]].index("won")]
    best = min(in_full, key=lambda rate: in_full[rate])
    print("\n| way | best rate | held-out loss | trained on | tokens in all | seconds |")
    print("|---|---|---|---|---|---|")
    last, rate = winner["legs"][-1], winner["values"]["optimizer.learning_rate"]
    spent = sum(leg["spent"] for trial in state["trials"] for leg in trial["legs"])
    own = f"{last['loss']:.4f} | {last['tokens']:,}"
    print(f"| sweep | {rate} | {own} | {spent:,.0f} | {sweep_seconds:.0f} |")
    tokens = sum(summary["tokens"] for summary in full.values())
    own = f"{in_full[best]:.4f} | {full[best]['tokens']:,}"
    print(f"| grid | {best} | {own} | {tokens:,} | {grid_seconds:.0f} |")


if __name__ == "__main__":
    main()
