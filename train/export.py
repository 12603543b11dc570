"""final/: a model that loads with plain transformers (merged) or PEFT (adapter), checked before we say so."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from ..adapters import compare_logits, merge_in_place, save_adapter
from ..models import plain_attention
from ..recipes.errors import ShoestringError
from .objectives import base_model


@dataclass(frozen=True)
class Exported:
    """Where the model lies, and how far its logits are from the trained model's on the same tokens."""

    path: Path
    kind: str
    comparison: dict[str, float]

    @property
    def line(self) -> str:
        """One line for the screen and the log."""
        return (
            f"{self.kind} model in {self.path}; reloaded, its logits agree with the trained model's "
            f"(mean KL {self.comparison['mean_kl']:.1e}, same top token {self.comparison['top1_agreement']:.1%})"
        )


def export_final(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    merged: bool,
    probe: Tensor,
    card: str,
) -> Exported:
    """Write the trained model to `folder`, load it again and compare logits on `probe` ([1, L] token ids).

    Written aside and renamed, so `folder` is always whole. With `merged` the adapter is merged in place:
    the trained model is gone afterwards, which spares its memory to the reloaded one. The adapter, if
    there is one, is saved first, in `folder/adapter` beside a merged model or as `folder` itself.

    Raises ShoestringError when the reloaded model does not say what the trained one said.
    """
    reference = _logits(model, probe)
    aside = folder.with_name(folder.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    has_adapter = hasattr(model, "peft_config")
    if has_adapter:
        save_adapter(model, aside / "adapter" if merged else aside)
    if merged or not has_adapter:
        plain: Any = merge_in_place(model) if has_adapter else model
        plain.save_pretrained(aside)
        comparison = compare_logits(reference, _reloaded_logits(aside, plain.dtype, probe))
    else:
        comparison = compare_logits(reference, _logits_with_saved_adapter(model, aside, probe))
    tokenizer.save_pretrained(aside)
    (aside / "README.md").write_text(card, encoding="utf-8")
    if not comparison["within_tolerance"]:
        raise ShoestringError(
            f"the exported model in {aside} differs from the trained one: {comparison}\n"
            "  The last checkpoint is whole; nothing is lost. Please report this."
        )
    _sync(aside)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(aside, folder)
    kind = "merged" if merged and has_adapter else "adapter" if has_adapter else "full"
    return Exported(folder, kind, comparison)


@torch.no_grad()
def _logits(model: nn.Module, probe: Tensor) -> Tensor:
    base = base_model(model)
    model.eval()
    with plain_attention(base):
        device = base.get_input_embeddings().weight.device
        return base(input_ids=probe.to(device), use_cache=False).logits.float().cpu()


def _reloaded_logits(folder: Path, dtype: torch.dtype, probe: Tensor) -> Tensor:
    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return _logits(reloaded, probe)


def _logits_with_saved_adapter(model: nn.Module, folder: Path, probe: Tensor) -> Tensor:
    from ..adapters import load_adapter_state

    load_adapter_state(model, folder)
    return _logits(model, probe)


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
