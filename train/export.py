"""final/: a model that loads with plain transformers (merged) or PEFT (adapter), checked before we say so."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from ..adapters import (
    SvfitConfig,
    compare_logits,
    load_adapter_state,
    merge_in_place,
    reading_lora,
    save_adapter,
)
from ..models import plain_attention
from ..offload.streamed_model import StreamedModel
from ..ops import give_back_freed_memory
from ..recipes.errors import ShoestringError
from .objectives import LossModule, base_model
from .streaming import write_merged


@dataclass(frozen=True)
class Exported:
    """Where the model lies, how far its logits are from the trained model's on the same tokens, and the model
    as it was loaded again.
    """

    path: Path
    kind: str
    comparison: dict[str, float | bool]
    model: nn.Module
    streamed: StreamedModel | None = None
    """Holds the weights of `model` that are not in memory; to be closed."""

    @property
    def line(self) -> str:
        """One line for the screen and the log."""
        kl, agreement = self.comparison["mean_kl"], self.comparison["top1_agreement"]
        return (
            f"{self.kind} model in {self.path}: loaded again, it says what the trained one said "
            f"(mean KL {kl:.1e}, same top token {agreement:.0%})"
        )


def export_final(
    module: LossModule,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    merged: bool,
    probe: Tensor,
    card: str,
    autocast: bool,
    streamed: StreamedModel | None = None,
    load_again: Callable[[Path, Any, torch.dtype], StreamedModel] | None = None,
) -> Exported:
    """Write the trained model to `folder`, load it again and compare logits on `probe` ([1, L] token ids).

    Written aside and renamed, so `folder` is always whole. The model is taken out of `module`: with `merged`
    the adapter is merged in place, and the trained model's memory goes to the reloaded one (but for what the
    optimizer holds, which it trains). The adapter, if there is one, is saved first: in `folder/adapter`
    beside a merged model, else as `folder` itself.
    autocast: the weights are float32 only for training and are written in bf16. streamed: holds weights of
    the model that are not in memory; it is closed, and the copy is loaded by `load_again(folder, config,
    dtype)`, streamed too.

    Raises ShoestringError when the reloaded model does not say what the trained one said.
    """
    model = module.release()
    reference = model_logits(model, probe)
    aside = folder.with_name(folder.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    has_adapter = hasattr(model, "peft_config")
    if has_adapter:
        save_adapter(model, aside / "adapter" if merged else aside, portable=True)
    if merged or not has_adapter:
        plain: Any
        reloaded: nn.Module
        if streamed is not None and load_again is not None:
            plain = write_merged(streamed, model, aside, torch.bfloat16 if autocast else None)
            dtype, config = torch.bfloat16 if autocast else plain.dtype, plain.config
            streamed.close()
            del model, plain
            streamed = load_again(aside, config, dtype)
            reloaded = streamed.model
        else:
            plain = merge_in_place(model) if has_adapter else model
            if autocast:
                plain.to(torch.bfloat16)
            plain.save_pretrained(aside)
            dtype, device = plain.dtype, plain.device
            del model, plain
            give_back_freed_memory()
            reloaded = AutoModelForCausalLM.from_pretrained(aside, dtype=dtype).to(device)
        comparison = compare_logits(reference, model_logits(reloaded, probe), dtype=dtype)
        kind = "merged" if has_adapter else "full"
    else:
        comparison = _compare_adapter(model, aside, reference, probe)
        kind, reloaded = "adapter", model
    tokenizer.save_pretrained(aside)
    (aside / "README.md").write_text(card, encoding="utf-8")
    if not comparison["within_tolerance"]:
        raise ShoestringError(
            f"the exported model in {aside} does not say what the trained one said: {comparison}\n"
            "  The last checkpoint is whole and nothing is lost. This is our fault; please report it."
        )
    sync_folder(aside)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(aside, folder)
    return Exported(folder, kind, comparison, reloaded, streamed)


@torch.no_grad()
def model_logits(model: nn.Module, probe: Tensor) -> Tensor:
    """Logits [1, L, vocabulary] of `probe`, on the host, in the type in which the model gives them."""
    base: Any = base_model(model)
    model.eval()
    weight = base.get_input_embeddings().weight
    mixed = len({p.dtype for p in model.parameters() if p.is_floating_point()}) > 1
    with (
        plain_attention(base),
        torch.autocast(weight.device.type, dtype=torch.bfloat16, enabled=mixed),
    ):
        logits: Tensor = base(input_ids=probe.to(weight.device), use_cache=False).logits
    return logits.cpu()


def _compare_adapter(
    model: nn.Module, folder: Path, reference: Tensor, probe: Tensor
) -> dict[str, float | bool]:
    """The saved adapter read back into the trained model, unless its start changed the base.

    PiSSA, OLoRA and LoftQ adapters are written for the base as it was published, which is not in memory any
    more: there the numbers in the file are compared with those in memory, which `save_adapter` converted.
    SVFit is written as LoRA, and the trained layers compute with what that file says.
    """
    dtype: torch.dtype = base_model(model).get_input_embeddings().weight.dtype
    peft_config: Any = model.peft_config
    if isinstance(peft_config["default"], SvfitConfig):
        with reading_lora(model, folder):
            return compare_logits(reference, model_logits(model, probe), dtype=dtype)
    if getattr(model, "initial_adapter", None) is None:
        load_adapter_state(model, folder)
    return compare_logits(reference, model_logits(model, probe), dtype=dtype)


def sync_folder(folder: Path) -> None:
    """Return when all files in it, and it itself, are on the disk."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
