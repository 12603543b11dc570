"""What will happen, said before anything is spent: the block above the progress bar."""

from __future__ import annotations

from ..plan import largest
from ..recipes import BudgetConfig, Recipe
from .legs import Leg
from .rundir import RunDir
from .screen import Headline
from .stages import StagePlan

LIMITS = ("time", "cost", "price", "energy", "tokens", "steps", "epochs")


def headline(
    recipe: Recipe, stages: list[StagePlan], run_dir: RunDir, budget: BudgetConfig, legs: list[Leg]
) -> Headline:
    """The run in a few lines. budget: of this leg."""
    first = stages[0]
    plan, data = first.plan, first.data
    more = [("steps", _steps(stage, recipe)) for stage in stages]
    if len(stages) > 1:
        more.append(("split", plan.reasons["objective.split"]))
    if legs:
        more.append((f"leg {len(legs) + 1}", legs[-1].why))
    return Headline(
        model=plan.model,
        trained_parameters=plan.trained_parameters,
        parameters=plan.parameters,
        data=f"{len(data.train):,} rows, {data.report.train_tokens:,} tokens, "
        f"{data.report.trained_share:.0%} trained",
        budget=budget_text(budget),
        tokens=None if legs else plan.tokens_in_budget,
        finish_seconds=None if legs else max(stage.plan.finish_seconds for stage in stages),
        device=f"{plan.machine}" if plan.device == "cpu" else f"{plan.machine} ({plan.device})",
        memory={
            tier: (parts["total"], plan.memory_limits.get(tier))
            for tier, parts in largest([stage.plan for stage in stages]).items()
            if parts
        },
        output_dir=str(run_dir.path),
        more=more,
    )


def budget_text(budget: BudgetConfig) -> str:
    """`time 3 min, price 2.49 USD/h`."""
    given = [
        f"{name} {getattr(value, 'text', value)}"
        for name, value in budget
        if value is not None and name in LIMITS
    ]
    return ", ".join(given)


def _steps(stage: StagePlan, recipe: Recipe) -> str:
    plan = stage.plan
    size = f"{plan.batch_rows:,} rows" if plan.batch_rows else f"{plan.batch_tokens:,} tokens"
    return (
        f"{'' if stage.end == 1.0 and stage.name == recipe.objective.name else stage.name + ': '}"
        f"about {plan.steps:,} of {size}, {plan.epochs:.2g} epochs, peak rate {plan.learning_rate:.1e}, "
        f"{recipe.schedule.name}"
    )
