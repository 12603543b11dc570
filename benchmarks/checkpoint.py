"""What a checkpoint costs the training: ours in memory, and all the usual ways to the disk, in one run.

A state of 1 GiB in 64 float32 tensors. `until free` is the time until the tensors may change again, `in all`
until the copy is where it is going (in the keeper's memory; on the disk, synced where that contender syncs).
`lost` is what a save takes from a training: the seconds of six steps, matrix products and then an update of
all tensors, with a save before the first one beyond those without. Contenders take turns in processes of
their own; medians are printed.

    python benchmarks/checkpoint.py                    # all of it, about 20 minutes on 2 quiet cores
    python benchmarks/checkpoint.py --table            # the contenders alone
    python benchmarks/checkpoint.py --recovery         # how long it takes to be back
    python benchmarks/checkpoint.py --shards           # two processes, with parity and without
    python benchmarks/checkpoint.py --lora             # SmolLM2 with LoRA: a snapshot after every single step
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TENSORS = 64
STEPS = 6
State = dict[str, Tensor]
Wait = Callable[[], object]
Save = Callable[[State, int], tuple[Wait, Wait]]
"""Of (tensors, number): two calls that return when the tensors may change, and when the copy is whole."""


def state(mib: int) -> State:
    """Touched pages of random numbers."""
    torch.manual_seed(0)
    count = mib * (1 << 20) // 4 // TENSORS
    return {f"tensor-{index}": torch.rand(count) for index in range(TENSORS)}


def nothing() -> None:
    """A copy that is whole already."""


def synced(path: Path) -> None:
    """fsync of a file."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def memcpy(folder: Path, like: State) -> Save:
    """Into buffers that were there before: what no snapshot can be quicker than."""
    buffers = {name: tensor.clone() for name, tensor in like.items()}

    def save(tensors: State, number: int) -> tuple[Wait, Wait]:
        for name, tensor in tensors.items():
            buffers[name].copy_(tensor)
        return nothing, nothing

    return save


def ours(folder: Path, like: State) -> Save:
    """A snapshot in the keeper's memory, with checksums."""
    from shoestring.checkpoint import Snapshotter

    snapshots = Snapshotter(folder)

    def save(tensors: State, number: int) -> tuple[Wait, Wait]:
        snapshots.begin(number, tensors={"state": tensors}, json={"trainer": {"step": number}})
        return snapshots.wait, snapshots.flush

    return save


def to_disk(folder: Path, like: State) -> Save:
    """Ours on the disk: checksums, manifest, synced directories."""
    from shoestring.checkpoint import save as save_checkpoint

    def save(tensors: State, number: int) -> tuple[Wait, Wait]:
        path = save_checkpoint(folder, step=number, tensors={"state": tensors}, json={})
        return nothing, lambda: shutil.rmtree(path)

    return save


def torch_save(folder: Path, like: State) -> Save:
    """torch.save and fsync."""

    def save(tensors: State, number: int) -> tuple[Wait, Wait]:
        path = folder / f"{number}.pt"
        torch.save(tensors, path)
        synced(path)
        return nothing, path.unlink

    return save


def safetensors_save(folder: Path, like: State) -> Save:
    """safetensors and fsync."""
    from safetensors.torch import save_file

    def save(tensors: State, number: int) -> tuple[Wait, Wait]:
        path = folder / f"{number}.safetensors"
        save_file(tensors, path)
        synced(path)
        return nothing, path.unlink

    return save


def distributed(folder: Path, like: State, *, process: bool, reuse: bool) -> Save:
    """torch.distributed.checkpoint.async_save, in a thread or a process, with a new stager or one for all."""
    import torch.distributed as dist
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(20_000 + os.getpid() % 20_000))
    dist.init_process_group("gloo", rank=0, world_size=1)
    kind = AsyncCheckpointerType.PROCESS if process else AsyncCheckpointerType.THREAD
    # Pinned memory, and staging in the background, are for CUDA.
    options = StagingOptions(
        use_pinned_memory=False,
        use_shared_memory=process,
        use_async_staging=False,
        use_non_blocking_copy=False,
    )
    kept = DefaultStager(options) if reuse else None

    def save(tensors: State, number: int) -> tuple[Wait, Wait]:
        place = folder / f"dcp-{number}"
        future: Any = dcp.async_save(
            tensors, checkpoint_id=place, async_checkpointer_type=kind, async_stager=kept
        )

        def whole() -> None:
            getattr(future, "upload_completion", future).result()
            shutil.rmtree(place)

        return nothing, whole

    return save


