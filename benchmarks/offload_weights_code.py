"""Streamed frozen layers on disk, as they are and in the lossless code: whole LoRA steps, and reading alone.

A Llama in bfloat16 with normally distributed weights (whose code is 1 % shorter than that of trained ones),
LoRA on all linear layers, past the page cache. Both contenders are open at once and take turns step by step;
medians. "waiting" has no arithmetic: each layer is brought and waited beside for `--wait` ms, forward and
backward, as where an accelerator computes and the cores are idle. `--disk-mbs` holds the file's reads to a
rate, for slower disks than the one at hand.

    python benchmarks/offload_weights_code.py                              # this disk, 16 and 256 tokens
    python benchmarks/offload_weights_code.py --disk-mbs 200 500 --tokens 16 64 256 --folder /ssd/scratch
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from shoestring.offload.code_rate import cannot_decode, measure_decoding
from shoestring.offload.direct_file import DirectFile
from shoestring.offload.streamed_model import StreamedModel
from shoestring.offload.streamed_weights import stream_layers

VOCABULARY = 8_192


def build(options: argparse.Namespace) -> Any:
    """The model with its adapters."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).train()
    return get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))


def slow_down(file: DirectFile, rate: float) -> None:
    """Let reads of the file take as long as they would at `rate` bytes a second."""
    lock, free, read = threading.Lock(), [0.0], file.read

    def slow(offset: int, into: memoryview) -> None:
        with lock:
            free[0] = max(time.perf_counter(), free[0]) + into.nbytes / rate
            until = free[0]
        read(offset, into)
        time.sleep(max(0.0, until - time.perf_counter()))

    file.read = slow  # type: ignore[method-assign]


def stepping(model: Any, tokens: int) -> Callable[[], float]:
    """A forward and a backward pass; the loss."""
    ids = torch.randint(3, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(1))

    def step() -> float:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        model.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def waiting(streamed: StreamedModel, seconds: float) -> Callable[[], float]:
    """The same passes over the layers, with nothing to compute."""

    def step() -> float:
        for layer in streamed.layers:
            with layer.present("forward"):
                time.sleep(seconds)
        for layer in reversed(streamed.layers):
            with layer.present("backward"):
                time.sleep(2 * seconds)
        return 0.0

    return step


def compare(steps: dict[str, Callable[[], float]], streamed: dict[str, StreamedModel], rounds: int) -> str:
    """A line: seconds of the clock, their ratio, and the processor's seconds, of both."""
    wall: dict[str, list[float]] = {name: [] for name in steps}
    used: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, float] = {}
    read: dict[str, int] = {}
    for number in range(rounds + 1):
        for name, step in steps.items():
            before = streamed[name].bytes_read
            began, processor = time.perf_counter(), time.process_time()
            losses[name] = step()
            took = time.perf_counter() - began, time.process_time() - processor
            read[name] = streamed[name].bytes_read - before
            if number:
                wall[name].append(took[0])
                used[name].append(took[1])
    if losses["raw"] != losses["coded"]:
        sys.exit(f"the losses differ: {losses}")
    ratios = [a / b for a, b in zip(wall["raw"], wall["coded"], strict=True)]
    each = [
        f"{statistics.median(wall[name]):7.3f} s ({statistics.median(used[name]):6.3f} of a core, "
        f"{read[name] / 1e6:,.0f} MB)"
        for name in steps
    ]
    return f"{'  '.join(each)}  x{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def run(options: argparse.Namespace, folder: Path, rate: float | None) -> None:
    """All rows of one disk."""
    with contextlib.ExitStack() as undo:
        streamed: dict[str, StreamedModel] = {}
        for name in ("raw", "coded"):
            streamed[name] = undo.enter_context(
                stream_layers(build(options), tier="disk", folder=folder, io="threads", coded=name == "coded")
            )
            file: Any = streamed[name]._tier.held
            if not file.direct:
                print("THROUGH the page cache, so these are no figures of a disk")
            if rate is not None:
                slow_down(file, rate)
        print(
            "this disk" if rate is None else f"held to {rate / 1e6:.0f} MB/s",
            "-",
            streamed["coded"].lines[-1],
        )
        for ms in options.wait:
            passes = {name: waiting(one, ms / 1e3) for name, one in streamed.items()}
            print(f"  waiting {ms:5.1f} ms  ", compare(passes, streamed, options.rounds), flush=True)
        for tokens in options.tokens:
            steps = {name: stepping(one.model, tokens) for name, one in streamed.items()}
            print(f"  {tokens:5d} tokens    ", compare(steps, streamed, options.rounds), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, nargs="*", default=[16, 256])
    parser.add_argument("--wait", type=float, nargs="*", default=[0.0, 10.0], metavar="MS")
    parser.add_argument("--disk-mbs", type=float, nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    if reason := cannot_decode():
        sys.exit(f"nothing to compare: {reason}")
    found = measure_decoding("cpu")
    assert found is not None
    print(
        f"{torch.get_num_threads()} threads; one decodes {found.bytes_per_second / 1e9:.2f} GB/s of weights"
    )
    print(" " * 19, "as they are", " " * 24, "coded")
    for rate in [None, *(mbs * 1e6 for mbs in options.disk_mbs)]:
        run(options, options.folder, rate)
