"""The longest step before the first one, and what is said when the GPU's memory is too small."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import Accelerator
from shoestring.checkpoint import random_state
from shoestring.data import Batch
from shoestring.recipes import load_recipe
from shoestring.recipes.errors import BudgetError
from shoestring.train.building import build
from shoestring.train.parts import Run
from shoestring.train.rehearsal import memory_explained, rehearse
from shoestring.train.rundir import RunDir
from shoestring.train.screen import Screen
from shoestring.train.signals import stop_on_signals
from shoestring.train.snapshots import open_snapshots


@pytest.fixture
def run(tmp_path: Path) -> Any:
    resolved = load_recipe(tiny.recipe(tmp_path), ["adapter.lora_dropout=0.1"])
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        directory = RunDir(resolved.recipe.output_dir)
        stack.enter_context(directory.lock())
        accelerator = Accelerator(cpu=True)
        none = open_snapshots(resolved.recipe, directory, accelerator, print)
        screen = Screen(active=False)
        yield build(resolved, accelerator, directory, screen, stop, none, started=time.monotonic())


def test_a_rehearsal_tries_the_worst_step_and_leaves_no_trace(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []
    real = run.engine.forward_backward

    def spy(batches: Sequence[Batch], *rest: Any, **keys: Any) -> Any:
        tried.extend(batch.n_tokens for batch in batches)
        return real(batches, *rest, **keys)

    monkeypatch.setattr(run.engine, "forward_backward", spy)
    before = {name: p.detach().clone() for name, p in run.engine.parameters.items()}
    state = random_state()
    rehearse(run)
    ordinary = max(
        sum(int(run.data.train.lengths[row]) for row in rows)
        for number in range(20)
        for rows in run.stage.order.step(number).micro_batches
    )
    assert max(tried) >= ordinary
    assert random_state() == state
    assert all(p.grad is None for p in run.engine.parameters.values())
    assert all(torch.equal(p, before[name]) for name, p in run.engine.parameters.items())
    assert not run.engine.optimizer.state


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({}, "train.activation_checkpointing=true"),
        (
            {"recomputed_layers": 2, "micro_tokens": 4096, "longest_row": 100, "accumulation": 2},
            "train.gradient_accumulation_steps=4",
        ),
        (
            {"recomputed_layers": 2, "micro_tokens": 64, "longest_row": 100, "max_length": 100},
            "data.max_length=50",
        ),
    ],
)
def test_a_full_gpu_says_what_was_planned_and_names_one_key(
    run: Run, changes: dict[str, Any], key: str
) -> None:
    device = {"weights": 15 * 10**9, "activations": 8 * 10**9, "total": 23 * 10**9}
    memory = {"host": run.plan.memory["host"], "device": device}
    run.stage.plan = replace(run.plan, memory=memory, memory_limits={"device": 24 * 10**9}, **changes)
    with pytest.raises(BudgetError) as refused, memory_explained(run):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    text = str(refused.value)
    assert text.startswith("out of memory  at step 1")
    assert "of 24.0 GB GPU memory" in text
    assert "the plan had 23.0 GB: weights 15.0, activations 8.00" in text
    assert text.count("=") == 1
    assert key in text
    assert len(text.splitlines()) <= 6


def test_other_errors_pass(run: Run) -> None:
    with pytest.raises(ZeroDivisionError), memory_explained(run):
        _ = 1 / 0
