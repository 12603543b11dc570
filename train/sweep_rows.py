"""What is said of a sweep's trials, as text: the rows of the table, and why each of them stopped."""

from __future__ import annotations

from dataclasses import dataclass

from .figures import number_text, share_text
from .sweep_plan import Ladder
from .sweep_ranking import furthest_first
from .sweep_state import State, Trial


@dataclass(frozen=True)
class Row:
    """A trial's cells: name, held-out loss at each pause and at the end, where it stopped, what it spent."""

    trial: Trial
    cells: tuple[str, ...]

    @property
    def won(self) -> bool:
        """The trial that landed."""
        return self.trial.state == "won"


def header_cells(ladder: Ladder) -> list[str]:
    """Titles of the cells of a Row: the held-out loss stands under the share at which it was measured."""
    return ["trial", *map(share_text, ladder.pauses), "100 %", "stopped", "spent"]


def in_order(state: State) -> list[Trial]:
    """The winner, then by how far trials came and their loss, then those that failed."""
    groups: dict[str, list[Trial]] = {"won": [], "alive": [], "out": [], "failed": []}
    for trial in state.trials:
        groups[trial.state].append(trial)
    return [trial for group in groups.values() for trial in furthest_first(group)]


def result_rows(ladder: Ladder, state: State, amount: float) -> list[Row]:
    """Of all trials, best first; amount: the sweep's budget in its unit."""
    found = []
    for trial in in_order(state):
        losses = {leg.until: leg.loss for leg in trial.legs}
        cells = [number_text(losses.get(until)) for until in (*ladder.pauses, 1.0)]
        found.append(Row(trial, (trial.name, *cells, _end(trial), share_text(trial.spent / amount))))
    return found


def reasons(state: State) -> list[str]:
    """The course of the sweep, a line for each decision."""
    lines = list(state.notes)
    if state.winner is not None:
        last = state.trial(state.winner).legs[-1]
        lines.append(f"{state.winner} went to its end: held-out loss {number_text(last.loss)}")
    return lines


def _end(trial: Trial) -> str:
    if trial.state == "won":
        return "landed"
    if trial.state == "failed":
        return trial.reason
    if trial.state == "out":
        return trial.reason.removeprefix("stopped ")
    return "not yet"
