"""docs/spending.md says what the code does."""

import contextlib
import io
import re
from pathlib import Path

from plan_cases import make_tiny_plan as plan
from plan_cases import pairs, rows
from shoestring.plan import choose_split
from shoestring.plan.repetition import effective_epochs, worth_of_next

PAGE = (Path(__file__).parent.parent / "docs" / "spending.md").read_text(encoding="utf-8")


def test_the_table_of_epochs() -> None:
    found = re.findall(r"^\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE, re.MULTILINE)
    assert len(found) == 7
    for epochs, worth, further in found:
        assert f"{effective_epochs(float(epochs)):.3g}" == worth
        assert abs(worth_of_next(float(epochs)) - float(further)) < 0.006


def test_the_printed_lines() -> None:
    small = rows(count=100, eval_rows=10)
    eight = plan("budget.time=null", "budget.epochs=8", data=small)
    for made in (
        plan("budget=3min"),
        plan("budget.time=null", "budget.epochs=2"),
        eight,
        plan("budget=20min", data=small),
    ):
        assert f"epochs  {made.reasons['epochs']}\n" in PAGE
    assert f"filter  {eight.reasons['filter']}\n" in PAGE
    assert f"weight_decay  {eight.weight_decay:g}  {eight.reasons['weight_decay']}\n" in PAGE
    dpo = plan("objective=dpo", data=pairs())
    assert f"objective  {dpo.reasons['objective']}\n" in PAGE
    for share in (choose_split(2500, 2500, 10**9, 1e6, None), choose_split(5000, 5000, 100_000, 1e6, None)):
        assert f"objective.split  {share.reason}\n" in PAGE


def test_the_example_of_early_signals() -> None:
    ((code, printed),) = re.findall(r"```python\n(.*?)```\n```\n(.*?)```", PAGE, re.DOTALL)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code, "spending.md", "exec"), {})
    assert said.getvalue() == printed
