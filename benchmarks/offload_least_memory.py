"""In how little memory can all weights of SmolLM2-135M be trained, and at what speed?

The same recipe step by step with less in memory; each run is `shoestring train`, its figures are those of its
summary.json, beside what the plan had predicted. With the state in memory or on disk the losses are the same.

    python benchmarks/offload_least_memory.py            # about 8 minutes on 2 quiet cores
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

COMMON = (
    "adapter=null",
    "budget.time=null",
    "eval.samples=0",
    "data.eval_rows=8",
    "eval.every=100%",
    "export=none",
    "train.batch_tokens=512",
)
MASTER = ("model.dtype=bfloat16", "optimizer.weights=master")
DISK = ("offload.optimizer=disk",)
BACKWARD = ("optimizer.step_in_backward=true",)
LAYERS = ("offload.weights=disk",)
AGAIN = ("train.activation_checkpointing=true",)
WAYS: dict[str, tuple[str, ...]] = {
    "float32 weights, AdamW": (),
    "bfloat16, float32 master, AdamW": MASTER,
    "its state on disk": (*MASTER, *DISK),
    "and activations computed again": (*MASTER, *DISK, *AGAIN),
    "and steps inside the backward pass": (*MASTER, *DISK, *AGAIN, *BACKWARD),
    "and layers streamed from disk": (*MASTER, *DISK, *BACKWARD, *LAYERS),
}


def carry_out(name: str, overrides: tuple[str, ...], folder: Path, steps: int) -> dict[str, Any] | None:
    """The run's summary.json and its last loss; None where it fails."""
    run = folder / name.replace(" ", "-").replace(",", "")
    command = [sys.executable, "-m", "shoestring.train", "cpu-demo", *COMMON, *overrides]
    command += [f"budget.steps={steps}", f"output_dir={run}", "--fresh"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"{name}: exit code {done.returncode}: {done.stderr.strip()[-400:]}", file=sys.stderr)
        return None
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {**summary, "last_loss": rows[-1]["loss"]}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/bench/least-memory"))
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    print("| | peak memory, MB | predicted | tokens/s | written, GB | loss of the last step |")
    print("|---|---|---|---|---|---|", flush=True)
    for name, overrides in WAYS.items():
        found = carry_out(name, overrides, options.folder, options.steps)
        if found is not None:
            peak, predicted = (found[f"{key}_host_bytes"] / 1e6 for key in ("peak", "predicted"))
            print(
                f"| {name} | {peak:,.0f} | {predicted:,.0f} | "
                f"{found['tokens_per_second']:.0f} | {found['disk_bytes_written'] / 1e9:.1f} | "
                f"{found['last_loss']:.6f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
