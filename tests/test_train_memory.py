"""The memory of whole runs, in processes of their own, against what the plan said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import tiny
import torch
from shoestring.adapters import attach, compare_logits, merge_in_place
from shoestring.models import load_model, load_tokenizer, read_facts
from shoestring.ops import use_fused
from shoestring.plan.live_bytes import LiveBytes
from shoestring.recipes import LoraAdapter, ModelConfig, SftObjective
from shoestring.train.export import export_final
from shoestring.train.objectives import LossModule, build_objective
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


CPU = torch.device("cpu")


def adapted(folder: Path) -> tuple[Any, Any]:
    """A tiny model in bfloat16 with LoRA as a run has it, and its tokenizer."""
    config = ModelConfig(model_name_or_path=str(tiny.model_folder(folder)))
    facts = read_facts(config)
    model = load_model(facts, config, device=CPU, dtype=torch.bfloat16)
    trained = attach(model, LoraAdapter(), facts, seed=0)
    use_fused(trained)
    return trained.train(), load_tokenizer(facts, config)


def base_weights(model: Any) -> list[torch.Tensor]:
    return [p for name, p in model.named_parameters() if "lora" not in name and p.dim() == 2]


def test_merging_takes_no_more_than_two_float32_layers(tmp_path: Path) -> None:
    """Not the model once more: each weight stays where it was."""
    model, _ = adapted(tmp_path)
    weights = base_weights(model)
    places = [p.data_ptr() for p in weights]
    with LiveBytes(CPU) as live:
        merge_in_place(model)
    assert [p.data_ptr() for p in weights] == places
    assert live.now < max(p.nbytes for p in weights)
    assert live.peak < 12 * max(p.nbytes for p in weights)


def test_comparing_logits_takes_less_than_the_logits() -> None:
    """By a few rows at a time, with the same result."""
    a = torch.randn(1, 128, 50_000, generator=torch.Generator().manual_seed(0))
    b = a + 0.01 * torch.randn(a.shape, generator=torch.Generator().manual_seed(1))
    with LiveBytes(CPU) as live:
        found = compare_logits(a, b)
    assert live.peak < a.nbytes
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    torch.testing.assert_close(found["mean_kl"], float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))
    assert found["max_abs"] == float((a - b).abs().max())
    assert 0.9 < found["top1_agreement"] <= 1.0


def module_to_export(folder: Path) -> tuple[LossModule, Any, list[weakref.ref[torch.Tensor]]]:
    """Nothing but the module holds the model; in a function, lest its caller's frame does."""
    model, tokenizer = adapted(folder)
    gone = [weakref.ref(p) for p in base_weights(model)]
    return LossModule(model, build_objective(SftObjective(), model)), tokenizer, gone


def test_the_trained_model_is_gone_when_the_exported_one_is_loaded(tmp_path: Path) -> None:
    module, tokenizer, gone = module_to_export(tmp_path / "base")
    assert all(one() is not None for one in gone)
    exported = export_final(
        module,
        tokenizer,
        tmp_path / "final",
        merged=True,
        probe=torch.arange(32)[None] % 23,
        card="",
        autocast=False,
    )
    assert exported.kind == "merged"
    assert not any(one() is not None for one in gone)
    assert not list(module.parameters())
