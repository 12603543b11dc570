"""Data: sources, formats, chat template and mask, packing, order, collate.

`prepare` turns the recipe's data section into tokenised rows; `Order` says which rows each step sees;
`training_batches` delivers them. See docs/data.md.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .batch import Batch, collate
    from .loader import training_batches
    from .order import Order, Step, eval_batches
    from .prepared import Prepared, prepare
    from .report import DataReport
    from .rows import TokenRows, make_rows
    from .template import prompt_ids
    from .view import describe

__all__ = [
    "Batch",
    "DataReport",
    "Order",
    "Prepared",
    "Step",
    "TokenRows",
    "collate",
    "describe",
    "eval_batches",
    "make_rows",
    "prepare",
    "prompt_ids",
    "training_batches",
]

_HOMES = {
    "Batch": "batch",
    "DataReport": "report",
    "Order": "order",
    "Prepared": "prepared",
    "Step": "order",
    "TokenRows": "rows",
    "collate": "batch",
    "describe": "view",
    "eval_batches": "order",
    "make_rows": "rows",
    "prepare": "prepared",
    "prompt_ids": "template",
    "training_batches": "loader",
}


def __getattr__(name: str) -> object:
    """Import torch and transformers only with the names that need them."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
