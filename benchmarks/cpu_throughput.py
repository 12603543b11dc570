"""Trained tokens per second on GSM8K rows: ours, a plain padded loop, TRL, and the machine's matmul rate.

LoRA r 16 on all linear layers, bf16, two cores. The contenders take turns, each in a process of its own,
so that a drifting machine hurts all alike; medians over steps (first left out) and rounds.

    python benchmarks/cpu_throughput.py --gsm8k train.jsonl
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import gsm8k
import yaml

HERE = Path(__file__).parent
PARAMETERS = 134.5e6


def ours(train: Path, model: Path) -> tuple[float, float]:
    """Real and trained tokens per second through `shoestring train` with a steps budget."""
    run = gsm8k.WORK / "throughput-shoestring"
    shutil.rmtree(run, ignore_errors=True)
    recipe = gsm8k.WORK / "throughput.yaml"
    settings = {
        "model": str(model),
        "data": {"train": str(train), "eval_rows": 16},
        "budget": {"steps": 12},
        "adapter": {"name": "lora", "r": 16, "target_modules": "all-linear"},
        "train": {"batch_tokens": 4096},
        "eval": {"samples": 0},
        "output_dir": str(run),
    }
    recipe.write_text(yaml.safe_dump(settings))
    subprocess.run(
        [sys.executable, "-m", "shoestring.train", str(recipe)], check=True, stdout=subprocess.DEVNULL
    )
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]
    summary = json.loads((run / "summary.json").read_text())
    rate = statistics.median(step["tokens_per_second"] for step in steps)
    return rate, rate * summary["trained_tokens"] / summary["tokens"]


def plain(train: Path, model: Path) -> tuple[float, float]:
    """The plain transformers + PEFT loop."""
    command = [sys.executable, str(HERE / "peer_plain.py"), "--model", str(model), "--train", str(train)]
    done = subprocess.run([*command, "--steps", "5"], check=True, capture_output=True, text=True)
    steps = json.loads(done.stdout.strip().splitlines()[-1])["steps"][1:]
    return (
        statistics.median(tokens / seconds for seconds, tokens, _ in steps),
        statistics.median(trained / seconds for seconds, _, trained in steps),
    )


def trl(train: Path, model: Path) -> tuple[float, float]:
    """TRL: its steps' seconds; tokens counted over the same number of rows at the data set's mean."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    encoded = [gsm8k.encode(tokenizer, row) for row in gsm8k.rows(train)[:1000]]
    tokens = 8 * statistics.mean(len(ids) for ids, _ in encoded)
    trained = 8 * statistics.mean(sum(label != -100 for label in labels) for _, labels in encoded)
    command = [sys.executable, str(HERE / "peer_trl.py"), "--model", str(model), "--train", str(train)]
    command += ["--output", str(gsm8k.WORK / "throughput-trl"), "--rate", "1e-3", "--steps", "5"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds = statistics.mean(json.loads(done.stdout.strip().splitlines()[-1])["step_seconds"][1:])
    return tokens / seconds, trained / seconds


def main() -> None:
    """Take turns and print the table."""
    parser = gsm8k.arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    train, _ = gsm8k.split(options.gsm8k)
    model = gsm8k.base_model()
    contenders = {"shoestring": ours, "plain transformers + PEFT, batch 8": plain}
    if importlib.util.find_spec("trl"):
        contenders["TRL SFTTrainer, batch 8"] = trl
    else:
        print("TRL is not installed (pip install trl): its row is left out")
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    rates = []
    for _ in range(options.rounds):
        rates.append(gsm8k.matmul_rate())
        for name, measure in contenders.items():
            results[name].append(measure(train, model))
    limit = statistics.median(rates)
    print(f"bf16 matmul rate: {limit / 1e9:.0f} GFLOP/s (median of {options.rounds} rounds)\n")
    print(f"{'':36} {'tokens/s':>9} {'trained/s':>10} {'of matmul rate':>15} {'ours is':>8}")
    reference = statistics.median(trained for _, trained in results["shoestring"])
    for name, pairs in results.items():
        tokens = statistics.median(pair[0] for pair in pairs)
        trained = statistics.median(pair[1] for pair in pairs)
        share = 4 * PARAMETERS * tokens / limit
        print(f"{name:36} {tokens:9.0f} {trained:10.0f} {share:15.1%} {reference / trained:7.2f}x")


if __name__ == "__main__":
    main()
