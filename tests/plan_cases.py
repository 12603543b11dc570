"""A tiny model, a machine and data that the tests of the plan share."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shoestring.models.facts import ModelFacts, read_facts
from shoestring.plan import Plan, make_plan
from shoestring.plan.curves import Line, Plane, Polyline
from shoestring.plan.facts import DataFacts
from shoestring.plan.machine import Machine
from shoestring.plan.measurement import Measurement, Setting
from shoestring.plan.rates import Rates
from shoestring.recipes import Recipe, load_recipe

GIGA = 10**9


@functools.cache
def tiny_folder() -> Path:
    """A two-layer Llama with tied embeddings, saved; removed with the process's temporary files."""
    import atexit
    import shutil
    import tempfile

    from transformers import LlamaConfig, LlamaForCausalLM

    folder = Path(tempfile.mkdtemp(prefix="plan-model-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1000,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@functools.cache
def tiny_facts() -> ModelFacts:
    return read_facts(recipe().model)


def recipe(*overrides: str) -> Recipe:
    path = tiny_folder() / "recipe.yaml"
    path.write_text(f"model: {tiny_folder()}\ndata: rows.jsonl\nbudget: 10min\n")
    return load_recipe(path, overrides).recipe


def rows(count: int = 4000, length: int = 200, longest: int = 400, eval_rows: int = 100) -> DataFacts:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.gamma(8, length / 8, count), 10, longest).astype(np.int64)
    lengths[0] = longest
    held = lengths[:eval_rows]
    return DataFacts(lengths, lengths // 2, np.ones(count), held, held // 2)


def pairs(count: int = 4000, **given: int) -> DataFacts:
    """Rows of two sequences: the first has two thirds of a row."""
    whole = rows(count, **given)
    return replace(whole, first=2 * whole.lengths // 3, eval_first=2 * whole.eval_lengths // 3)


def make_tiny_plan(
    *overrides: str, on: Machine | None = None, data: DataFacts | None = None, **given: Any
) -> Plan:
    """The plan of the tiny model with the measurement given by a formula."""
    given = {"world_size": 1, "measure": Meter(), "libraries": GIGA, "can_pack": True, **given}
    return make_plan(recipe(*overrides), on or machine(), tiny_facts(), data or rows(), **given)


def machine(device: str = "cpu", host: float = 16.0, gpu: float = 0.0, disk: float = 100.0) -> Machine:
    rates = Rates(matmul_bf16=1e12, matmul_fp32=2e11, copy=2e10, disk_write=5e8)
    return Machine(
        device=device,
        name="test machine",
        cores=2,
        host_total_bytes=int(host * GIGA),
        host_bytes=int(host * GIGA),
        device_total_bytes=int(gpu * GIGA),
        device_bytes=int(gpu * GIGA),
        disk_bytes=int(disk * GIGA),
        output_dir="runs/test",
        watts_source=None,
        given_rates=rates,
    )


class Meter:
    """Stands for the measurement: bytes and seconds by a formula, with the settings it was asked for."""

    def __init__(self, *, per_token: float = 1e6, seconds: float = 1e-3, head: float = 0.0) -> None:
        self.per_token = per_token
        self.seconds = seconds
        self.head = head
        self.asked: list[Setting] = []

    def __call__(
        self, recipe: Recipe, facts: ModelFacts, device: torch.device, setting: Setting
    ) -> Measurement:
        self.asked.append(setting)
        share, slower = (0.1, 1.33) if setting.checkpointing else (1.0, 1.0)
        if recipe.model.load_in_4bit:
            slower *= 1.2
        layer = self.per_token * share / facts.layers
        seconds = self.seconds * slower / facts.layers
        return Measurement(
            saved=Plane(0, 0, 0, layer),
            peak=Plane(0, 0, self.per_token / 100, layer),
            seconds=Plane(0, 0, 0, seconds),
            forward_seconds=Plane(0, 0, 0, seconds / 3),
            head_peak=Polyline(((100, 1e6), (200, 2e6)), 100.0),
            head_held=0,
            head_seconds=Line(0, 3 * self.head),
            head_forward_seconds=Line(0, self.head),
            tokens=setting.tokens,
        )
