"""What a sweep tries: `--over` and `--budget` as a person writes them, and the trials that follow."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..recipes import Resolved, load_recipe
from ..recipes.errors import UserError, in_columns
from ..recipes.quantities import Count, Seconds

UNITS = ("time", "tokens", "steps")
LIMITS = ("time", "cost", "energy", "tokens", "steps", "epochs")
LONGEST_NAME = 80
_LOG = re.compile(r"log:(.+?)\.\.(.+?):([0-9]+)")
_EXAMPLE = "--over optimizer.learning_rate=1e-4,3e-4,1e-3, or =log:1e-5..1e-3:5"


@dataclass(frozen=True)
class Axis:
    """A key of the recipe and the values to try, as texts of YAML."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Candidate:
    """One trial before it runs: its folder's name and what it overrides."""

    name: str
    values: dict[str, str]


@dataclass(frozen=True)
class Job:
    """A sweep as asked for, every trial of it checked. `amount` is the whole budget in seconds or counts."""

    source: str
    overrides: tuple[str, ...]
    axes: tuple[Axis, ...]
    candidates: tuple[Candidate, ...]
    unit: str
    amount: float
    resolved: Resolved

    @property
    def output(self) -> Path:
        """Where the sweep's own files go; its trials are below `sweep/`."""
        return Path(self.resolved.recipe.output_dir)

    def folder(self, name: str) -> Path:
        """The run directory of a trial."""
        return self.output / "sweep" / name

    def trial_overrides(self, values: Mapping[str, str], name: str, amount: float) -> list[str]:
        """What follows the recipe on the command line of a trial that may use `amount` in all."""
        return [
            *self.overrides,
            *(f"{key}={value}" for key, value in values.items()),
            *budget_overrides(self.resolved, self.unit, amount),
            f"output_dir={self.quoted(self.folder(name))}",
        ]

    @staticmethod
    def quoted(path: str | Path) -> str:
        """A path as a value that YAML reads back as it is."""
        return json.dumps(str(path))


def read_job(source: str, overrides: Sequence[str], over: Sequence[str], budget: str | None) -> Job:
    """The sweep that a command line asks for. Raises UserError for whatever a trial would stumble over."""
    axes = tuple(read_axis(text) for text in over)
    if not axes:
        raise UserError(in_columns([("--over", f"is missing: what is to be tried.   {_EXAMPLE}")]))
    keys = [axis.key for axis in axes]
    given = [text.partition("=")[0].strip() for text in overrides]
    for key in keys:
        if keys.count(key) > 1 or key in given:
            text = f"{key} is given twice.   Put all its values into one: --over {key}=A,B,C"
            raise UserError(in_columns([("--over", text)]))
    candidates = tuple(grid(axes))
    if len(candidates) < 2:
        text = f"{over[0]!r} makes one trial.   Give several values, or use: shoestring train {source}"
        raise UserError(in_columns([("--over", text)]))
    first = [] if budget is None else _read_budget(budget)
    resolved = load_recipe(source, [*overrides, *first])
    unit, amount = _budget_of(resolved, None if budget is None else first[0])
    job = Job(source, tuple(overrides), axes, candidates, unit, amount, resolved)
    for candidate in candidates:
        load_recipe(source, job.trial_overrides(candidate.values, candidate.name, amount))
    return job


def read_axis(text: str) -> Axis:
    """`adapter.r=8,32` or `optimizer.learning_rate=log:1e-5..1e-3:5`. UserError when it is neither."""
    key, equals, given = text.partition("=")
    key = key.strip()
    if not equals or not all(part and part == part.strip() for part in key.split(".")):
        raise UserError(in_columns([("--over", f"{text!r} is not KEY=VALUE,VALUE.   {_EXAMPLE}")]))
    if key.split(".")[0] in ("budget", "output_dir"):
        text = (
            f"{key} is the sweep's own.   Its budget is --budget, its folder output_dir=DIR; try other keys"
        )
        raise UserError(in_columns([("--over", text)]))
    values = _spaced(key, given) if given.startswith("log:") else split_values(given)
    if "" in values or len(set(values)) < len(values):
        what = "has an empty value" if "" in values else "has a value twice"
        raise UserError(in_columns([("--over", f"{text!r} {what}.   {_EXAMPLE}")]))
    return Axis(key, tuple(values))


