"""Weight decay that follows the budget."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
from shoestring.train.run import train_recipe
from test_train_run import _one_thread  # noqa: F401 - a fixture


@pytest.mark.parametrize(
    ("shape", "expected"), [("constant", [0.1] * 4), ("linear", [0.075, 0.05, 0.025, 0.0])]
)
def test_weight_decay_moves_with_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str, expected: list[float]
) -> None:
    from shoestring.train.engine import NativeEngine

    seen: list[float] = []
    real = NativeEngine.step

    def looks(self: NativeEngine, max_grad_norm: float | None) -> Any:
        seen.append(max(group["weight_decay"] for group in self.optimizer.param_groups))
        return real(self, max_grad_norm)

    monkeypatch.setattr(NativeEngine, "step", looks)
    recipe = tiny.recipe(
        tmp_path,
        budget={"steps": 4},
        optimizer={"name": "adamw", "learning_rate": 1e-2, "weight_decay": 0.1},
        schedule={"name": "linear", "weight_decay": shape},
    )
    assert train_recipe(str(recipe), [], fresh=False, started=time.monotonic()) == 0
    assert seen == pytest.approx(expected)
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 4
