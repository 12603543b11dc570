"""Several processes on one machine, and when this run's process really started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import psutil

STARTED_AT = "SHOESTRING_STARTED_AT"  # seconds on the monotonic clock, shared by all processes of a machine


def process_start() -> float:
    """When the user's command started, on time.monotonic's axis.

    A launcher's start counts (`accelerate launch`, torchrun, our own): it is the user's evening, too.
    """
    told = os.environ.get(STARTED_AT)
    if told is not None:
        return float(told)
    process = psutil.Process()
    oldest: float = process.create_time()
    for parent in process.parents():
        command = " ".join(parent.cmdline())
        if not any(word in command for word in ("accelerate", "torchrun", "torch.distributed", "shoestring")):
            break
        if "python" not in command:  # a shell whose command line only quotes ours
            break
        oldest = parent.create_time()
    return time.monotonic() - max(0.0, time.time() - oldest)


def launch(arguments: list[str], num_processes: int) -> int:
    """Run `python -m shoestring.train ARGUMENTS` in several processes; returns the exit code to pass on.

    `accelerate launch --cpu --num_processes 2` starts one process unless MPI is installed, and torchrun
    turns every exit code into 1, so the rendezvous variables that both would set are set here. Accelerate
    then finds gloo on CPUs and NCCL on GPUs by itself. The first process to fail ends the others.
    """
    import torch

    on_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= num_processes
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        STARTED_AT: str(process_start()),
    }
    if not on_gpu:
        environment["ACCELERATE_USE_CPU"] = "true"
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num_processes)))
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "shoestring.train", *arguments],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(num_processes)
    ]

    def pass_on(number: int, _frame: object) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C reaches the children through the terminal
    return _wait(children)


def _wait(children: list[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [child.poll() for child in children]
        failed = [code for code in codes if code]
        if failed:
            deadline = (
                time.monotonic() + 30.0
            )  # the others may be saving; then they are stuck in a collective
            while time.monotonic() < deadline and any(child.poll() is None for child in children):
                time.sleep(0.1)
            for child in children:
                if child.poll() is None:
                    child.kill()
                    child.wait()
            return failed[0] if failed[0] > 0 else 128 - failed[0]
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