def accelerate_save(folder: Path, like: State) -> Save:
    """Accelerator.save_state of a module with these parameters."""
    from accelerate import Accelerator

    module = torch.nn.Module()
    for name, tensor in like.items():
        module.register_parameter(name.replace("-", "_"), torch.nn.Parameter(tensor, requires_grad=False))
    accelerator = Accelerator(cpu=True)
    accelerator.prepare_model(module, evaluation_mode=True)

    def save(tensors: State, number: int) -> tuple[Wait, Wait]:
        place = folder / f"accelerate-{number}"
        accelerator.save_state(str(place))
        return nothing, lambda: shutil.rmtree(place)

    return save


CONTENDERS: dict[str, Callable[[Path, State], Save]] = {
    "warm memcpy": memcpy,
    "ours, in memory": ours,
    "dcp.async_save, thread": lambda folder, like: distributed(folder, like, process=False, reuse=False),
    "dcp.async_save, thread, one stager": lambda folder, like: distributed(
        folder, like, process=False, reuse=True
    ),
    "dcp.async_save, process, one stager": lambda folder, like: distributed(
        folder, like, process=True, reuse=True
    ),
    "ours, on the disk": to_disk,
    "safetensors + fsync": safetensors_save,
    "torch.save + fsync": torch_save,
    "Accelerator.save_state": accelerate_save,
}


def contender(name: str, folder: Path, mib: int, rounds: int) -> dict[str, float]:
    """Medians over `rounds`, after a first save that touches what is touched once."""
    tensors, work = state(mib), torch.rand(1024, 1024)
    save = CONTENDERS[name](folder, tensors)

    def products() -> None:
        for _ in range(24):
            work @ work

    def update() -> None:
        for tensor in tensors.values():
            tensor.mul_(0.999)

    def free_and_whole(number: int) -> tuple[float, float]:
        began = time.perf_counter()
        until_free, until_whole = save(tensors, number)
        until_free()
        free = time.perf_counter() - began
        until_whole()
        return free, time.perf_counter() - began

    def steps(number: int | None) -> float:
        began = time.perf_counter()
        until_free, until_whole = save(tensors, number) if number is not None else (nothing, nothing)
        for _ in range(STEPS):
            products()
            until_free()  # of what was begun before the step, when the step would change it
            update()
        seconds = time.perf_counter() - began
        until_whole()
        return seconds

    free_and_whole(0)
    alone = [free_and_whole(number) for number in range(1, rounds + 1)]
    steps(None)
    beside = [(steps(None), steps(rounds + number)) for number in range(1, rounds + 1)]
    return {
        "free": statistics.median(free for free, _ in alone),
        "whole": statistics.median(whole for _, whole in alone),
        "lost": statistics.median(slow - plain for plain, slow in beside),
        "step": statistics.median(plain for plain, _ in beside) / STEPS,
    }


