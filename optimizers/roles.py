"""What a trained tensor is to an optimizer: a matrix inside the network, or one that wants AdamW.

Low-rank and orthogonalising rules are made for the matrices of linear layers. Embeddings and the output head
are look-up tables over the vocabulary (tied ones are one tensor and count as embedding), and norms and biases
have one dimension: every published recipe gives those to AdamW.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Literal

from torch import nn

Role = Literal["matrix", "embedding", "head", "vector"]
"""matrix: 2-D, or 3-D as a stack of matrices (experts). vector: everything of another dimension."""

_EMBEDDING = re.compile(
    r"(^|[._])(embed|embeddings?|embed_tokens|wte|wpe|tok_embeddings|word_embeddings)\b", re.I
)
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output|score|classifier|head)\.(\w+\.)*weight$", re.I)


@dataclass(frozen=True)
class Slot:
    """A trained tensor as an optimizer sees it, without its values."""

    name: str
    shape: tuple[int, ...]
    role: Role

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        return prod(self.shape)


def slots(model: nn.Module) -> list[Slot]:
    """The parameters of `model` that require a gradient, in its order. Meta tensors do as well."""
    found = roles(model)
    return [Slot(n, tuple(p.shape), found[n]) for n, p in model.named_parameters() if p.requires_grad]


def share_line(slots: Iterable[Slot]) -> str:
    """Which tensors a rule for matrices takes and which AdamW takes, in one line."""
    counts: dict[Role, list[int]] = {}
    for slot in slots:
        counts.setdefault(slot.role, []).append(slot.elements)
    total = sum(sum(sizes) for sizes in counts.values())
    texts = {
        "matrix": "matrices",
        "embedding": "embeddings",
        "head": "output heads",
        "vector": "norms, biases and other vectors",
    }

    def part(role: Role) -> str:
        sizes = counts[role]
        return f"{len(sizes)} {texts[role]} ({sum(sizes) / total:.1%} of the trained parameters)"

    by_method = part("matrix") if "matrix" in counts else "no matrix"
    rest = ", ".join(part(role) for role in counts if role != "matrix")
    return by_method + (f"; AdamW takes {rest}" if rest else "")


def roles(model: nn.Module) -> dict[str, Role]:
    """Role of every parameter of `model` by name, from the modules that hold it. Meta tensors do as well."""
    found = {name: role_of(name, tuple(p.shape)) for name, p in model.named_parameters()}
    names = {id(p): name for name, p in model.named_parameters()}
    for module in model.modules():
        if isinstance(module, nn.Embedding) and id(module.weight) in names:
            found[names[id(module.weight)]] = "embedding"
    head = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    if weight is not None and id(weight) in names and found[names[id(weight)]] != "embedding":
        found[names[id(weight)]] = "head"
    return found


def role_of(name: str, shape: tuple[int, ...]) -> Role:
    """The role by name and shape alone; an empty name goes by its shape."""
    if len(shape) not in (2, 3) or min(shape) <= 1:
        return "vector"
    if ".lora_" in f".{name}":
        return "matrix"
    if _EMBEDDING.search(name):
        return "embedding"
    return "head" if _HEAD.search(name) else "matrix"
