"""The errors a person can meet, by whose turn it is to act.

    ShoestringError   exit 1   ours to fix
    ├── UserError     exit 2   the recipe, the data, the files or the environment
    ├── BudgetError   exit 3   does not fit the memory, or cannot meet the budget
    └── DivergedError exit 4   the loss or the gradient is not finite

A message is complete: the command line prints it as it is, without a traceback. It says where (file, line,
key), what was given, what is allowed or was measured, and what to type next, in at most six lines for each
problem.
"""

from collections.abc import Sequence


class ShoestringError(Exception):
    """A failure with one message, already formatted for a person."""

    exit_code = 1


class UserError(ShoestringError):
    """The user's mistake: where, what was given, what is allowed, the fix."""

    exit_code = 2


class BudgetError(ShoestringError):
    """The run does not fit the memory, or cannot meet the budget."""

    exit_code = 3


class DivergedError(ShoestringError):
    """The loss or the gradient is not finite."""

    exit_code = 4


def in_columns(rows: Sequence[tuple[str, str]]) -> str:
    """Lay out (where, what) rows with the second column aligned; its further lines are indented to it."""
    width = max((len(where) for where, _ in rows), default=0)
    gap = "\n" + " " * (width + 2)
    return "\n".join(f"{where:<{width}}  {gap.join(what.splitlines())}".rstrip() for where, what in rows)
