"""Trains a model of 400 MB of layers in a process of its own and prints the memory it took, as JSON.

python streaming_process.py lora|full FOLDER
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from shoestring.offload.streamed_loading import load_streamed
from shoestring.optimizers.in_backward import BackwardStepper
from shoestring.optimizers.lomo import LOMO
from streaming import config, loss_of
from transformers import AutoModelForCausalLM

LARGE = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8, "num_key_value_heads": 8}


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) << 10


def steps_of(model: Any, full: bool) -> Any:
    """The trained model, and a function that makes a step."""
    if full:
        stepper = BackwardStepper(LOMO(model.named_parameters(), lr=1e-3))
        return model, lambda loss: stepper.step(loss)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)

    def step(loss: Any) -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return adapted, step


def train(full: bool, steps: int, folder: Path, layers: int, **sizes: int) -> dict[str, int]:
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    of = config(layers, **sizes)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in AutoModelForCausalLM.from_config(of).named_parameters()}
    draw = torch.Generator().manual_seed(0)
    streamed = load_streamed(
        of,
        lambda name: torch.randn(shapes[name], generator=draw).mul_(0.02),
        dtype=torch.float32,
        tier="disk",
        folder=folder,
        io="threads",
        trainable=full,
    )
    with streamed:
        model, step = steps_of(streamed.model.train(), full)
        resident = []
        for number in range(steps):
            ids = torch.randint(3, 50, (1, 32), generator=torch.Generator().manual_seed(number))
            step(lambda ids=ids: loss_of(model, ids))
            resident.append(status("VmRSS"))
        return {
            "peak": status("VmHWM") - before,
            "growth": resident[-1] - resident[min(4, steps - 1)],
            "buffers": sum(slot.memory.nbytes for slot in streamed.buffers._slots),
            "largest": max(layer.place.nbytes for layer in streamed.layers),
            "store": sum(layer.place.nbytes for layer in streamed.layers),
            "kept": sum(p.nbytes for p in model.parameters() if p.untyped_storage().nbytes() >= p.nbytes),
        }


if __name__ == "__main__":
    kind, where = sys.argv[1], Path(sys.argv[2])
    small = train(kind == "full", 20, where, 8)  # this loads what is loaded once, too
    print(json.dumps({"small": small, "large": train(kind == "full", 3, where, 8, **LARGE)}))
