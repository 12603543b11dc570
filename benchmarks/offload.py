"""Optimizer state on disk: ours, DeepSpeed's, and the same transfers without any computation, in one run.

A Llama of 217 M parameters (bf16, batch 1 x 64 tokens, so that nothing hides the disk), AdamW with float32
master weights and moments: 12 bytes a parameter on disk. Contenders take turns, each in a process of its own,
all on the same volume; medians over rounds and steps are printed. The optimizer phase of ours ends when the
disk has been given everything (`step`, then waiting for what a next forward pass would hide).

    python benchmarks/offload.py                       # ours, in memory, and the ring without computation
    python benchmarks/offload.py --deepspeed           # DeepSpeed's NVMe offload too (pip install deepspeed)
    python benchmarks/offload.py --sizes 3 6 12 24 --chart sizes.png    # memory and seconds against size
    python benchmarks/offload.py --hidden 64 512 2048                   # how much of it which batch hides
    python benchmarks/offload.py --folder /ssd/scratch --rounds 3 --steps 6
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SIZE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 16}
VOCABULARY = 16_384
TOKENS = 64
RATE = 1e-4
MIB = 1 << 20
LIBRARIES = 0
"""Peak bytes of this process before it has a model."""

DEEPSPEED = {
    "deepspeed, pipelined": {"sub_group_size": int(5e7), "buffer_count": 12, "pipeline": True},
    "deepspeed, pipelined, small groups": {"sub_group_size": int(1e7), "buffer_count": 12, "pipeline": True},
    "deepspeed, one after the other": {"sub_group_size": int(1e7), "buffer_count": 4, "pipeline": False},
}


def build_model(layers: int) -> Any:
    """The transformer, in bf16; random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, **{**SIZE, "num_hidden_layers": layers})
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)


def storage_bytes() -> tuple[int, int]:
    """Bytes that this process has had read from and written to storage, as the kernel counts them."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"]), int(lines["write_bytes"])


def locked_bytes() -> int:
    """Bytes that cannot be swapped out."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmLck")).split()[1]) * 1024


def measure(
    forward_backward: Callable[[], float], step: Callable[[], None], drain: Callable[[], None], steps: int
) -> dict[str, Any]:
    """Figures of `steps` steps after two that are not counted."""
    found: dict[str, Any] = {"backward": [], "phase": [], "step": [], "read": [], "written": [], "losses": []}
    whole = 0.0
    for number in range(steps + 2):
        began = time.perf_counter()
        whole = began if number == 2 else whole
        found["losses"].append(forward_backward())
        backward = time.perf_counter()
        read, written = storage_bytes()
        step()
        stepped = time.perf_counter()
        drain()
        ended = time.perf_counter()
        if number < 2:
            continue
        now = storage_bytes()
        found["backward"].append(backward - began)
        found["step"].append(stepped - backward)
        found["phase"].append(ended - backward)
        found["read"].append(now[0] - read)
        found["written"].append(now[1] - written)
    found["whole"] = (ended - whole) / steps
    found["libraries"] = LIBRARIES
    found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found["locked"] = locked_bytes()
    return found


def ours(options: argparse.Namespace, *, tier: str | None, compute: bool = True) -> dict[str, Any]:
    """AdamW of shoestring with its state in memory or on disk; without `compute`, the transfers alone."""
    from shoestring.offload import offload_optimizer
    from shoestring.optimizers import AdamW

    model = build_model(options.layers)
    ids = torch.randint(0, VOCABULARY, (1, options.tokens))
    optimizer: Any = AdamW(model.parameters(), lr=RATE, weights="master")
    drain: Callable[[], None] = lambda: None  # noqa: E731 (it has nothing to wait for)
    if tier is not None:
        buffers = {"buffer_size": options.buffer_mib * MIB, "buffer_count": options.buffers, "io": options.io}
        optimizer, lines = offload_optimizer(optimizer, tier=tier, folder=options.folder, **buffers)
        print(*lines, sep="; ", file=sys.stderr)
        drain = drain if options.overlap else optimizer.wait

    def forward_backward() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return float(loss.detach())

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def pass_through() -> None:
        optimizer.pass_through()
        optimizer.zero_grad(set_to_none=True)

    if not compute:
        forward_backward()
        step()  # so that there is something to read
    found = measure(forward_backward, step if compute else pass_through, drain, options.steps)
    found["parameters"] = sum(p.numel() for p in model.parameters())
    if tier is not None:
        optimizer.close()
    return found


