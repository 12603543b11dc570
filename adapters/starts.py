"""Where an adapter starts, when that takes more than random numbers: LoftQ, orthogonal and EVA.

PiSSA, OLoRA and LoftQ change the base weights. Their adapters fit that changed base only, so the first state
is kept: with it the trained adapter can be written as a plain one for the unchanged base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..recipes.errors import UserError

if TYPE_CHECKING:
    from ..recipes.choices import LoraAdapter

InitialAdapter = dict[str, torch.Tensor]
_ADAPTER = "default"


def lora_layers(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """(name in the base model, PEFT layer) of every adapted layer."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name.removeprefix("base_model.model."), module


def remember_start(model: torch.nn.Module) -> InitialAdapter:
    """A copy of the adapter's weights on the CPU, as PEFT names them in files."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: value.detach().cpu().clone() for name, value in state.items()}


@torch.no_grad()
def start_orthogonal(model: torch.nn.Module) -> None:
    """A from the even and B from the odd rows of one orthogonal matrix: B @ A = 0 with neither zero."""
    for _, layer in lora_layers(model):
        if _ADAPTER not in layer.lora_A:
            raise UserError(
                "adapter.init_lora_weights: orthogonal is for linear layers, and adapter.target_modules "
                "names an "
                "embedding.\n  Leave the embedding out, or use init_lora_weights: true"
            )
        a, b = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
        rank = a.shape[0]
        basis = torch.linalg.qr(torch.randn(rank, rank)).Q
        a.copy_((torch.randn(a.shape[1], rank // 2) @ basis[0::2]).T / 10)
        b.copy_((torch.randn(b.shape[0], rank // 2) @ basis[1::2]) / 10)


@torch.no_grad()
def start_loftq(
    model: torch.nn.Module, adapter: LoraAdapter, original_weight: Callable[[str], torch.Tensor] | None
) -> None:
    """LoftQ (arXiv:2310.08659, algorithm 1): alternate Q = quantise(W - s B A) and B A = SVD_r(W - Q) / s.

    On a 4-bit base Q is the base itself; on an unquantised one the base becomes the dequantised Q. The
    factors come from a randomised SVD with four power iterations, so that large matrices take seconds.
    """
    for name, layer in lora_layers(model):
        base, scale = layer.get_base_layer(), layer.scaling[_ADAPTER]
        four_bit = hasattr(base.weight, "quant_state")
        if four_bit and (original_weight is None or adapter.loftq_bits != 4):
            raise UserError(
                "adapter.init_lora_weights: loftq on a 4-bit base needs the unquantised weights and "
                "loftq_bits: 4."
            )
        if four_bit and original_weight is not None:
            weight = original_weight(f"{name}.weight").to(base.weight.device)
        else:
            weight = base.weight.detach().float()
        a, b = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
        for iteration in range(adapter.loftq_iter):
            if four_bit:
                if iteration:
                    base.weight = _requantised(base.weight, weight - scale * (b @ a))
                quantised = _dequantised(base.weight)
            else:
                left = weight if iteration == 0 else weight - scale * (b @ a)
                quantised = _through_nf4(left) if adapter.loftq_bits == 4 else _through_int8(left)
            rank = a.shape[0]
            u, s, v = torch.svd_lowrank(weight - quantised, q=min(rank + 16, *weight.shape), niter=4)
            root = s[:rank].sqrt()
            b.copy_(u[:, :rank] * root / scale)
            a.copy_((v[:, :rank] * root).T)
        if not four_bit:
            base.weight.copy_(quantised)


def _through_nf4(weight: torch.Tensor) -> torch.Tensor:
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(weight.contiguous(), quant_type="nf4")
    value: torch.Tensor = bnb.dequantize_4bit(packed, state)
    return value


def _through_int8(weight: torch.Tensor) -> torch.Tensor:
    scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
    return (weight / scale).round() * scale


def _dequantised(weight: Any) -> torch.Tensor:
    import bitsandbytes.functional as bnb

    value: torch.Tensor = bnb.dequantize_4bit(weight.data, weight.quant_state)
    return value.float()


def _requantised(old: Any, weight: torch.Tensor) -> Any:
    from bitsandbytes.nn import modules

    state = old.quant_state
    params: Any = modules.Params4bit  # its own `to` is typed so that no call fits
    return params(
        weight.to(state.dtype).contiguous(),
        requires_grad=False,
        quant_type=state.quant_type,
        compress_statistics=state.nested,
        blocksize=state.blocksize,
    ).to(old.device)


def check_eva_batches(adapter: LoraAdapter, batches: Sequence[Mapping[str, torch.Tensor]] | None) -> None:
    """EVA needs batches, each with at least as many usable tokens as the largest rank it may give.

    PEFT would otherwise read the batches for ever.
    """
    rank = round(max(adapter.r, *adapter.rank_pattern.values(), 0) * adapter.eva_rho)
    if not batches:
        raise UserError(
            "adapter.init_lora_weights: eva looks at training rows first, and there are none.   Use true in "
            "its place"
        )
    fewest = min(_usable_tokens(batch) for batch in batches)
    if fewest <= rank:
        raise UserError(
            f"adapter.init_lora_weights: eva needs more than {rank} tokens (eva_rho * r) in each batch it "
            "looks at; "
            f"the shortest has {fewest}.\n  Lower adapter.r or adapter.eva_rho, or use init_lora_weights: "
            "true"
        )


def _usable_tokens(batch: Mapping[str, torch.Tensor]) -> int:
    if "labels" in batch:
        return int((batch["labels"] != -100).sum())
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    return batch["input_ids"].numel()


def calibrate_eva(model: Any, batches: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """A = right-singular vectors of each layer's inputs, ranks by their variance (arXiv:2410.07170)."""
    from peft import initialize_lora_eva_weights

    config = model.peft_config[_ADAPTER]
    config.eva_config.use_label_mask = all("labels" in batch for batch in batches)
    rows = [dict(batch) for batch in batches]
    initialize_lora_eva_weights(model, rows, gather_distributed_inputs=False, show_progress_bar=False)
