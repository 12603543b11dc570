"""One of several processes that train recipes and count tensors: started by test_plan_engines, not a test.

    python engine_memory.py FOLDER

FOLDER/held.json gets a line for each FOLDER/*/recipe.yaml: bytes that were alive before the last step, beyond
those that were before the engine began but for the weights, and the same by the parts of the plan.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from shoestring.plan import sizes
from shoestring.plan.engines import Held
from shoestring.train import deepspeed_config, sharded
from shoestring.train.deepspeed_engine import DeepSpeedEngine
from shoestring.train.fsdp_engine import Fsdp2Engine
from shoestring.train.run import train_recipe


def alive() -> int:
    """Bytes of all tensors' memory, each once."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and type(thing) in (torch.Tensor, torch.nn.Parameter):
            for tensor in (thing, thing.grad):
                if tensor is not None and tensor.device.type == "cpu" and hasattr(tensor, "untyped_storage"):
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def main(folder: Path) -> None:
    deepspeed_config.PERSISTENT = 0  # small weights are cut too
    seen: dict[str, Any] = {}
    begin, held_by = sharded.ShardedEngine.begin, sizes.held_by

    def begin_and_count(engine: Any) -> None:
        weights = sum(p.nbytes for p in engine.loss_module.parameters())
        seen["before"] = alive() - weights
        begin(engine)

    def count_and_step(real: Any) -> Any:
        def step(engine: Any, max_grad_norm: float | None) -> Any:
            seen["found"] = alive() - seen["before"]
            return real(engine, max_grad_norm)

        return step

    def keep(*args: Any, **given: Any) -> Held | None:
        seen["held"] = held_by(*args, **given)
        return seen["held"]

    sharded.ShardedEngine.begin = begin_and_count  # type: ignore[method-assign]
    sizes.held_by = keep  # type: ignore[assignment]
    for kind in (DeepSpeedEngine, Fsdp2Engine):
        kind.step = count_and_step(kind.step)  # type: ignore[method-assign]
    lines = []
    for recipe in sorted(folder.glob("*/recipe.yaml")):
        assert train_recipe(str(recipe), (), fresh=False, started=time.monotonic()) == 0, recipe
        if int(os.environ.get("RANK", "0")):
            continue  # the main process plans
        held, name = seen["held"], recipe.parent.name
        # Gathered weights and buckets are gone between backward pass and step; stage 3 keeps its bucket.
        gone = {"gathered"} if name == "zero-3" else {"gathered", "buckets"}
        parts = [size for key, size in held.device.items() if key not in gone] + list(held.host.values())
        lines.append({"engine": name, "found": seen["found"], "planned": sum(parts)})
    if lines:
        (folder / "held.json").write_text(json.dumps(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
