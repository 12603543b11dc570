"""RUN/budget.yaml: a budget that changes while the run is going.

The file holds what the recipe's `budget` section would (`time: 40min`, or just `40min`); its keys replace the
recipe's. `shoestring budget RUN 40min` writes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..recipes import BudgetConfig, Recipe
from ..recipes.draft import COMMAND_LINE, Draft
from ..recipes.errors import UserError, in_columns
from ..recipes.messages import explain
from ..recipes.short_forms import expand_section
from ..recipes.yaml_text import flow, parse, read_text, scalar
from ..schedules.limits import Limits

LIMITS = (*Limits().amounts(), "price")
FIXED = ("device_memory", "host_memory", "disk")


class BudgetFile:
    """Watches one file. given: the budget that its keys are put into."""

    def __init__(self, path: Path, given: BudgetConfig) -> None:
        self.path, self.given = path, given
        self._seen: tuple[int, ...] | None = None
        self._warning: str | None = None

    def poll(self) -> BudgetConfig | None:
        """The budget that holds now, when the file has changed (or gone) since the last call; else None.

        It costs one look at the file's date. Content that is no budget changes nothing and is told by
        `take_warning`.
        """
        try:
            status = self.path.stat()
        except FileNotFoundError:
            seen = None
        else:
            seen = (status.st_mtime_ns, status.st_size, status.st_ino)
        if seen == self._seen:
            return None
        self._seen = seen
        if seen is None:
            return self.given
        try:
            return changed(self.given, *read_budget(self.path), shown=str(self.path))
        except UserError as error:
            self._warning = f"{error}\nThe budget stays as it was"
            return None

    def take_warning(self) -> str | None:
        """Why the file, as it was found, changes nothing; said once."""
        warning, self._warning = self._warning, None
        return warning


def read_budget(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The keys of the file as plain values, and the place of each. Raises UserError where it holds none."""
    document = parse(read_text(path, str(path)), str(path))
    values = expand_section("budget", document.values)
    if not isinstance(values, dict):
        raise UserError(
            f"{path}  is {'empty' if values is None else flow(values)[:60]}; allowed: a duration such as "
            f"40min, or some of {', '.join(LIMITS)} as in a recipe's budget"
        )
    return values, {key: f"{path}:{document.lines.get((key,), 1)}" for key in values}


def read_words(words: Sequence[str]) -> dict[str, Any]:
    """Plain values of `40min`, `time=40min` or `price="1.10 USD/h"`; UserError where one is neither."""
    found = {}
    for word in words:
        name, _, text = (word if "=" in word else f"time={word}").partition("=")
        if not text.strip():
            raise UserError(
                f"{COMMAND_LINE}  {word!r} gives no amount; allowed: a duration such as 40min, or "
                f"NAME=AMOUNT with one of {', '.join(LIMITS)}"
            )
        found[name.strip().removeprefix("budget.")] = scalar(text, COMMAND_LINE)
    return found


def changed(
    given: BudgetConfig, values: Mapping[str, Any], origins: Mapping[str, str], *, shown: str
) -> BudgetConfig:
    """As `put_into`, but only what a run can take over while it goes on."""
    for key in values:
        if key in FIXED:
            raise UserError(
                f"{origins[key]}  {key} cannot change while a run goes on; allowed: {', '.join(LIMITS)}"
            )
    return put_into(given, values, origins, shown=shown)


def put_into(
    given: BudgetConfig, values: Mapping[str, Any], origins: Mapping[str, str], *, shown: str
) -> BudgetConfig:
    """`given` with the keys of `values` in place of its own.

    Raises UserError with the place, the key, the value and what is allowed. It is checked as the budget of a
    recipe that has nothing else, so limits that disagree are found and the sentences are the recipe's.
    """
    merged = {**given.model_dump(mode="json"), **values}
    rest = {"model": "-", "data": "-"}
    draft = Draft({**rest, "budget": merged}, {("budget", key): place for key, place in origins.items()})
    try:
        return Recipe.model_validate(draft.values).budget
    except ValidationError as error:
        raise UserError(in_columns(explain(error, draft, shown))) from None
