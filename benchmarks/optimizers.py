"""Every optimizer on SmolLM2-135M's own gradients: state, memory, time of a step, and the floor of each.

All weights are trained, in float32. Each optimizer has a process of its own and steps on the same gradients;
its time is the median of steps taken in turn with torch's fused AdamW in the same process, so that a machine
that drifts hurts both alike. The floor is what the rule must move through memory at the copy bandwidth plus
its matrix products at the bfloat16 rate, both measured in this run. Peers (galore-torch, bitsandbytes,
torchao) run as they come, where they are installed.

    python benchmarks/optimizers.py                 the table above
    python benchmarks/optimizers.py --matrices      eight float32 matrices of 4096 x 1024 instead of the model
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gsm8k
import psutil
import torch
from shoestring.ops import keep_freed_memory
from shoestring.optimizers import build_optimizer, set_rate, slots, state_bytes, update_cost
from shoestring.plan.rates import measure_rates
from shoestring.recipes.optimizers import OptimizerConfig
from torch import nn

ROUNDS = 5
OURS = {
    "adamw": {},
    "adamw 16-bit": {"name": "adamw", "state_bits": 16},
    "adamw 8-bit": {"name": "adamw", "state_bits": 8},
    "apollo": {},
    "apollo rank 256": {"name": "apollo", "rank": 256},
    "apollo_mini": {},
    "q_apollo": {},
    "galore": {},
    "galore rank 256": {"name": "galore", "rank": 256},
    "natural_galore": {},
    "frugal": {},
    "frugal svd": {"name": "frugal", "projection": "svd"},
    "frugal randk": {"name": "frugal", "projection": "randk"},
    "cosmos": {},
    "muon": {},
    "soap": {},
    "badam": {},
    "lomo": {},
    "adalomo": {},
    "adafactor": {},
    "lion": {},
    "adam_mini": {},
    "came": {},
    "schedule_free_adamw": {},
}
PEERS = {
    "bitsandbytes AdamW8bit": "adamw 8-bit",
    "bitsandbytes Lion8bit": "lion",
    "galore-torch": "galore",
    "galore-torch rank 256": "galore rank 256",
    "torchao AdamW8bit": "adamw 8-bit",
    "torch Muon": "muon",
}


class Matrices(nn.Module):
    """Eight matrices, as the published figures were taken."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1024, 4096, bias=False) for _ in range(8))


def subject(matrices: bool) -> nn.Module:
    """What is trained, with gradients."""
    torch.manual_seed(0)
    if matrices:
        model: nn.Module = Matrices()
        for p in model.parameters():
            p.grad = torch.randn_like(p) * 1e-3
        return model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = gsm8k.base_model()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    kept = gsm8k.WORK / "gradients.safetensors"
    from safetensors.torch import load_file, save_file

    if not kept.is_file():
        text = " ".join(row["question"] + " " + row["answer"] for row in SAMPLE)
        ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        save_file({name: p.grad for name, p in model.named_parameters()}, kept)
    grads = load_file(kept)
    for name, p in model.named_parameters():
        p.grad = grads[name]
    return model


SAMPLE = [
    {
        "question": "A baker has 12 trays of 8 rolls and sells 5 trays. How many rolls are left?",
        "answer": "12 - 5 = 7 trays are left. 7 * 8 = 56 rolls are left. #### 56",
    }
] * 8


def config_of(name: str) -> Any:
    """The recipe's section for a line of the table."""
    from pydantic import TypeAdapter

    given = OURS[name]
    return TypeAdapter(OptimizerConfig).validate_python({"name": name.split()[0], **given})


