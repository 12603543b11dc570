"""What the budget buys: batch, steps, tokens, and where the time goes. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, floor, inf

from ..recipes import Recipe
from ..recipes.errors import BudgetError, in_columns
from ..schedules.limits import Limits
from . import defaults
from .facts import DataFacts
from .seconds import Fixed, StepTime, Timeline, occasions, overhead
from .sizes import accumulates

StepOf = Callable[[int], StepTime]


@dataclass(frozen=True)
class Spending:
    """How the budget is spent. steps and tokens: what fits; evals: measurements between start and end.

    bound_by: the limit that ends the run, budget.time, .cost, .energy, .tokens, .steps or .epochs.
    """

    step: StepTime
    batch_reason: str
    timeline: Timeline
    evals: int
    saves: int
    bound_by: str


def deadline_of(limits: Limits, watts: float) -> tuple[float, str]:
    """Seconds that time, cost and energy leave, inf where none is limited, and which of them is the least.

    watts: a guess, since nothing has been measured under load; the run goes by what it measures.
    """
    allowed = {
        "budget.time": limits.seconds or inf,
        "budget.cost": limits.cost_seconds or inf,
        "budget.energy": inf if limits.joules is None else limits.joules / watts,
    }
    name = min(allowed, key=lambda key: allowed[key])
    return allowed[name], name


def token_limit(limits: Limits, data: DataFacts) -> tuple[float, str]:
    """Tokens that the counted limits other than steps allow, and which one binds."""
    allowed = {
        "budget.tokens": float(limits.tokens or inf),
        "budget.epochs": limits.epochs * data.tokens if limits.epochs else inf,
    }
    name = min(allowed, key=lambda key: allowed[key])
    return allowed[name], name


def choose_batch(
    recipe: Recipe,
    data: DataFacts,
    *,
    tokens: float,
    steps_limit: int | None,
    seconds_per_token: float,
    update_seconds: float,
    deadline: float,
    world_size: int,
    micro_tokens: int,
    micro_rows: int | None,
) -> tuple[int, str]:
    """Tokens of an optimizer step, all processes together, and the reason."""
    train = recipe.train
    if train.batch_tokens is not None:
        return train.batch_tokens, "train.batch_tokens"
    if micro_rows is not None:
        accumulation = train.gradient_accumulation_steps or 1
        rows = min(micro_rows * accumulation * world_size, data.rows)
        return max(1, round(rows * data.mean_length)), f"{rows} rows, as given by the recipe"
    if not accumulates(recipe) and train.gradient_accumulation_steps is None:
        return micro_tokens * world_size, "one micro-batch, whose gradients are gone when it ends"
    if train.gradient_accumulation_steps is not None and tokens == inf and steps_limit is None:
        return micro_tokens * train.gradient_accumulation_steps * world_size, "accumulation as given"

    if steps_limit is not None:
        # The tokens are ours to choose: the batch for which the rule and the number of steps agree.
        tokens = min(tokens, defaults.BATCH_PER_ROOT_TOKEN**2 * steps_limit * steps_limit)
    batch = defaults.batch_tokens_for(tokens)
    reason = f"grows as the root of the tokens that the budget buys ({short(tokens)})"
    # With counted limits only, nothing measured may decide: the run must repeat to the bit.
    timed = deadline < inf
    least = update_seconds * (1 / defaults.MAX_OPTIMIZER_SHARE - 1) / seconds_per_token
    if timed and least > batch:
        batch = min(ceil(least), defaults.MAX_BATCH_TOKENS)
        reason = f"so that the optimizer takes at most {defaults.MAX_OPTIMIZER_SHARE:.0%} of a step"
    most = (defaults.MAX_STEP_SHARE * deadline - update_seconds) / seconds_per_token
    # Not below the least batch, as long as that still leaves ten steps.
    most = max(most, min(defaults.MIN_BATCH_TOKENS, 0.1 * deadline / seconds_per_token))
    if timed and batch > most:
        batch = max(1, floor(most))
        reason = f"so that a step takes at most {defaults.MAX_STEP_SHARE:.0%} of the time"
    batch = max(batch, ceil(data.mean_length) * world_size)
    if batch >= data.tokens:
        return data.tokens, "the data has no more rows"
    return _round(batch), reason


def spend(
    recipe: Recipe,
    data: DataFacts,
    limits: Limits,
    fixed: Fixed,
    *,
    watts: float,
    elapsed: float,
    batch_for: Callable[[float], tuple[int, str]],
    step_of: StepOf,
    seconds_per_token: float,
    share: float = 1.0,
) -> Spending:
    """Divide the budget. `batch_for(tokens)` chooses the batch, `step_of(batch)` times a step of it.

    share: of the training, for a stage that is not all of it. The rest of it is on the time line as "other
    stage", taken to be as quick as this one where the budget is counted.

    BudgetError: time or cost does not cover start, one step and landing.
    """
    deadline, by_time_name = deadline_of(limits, watts)
    allowed, bound_by = token_limit(limits, data)
    allowed *= share
    steps_allowed = inf if limits.steps is None else max(1.0, limits.steps * share)
    evals = saves = 0
    steps: float
    spending: Spending | None = None
    # How often it is evaluated depends on the steps, these on the time that evaluations leave: settle in
    # turns.
    for _ in range(3):
        outside = overhead(fixed, elapsed=elapsed, evals=evals, saves=saves)
        left = share * (deadline - sum(outside.values()))
        affordable = left / seconds_per_token if left > 0 else 0.0
        batch, reason = batch_for(min(allowed, affordable))
        step = step_of(batch)
        if left < step.seconds:
            if evals + saves == 0:
                raise too_short(recipe, limits, watts, outside, step)
            evals, saves = evals // 2, saves // 2
            continue
        by_time = left / step.seconds
        by_tokens = max(1.0, allowed / batch)
        steps = min(by_time, by_tokens, steps_allowed)
        name = by_time_name if steps == by_time else "budget.steps" if steps == steps_allowed else bound_by
        steps = max(1, floor(steps))
        parts = {**outside, "training": steps * step.seconds}
        if share < 1.0:
            parts["other stage"] = parts["training"] * (1.0 - share) / share
        timeline = Timeline(parts, int(steps), int(min(steps * batch, allowed)))
        spending = Spending(step, reason, timeline, evals, saves, name)
        evals = occasions(recipe.eval.every, seconds=timeline.total, steps=steps)
        saves = occasions(recipe.checkpoint.every, seconds=timeline.total, steps=steps)
    assert spending is not None
    return spending


def too_short(
    recipe: Recipe, limits: Limits, watts: float, outside: dict[str, float], step: StepTime
) -> BudgetError:
    """The refusal of a budget that does not cover start, one step and landing."""
    needed = sum(outside.values()) + 20 * step.seconds
    start = outside["start"] + outside["load"]
    rows = []
    deadline, name = deadline_of(limits, watts)
    if name == "budget.energy":
        rows.append(
            (name, f"{(limits.joules or 0.0) / 3.6e6:g} kWh lasts {deadline:.0f} s at {watts:.0f} W, a guess")
        )
        fix = f"budget.energy={ceil(ceil(needed / 10) * 10 * watts / 1e3)}kJ"
    elif name == "budget.cost":
        price = limits.price_per_hour or 0.0
        rows.append(("budget.cost", f"{limits.cost:g} buys {deadline:.0f} s at {price:g}/h"))
        fix = f'budget.cost="{needed / 3600 * price:.2g} {currency(recipe)}"'
    else:
        rows.append(("budget.time", f"{deadline:.0f} s is too short for this run on this machine"))
        fix = f"budget.time={ceil(needed / 10) * 10}s"
    rows.append(
        (
            "needs",
            f"start and load {start:.0f} s, evaluations {outside['evaluations']:.0f}, samples "
            f"{outside['samples']:.0f}, one step {step.seconds:.1f}, save {outside['saves']:.0f}, export and "
            f"report {outside['export'] + outside['report']:.0f}",
        )
    )
    rows.append(("give", f"{fix} for 20 steps; or less work: eval.samples=0 eval.rows=50"))
    return BudgetError(in_columns(rows))


def currency(recipe: Recipe) -> str:
    """The currency of the recipe's price."""
    return "" if recipe.budget.price is None else recipe.budget.price.currency


def _round(tokens: int) -> int:
    """To a multiple of 64 above 256, so that the figure reads like a choice and not like a measurement."""
    return tokens if tokens < 256 else tokens // 64 * 64


def short(tokens: float) -> str:
    """1.23M, 45.6k or 789."""
    return (
        f"{tokens / 1e6:.3g}M"
        if tokens >= 1e6
        else f"{tokens / 1e3:.3g}k"
        if tokens >= 1e3
        else f"{tokens:.0f}"
    )
