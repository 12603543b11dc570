"""SVFit (arXiv:2409.05926): train the largest singular values of each weight, in place of the weight.

    W = U S V^T,   W' = W + U_r diag(d) V_r^T,   y = W x + U_r (d * (V_r^T x))

d [r] is trained and starts at zero, so training starts at the base model whatever U_r and V_r are. What is
left of W is never formed. The backward pass needs x V_r [tokens, r] alone, not x.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..ops.autocast import computing_dtype
from .layers import OwnConfig, OwnLayer, OwnTuner, base_weight, is_meta, own_layers, register
from .spectra import energy_rank, sketch, thin_svd


@dataclass
class SvfitConfig(OwnConfig):
    """r: singular values trained in each matrix, at most its smaller side; None: as many as hold `energy`."""

    r: int | None = None
    energy: float = 0.99

    def __post_init__(self) -> None:
        """The key under which PEFT knows the method."""
        super().__post_init__()
        self.peft_type: Any = "SVFIT (import shoestring.adapters)"


class _AddScaled(torch.autograd.Function):
    """base + ((x v) * d) u^T, with x v, u, v and d kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Tensor, u: Tensor, v: Tensor, d: Tensor) -> Tensor:
        dtype = computing_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            flat, left, right = x.reshape(-1, x.shape[-1]).to(dtype), u.to(dtype), v.to(dtype)
            h = flat @ right
            out = torch.addmm(base.reshape(-1, base.shape[-1]).to(dtype), h * d.to(dtype), left.t())
        ctx.save_for_backward(h, u, v, d)
        ctx.x_shape, ctx.x_dtype, ctx.base_dtype = x.shape, x.dtype, base.dtype
        return out.view(base.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        h, u, v, d = ctx.saved_tensors
        dtype = h.dtype
        flat = grad_output.reshape(-1, grad_output.shape[-1]).to(dtype)
        back = flat @ u.to(dtype)
        # summed in the trained vector's own type: thousands of tokens do not add up in bfloat16
        wanted = (h.to(d.dtype) * back.to(d.dtype)).sum(dim=0) if ctx.needs_input_grad[4] else None
        dx = None
        if ctx.needs_input_grad[0]:
            dx = ((back * d.to(dtype)) @ v.to(dtype).t()).view(ctx.x_shape).to(ctx.x_dtype)
        dbase = grad_output.to(ctx.base_dtype) if ctx.needs_input_grad[1] else None
        return dx, dbase, None, None, wanted


def add_scaled(x: Tensor, base: Tensor, u: Tensor, v: Tensor, d: Tensor) -> Tensor:
    """base [..., out] + ((x v) * d) u^T for x [..., in], u [out, r], v [in, r], d [r].

    Gradients reach x, base and d; u and v are frozen.
    """
    output: Tensor = _AddScaled.apply(x, base, u, v, d)  # type: ignore[no-untyped-call]  # torch has no types here
    return output


class SvfitLayer(OwnLayer):
    """A linear layer with trained singular values: `svfit_u` [out, r], `svfit_v` [in, r], `svfit_d` [r]."""

    adapter_layer_names = ("svfit_d",)
    other_param_names = ("svfit_u", "svfit_v")

    def __init__(self, base_layer: nn.Module, adapter_name: str, u: Tensor, v: Tensor) -> None:
        """u and v are held in the type that the base computes in."""
        super().__init__(base_layer)
        self.svfit_u = nn.Parameter(u, requires_grad=False)
        self.svfit_v = nn.Parameter(v, requires_grad=False)
        start = torch.zeros(u.shape[1], dtype=torch.float32, device=u.device)
        self.svfit_d = nn.ParameterDict({adapter_name: nn.Parameter(start)})
        self.set_adapter([adapter_name])

    def add(self, x: Tensor, base: Tensor) -> Tensor:
        """See `add_scaled`."""
        (name,) = self.active_adapters
        return add_scaled(x, base, self.svfit_u, self.svfit_v, self.svfit_d[name])

    def delta(self, adapter: str) -> Tensor:
        """U diag(d) V^T, [out, in]."""
        d = self.svfit_d[adapter].detach().float()
        delta: Tensor = (self.svfit_u.float() * d) @ self.svfit_v.float().t()
        return delta


class SvfitTuner(OwnTuner):
    """Wraps linear layers for SVFit."""

    prefix = "svfit_"
    tuner_layer_cls = SvfitLayer

    def wrap(self, config: SvfitConfig, name: str, target: nn.Module, adapter_name: str) -> SvfitLayer:
        """Singular vectors of the weight; from shapes alone, a rank by energy counts as the whole."""
        plain = OwnLayer(target)
        small = min(plain.in_features, plain.out_features)
        weight: Any = target.weight
        rank = config.ranks.get(name, config.r)
        device, dtype = weight.device, plain.held_type()
        if config.init_weights and not is_meta(plain):
            u, s, v = thin_svd(base_weight(plain), rank)
            if rank is None:
                rank = energy_rank(s, config.energy)
            u, v = (value[:, :rank].to(device=device, dtype=dtype).contiguous() for value in (u, v))
            config.ranks[name] = u.shape[1]
            config.fingerprints[name] = sketch(u, v)
        else:
            rank = small if rank is None else min(rank, small)
            u = _spread(plain.out_features, rank, device, dtype)
            v = _spread(plain.in_features, rank, device, dtype)
        return SvfitLayer(target, adapter_name, u, v)


def _spread(rows: int, columns: int, device: torch.device, dtype: Any) -> Tensor:
    """Values of the usual size, for measurements; a file's own replace them when one is loaded."""
    return torch.full((rows, columns), rows**-0.5, device=device, dtype=dtype)


def lora_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The adapter as LoRA of the same weight change, by PEFT's names in files, and the rank of each module.

    A = V^T and B = U diag(d), with alpha = r: exact, on the CPU in float32.
    """
    state: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, layer in own_layers(model):
        assert isinstance(layer, SvfitLayer)
        (adapter,) = layer.active_adapters
        d = layer.svfit_d[adapter].detach().float()
        state[f"base_model.model.{name}.lora_A.weight"] = layer.svfit_v.float().t().contiguous().cpu()
        state[f"base_model.model.{name}.lora_B.weight"] = (layer.svfit_u.float() * d).contiguous().cpu()
        ranks[name] = len(d)
    return state, ranks


def save_as_lora(model: Any, folder: Path) -> None:
    """Write the SVFit adapter of a PeftModel as a plain LoRA one, which needs PEFT and nothing of ours."""
    from peft import LoraConfig
    from safetensors.torch import save_file
    from transformers.pytorch_utils import Conv1D

    state, ranks = lora_tensors(model)
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {name: rank for name, rank in ranks.items() if rank != common}
    own: SvfitConfig = model.peft_config["default"]
    bases = [layer.get_base_layer() for _, layer in own_layers(model)]
    config = LoraConfig(
        task_type=own.task_type,
        base_model_name_or_path=own.base_model_name_or_path,
        inference_mode=True,
        r=common,
        lora_alpha=common,
        target_modules=sorted(ranks),
        rank_pattern=others,
        alpha_pattern=dict(others),
        fan_in_fan_out=any(isinstance(base, Conv1D) for base in bases),
    )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))


@contextmanager
def reading_lora(model: nn.Module, folder: Path) -> Iterator[None]:
    """In it, the SVFit layers of `model` compute with the LoRA that `save_as_lora` wrote to `folder`."""
    from safetensors.torch import load_file

    saved = load_file(folder / "adapter_model.safetensors")
    with ExitStack() as back:
        for name, layer in own_layers(model):
            assert isinstance(layer, SvfitLayer)
            (adapter,) = layer.active_adapters
            u, v, d = layer.svfit_u, layer.svfit_v, layer.svfit_d[adapter]
            stem = f"base_model.model.{name}.lora_"
            values = (saved[f"{stem}B.weight"], saved[f"{stem}A.weight"].t(), torch.ones_like(d))
            for parameter, value in zip((u, v, d), values, strict=True):
                back.callback(setattr, parameter, "data", parameter.data)
                parameter.data = value.to(d.device)
        yield


register(SvfitConfig, SvfitTuner)