def deepspeed_nvme(options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """ZeRO 3 with the optimizer's state on NVMe, on DeepSpeed's CPU accelerator."""
    os.environ.update(DS_ACCELERATOR="cpu", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(20_000 + os.getpid() % 20_000))
    import deepspeed

    pipeline = settings["pipeline"]
    folder = Path(options.folder) / f"deepspeed-{os.getpid()}"
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": RATE, "weight_decay": 0.01}},
        "zero_optimization": {
            "stage": 3,
            "sub_group_size": settings["sub_group_size"],
            "offload_optimizer": {
                "device": "nvme",
                "nvme_path": str(folder),
                "buffer_count": settings["buffer_count"],
                "pipeline_read": pipeline,
                "pipeline_write": pipeline,
            },
        },
        "aio": {"block_size": MIB, "queue_depth": 8, "overlap_events": True},
    }
    model = build_model(options.layers)
    parameters = sum(p.numel() for p in model.parameters())
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), config=config, dist_init_required=True
    )
    ids = torch.randint(0, VOCABULARY, (1, options.tokens))

    def forward_backward() -> float:
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        return float(loss.detach())

    try:
        found = measure(forward_backward, engine.step, lambda: None, options.steps)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {**found, "parameters": parameters}


def contenders(options: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    """By name; each is run in a process of its own."""
    found: dict[str, Callable[[], dict[str, Any]]] = {
        "ours, in memory": lambda: ours(options, tier=None),
        "ours, on disk": lambda: ours(options, tier="disk"),
        "the transfers alone": lambda: ours(options, tier="disk", compute=False),
    }
    if options.deepspeed:
        for name, settings in DEEPSPEED.items():
            found[name] = lambda settings=settings: deepspeed_nvme(options, settings)  # type: ignore[misc]
    return found


def sizes(options: argparse.Namespace) -> None:
    """A table, and a chart with `--chart`, of models of several depths, with what arithmetic says beside it.

    Memory: libraries, 2 bytes of weight and 2 of gradient a parameter, and 12 of state or the ring. Seconds
    of the optimizer phase: what is moved at the rate of the transfers alone in the same round.
    """
    rows = []
    print("| M parameters | | peak memory, MiB | predicted | optimizer phase, s | predicted |")
    print("|---|---|---|---|---|---|", flush=True)
    for layers in options.sizes:
        arguments = [*sys.argv[1:], "--layers", str(layers)]
        found = {name: run_child(name, arguments) for name in list(contenders(options))[:3]}
        memory, disk, alone = found.values()
        if memory is None or disk is None or alone is None:
            continue
        count = disk["parameters"]
        ring = options.buffers * options.buffer_mib * MIB
        rate = statistics.median(r + w for r, w in zip(alone["read"], alone["written"], strict=True))
        rate /= statistics.median(alone["phase"])
        moved = statistics.median(r + w for r, w in zip(disk["read"], disk["written"], strict=True))
        for name, one, state in (("in memory", memory, 12 * count), ("on disk", disk, ring)):
            row = {
                "name": name,
                "parameters": count / 1e6,
                "peak": one["peak"] / MIB,
                "predicted": (one["libraries"] + 4 * count + state) / MIB,
                "phase": statistics.median(one["phase"]),
                "predicted_phase": moved / rate if name == "on disk" else None,
            }
            rows.append(row)
            predicted = row["predicted_phase"]
            print(
                f"| {row['parameters']:.0f} | {name} | {row['peak']:,.0f} | {row['predicted']:,.0f} | "
                f"{row['phase']:.2f} | {'' if predicted is None else f'{predicted:.2f}'} |",
                flush=True,
            )
    if options.chart:
        draw(rows, options.chart)


def hidden(options: argparse.Namespace) -> None:
    """For each batch the seconds of a whole step, and the share of what the disk adds that it hides.

    The disk adds what its phase takes beyond the one in memory when nothing runs beside it.
    """
    in_memory, on_disk = list(contenders(options))[:2]
    print(
        "| tokens | step in memory, s | on disk, s | of the disk's time hidden |\n|---|---|---|---|",
        flush=True,
    )
    for tokens in options.hidden:
        arguments = [*sys.argv[1:], "--tokens", str(tokens)]
        rounds = []
        for _ in range(options.rounds):
            memory, alone = run_child(in_memory, arguments), run_child(on_disk, arguments)
            beside = run_child(on_disk, [*arguments, "--overlap"])
            if memory and alone and beside:
                rounds.append((memory, alone, beside))
        if not rounds:
            continue
        adds = [
            statistics.median(alone["phase"]) - statistics.median(memory["phase"])
            for memory, alone, _ in rounds
        ]
        shown = [beside["whole"] - memory["whole"] for memory, _, beside in rounds]
        share = statistics.median(1.0 - left / added for left, added in zip(shown, adds, strict=True))
        whole = [statistics.median(one["whole"] for one in ways) for ways in zip(*rounds, strict=True)]
        print(f"| {tokens:,} | {whole[0]:.2f} | {whole[2]:.2f} | {share:.0%} |", flush=True)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Two panels: memory and seconds over the size, measured as dots, predicted as lines."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for panel, key, line, label in (
        (panels[0], "peak", "predicted", "peak memory, GiB"),
        (panels[1], "phase", "predicted_phase", "optimizer phase, s"),
    ):
        scale = 1024 if key == "peak" else 1
        for name, color in (("in memory", "tab:gray"), ("on disk", "tab:blue")):
            own = [row for row in rows if row["name"] == name]
            xs = [row["parameters"] for row in own]
            panel.plot(xs, [row[key] / scale for row in own], "o", color=color, label=f"{name}, measured")
            if all(row[line] is not None for row in own):
                panel.plot(xs, [row[line] / scale for row in own], "-", color=color, label="predicted")
        panel.set(xlabel="million parameters", ylabel=label, xlim=0, ylim=0)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def run_child(name: str, arguments: list[str]) -> dict[str, Any] | None:
    """One contender in a new process; None where it fails, and why on the screen."""
    command = [sys.executable, __file__, *arguments, "--child", name]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        print(f"{name}: exit code {done.returncode}: {done.stderr.strip()[-400:]}", file=sys.stderr)
        return None
    result: dict[str, Any] = json.loads(lines[-1])
    return result


