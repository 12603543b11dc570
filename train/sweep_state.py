"""sweep.json: what a sweep has done so far, so that the same command goes on after any end of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..recipes.errors import UserError
from .report_data import flat
from .rundir import write_json
from .sweep_plan import Overheads

FILE = "sweep.json"
FORMAT = 1


@dataclass
class LegDone:
    """What one leg of a trial came to.

    until: the progress asked for. loss: held out; None when it failed. spent: in the sweep's unit. seconds:
    on the sweep's clock. start, end: of these, before the first step and after the last one; outside: beyond
    what the run itself counted; None when the leg was interrupted and is no measure. clock: the run's own
    seconds.
    """

    rung: int
    until: float
    progress: float
    loss: float | None
    spent: float
    seconds: float
    step: int
    tokens: int
    clock: float
    start: float | None = None
    end: float | None = None
    outside: float | None = None


@dataclass
class Trial:
    """One trial. state: "alive", "out" (stopped by its result), "failed" or "won"; reason: for the table."""

    name: str
    values: dict[str, str]
    state: str = "alive"
    reason: str = ""
    finished: bool = False
    legs: list[LegDone] = field(default_factory=list)

    @property
    def spent(self) -> float:
        """Of the sweep's budget, in its unit."""
        return sum(leg.spent for leg in self.legs)

    @property
    def last(self) -> LegDone | None:
        """Its furthest leg."""
        return self.legs[-1] if self.legs else None


@dataclass
class Running:
    """The leg on the way: where its trial stood before it (step, tokens, seconds of its own clock)."""

    name: str
    rung: int
    amount: float
    step: int
    tokens: int
    clock: float
    seconds: float = 0.0
    """Spent on it by processes of the sweep that have ended."""


@dataclass
class State:
    """The whole file. grants: of each rung begun, what its trials were given. seconds: used by the sweep."""

    settings: dict[str, Any]
    trials: list[Trial]
    guess: Overheads = field(default_factory=Overheads)
    seconds: float = 0.0
    rung: int = 0
    """The leg that trials are on; those before it are decided."""
    grants: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    running: Running | None = None
    finalists: list[str] = field(default_factory=list)
    winner: str | None = None
    format: int = FORMAT

    def trial(self, name: str) -> Trial:
        """By name."""
        return next(trial for trial in self.trials if trial.name == name)

    def alive(self) -> list[Trial]:
        """Those that may still win, in the order of the grid."""
        return [trial for trial in self.trials if trial.state == "alive"]

    def save(self, path: Path) -> None:
        """Written whole or not at all."""
        write_json(path, self)


def load_state(path: Path) -> State | None:
    """The state in `path`; None where there is none. UserError when it cannot be read."""
    if not path.exists():
        return None
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        if plain["format"] != FORMAT:
            raise ValueError(f"format {plain['format']}")
        trials = [
            Trial(**{**trial, "legs": [LegDone(**leg) for leg in trial["legs"]]}) for trial in plain["trials"]
        ]
        running = None if plain["running"] is None else Running(**plain["running"])
        return State(**{**plain, "trials": trials, "running": running, "guess": Overheads(**plain["guess"])})
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path}  cannot be read as a sweep's state ({error}).   Start over with --fresh, or set another "
            "output_dir"
        ) from None


def check_settings(saved: Mapping[str, Any], now: Mapping[str, Any], *, output: Path) -> None:
    """UserError naming what differs between the sweep in `output` and the one asked for."""
    before, after = flat(saved), flat(json.loads(json.dumps(now)))
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    if not changed:
        return
    lines = [
        f"  {key.removeprefix('recipe.')}: was {_short(before.get(key))}, now {_short(after.get(key))}"
        for key in changed[:3]
    ]
    if len(changed) > 3:
        lines.append(f"  and {len(changed) - 3} more")
    count = "one thing differs" if len(changed) == 1 else f"{len(changed)} things differ"
    raise UserError(
        f"{output}: holds another sweep; {count}:\n"
        + "\n".join(lines)
        + f"\nUndo the change to go on; or start over with --fresh; or keep both: output_dir={output}-2"
    )


def settings_of(
    over: Sequence[tuple[str, Sequence[str]]],
    *,
    budget: str,
    reduction: int,
    rungs: int,
    by: str,
    recipe: Mapping[str, Any],
) -> dict[str, Any]:
    """What makes a sweep the same one; the recipe as plain values."""
    return {
        "--over": [f"{key}={','.join(values)}" for key, values in over],
        "--budget": budget,
        "--reduction": reduction,
        "--rungs": rungs,
        "--by": by,
        "recipe": dict(recipe),
    }


def _short(value: Any) -> str:
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    text = "not set" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
