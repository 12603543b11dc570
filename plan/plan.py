"""The Plan: every decision of a run with its predicted memory, time and cost, as one value."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..offload.placement import Placement

_OF_STEPS = (
    "batch_tokens",
    "batch_rows",
    "learning_rate",
    "weight_decay",
    "dtype",
    "autocast",
    "packed",
    "max_length",
    "longest_row",
    "eval_rows",
    "eval_rows_between",
)


@dataclass(frozen=True)
class Plan:
    """All decisions of a run, JSON-able. Sizes in bytes, times in seconds, counts over all processes.

    memory: {"device": {part: bytes, ..., "total"}, "host": {...}}; device is empty on a CPU. phases: totals
    of load, train, export on the tier that computes. timeline: seconds by kind. eval_rows: at the start and
    the end, eval_rows_between: in between. max_length, longest_row: tokens of the longest sequence after and
    before cutting. weight_decay: for the optimizer, in place of auto. disk_bytes: written for checkpoints and
    export; disk_writes: with the optimizer's state, where that is on disk. placement: where each part of the
    training state lives. reasons: key -> one line.
    """

    model: str
    device: str
    machine: str
    world_size: int
    parameters: int
    trained_parameters: int
    optimizer_bytes: int
    dtype: str
    autocast: bool
    packed: bool
    max_length: int
    longest_row: int
    micro_tokens: int
    micro_rows: int | None
    batch_tokens: int
    batch_rows: int | None
    accumulation: int
    recomputed_layers: int
    learning_rate: float
    eval_rows: int
    eval_rows_between: int
    steps: int
    tokens_in_budget: int
    epochs: float
    step_seconds: float
    tokens_per_second: float
    seconds_per_token: float
    update_seconds: float
    finish_seconds: float
    timeline: dict[str, float]
    reserve_guess: dict[str, float]
    bound_by: str
    cost: float | None
    currency: str | None
    disk_bytes: int
    memory: dict[str, dict[str, int]]
    memory_limits: dict[str, int]
    phases: dict[str, int]
    reasons: dict[str, str] = field(default_factory=dict)
    weight_decay: float = 0.0
    placement: Placement = field(default_factory=Placement)
    disk_writes: int = 0
    swapped_layers: int = 0
    snapshot_bytes: int = 0

    @property
    def activation_checkpointing(self) -> bool:
        """Whether any layer's activations are computed again: `recomputed_layers` of them."""
        return self.recomputed_layers > 0

    @property
    def predicted_device_bytes(self) -> int | None:
        """Predicted peak on the accelerator; None on a CPU."""
        return self.memory["device"].get("total")

    @property
    def predicted_host_bytes(self) -> int:
        """Predicted peak of host memory, of one process."""
        return self.memory["host"]["total"]

    def order_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `data.Order` that the plan decides."""
        return {
            "batch_tokens": self.batch_tokens if self.batch_rows is None else None,
            "batch_rows": self.batch_rows,
            "micro_tokens": self.micro_tokens if self.micro_rows is None else None,
            "micro_rows": self.micro_rows,
            "world_size": self.world_size,
            "packed": self.packed,
        }

    def with_steps_of(self, begun: Plan) -> Plan:
        """This plan, with the steps of a run that began with `begun`, of another number of processes.

        What a step is made of and what it does to the weights stays; memory, time and the size of a
        micro-batch are those of now.
        """
        return replace(self, **{key: getattr(begun, key) for key in _OF_STEPS})

    def to_json(self) -> dict[str, Any]:
        """Plain values; `Plan.from_json` gives the same plan back."""
        return {**asdict(self), "placement": self.placement.to_json()}

    @classmethod
    def from_json(cls, value: dict[str, Any] | str) -> Plan:
        """The plan in `to_json`'s value or text, such as a run's plan.json. ValueError: not one of ours."""
        plain = dict(json.loads(value) if isinstance(value, str) else value)
        placement = Placement.from_json(plain.pop("placement", ()))
        try:
            return cls(**plain, placement=placement)
        except TypeError as error:
            raise ValueError(f"not a plan of this version: {error}") from None