HEADINGS = (
    "",
    "optimizer phase, s",
    "of it in `step`",
    "forward + backward, s",
    "peak memory, MiB",
    "locked, MiB",
    "read + written, bytes a parameter",
)


def show(results: dict[str, list[dict[str, Any]]]) -> None:
    """The table."""
    print("| " + " | ".join(HEADINGS) + " |")
    print("|---" * len(HEADINGS) + "|")
    for name, rounds in results.items():
        if rounds:
            print("| " + " | ".join([name, *row(rounds)]) + " |")


def row(rounds: list[dict[str, Any]]) -> list[str]:
    """A contender's cells."""

    def all_of(key: str) -> list[float]:
        return [value for one in rounds for value in one[key]]

    phases = all_of("phase")
    moved = [read + written for read, written in zip(all_of("read"), all_of("written"), strict=True)]
    return [
        f"{statistics.median(phases):.2f} ({min(phases):.2f} to {max(phases):.2f})",
        f"{statistics.median(all_of('step')):.2f}",
        f"{statistics.median(all_of('backward')):.2f}",
        f"{max(one['peak'] for one in rounds) / MIB:,.0f}",
        f"{max(one['locked'] for one in rounds) / MIB:,.0f}",
        f"{statistics.median(moved) / rounds[0]['parameters']:.1f}",
    ]


def main() -> None:
    """Run in turns and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/bench/offload"), help="on the disk to measure"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--buffer-mib", type=int, default=16)
    parser.add_argument("--buffers", type=int, default=6)
    parser.add_argument("--io", choices=["threads", "io_uring"], default=None)
    parser.add_argument("--deepspeed", action="store_true")
    parser.add_argument("--only", nargs="+", default=None)
    parser.add_argument("--sizes", type=int, nargs="+", default=None, help="layers of the models to compare")
    parser.add_argument("--chart", type=Path, default=None, help="with --sizes: a picture")
    parser.add_argument("--hidden", type=int, nargs="+", default=None, help="batches in tokens to compare")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a batch")
    parser.add_argument("--overlap", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.sizes and not options.child:
        sizes(options)
        return
    if options.hidden and not options.child:
        hidden(options)
        return
    if options.child:
        import transformers.models.llama.modeling_llama  # noqa: F401 (so that it counts as a library)

        global LIBRARIES
        LIBRARIES = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(contenders(options)[options.child]()))
        return
    names = options.only or list(contenders(options))
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            result = run_child(name, sys.argv[1:])
            if result is not None:
                results[name].append(result)
    show(results)


if __name__ == "__main__":
    main()