def split_values(text: str) -> list[str]:
    """At the commas outside brackets and quotes: `[q_proj, v_proj],all-linear` is two values."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char in "[{":
            depth += 1
        elif char in "]}":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += char
    return [part.strip() for part in parts]


def grid(axes: Sequence[Axis]) -> list[Candidate]:
    """Every combination, the last key moving fastest; names are unique and good for folders."""
    last = [axis.key.split(".")[-1] for axis in axes]
    labels = [name if last.count(name) == 1 else axis.key for name, axis in zip(last, axes, strict=True)]
    found: list[Candidate] = []
    taken: set[str] = set()
    for values in itertools.product(*(axis.values for axis in axes)):
        parts = (f"{label}={_safe(value)}" for label, value in zip(labels, values, strict=True))
        name = plain = ",".join(parts)[:LONGEST_NAME]
        number = 2
        while name in taken:
            name, number = f"{plain}-{number}", number + 1
        taken.add(name)
        found.append(Candidate(name, dict(zip((axis.key for axis in axes), values, strict=True))))
    return found


def short(value: float) -> str:
    """Three significant digits as one would type them: 3.16e-4, 0.0316, 100."""
    mantissa, exponent = f"{value:.2e}".split("e")
    if -2 <= int(exponent) <= 3:
        return f"{float(f'{value:.2e}'):g}"
    return f"{float(mantissa):g}e{int(exponent)}"


def budget_overrides(resolved: Resolved, unit: str, amount: float) -> list[str]:
    """The trial's only limit; those that the recipe has beside it are taken away."""
    text = Seconds.write(amount) if unit == "time" else Count.write(int(amount))
    others = [name for name in LIMITS if name != unit and getattr(resolved.recipe.budget, name) is not None]
    return [f"budget.{unit}={text}", *(f"budget.{name}=null" for name in others)]


def _read_budget(text: str) -> list[str]:
    """`30min`, `tokens=2M` or `steps=600` as an override, its unit checked."""
    unit, equals, amount = text.partition("=")
    if not equals:
        unit, amount = "time", text
    if unit.strip() not in UNITS:
        why = f"{text!r} is not a budget for a sweep; allowed: 30min, time=30min, tokens=2M or steps=600"
        raise UserError(in_columns([("--budget", why)]))
    try:
        (Seconds if unit.strip() == "time" else Count).parse(amount)
    except ValueError as error:
        raise UserError(in_columns([("--budget", str(error))])) from None
    return [f"budget.{unit.strip()}={amount.strip()}"]


def _budget_of(resolved: Resolved, given: str | None) -> tuple[str, float]:
    """(unit, amount) of the whole sweep: `given`, or the recipe's one limit."""
    budget = resolved.recipe.budget
    limits = [name for name in LIMITS if getattr(budget, name) is not None]
    if given is not None:
        limits = [given.partition("=")[0].removeprefix("budget.")]
    if len(limits) != 1 or limits[0] not in UNITS:
        text = (
            f"is missing, and the recipe's own budget ({', '.join(limits)}) is not one of time, tokens or "
            "steps.   Give the sweep's: --budget 30min, tokens=2M or steps=600"
        )
        raise UserError(in_columns([("--budget", text)]))
    return limits[0], float(getattr(budget, limits[0]))


def _spaced(key: str, text: str) -> list[str]:
    """`log:LOW..HIGH:COUNT`: COUNT values of equal ratio, rounded to three digits."""
    found = _LOG.fullmatch(text)
    low, high, count = math.nan, math.nan, 0
    if found is not None:
        with contextlib.suppress(ValueError):  # no numbers: refused below, with what is allowed
            low, high, count = float(found[1]), float(found[2]), int(found[3])
    if not (0 < low < high < math.inf and 2 <= count <= 100):
        why = f"{key}={text} is not log:LOW..HIGH:COUNT with 0 < LOW < HIGH and COUNT from 2 to 100"
        raise UserError(in_columns([("--over", f"{why}.   For example {key}=log:1e-5..1e-3:5")]))
    ratio = math.log(high / low) / (count - 1)
    return [short(low * math.exp(step * ratio)) for step in range(count)]


def _safe(value: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+_-]+", "-", value).strip("-") or "empty"
