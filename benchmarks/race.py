"""The race: SmolLM2-135M on GSM8K, our preset's own defaults against TRL's best rate, at equal wall clock.

Both start from the same folder and the clock runs from process start to saved model. The score is the loss
on the answer tokens of the last 200 training rows, which nobody trained on, by one scorer for all.

    python benchmarks/race.py --gsm8k train.jsonl            # about 45 minutes on 2 cores
    python benchmarks/race.py --gsm8k train.jsonl --seconds 120 --rates 1e-3
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import gsm8k
import yaml

HERE = Path(__file__).parent


def ours(train: Path, model: Path, seconds: float) -> tuple[Path, dict[str, object]]:
    """`shoestring train` with a model, data and a budget, all else default."""
    run = gsm8k.WORK / f"race-shoestring-{seconds:.0f}"
    shutil.rmtree(run, ignore_errors=True)
    recipe = gsm8k.WORK / "race.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "model": str(model),
                "data": str(train),
                "budget": f"{seconds:.0f}s",
                "adapter": {"name": "lora", "r": 16, "target_modules": "all-linear"},
                "output_dir": str(run),
            }
        )
    )
    subprocess.run(
        [sys.executable, "-m", "shoestring.train", str(recipe)], check=True, stdout=subprocess.DEVNULL
    )
    return run / "final", json.loads((run / "summary.json").read_text())


def trl(train: Path, model: Path, seconds: float, rate: float, steps: int) -> tuple[Path, dict[str, object]]:
    """TRL's SFTTrainer for at most `seconds`, its linear schedule over `steps`."""
    output = gsm8k.WORK / f"race-trl-{rate:g}"
    command = [sys.executable, str(HERE / "peer_trl.py"), "--model", str(model), "--train", str(train)]
    command += [
        "--output",
        str(output),
        "--rate",
        str(rate),
        "--steps",
        str(steps),
        "--seconds",
        str(seconds),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return output, json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Run the race and print the table."""
    parser = gsm8k.arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=500.0)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-4, 1e-3, 3e-3])
    options = parser.parse_args()
    train, held_out = gsm8k.split(options.gsm8k)
    model = gsm8k.base_model()
    print(f"{'contender':34} {'budget s':>8} {'used s':>7} {'steps':>6} {'loss on answers':>16}", flush=True)
    print(f"{'untrained':34} {'':8} {'':7} {'':6} {gsm8k.answer_loss(model, held_out):16.4f}", flush=True)

    def row(name: str, budget: float, result: dict[str, object], folder: Path) -> float:
        loss = gsm8k.answer_loss(folder, held_out)
        print(
            f"{name:34} {budget:8.0f} {result['seconds']:7.1f} {result['steps']:6d} {loss:16.4f}", flush=True
        )
        return loss

    mine = {}
    for seconds in (options.seconds, options.seconds / 2):
        folder, summary = ours(train, model, seconds)
        mine[seconds] = row("shoestring (defaults)", seconds, summary, folder)

    _, probe = trl(train, model, options.seconds, 1e-3, 3)
    step = statistics.median(probe["step_seconds"])
    steps = max(1, int((options.seconds - probe["start_up"] - probe["save"] - 5.0) / step))
    theirs = {}
    for rate in options.rates:
        folder, result = trl(train, model, options.seconds, rate, steps)
        theirs[rate] = row(f"TRL SFTTrainer, rate {rate:g}", options.seconds, result, folder)
    best = min(theirs.values())
    print(f"\nat equal time: {mine[options.seconds]:.4f} against {best:.4f}")
    print(f"in half the time: {mine[options.seconds / 2]:.4f} against {best:.4f}")


if __name__ == "__main__":
    main()
