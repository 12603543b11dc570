"""What our own PEFT tuners share: a frozen linear layer with a change that is added to its output.

A tuner is registered by a key of its own in PEFT's three dictionaries (its list of methods is closed, and its
public function refuses other names). The key says what to import, because PEFT's error for an unknown method
is the key alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from ..recipes.errors import UserError
from .spectra import dense_weight


@dataclass
class OwnConfig(PeftConfig):
    """Which modules are adapted, and what was found when they were.

    ranks and fingerprints are filled while the model is wrapped: the rank of each module, and one number for
    its frozen factors. init_weights: compute the factors from the weights; off in a saved adapter, whose file
    has them.
    """

    target_modules: Any = None
    exclude_modules: Any = None
    layers_to_transform: list[int] | None = None
    layers_pattern: list[str] | str | None = None
    init_weights: bool = True
    ranks: dict[str, int] = field(default_factory=dict)
    fingerprints: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """PEFT looks names up in a set."""
        super().__post_init__()  # type: ignore[no-untyped-call]
        if isinstance(self.target_modules, list | tuple):
            self.target_modules = set(self.target_modules)


class OwnLayer(nn.Module, BaseTunerLayer):
    """A linear layer and a change to its weight; a subclass says what the change is.

    A subclass names its trained ParameterDict in `adapter_layer_names`. Its frozen factors are parameters of
    the layer itself: PEFT would make those in a dictionary float32, and trained.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        """base_layer: nn.Linear, a 4-bit one, or GPT-2's Conv1D; it stays frozen."""
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = []
        self.turned = isinstance(base_layer, Conv1D)
        weight: Any = base_layer.weight
        if isinstance(base_layer, nn.Linear):  # 4-bit layers are too, with packed weights
            self.out_features, self.in_features = base_layer.out_features, base_layer.in_features
        else:
            self.in_features, self.out_features = (int(size) for size in weight.shape)

    def add(self, x: Tensor, base: Tensor) -> Tensor:
        """base [..., out] with the change's output for x [..., in] added."""
        raise NotImplementedError

    def get_delta_weight(self, adapter: str = "default") -> Tensor:
        """The change of the weight, [out, in] in float32, as its base layer holds it (turned in a Conv1D)."""
        delta = self.delta(adapter)
        return delta.t() if self.turned else delta

    def delta(self, adapter: str) -> Tensor:
        """The change, [out, in] in float32."""
        raise NotImplementedError

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] -> [..., out]."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        base: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return base
        return self.add(x, base)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the change to the base weight, in its type.

        Raises ValueError: 4-bit weights, or with safe_merge values that are not finite.
        """
        if self.merged or (adapter_names is not None and not set(adapter_names) & set(self.active_adapters)):
            return
        base: Any = self.get_base_layer()
        if hasattr(base.weight, "quant_state"):
            raise ValueError(
                "merging into 4-bit weights would round the change away; "
                "shoestring.adapters.merge_in_place dequantises them first"
            )
        (name,) = self.active_adapters
        merged = (base.weight.data.float() + self.get_delta_weight(name)).to(base.weight.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"the merged weights of adapter {name} are not finite")
        base.weight.data = merged
        self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the change out again; what the base weight's type has rounded is not given back."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            base: Any = self.get_base_layer()
            delta = self.get_delta_weight(name)
            base.weight.data = (base.weight.data.float() - delta).to(base.weight.dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """The change is additive, so PEFT's conversion takes it."""
        return True

    def held_type(self) -> torch.dtype:
        """The type the base layer computes in, in which large factors are held."""
        base: Any = self.get_base_layer()
        found: Any = getattr(base, "compute_dtype", None) if hasattr(base.weight, "quant_state") else None
        dtype: torch.dtype = found or base.weight.dtype
        return dtype if dtype.is_floating_point else torch.float32


class OwnTuner(BaseTuner):
    """PEFT's walk over the model; a subclass wraps one layer."""

    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - declared so by PEFT; nothing by default

    def wrap(self, config: Any, name: str, target: nn.Module, adapter_name: str) -> OwnLayer:
        """The layer around `target`, called `name` in the model; tells `config` its rank and fingerprint."""
        raise NotImplementedError

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        from transformers.pytorch_utils import Conv1D

        if isinstance(target, OwnLayer):
            raise ValueError(f"{current_key} has an adapter already, and this method has one at a time")
        if not isinstance(target, nn.Linear | Conv1D):
            raise UserError(
                f"adapter.target_modules: {current_key} is of class {type(target).__name__}, and this "
                "adapter is for linear layers.\n  Leave it out, or take adapter=lora"
            )
        layer = self.wrap(peft_config, current_key, target, adapter_name)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _post_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        # From here on the factors are part of the adapter: whoever loads its file takes them from there.
        config.init_weights = False


def register(config: type[Any], tuner: type[OwnTuner]) -> None:
    """Make PEFT know `config` and `tuner` under the key that the config gives itself."""
    from peft import mapping

    tables: Any = mapping
    key = config().peft_type
    tables.PEFT_TYPE_TO_CONFIG_MAPPING[key] = config
    tables.PEFT_TYPE_TO_TUNER_MAPPING[key] = tuner
    tables.PEFT_TYPE_TO_PREFIX_MAPPING[key] = tuner.prefix


def own_layers(model: nn.Module) -> Iterator[tuple[str, OwnLayer]]:
    """(name in the base model, layer) of every layer with an adapter of ours."""
    for name, module in model.named_modules():
        if isinstance(module, OwnLayer):
            yield name.removeprefix("base_model.model."), module


def base_weight(layer: OwnLayer) -> Tensor:
    """The frozen weight, float64 [out, in]."""
    return dense_weight(layer.get_base_layer())


def is_meta(layer: OwnLayer) -> bool:
    """Whether the layer has shapes only."""
    weight: Any = layer.get_base_layer().weight
    return bool(weight.is_meta)
