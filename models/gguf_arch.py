"""What llama.cpp calls a decoder: architecture, settings, and each tensor's name, scale and row order.

Where llama.cpp computes otherwise than transformers for the same config, the difference goes into the tensors
(rotary pairs, norms with 1 added, the scale of attention) or into a setting (windows), or the model is
refused. Settings and tensor names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from torch import nn

from ..recipes.errors import UserError
from .gguf_rope import Rope, rope_of
from .gguf_windows import attention_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Value = int | float | bool | str | list[int]
_CLASSES: Final = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
}
# Layers at which llama.cpp takes Gemma for the one whose queries are scaled by hidden size / heads.
_SCALED_BY_HIDDEN: Final = {"gemma2": 46, "gemma3": 62}
_PAIRED: Final = {"llama", "deci"}  # rotary pairs (0, 1), (2, 3); the others have (0, d/2), (1, d/2 + 1)
_LINEARS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Placed:
    """One tensor of the file: (the parameter `source` + `add`) · `scale`, in PyTorch's shape."""

    name: str
    source: str
    shape: tuple[int, ...]
    heads: int = 0
    """Above 0, the rows of each of so many heads go from halves into pairs."""
    add: float = 0.0
    scale: float = 1.0

    def row_order(self) -> np.ndarray[tuple[int], np.dtype[np.int64]] | None:
        """For each row of the file, the row of the parameter; None where they are the same."""
        if not self.heads:
            return None
        return np.arange(self.shape[0]).reshape(self.heads, 2, -1).swapaxes(1, 2).ravel()


@dataclass(frozen=True)
class Layout:
    """A model as llama.cpp wants it. Keys of `settings` lack the prefix, which is the architecture."""

    architecture: str
    settings: dict[str, Value]
    tensors: tuple[Placed, ...]
    constants: dict[str, np.ndarray[tuple[int], np.dtype[np.float32]]]
    notes: tuple[str, ...]
    vocab_size: int


@dataclass(frozen=True)
class _Layers:
    """Widths of each layer: neurons, query heads, heads of keys and values; and which linears have biases."""

    neurons: list[int]
    heads: list[int]
    groups: list[int]
    head_dim: int
    biased: set[str] = field(default_factory=set)

    @property
    def even(self) -> bool:
        return all(len(set(widths)) == 1 for widths in (self.neurons, self.heads, self.groups))


def layout_of(model: PreTrainedModel) -> Layout:
    """How `model` (weights may be on the meta device) is written.

    Raises:
        UserError: a class, shape or setting that llama.cpp has no place for.
    """
    plain: Any = model
    config: Any = model.config
    # a pruned class of our own is a subclass of the stock one
    family = next((_CLASSES[kind.__name__] for kind in type(model).__mro__ if kind.__name__ in _CLASSES), "")
    if not family:
        raise UserError(
            f"gguf: {type(model).__name__} is not written as GGUF here; known are {', '.join(_CLASSES)}.\n"
            "  Merge an adapter into its base first; of a model with images export the text model."
        )
    layers = _read_layers(plain)
    architecture = _architecture(family, layers, int(config.hidden_size))
    _check(architecture, config, tied="lm_head.weight" not in dict(model.named_parameters()))
    rope = rope_of(architecture, config, layers.head_dim)
    windows = attention_windows(architecture, config, len(layers.neurons))
    notes = list(windows.notes)
    settings: dict[str, Value] = {
        "block_count": len(layers.neurons),
        "context_length": windows.context,
        "embedding_length": int(config.hidden_size),
        "feed_forward_length": _one_or_all(layers.neurons, architecture),
        "attention.head_count": _one_or_all(layers.heads, architecture),
        "attention.head_count_kv": _one_or_all(layers.groups, architecture),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": layers.head_dim,
        "attention.value_length": layers.head_dim,
        "vocab_size": int(plain.get_input_embeddings().weight.shape[0]),
        **windows.settings,
        **rope.settings,
    }
    if architecture == "gemma2":
        settings["attn_logit_softcapping"] = float(config.attn_logit_softcapping)
        settings["final_logit_softcapping"] = float(config.final_logit_softcapping)
    if architecture == "deci":
        notes.append(
            "the layers differ in width, so the architecture is `deci`: llama.cpp reads it, transformers "
            "does not"
        )
    return Layout(
        architecture=architecture,
        settings=settings,
        tensors=_place(plain, architecture, layers),
        constants=_constants(rope),
        notes=tuple(notes),
        vocab_size=int(plain.get_input_embeddings().weight.shape[0]),
    )