def peer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """A peer's optimizer, grouped as its documentation says."""
    matrices = [s.name for s in slots(model) if s.role == "matrix"]
    params = dict(model.named_parameters())
    light = [params[n] for n in matrices]
    rest = [p for n, p in params.items() if n not in set(matrices)]
    match name.split(" rank")[0]:
        case "bitsandbytes AdamW8bit":
            import bitsandbytes

            return bitsandbytes.optim.AdamW8bit(model.parameters(), lr=1e-6)
        case "bitsandbytes Lion8bit":
            import bitsandbytes

            return bitsandbytes.optim.Lion8bit(model.parameters(), lr=1e-6)
        case "torchao AdamW8bit":
            from torchao.optim import AdamW8bit

            return AdamW8bit(model.parameters(), lr=1e-6)
        case "torch Muon":
            groups = [{"params": light}]
            return torch.optim.Muon(groups, lr=1e-6, adjust_lr_fn="match_rms_adamw")
        case _:
            from galore_torch import GaLoreAdamW

            given = int(name.split("rank ")[1]) if "rank" in name else None
            by_rank: dict[int, list[torch.Tensor]] = {}
            for p in light:
                by_rank.setdefault(min(given or min(p.shape) // 4, *p.shape), []).append(p)
            groups = [
                {"params": ps, "rank": r, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
                for r, ps in by_rank.items()
            ]
            return GaLoreAdamW([{"params": rest}, *groups] if rest else groups, lr=1e-6)


def held_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the state, shared ones once."""
    found: dict[int, int] = {}

    def look(value: Any) -> None:
        if hasattr(value, "__tensor_flatten__"):  # torchao's states are made of several tensors
            for part in value.__tensor_flatten__()[0]:
                look(getattr(value, part))
        elif isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for item in value.values():
                look(item)
        elif hasattr(value, "ortho_matrix"):  # galore-torch hides its projection in an object
            look(value.ortho_matrix)

    for state in optimizer.state.values():
        look(state)
    return sum(found.values())


def timed(step: Callable[[], Any]) -> float:
    """Milliseconds of one call."""
    started = time.perf_counter()
    step()
    return (time.perf_counter() - started) * 1e3


def one(name: str, matrices: bool) -> dict[str, Any]:
    """Figures of one optimizer, in a process of its own, whose allocator is set as a run's is."""
    keep_freed_memory()
    model = subject(matrices)
    ours = name in OURS
    predicted = floor = None
    grads = {n: p.grad for n, p in model.named_parameters()}
    if ours:
        config = config_of(name)
        if config.name == "q_apollo":
            from shoestring.ops import use_int8_weights

            use_int8_weights(model, config.group_size)
            for n, p in model.named_parameters():
                p.grad = grads[n]
        predicted = state_bytes(config, slots(model), torch.float32)
        floor = update_cost(config, slots(model), torch.float32)
        optimizer = build_optimizer(model, config)
        set_rate(optimizer, 1e-6)
        for n, p in model.named_parameters():  # BAdam drops gradients of other blocks
            p.grad = grads[n] if p.requires_grad else None
    else:
        optimizer = peer(name, model)
    count = sum(p.numel() for p in model.parameters())
    before = psutil.Process().memory_info().rss
    first = timed(optimizer.step)
    optimizer.step()
    peak = max(psutil.Process().memory_info().rss, peak_rss()) - before
    measured = held_bytes(optimizer)
    copy = [
        nn.Parameter(p.detach().dequantise() if hasattr(p, "dequantise") else p.detach().clone())
        for p in model.parameters()
    ]
    for p, q in zip(copy, grads.values(), strict=True):
        p.grad = q
    fused = torch.optim.AdamW(copy, lr=1e-6, fused=True)
    fused.step()
    times, reference = [], []
    for _ in range(ROUNDS):
        for n, p in model.named_parameters():
            p.grad = grads[n] if p.requires_grad else None
        times.append(timed(optimizer.step))
        reference.append(timed(fused.step))
    return {
        "state": measured / count,
        "predicted": None if predicted is None else predicted / count,
        "peak": peak,
        "first": first,
        "step": statistics.median(times),
        "slowest": max(times) / statistics.median(times),
        "fused": statistics.median(reference),
        "floor": None if floor is None else [floor.bytes, floor.flops],
        "weights": sum(p.nbytes for p in model.parameters()),
    }


def peak_rss() -> int:
    """The process's highest resident memory so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def run(name: str, matrices: bool) -> dict[str, Any] | str:
    """`one` in a process; a line where it does not run."""
    command = [sys.executable, __file__, "--one", name, *(["--matrices"] if matrices else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--matrices", action="store_true", help="eight 4096 x 1024 matrices, no model")
    parser.add_argument("--only", nargs="*", help="lines of the table")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one, options.matrices)))
        return
    if not options.matrices:
        subject(False)  # makes the gradients that all share
    rates = measure_rates("cpu", Path(os.curdir))
    print(
        f"copy {2 * rates.copy / 1e9:.1f} GB/s read and written, bfloat16 products "
        f"{rates.matmul_bf16 / 1e9:.0f} GFLOP/s, float32 {rates.matmul_fp32 / 1e9:.0f}"
    )
    print(
        "| optimizer | state B/param | predicted | peak above start | step | of fused AdamW | floor "
        "| step / floor | slowest / median | peer |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    results: dict[str, Any] = {}
    wanted = options.only or [*PEERS, *OURS]
    for name in wanted:
        results[name] = run(name, options.matrices)
        found = results[name]
        if isinstance(found, str):
            print(f"| {name} | does not run: {found} |", flush=True)
            continue
        floor = ratio = "-"
        if found["floor"]:
            least = 1e3 * (found["floor"][0] / (2 * rates.copy) + found["floor"][1] / rates.matmul_bf16)
            floor, ratio = f"{least:.0f} ms", f"{found['step'] / least:.2f}"
        peers = [p for p, of in PEERS.items() if of == name and isinstance(results.get(p), dict)]
        beside = ", ".join(
            f"{found['step'] / found['fused'] / (results[p]['step'] / results[p]['fused']):.2f} of {p}"
            for p in peers
        )
        predicted = "-" if found["predicted"] is None else f"{found['predicted']:.3f}"
        print(
            f"| {name} | {found['state']:.3f} | {predicted} | {found['peak'] / 1e6:.0f} MB "
            f"| {found['step']:.0f} ms | "
            f"{found['step'] / found['fused']:.2f} | {floor} | {ratio} | {found['slowest']:.2f} | {beside} |",
            flush=True,
        )
    gsm8k.WORK.mkdir(parents=True, exist_ok=True)
    (gsm8k.WORK / ("optimizers-matrices.json" if options.matrices else "optimizers.json")).write_text(
        json.dumps(results)
    )


if __name__ == "__main__":
    main()
