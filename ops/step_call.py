"""What a step over many tensors is told: the tensors, and what is the same for all of them.

All who compute `quantised_step` take these two. `SCHEMA` and `folded` are the same as the flat list of
arguments that `torch.library` wants of an operation. They are tuples, which cost a step of one small tensor
less than frozen dataclasses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_type_hints

from torch import Tensor

from .codec import Law
from .writing import Mode

Rule = Literal["adamw", "lion", "direction"]


class StepTensors(NamedTuple):
    """Parallel lists of tensors of any sizes: all on one device, contiguous, each list of one type.

    weights: bfloat16 or float32 (float16, float64: PyTorch's operations); of a direction the gradients,
    float32 or float64, which it replaces. grads: of any floating type; of a direction none. first, second:
    the moments; lion has no second. first_scales, second_scales: float32, beside moments that are codes, else
    none. extra: for narrow weights the float32 `master`s or the bfloat16 compensations of `kahan`, else none.
    starts: `rounding.noise_start` of each tensor. grad_scale: a number that gradients are multiplied by.
    skip: where this number is not zero nothing changes; both are scalars on the tensors' device.
    """

    weights: list[Tensor]
    grads: list[Tensor]
    first: list[Tensor]
    first_scales: list[Tensor]
    second: list[Tensor]
    second_scales: list[Tensor]
    extra: list[Tensor]
    starts: list[int]
    grad_scale: Tensor | None = None
    skip: Tensor | None = None

    @property
    def columns(self) -> list[list[Tensor]]:
        """The seven lists; a direction's gradients lie where its weights do."""
        return [
            self.weights, self.grads or self.weights, self.first, self.first_scales, self.second,
            self.second_scales, self.extra,
        ]  # fmt: skip

    @property
    def changed(self) -> list[list[Tensor]]:
        """The lists that a step writes to."""
        return [self.weights, self.first, self.first_scales, self.second, self.second_scales, self.extra]


class StepSettings(NamedTuple):
    """The formula and its numbers. Of a direction rule, law, betas, eps and step are read alone.

    law: of moments that are codes; None where they are float32, float64 or bfloat16. mode: how narrow weights
    are written. step counts from 1. key: `rounding.noise_key` of the step.
    """

    rule: Rule
    law: Law | None
    mode: Mode
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    step: int
    key: int

    @property
    def decay(self) -> float:
        """The share of a weight that is taken off before the update; nothing of a direction's values."""
        return 0.0 if self.rule == "direction" else self.lr * self.weight_decay

    @property
    def rate(self) -> float:
        """What is taken off a weight is this many times m / (√v · root + ε), or lion's sign."""
        if self.rule == "direction":
            return -1.0  # taken off nothing
        return self.lr / (1 - self.betas[0] ** self.step) if self.rule == "adamw" else self.lr

    @property
    def root(self) -> float:
        """What the root of a mean square is multiplied by: adamw's correction of its first steps."""
        return (1 - self.betas[1] ** self.step) ** -0.5 if self.rule == "adamw" else 1.0


_KINDS: dict[Any, str] = {
    list[Tensor]: "Tensor[]",
    Tensor | None: "Tensor?",
    list[int]: "SymInt[]",
    int: "SymInt",
    float: "float",
    tuple[float, float]: "float[]",
    Rule: "str",
    Mode: "str",
    Law | None: "str?",
}
# With the name of the part: PyTorch's tracer has an argument `mode` of its own.
_ARGUMENTS: dict[str, Any] = {
    f"{part}_{name}": hint
    for part, kind in (("tensors", StepTensors), ("settings", StepSettings))
    for name, hint in get_type_hints(kind).items()
}

CHANGED = [n for n, hint in _ARGUMENTS.items() if hint == list[Tensor] and n != "tensors_grads"]
"""The arguments that the operation writes to."""


def _declared(name: str, hint: Any) -> str:
    if name in CHANGED:
        return f"Tensor(a{CHANGED.index(name)}!)[] {name}"
    return f"{_KINDS[hint]} {name}"


SCHEMA = f"({', '.join(_declared(*entry) for entry in _ARGUMENTS.items())}) -> ()"
"""The operation's signature in PyTorch's notation: all fields, one after the other."""


def folded(flat: Sequence[Any]) -> tuple[StepTensors, StepSettings]:
    """The arguments of SCHEMA as what they are."""
    count = len(StepTensors._fields)
    return StepTensors(*flat[:count]), StepSettings(*flat[count:])
