"""Which tensors are trained together, and when: blocks of a model and the order in which they take turns.

A block is a decoder layer, found by the number in its tensors' names. The schedule is a function of the
settings and the step alone. There is no cursor and no generator to save: who knows the number of steps done
knows the active blocks, on every rank and after every resume.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from .roles import role_of

Order = Literal["descending", "ascending", "random", "lisa"]

# The leftmost number counts: `encoder.block.3.layer.0.` is layer 3, and so is an expert inside `layers.3.`.
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)(?=\.|$)")


@dataclass(frozen=True)
class Blocks:
    """Names of a model's tensors by block, from the input to the output."""

    embeddings: tuple[str, ...]
    layers: tuple[tuple[str, ...], ...]
    output: tuple[str, ...]
    """What else belongs to no layer: the final norm, an untied head."""


def find_blocks(names: Iterable[str]) -> Blocks:
    """Layers by the number in `...layers.N.`, `h.N.` or `blocks.N.`, in order; and what is in no layer.

    Two stacks of layers (an encoder and a decoder) come one after the other as their names do. Raises
    ValueError where no name has such a number.
    """
    stacks: dict[str, dict[int, list[str]]] = {}
    embeddings: list[str] = []
    output: list[str] = []
    for name in names:
        found = _LAYER.search(name)
        if found is not None:
            stack = stacks.setdefault(name[: found.start(1)], {})
            stack.setdefault(int(found[1]), []).append(name)
        elif role_of(name, (2, 2)) == "embedding":
            embeddings.append(name)
        else:
            output.append(name)
    if not stacks:
        shown = ", ".join((embeddings + output)[:3]) or "no names at all"
        raise ValueError(
            "no layers found: no name has a number as in `layers.0.`, `h.0.` or `blocks.0.` "
            f"({shown}); give blocks=[[prefix, ...], ...], a list of names or prefixes for each block"
        )
    layers = [tuple(stack[number]) for stack in stacks.values() for number in sorted(stack)]
    return Blocks(tuple(embeddings), tuple(layers), tuple(output))


def take_turns(
    names: Iterable[str],
    *,
    order: str,
    train_embeddings: bool = False,
    blocks: Sequence[Sequence[str] | str] | None = None,
) -> tuple[list[list[str]], list[str]]:
    """(blocks that take turns, from the input to the output; names that are trained at every step).

    In the order `lisa` all that is in no block is trained at every step; otherwise it is trained never, or
    with `train_embeddings` as a block of the embeddings and one of the final norm and the head. blocks: names
    or prefixes of whole modules, in place of the layers. ValueError for blocks that do not fit the names.
    """
    all_names = list(names)
    if blocks is None:
        found = find_blocks(all_names)
        turns = [list(layer) for layer in found.layers]
        outside = [list(found.embeddings), list(found.output)]
        if order == "lisa":
            return turns, outside[0] + outside[1]
        if train_embeddings:
            turns = [block for block in (outside[0], *turns, outside[1]) if block]
        return turns, []
    if train_embeddings and order != "lisa":
        raise ValueError(
            "train_embeddings is for layers found by name; here make the embeddings one of `blocks`"
        )
    turns = _explicit(all_names, blocks)
    taken = {name for block in turns for name in block}
    return turns, [name for name in all_names if name not in taken] if order == "lisa" else []


def _explicit(names: list[str], blocks: Sequence[Sequence[str] | str]) -> list[list[str]]:
    if not blocks:
        raise ValueError("blocks is empty; give a list of names or prefixes for each block")
    owner: dict[str, int] = {}
    for number, entries in enumerate(blocks):
        for entry in [entries] if isinstance(entries, str) else entries:
            # up to a dot: `layers.1` is not `layers.10`
            prefix = entry.rstrip(".") + "."
            members = [name for name in names if name == entry or name.startswith(prefix)]
            if not members:
                raise ValueError(f"blocks[{number}]: no trained parameter is called {entry!r} or {prefix}...")
            for name in members:
                if owner.setdefault(name, number) != number:
                    raise ValueError(f"{name} is in blocks[{owner[name]}] and in blocks[{number}]")
    return [[name for name in names if owner.get(name) == number] for number in range(len(blocks))]


@dataclass(frozen=True)
class BlockSchedule:
    """Which of `blocks` blocks, numbered from the input to the output, are trained at a step.

    `active` of them at a time, for `every` steps. descending, ascending: from the output or the input, over
    and over. random: each round is a new permutation. These three visit every block once a round; where
    `active` does not divide `blocks`, the last turn of a round has fewer. lisa: every turn draws `active`
    blocks uniformly (arXiv:2403.17919, algorithm 1). All fields are plain values: `asdict` saves it.
    """

    blocks: int
    order: Order = "random"
    every: int = 50
    active: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.order not in get_args(Order):
            raise ValueError(f"order is {self.order!r}; allowed: {', '.join(map(repr, get_args(Order)))}")
        if self.every < 1:
            raise ValueError(f"switch_block_every is {self.every}; it must be at least 1")
        if not 1 <= self.active <= self.blocks:
            raise ValueError(
                f"active_blocks is {self.active}; the model has {self.blocks} blocks to choose from"
            )

    def at(self, step: int) -> tuple[int, ...]:
        """The blocks trained at `step`, counted from 0, in ascending order."""
        turn = step // self.every
        if self.order == "lisa":
            return tuple(sorted(self._permutation(turn)[: self.active]))
        number, place = divmod(turn, self._turns)
        return tuple(sorted(self._round(number)[place * self.active : (place + 1) * self.active]))

    def largest(self, sizes: Sequence[int]) -> int:
        """The largest sum of `sizes`, one for each block, over blocks that come to be active together."""
        if self.order in ("random", "lisa"):
            return sum(sorted(sizes, reverse=True)[: self.active])
        turns = range(0, self._turns * self.every, self.every)
        return max(sum(sizes[block] for block in self.at(step)) for step in turns)

    @property
    def _turns(self) -> int:
        return -(-self.blocks // self.active)

    def _round(self, number: int) -> list[int]:
        if self.order == "random":
            return self._permutation(number)
        ascending = list(range(self.blocks))
        return ascending if self.order == "ascending" else ascending[::-1]

    def _permutation(self, number: int) -> list[int]:
        # Of a generator from text and its `random()` Python promises the same numbers in all versions; of
        # `shuffle` and `sample` it does not.
        draw = random.Random(f"{self.seed}/{number}")
        keys = [draw.random() for _ in range(self.blocks)]
        return sorted(range(self.blocks), key=keys.__getitem__)
