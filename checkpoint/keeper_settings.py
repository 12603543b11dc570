"""How long the keeper keeps, how often and how fast it writes to the disk, how it is watched."""

from __future__ import annotations

from dataclasses import dataclass

from ..recipes.errors import UserError


@dataclass(frozen=True)
class KeeperSettings:
    """How long and how fast, in seconds and bytes a second.

    lease: for which the keeper holds the memory of a dead trainer. persist_every: between snapshots that it
    writes to the disk by itself, 0 for never; persist_rate caps how fast, 0 for no cap. heartbeat: between
    looks at the keeper; patience: for an answer, before it is taken for dead.
    """

    lease: float = 600.0
    persist_every: float = 0.0
    persist_rate: float = 0.0
    heartbeat: float = 1.0
    patience: float = 10.0

    def __post_init__(self) -> None:
        for key in ("lease", "persist_every", "persist_rate", "heartbeat", "patience"):
            value = getattr(self, key)
            least = "above 0" if key in ("heartbeat", "patience") else "0 or more"
            if not 0 <= value < float("inf") or (value == 0 and least == "above 0"):
                raise UserError(
                    f"{key}={value}: must be a number of seconds (persist_rate: bytes/s), {least}."
                )
