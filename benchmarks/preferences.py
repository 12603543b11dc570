"""One budget over supervised and preference data: SFT alone against SFT then DPO, GSM8K and SmolLM2-135M.

Equal budgets in passes through the model: a token of DPO costs a third more than one of SFT, for the
reference model's forward pass, so a run with DPO gets fewer tokens. LoRA, the plan's batch, SFT at `--rate`,
DPO at a tenth of it. The last 100 pairs and the last 200 rows are kept out of training.

Measured on the finished models: the loss of an answer's tokens on held-out rows; and on the held-out pairs
the share whose chosen answer gained more probability over the untrained model than the rejected one.

    python benchmarks/preferences.py --gsm8k train.jsonl --pairs preferences.jsonl
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import gsm8k
import torch
from shoestring.recipes import load_recipe

HELD_OUT_PAIRS = 100
HELD_OUT_ROWS = 60
DPO_COST = 4 / 3


def pair_files(path: Path) -> tuple[Path, list[dict[str, str]]]:
    """A file of the training pairs, and the held-out ones."""
    pairs = gsm8k.rows(path)
    target = gsm8k.WORK / "pairs-train.jsonl"
    target.write_text("".join(json.dumps(pair) + "\n" for pair in pairs[:-HELD_OUT_PAIRS]), encoding="utf-8")
    return target, pairs[-HELD_OUT_PAIRS:]


@torch.inference_mode()
def answer_log_prob(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """Log-probability of an answer to a prompt, by plain transformers."""
    ids, labels = gsm8k.encode(tokenizer, {"question": prompt, "answer": answer})
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].float()
    target = torch.tensor(labels[1:])
    return -float(torch.nn.functional.cross_entropy(logits, target, ignore_index=-100, reduction="sum"))


def pair_log_probs(folder: Path, pairs: list[dict[str, str]]) -> list[tuple[float, float]]:
    """(chosen, rejected) for each pair."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [
        (
            answer_log_prob(model, tokenizer, pair["prompt"], pair["chosen"]),
            answer_log_prob(model, tokenizer, pair["prompt"], pair["rejected"]),
        )
        for pair in pairs
    ]


def accuracy(now: list[tuple[float, float]], before: list[tuple[float, float]]) -> float:
    """Share of pairs whose chosen answer gained more than the rejected one."""
    gains = [(c - c0) - (r - r0) for (c, r), (c0, r0) in zip(now, before, strict=True)]
    return sum(gain > 0 for gain in gains) / len(gains)


def main() -> None:
    """Run and print the table."""
    parser = gsm8k.arguments(__doc__)
    parser.add_argument("--pairs", type=Path, default=Path("gsm8k/preferences.jsonl"))
    parser.add_argument("--tokens", type=int, default=60_000, help="of SFT; other runs get as many passes")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--splits", nargs="+", default=["1", "auto", "0.5"])
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    rows, held_out = gsm8k.chats(options.gsm8k)
    pairs, held_pairs = pair_files(options.pairs)
    small = held_out.with_name("gsm8k-held-out-small.jsonl")
    lines = gsm8k.split(options.gsm8k)[1].read_text(encoding="utf-8").splitlines(keepends=True)
    small.write_text("".join(lines[:HELD_OUT_ROWS]), encoding="utf-8")
    base = gsm8k.base_model()
    before = pair_log_probs(base, held_pairs)
    print(f"untrained: loss {gsm8k.answer_loss(base, small):.4f}")
    print("| split | sft share | tokens | seconds | held-out loss | each | pair accuracy | each |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for split in options.splits:
        found: dict[str, list[float]] = {"loss": [], "accuracy": [], "seconds": [], "tokens": []}
        share = 1.0
        for seed in range(options.seeds):
            run = gsm8k.WORK / f"preferences-{split}-{seed}"
            recipe = [
                f"model={base}",
                f"data.train={rows}",
                f"data.eval={held_out}",
                "data.format=auto",
                "data.columns=null",
                "data.eval_rows=16",
                "adapter=lora",
                f"optimizer.learning_rate={options.rate}",
                "schedule=linear",
                "eval.samples=0",
                f"train.seed={seed}",
                f"output_dir={run}",
            ]
            if split != "1":
                recipe += [
                    f"data.preferences={pairs}",
                    f"objective={{name: sft_then_dpo, split: {split}}}",
                ]
            load_recipe("cpu-demo", recipe)  # a mistake here must not cost a run
            command = [sys.executable, "-m", "shoestring.train", "cpu-demo", *recipe]
            if not (run / "summary.json").exists():
                share = _share(command, run, split, options.tokens)
                tokens = options.tokens / (share + DPO_COST * (1 - share))
                budget = ["budget.time=null", f"budget.tokens={tokens:.0f}"]
                subprocess.run([*command, *budget, "--fresh"], check=True, stdout=subprocess.DEVNULL)
            summary = json.loads((run / "summary.json").read_text())
            share = _kept_share(run)
            found["loss"].append(gsm8k.answer_loss(run / "final", small))
            found["accuracy"].append(accuracy(pair_log_probs(run / "final", held_pairs), before))
            found["seconds"].append(summary["seconds"])
            found["tokens"].append(summary["tokens"])
        print(
            f"| {split} | {share:.2f} | {statistics.median(found['tokens']):.0f} | "
            f"{statistics.median(found['seconds']):.0f} | {statistics.median(found['loss']):.4f} | "
            + ", ".join(f"{loss:.4f}" for loss in found["loss"])
            + f" | {statistics.median(found['accuracy']):.2f} | "
            + ", ".join(f"{share:.2f}" for share in found["accuracy"])
            + " |",
            flush=True,
        )


def _kept_share(run: Path) -> float:
    path = run / "stages.json"
    return float(json.loads(path.read_text())["share"]) if path.exists() else 1.0


def _share(command: list[str], run: Path, split: str, tokens: int) -> float:
    """What the run will give to SFT: as given, or as its plan decides for so many tokens."""
    if split == "1":
        return 1.0
    if split != "auto":
        return float(split)
    verb = [sys.executable, "-c", "from shoestring.train.cli import main; main()", "plan"]
    budget = ["budget.time=null", f"budget.tokens={tokens}", "--json"]
    done = subprocess.run([*verb, *command[3:], *budget], capture_output=True, text=True, check=True)
    plans = json.loads(done.stdout[done.stdout.index("{") :])
    if "dpo" not in plans:
        return 1.0
    counted = {name: made["tokens_in_budget"] for name, made in plans.items()}
    return float(counted["sft"] / sum(counted.values()))


if __name__ == "__main__":
    main()
