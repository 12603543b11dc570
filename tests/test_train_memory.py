"""The memory of whole runs, in processes of their own, against what the plan said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import tiny
from transformers import LlamaConfig, LlamaForCausalLM


def wide_recipe(folder: Path, **sections: Any) -> Path:
    """Full tuning of a model that is nearly all embedding: 15 M of 16 M parameters."""
    path = tiny.recipe(
        folder,
        adapter=None,
        budget={"steps": 4},
        train={"batch_tokens": 512},
        eval={"samples": 0},
        export={"final": "none"},
        **sections,
    )
    model = folder / "model"
    config = LlamaConfig.from_pretrained(model)
    config.vocab_size, config.hidden_size, config.tie_word_embeddings = 60_000, 256, True
    LlamaForCausalLM(config).save_pretrained(model)
    return path


def test_a_run_with_state_on_disk_stays_within_its_plan(tmp_path: Path) -> None:
    path = wide_recipe(
        tmp_path,
        optimizer={"name": "adamw", "learning_rate": 1e-3},
        offload={"optimizer": "disk", "buffer_size": "4MiB", "buffer_count": 3},
    )
    command = [sys.executable, "-m", "shoestring.train", str(path), "--fresh"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 4
    # a quarter above where the heap keeps what the short measurement has left
    assert summary["peak_host_bytes"] < 1.15 * summary["predicted_host_bytes"]
