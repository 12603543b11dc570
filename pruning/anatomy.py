"""Where a decoder model keeps what can be removed: blocks, neurons of the MLP, groups of attention heads.

A *neuron* is one row of gate_proj and of up_proj with one column of down_proj. A *group* is what shares one
head of keys and values: k and v of that head, the q heads that read it, and their columns of o_proj; without
grouped queries it is one head. Query heads of a group are never separated, since plain configs hold one
number of query heads for all groups. A *block* is a whole decoder layer.

Inside the heads: a *pair* is what rotary positions turn together, channel i and i + h/2 of a head of k and of
the q heads that read it; a *value* is a channel of a head of v with the columns of o_proj that read it.
Layers that lost some of these compute with the attention of modeling_pruned.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ..recipes.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
_CLASSES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
}
# the classes of modeling_pruned.py
_PRUNED = {f"Pruned{name}": family for name, family in _CLASSES.items()}
MLP = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Block:
    """One decoder layer: gate and up [D, d], down [d, D], q [G·g·h, d], k and v [G·h, d], o [d, G·g·h].

    D neurons, d channels, G groups of g query heads, h `head_dim`. The counts follow the modules, so they are
    true after a removal too. Where heads were narrowed, h is `query_dim` in q and k, `value_dim` in v and o,
    and `pairs` says which of the head_dim/2 pairs each group kept.
    """

    layer: nn.Module
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear
    head_dim: int
    heads_per_group: int
    value_dim: int
    pairs: tuple[tuple[int, ...], ...] | None = None

    @property
    def query_dim(self) -> int:
        """Channels of a head of q and of k."""
        return self.head_dim if self.pairs is None else 2 * len(self.pairs[0])

    @property
    def is_narrow(self) -> bool:
        """Whether q and k, or v, have heads narrower than `head_dim`."""
        return self.query_dim != self.head_dim or self.value_dim != self.head_dim

    @property
    def neurons(self) -> int:
        """Width of the MLP."""
        return self.down.in_features

    @property
    def groups(self) -> int:
        """Heads of keys and values."""
        return self.v.out_features // self.value_dim

    @property
    def group_width(self) -> int:
        """Columns of o_proj that one group feeds."""
        return self.heads_per_group * self.value_dim

    @property
    def neuron_parameters(self) -> int:
        """Parameters that leave with one neuron."""
        biases = (self.gate.bias is not None) + (self.up.bias is not None)
        return self.gate.in_features + self.up.in_features + self.down.out_features + biases

    @property
    def group_parameters(self) -> int:
        """Parameters that leave with one group."""
        return self.query_dim // 2 * self._pair_cost + self.value_dim * self._value_cost

    @property
    def pair_parameters(self) -> int:
        """Parameters that leave when every group loses one pair."""
        return self.groups * self._pair_cost

    @property
    def value_parameters(self) -> int:
        """Parameters that leave when every group loses one value."""
        return self.groups * self._value_cost

    @property
    def _pair_cost(self) -> int:
        queries = self.heads_per_group * (self.q.in_features + (self.q.bias is not None))
        return 2 * (queries + self.k.in_features + (self.k.bias is not None))

    @property
    def _value_cost(self) -> int:
        values = self.v.in_features + (self.v.bias is not None)
        return values + self.heads_per_group * self.o.out_features

    @property
    def parameters(self) -> int:
        """Parameters of the whole layer, norms included."""
        return sum(parameter.numel() for parameter in self.layer.parameters())


@dataclass(frozen=True)
class Anatomy:
    """A causal model whose blocks are known. `base` is the module with `embed_tokens` and `layers`."""

    model: PreTrainedModel
    base: Any
    family: str
    blocks: tuple[Block, ...]

    @property
    def parameters(self) -> int:
        """All parameters; tied ones count once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def has_windows(self) -> bool:
        """Whether some layer attends to a window only."""
        config: Any = self.model.config
        types = getattr(config, "layer_types", None)
        if types is not None:
            return "sliding_attention" in types
        return getattr(config, "sliding_window", None) is not None


def read_anatomy(model: PreTrainedModel) -> Anatomy:
    """The anatomy of a loaded model of one of FAMILIES.

    Raises:
        UserError: another architecture, or linear layers that are adapters, quantised or replaced.
    """
    name = type(model).__name__
    family = _CLASSES.get(name) or _PRUNED.get(name)
    if family is None:
        raise UserError(
            f"pruning: {name} is not known here; known are {', '.join(_CLASSES)}.\n"
            "  Merge an adapter into its base first; of a model with images prune the text model."
        )
    base: Any = model.model
    blocks = tuple(_block(layer, index) for index, layer in enumerate(base.layers))
    return Anatomy(model, base, family, blocks)


def _block(layer: Any, index: int) -> Block:
    linears = dict(_linears(layer, index))
    attention = layer.self_attn
    pairs = getattr(attention, "rotary_pairs", None)
    per_group = linears["q_proj"].out_features // linears["k_proj"].out_features
    short = {name.removesuffix("_proj"): linear for name, linear in linears.items()}
    return Block(
        layer=layer,
        head_dim=int(attention.head_dim),
        heads_per_group=per_group,
        value_dim=int(getattr(attention, "value_width", attention.head_dim)),
        pairs=None if pairs is None else tuple(map(tuple, pairs)),
        **short,
    )


def _linears(layer: Any, index: int) -> Iterator[tuple[str, nn.Linear]]:
    for home, names in ((layer.mlp, MLP), (layer.self_attn, ATTENTION)):
        for name in names:
            linear = getattr(home, name)
            if type(linear) is not nn.Linear:
                raise UserError(
                    f"pruning: layer {index} has {name} as {type(linear).__name__}; only torch.nn.Linear can "
                    "be cut.\n  Prune the plain model: before adapters, 4-bit weights and other "
                    "replacements, or after merging."
                )
            yield name, linear
