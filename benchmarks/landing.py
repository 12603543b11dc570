"""Landing: budgets of 3 and 6 minutes, three runs each, on the demo's model and data.

A good landing ends between 96 % and 101 % of the budget, annealed, and with a lower held-out loss.

    python benchmarks/landing.py                  # about 30 minutes on 2 cores
    python benchmarks/landing.py --minutes 3 --runs 1
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, nargs="+", default=[3.0, 6.0])
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    columns = f"{'budget':>7} {'finish':>8} {'of it':>7} {'progress':>9} {'last/peak rate':>15}"
    print(f"{columns} {'held-out loss':>18}  verdict", flush=True)
    for minutes in options.minutes:
        for number in range(options.runs):
            run = Path("runs/bench") / f"landing-{minutes:g}-{number}"
            command = [sys.executable, "-m", "shoestring.train", "cpu-demo", "--fresh"]
            command += [f"budget={minutes * 60:.0f}s", f"output_dir={run}", f"train.seed={42 + number}"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            summary = json.loads((run / "summary.json").read_text())
            peak = json.loads((run / "plan.json").read_text())["learning_rate"]
            share = summary["seconds"] / (60 * minutes)
            last = summary["final_learning_rate"] / peak
            good = (
                0.96 <= share <= 1.01
                and summary["final_progress"] >= 0.98
                and last <= 0.02
                and summary["eval_loss"] < summary["eval_loss_before"]
            )
            losses = f"{summary['eval_loss_before']:.3f} -> {summary['eval_loss']:.3f}"
            print(
                f"{minutes:5.0f}min {summary['seconds']:7.1f}s {share:7.2%} {summary['final_progress']:9.4f}"
                f" {last:15.2%} {losses:>18}  {'lands' if good else 'MISSED'}",
                flush=True,
            )


if __name__ == "__main__":
    main()
