"""All operations against their contenders, against what the machine could do at best, and a whole step.

Each table has a line for each contender: milliseconds, how many times ours that is, and the floor's share of
it. The floor is the larger of bytes over the copy bandwidth and FLOPs over the matrix rate, both measured in
the same run; 100 % is as fast as this machine goes. Memory is what a contender allocates beyond its inputs.
With `--device cpu`, and with `--floors` alone, the floors of an H200 are computed for Llama-3-8B's shapes
(4.3 TB/s of copy, 790 TFLOP/s).

    python benchmarks/ops.py --device cpu
    python benchmarks/ops.py --device cuda --markdown ops-cuda.md
    python benchmarks/ops.py --device cpu --only ops_gathered ops_loss_head
    python benchmarks/ops.py --floors
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import platform
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from ops_timing import H200_COPY, H200_MATMUL, Row, copy_bandwidth, matmul_rate
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

MODULES = (
    "ops_step_cpu",
    "ops_step_cuda",
    "ops_low_rank",
    "ops_grad_pack",
    "ops_lossless",
    "ops_lora",
    "ops_loss_head",
    "ops_gathered",
    "ops_whole_step",
)


@dataclass(frozen=True)
class Limits:
    """Bytes read and written a second, and FLOP a second of matrix products."""

    copy: float
    matmul: float

    def floor(self, row: Row) -> float:
        """Seconds that `row` takes at least."""
        return max(row.bytes / self.copy, row.flops / self.matmul)


H200 = Limits(H200_COPY, H200_MATMUL)


@dataclass(frozen=True)
class Page:
    """A table as text; the first column is set to the left."""

    title: str
    head: list[str]
    lines: list[list[str]]

    def markdown(self) -> str:
        """As a table of Markdown under its title."""
        rule = ["---"] + ["---:"] * (len(self.head) - 1)
        body = "\n".join(f"| {' | '.join(line)} |" for line in [self.head, rule, *self.lines])
        return f"**{self.title}**\n\n{body}\n"

    def show(self, console: Console) -> None:
        """Print it."""
        table = Table(title=Text(self.title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for index, name in enumerate(self.head):
            table.add_column(name, justify="right" if index else "left", max_width=None if index else 64)
        for line in self.lines:
            table.add_row(*map(Text, line))  # as it is: brackets are no markup
        console.print(table)


def measured(name: str, rows: list[Row], limits: Limits) -> Page:
    """A line for each contender of each row; ours first."""
    lines = []
    for row in rows:
        floor, ours = limits.floor(row), row.seconds.get("ours")
        names = sorted(row.seconds, key=lambda contender: contender != "ours")
        for index, contender in enumerate(names):
            seconds = row.seconds[contender]
            lines.append(
                [
                    row.name if index == 0 else "",
                    contender,
                    _milliseconds(seconds),
                    f"{seconds / ours:.2f}" if ours else "",
                    f"{floor / seconds:.0%}" if floor and seconds else "",
                    f"{row.memory[contender] / 1e6:.1f}" if contender in row.memory else "",
                ]
            )
        if not names:
            lines.append([row.name, "floor", _milliseconds(floor), "", "", ""])
        if row.note:
            lines.append([f"  {row.note}", "", "", "", "", ""])
    return Page(name, ["operation", "contender", "ms", "x ours", "floor's share", "MB"], lines)


def computed(name: str, rows: list[Row]) -> Page:
    """What an H200 takes at least."""
    lines = []
    for row in rows:
        binds = "bytes" if row.bytes / H200.copy >= row.flops / H200.matmul else "products"
        cells = [_milliseconds(H200.floor(row)), binds, f"{row.bytes / 1e9:.3g}", f"{row.flops / 1e12:.3g}"]
        lines.append([row.name, *cells])
    return Page(
        f"{name}: floors of an H200 at Llama-3-8B's shapes, computed",
        ["operation", "ms at least", "bound by", "GB", "TFLOP"],
        lines,
    )


def _milliseconds(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def machine(device: torch.device) -> tuple[Limits, str]:
    """The limits measured now, and a line that says where."""
    # The best of some tries: a limit is what the machine can do, not what it did beside other programs.
    types = (torch.bfloat16, torch.float32)
    rates = {dtype: max(matmul_rate(device, dtype) for _ in range(3)) for dtype in types}
    limits = Limits(max(copy_bandwidth(device) for _ in range(3)), max(rates.values()))
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    speeds = ", ".join(f"{str(dtype)[6:]} {rate / 1e12:.3g}" for dtype, rate in rates.items())
    asked = os.environ.get("SHOESTRING_OPS", "")
    line = (
        f"{chip}, {torch.get_num_threads()} threads, torch {torch.__version__}: "
        f"copy {limits.copy / 1e9:.1f} GB/s, products in TFLOP/s: {speeds}"
        + (f"; SHOESTRING_OPS={asked}" if asked else "")
    )
    return limits, line


def pages_of(
    module: ModuleType, device: torch.device | None, limits: Limits | None, all_rows: list[Row]
) -> list[Page]:
    """What `module` has to say: rows measured on `device`, and computed ones where it is no GPU.

    The measured rows are added to `all_rows`.
    """
    name, pages = module.__name__, []
    if device is not None and limits is not None and (rows := module.rows(device)):
        pages.append(measured(name, rows, limits))
        all_rows += rows
    floors = getattr(module, "h200_rows", None)
    if floors is not None and (device is None or device.type == "cpu"):
        pages.append(computed(name, floors()))
    return pages


def run(
    names: list[str], device: torch.device | None, minutes: float, plot: Path | None
) -> tuple[list[str], bool]:
    """Markdown of all that was printed, and whether all went well; `device` None: floors alone."""
    rows: list[Row] = []
    console = Console(width=None if sys.stdout.isatty() else 150)
    start, written, well, limits = time.monotonic(), [], True, None
    if device is not None:
        limits, line = machine(device)
        console.print(line, highlight=False)
        written.append(line + "\n")
    for name in names:
        if time.monotonic() - start > 60 * minutes:
            console.print(f"{name}: left out, {minutes:g} minutes have passed (--minutes)")
            well = False
            continue
        begun = time.monotonic()
        try:
            pages = pages_of(importlib.import_module(name), device, limits, rows)
        except Exception as error:
            # One that fails must not take the others with it.
            absent = isinstance(error, ModuleNotFoundError) and error.name == name
            reason = "there is no such file" if absent else traceback.format_exc(limit=-4)
            console.print(f"{name} failed: {reason}", markup=False, highlight=False)
            well = False
            continue
        if not pages:
            console.print(f"{name}: no rows for {device.type if device else 'floors'}")
        for page in pages:
            page.show(console)
            written.append(page.markdown())
        if device is not None and pages:
            console.print(f"{name} took {time.monotonic() - begun:.0f} s", highlight=False)
        gc.collect()
        if device is not None and device.type == "cuda":
            torch.cuda.empty_cache()
    if plot is not None and rows:
        from ops_plot import draw

        draw(rows, plot, written[0].strip())
    return written, well


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", choices=MODULES, help=f"some of: {', '.join(MODULES)}"
    )
    parser.add_argument(
        "--floors", action="store_true", help="print the computed floors alone; no GPU needed"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the ratios there (matplotlib)")
    parser.add_argument("--minutes", type=float, help="begin nothing after so many (10 on CUDA, else no end)")
    given = parser.parse_args()
    if given.device == "cuda" and not given.floors and not torch.cuda.is_available():
        print("no CUDA device here; --floors prints the computed floors of an H200", file=sys.stderr)
        return 2
    device = None if given.floors else torch.device(given.device)
    minutes = given.minutes or (10.0 if given.device == "cuda" else float("inf"))
    written, well = run(given.only or list(MODULES), device, minutes, given.plot)
    if given.markdown is not None:
        given.markdown.write_text("\n".join(written), encoding="utf-8")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
