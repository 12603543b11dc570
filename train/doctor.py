"""What this machine has, how quick it is, which optional parts are missing, and what lies in runs/."""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "pydantic")
# module -> (what it is for, how to get it)
OPTIONAL = {
    "bitsandbytes": ("4-bit base models, 8-bit optimizers", "pip install 'shoestring[quantized]'"),
    "gguf": ("models in GGUF files", "pip install 'shoestring[gguf]'"),
    "wandb": ("track.report_to=wandb", "pip install 'shoestring[wandb]'"),
    "tensorboard": ("track.report_to=tensorboard", "pip install 'shoestring[tensorboard]'"),
    "trackio": ("track.report_to=trackio", "pip install 'shoestring[trackio]'"),
}


def examine(runs: Path = Path("runs")) -> None:
    """Print it all; nothing is changed, and nothing missing is an error."""
    from ..checkpoint import describe_checkpoints
    from ..plan import probe

    console = Console(highlight=False)
    table = Table("machine", "", box=box.SIMPLE_HEAD)
    for label, text in probe(Path.cwd()).describe():
        table.add_row(label, text)
    console.print(table)

    table = Table("library", "version", box=box.SIMPLE_HEAD)
    for name in LIBRARIES:
        table.add_row(name, version(name))
    console.print(table)

    table = Table("optional", "version", "for", box=box.SIMPLE_HEAD)
    for name, (purpose, command) in OPTIONAL.items():
        here = importlib.util.find_spec(name) is not None
        table.add_row(
            name,
            _version(name) if here else "missing",
            purpose if here else escape(f"{purpose}: {command}"),
        )
    console.print(table)

    for folder in sorted(runs.glob("*/")):
        checkpoints = describe_checkpoints(folder)
        if checkpoints:
            console.print(f"{folder}", markup=False)
            for facts in checkpoints:
                console.print(f"  {facts}", markup=False)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "present"