def _read_layers(model: Any) -> _Layers:
    neurons, heads, groups, biased = [], [], [], set()
    head_dim = int(model.model.layers[0].self_attn.head_dim)
    for index, layer in enumerate(model.model.layers):
        for name in _LINEARS:
            linear = getattr(layer.self_attn if name[0] in "qkvo" else layer.mlp, name)
            if type(linear) is not nn.Linear:
                raise UserError(
                    f"gguf: layer {index} has {name} as {type(linear).__name__}; only torch.nn.Linear is "
                    "written.\n  Merge adapters and dequantise first: shoestring export RUN --to merged"
                )
            if linear.bias is not None:
                biased.add(name)
        if not _whole_heads(layer.self_attn, head_dim):
            raise UserError(
                f"gguf: layer {index} has heads narrower than {head_dim} channels, and llama.cpp has no "
                "place for them.\n  Prune neurons, groups and blocks only."
            )
        neurons.append(int(layer.mlp.down_proj.weight.shape[1]))
        heads.append(int(layer.self_attn.q_proj.weight.shape[0]) // head_dim)
        groups.append(int(layer.self_attn.k_proj.weight.shape[0]) // head_dim)
    return _Layers(neurons, heads, groups, head_dim, biased)


def _whole_heads(attention: Any, head_dim: int) -> bool:
    queries, keys = attention.q_proj.weight.shape[0], attention.k_proj.weight.shape[0]
    return (
        getattr(attention, "rotary_pairs", None) is None
        and keys % head_dim == 0
        and queries == keys * attention.num_key_value_groups
        and attention.v_proj.weight.shape[0] == keys
        and attention.o_proj.weight.shape[1] == queries
    )


def _architecture(family: str, layers: _Layers, hidden: int) -> str:
    if family == "qwen2" and not (
        layers.even
        and layers.biased == {"q_proj", "k_proj", "v_proj"}
        and layers.heads[0] * layers.head_dim == hidden
    ):
        family = "llama"  # the same block: all biases optional, any number of heads
    if family == "llama":
        return "llama" if layers.even else "deci"
    if not layers.even:
        raise UserError(
            "gguf: the layers differ in width, which llama.cpp allows for Llama, Mistral and Qwen2, not for "
            f"{family}.\n  Prune with widths: uniform, or fill up with zeros: shoestring.pruning.pad(model)"
        )
    if layers.biased and family != "qwen2":
        raise UserError(
            f"gguf: llama.cpp has no biases for {family}; the model has some in "
            f"{', '.join(sorted(layers.biased))}.\n  Prune without compensation, or refit instead: refit"
        )
    return family


def _check(architecture: str, config: Any, *, tied: bool) -> None:
    """Refuse settings that llama.cpp computes otherwise without saying so."""
    gemma = architecture.startswith("gemma")
    given = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    wanted = "gelu_pytorch_tanh" if gemma else "silu"
    wrong: dict[str, tuple[Any, Any]] = {}
    if given != wanted and not (wanted == "silu" and given == "swish"):
        wrong["hidden_act"] = (given, wanted)
    if gemma and not tied:
        wrong["tie_word_embeddings"] = (False, True)
    if getattr(config, "use_bidirectional_attention", None):
        wrong["use_bidirectional_attention"] = (config.use_bidirectional_attention, False)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        value = getattr(config, name, None)
        if architecture == "gemma2" and value is None:
            wrong[name] = (None, "a number")
        if architecture == "gemma3" and value is not None:
            wrong[name] = (value, None)
    for name, (found, allowed) in wrong.items():
        raise UserError(
            f"gguf: {name} is {found!r} in the model's config, and llama.cpp computes {architecture} with "
            f"{allowed!r} only.\n  Such a model stays with transformers: shoestring export RUN --to merged"
        )


def _one_or_all(widths: list[int], architecture: str) -> int | list[int]:
    return widths if architecture == "deci" else widths[0]


def _place(model: Any, architecture: str, layers: _Layers) -> tuple[Placed, ...]:
    import gguf

    kind = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(kind, len(layers.neurons))
    placed = []
    for source, parameter in model.named_parameters():
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None or not parameter.is_floating_point():
            raise UserError(
                f"gguf: {source} has no place in a GGUF file of the architecture {architecture}.\n"
                "  Merge adapters and dequantise first: shoestring export RUN --to merged"
            )
        placed.append(_one(source, name, tuple(parameter.shape), architecture, model, layers))
    return tuple(placed)


def _one(
    source: str, name: str, shape: tuple[int, ...], architecture: str, model: Any, layers: _Layers
) -> Placed:
    heads, add, scale = 0, 0.0, 1.0
    if architecture in _PAIRED and (".q_proj." in source or ".k_proj." in source):
        index = int(source.split(".layers.")[1].split(".")[0])
        heads = (layers.heads if ".q_proj." in source else layers.groups)[index]
    if architecture.startswith("gemma") and "norm" in source:
        add = 1.0
    scaled = {"gemma2": ".q_proj.", "gemma3": ".q_norm."}.get(architecture)
    if scaled is not None and scaled in source:
        attention = model.model.layers[0].self_attn
        fixed = layers.head_dim
        if len(layers.neurons) == _SCALED_BY_HIDDEN[architecture]:
            fixed = int(model.config.hidden_size) // layers.heads[0]
        scale = float(attention.scaling) * fixed**0.5
        if abs(scale - 1) < 1e-6:  # only rounding
            scale = 1.0
    return Placed(name, source, shape, heads, add, scale)


def _constants(rope: Rope) -> dict[str, np.ndarray[tuple[int], np.dtype[np.float32]]]:
    return {} if rope.divisors is None else {"rope_freqs.weight": rope.divisors.astype(np.float32)}