def table(options: argparse.Namespace) -> None:
    """All contenders, in turns."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in options.only or CONTENDERS}
    for _ in range(options.turns):
        for name in found:
            command = [sys.executable, __file__, "--contender", name, "--mib", str(options.mib)]
            command += ["--folder", str(options.folder), "--rounds", str(options.rounds)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"{name}: {done.stderr.strip()[-400:]}", file=sys.stderr)
                continue
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"\n{options.mib} MiB in {TENSORS} tensors, medians of {options.turns} processes\n")
    print("| | until free, s | of a memcpy | in all, s | lost, s |\n|---|---|---|---|---|")
    floor = None
    for name, runs in found.items():
        if not runs:
            continue
        free, whole, lost = (statistics.median(run[key] for run in runs) for key in ("free", "whole", "lost"))
        floor = floor or free
        print(f"| {name} | {free:.3f} | {free / floor:.2f} | {whole:.2f} | {lost:.3f} |", flush=True)


def recovery(options: argparse.Namespace) -> None:
    """Seconds until another process has read and verified a killed one's state: from memory, from disk."""
    code = (
        "import os, sys; sys.path.insert(0, {here!r}); import checkpoint as b; from pathlib import Path\n"
        "from shoestring.checkpoint import Snapshotter, save\n"
        "folder = Path({folder!r}); tensors = b.state({mib})\n"
        "snapshots = Snapshotter(folder); save(folder, step=1, tensors={{'state': tensors}}, json={{}})\n"
        "snapshots.begin(2, tensors={{'state': tensors}}, json={{}}); snapshots.flush()\n"
        "os.kill(os.getpid(), 9)"
    )
    folder = options.folder / "recovery"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    here = str(Path(__file__).resolve().parent)
    subprocess.run([sys.executable, "-c", code.format(here=here, folder=str(folder), mib=options.mib)])
    from shoestring.checkpoint import Snapshotter, newest

    began = time.perf_counter()
    snapshots = Snapshotter(folder)
    snapshot = snapshots.newest()
    assert snapshot is not None
    read = snapshot.tensors("state")
    memory = time.perf_counter() - began
    step = snapshot.step
    del snapshot
    snapshots.close()
    with open(next(folder.glob("checkpoint-*/state.safetensors")), "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # a machine that was started again
    began = time.perf_counter()
    found = newest(folder, print)
    assert found is not None
    again = found.tensors("state")
    disk = time.perf_counter() - began
    assert len(read) == len(again) == TENSORS
    print(f"\n| back from | step | seconds |\n|---|---|---|\n| memory | {step} | {memory:.2f} |")
    print(f"| disk, nothing cached | {found.step} | {disk:.2f} |")
    shutil.rmtree(folder)


def shard(rank: int, folder: str, mib: int, rounds: int, parity: bool) -> None:
    """One of two processes; prints medians of the first one."""
    import torch.distributed as dist
    from shoestring.checkpoint import ShardedSnapshotter
    from shoestring.checkpoint.pieces import share_of

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{parity}", rank=rank, world_size=2)
    tensors = state(mib)
    free, whole = [], []
    with ShardedSnapshotter(Path(folder) / f"run-{parity}", parity=parity) as snapshots:
        for step in range(rounds + 1):
            dist.barrier()
            began = time.perf_counter()
            snapshots.begin(step, pieces=share_of({"state": tensors}, rank, 2), json={})
            snapshots.wait()
            free.append(time.perf_counter() - began)
            snapshots.flush()
            whole.append(time.perf_counter() - began)
        dist.barrier()
    if rank == 0:
        named = "with parity" if parity else "without parity"
        middle = [statistics.median(seconds[1:]) for seconds in (free, whole)]
        print(f"| {named} | {middle[0]:.3f} | {middle[1]:.2f} |", flush=True)


def shards(options: argparse.Namespace) -> None:
    """A state that two processes hold alike: each takes half, and with parity a copy of the other half."""
    folder = (options.folder / "shards").resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print(
        f"\n{options.mib} MiB in two processes\n\n| | until free, s | in all, s |\n|---|---|---|", flush=True
    )
    for parity in (False, True):
        torch.multiprocessing.spawn(shard, (str(folder), options.mib, options.rounds, parity), nprocs=2)
    shutil.rmtree(folder)


def lora(options: argparse.Namespace) -> None:
    """SmolLM2 with LoRA: seconds a step without snapshots, as often as is chosen, and after each step."""
    ways = {
        "none": ["checkpoint.in_memory=false"],
        "auto": ["checkpoint.in_memory=true"],
        "after every step": ["checkpoint.in_memory=true", "checkpoint.snapshot_every=1"],
    }
    common = ["budget.time=null", f"budget.steps={options.steps}", "eval.samples=0", "eval.every=100%"]
    common += ["export=none", "train.batch_tokens=512"]
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(options.turns):
        for name, keys in ways.items():
            run = options.folder / f"lora-{name.replace(' ', '-')}-{turn}"
            command = [sys.executable, "-m", "shoestring.train", "cpu-demo", *common, *keys]
            subprocess.run([*command, f"output_dir={run}", "--fresh"], check=True, capture_output=True)
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][2:]
            seconds = (lines[-1]["seconds"] - lines[0]["seconds"]) / (len(lines) - 1)
            tokens = (lines[-1]["tokens"] - lines[0]["tokens"]) / (len(lines) - 1)
            found[name].append(1000 * seconds / tokens)
            shutil.rmtree(run)
    plain = statistics.median(found["none"])
    print("\n| snapshots | ms a token | over none | each turn |\n|---|---|---|---|")
    for name, each in found.items():
        middle = statistics.median(each)
        turns = ", ".join(f"{one:.3f}" for one in each)
        print(f"| {name} | {middle:.3f} | {middle / plain - 1:+.1%} | {turns} |")


PARTS = (table, recovery, shards, lora)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3, help="saves in each process")
    parser.add_argument("--turns", type=int, default=2, help="processes of each contender")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench/checkpoint"))
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS))
    for part in PARTS:
        parser.add_argument(f"--{part.__name__}", action="store_true")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--contender", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        folder = options.folder / f"{os.getpid()}"
        folder.mkdir(parents=True)
        try:
            found = contender(options.contender, folder, options.mib, options.rounds)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        print(json.dumps(found), flush=True)
        os._exit(0)  # helpers of some contenders do not end by themselves
    asked = [part for part in PARTS if getattr(options, part.__name__)]
    for part in asked or PARTS:
        part(options)


if __name__ == "__main__":
    main()
