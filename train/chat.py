"""Talk to an exported model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..recipes.errors import UserError
from .samples import answer
from .screen import quiet_libraries


def load_final(run: Path) -> tuple[Any, Any]:
    """The exported model and tokenizer of a run.

    Raises UserError when the run has no final/ yet.
    """
    folder = run / "final"
    if not (run / "resolved.yaml").is_file():
        raise UserError(
            f"{run} is no run directory: it has no resolved.yaml.  Runs lie under runs/ by default."
        )
    if not folder.is_dir():
        raise UserError(
            f"{run} has no final/ model.\n"
            "  Finish the run (the same `shoestring train` command resumes it), or: "
            f"shoestring export {run} --to merged"
        )
    quiet_libraries()
    dtype = torch.bfloat16
    # Not only by default: without a value, code that comes with the model may be asked for at the terminal.
    safely: dict[str, Any] = {"trust_remote_code": False, "use_safetensors": True}
    if (folder / "adapter_config.json").exists():
        from peft import AutoPeftModelForCausalLM

        from .. import adapters  # noqa: F401 - PEFT knows ours then

        model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=dtype, **safely)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **safely)
    return model.eval(), AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def chat_with(run: Path, *, max_new_tokens: int) -> None:
    """Read lines, answer them; an empty line starts a new conversation, Ctrl-D ends."""
    console = Console()
    model, tokenizer = load_final(run)
    console.print(f"[dim]{run / 'final'} · an empty line starts anew · Ctrl-D ends[/dim]")
    messages: list[dict[str, str]] = []
    while True:
        try:
            text = console.input("[bold]you>[/bold] ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if not text:
            messages = []
            console.print("[dim]new conversation[/dim]")
            continue
        messages.append({"role": "user", "content": text})
        reply = answer(model, tokenizer, [messages], max_new_tokens=max_new_tokens)[0]
        messages.append({"role": "assistant", "content": reply})
        console.print(f"[bold cyan]model>[/bold cyan] {escape(reply)}", highlight=False)
