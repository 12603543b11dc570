"""Early signals of runs, on records as metrics.jsonl has them."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from shoestring.plan import rank_by_early_signals
from shoestring.recipes.errors import UserError


def run(norm: float, loss: float, *, batch: int = 100, steps: int = 50, **odd: Any) -> list[dict[str, Any]]:
    return [
        {"step": k, "tokens": k * batch, "grad_norm": norm, "loss": loss, **odd} for k in range(1, steps + 1)
    ]


def order(*runs: list[dict[str, Any]], window: int = 1000, **given: bool) -> list[int]:
    return [judged.run for judged in rank_by_early_signals(runs, window, **given)]


def test_the_lower_norm_comes_first_whatever_the_loss() -> None:
    assert order(run(2.0, 1.0), run(1.0, 1.5), run(1.5, 0.5)) == [1, 2, 0]
    assert order(run(1.0, 1.0), run(1.0, 2.0)) == [0, 1]  # a tie stays as given


def test_a_higher_loss_counts_only_with_a_lower_norm() -> None:
    judged = rank_by_early_signals([run(1.0, 1.5), run(2.0, 1.0), run(2.5, 3.0)], 1000)
    assert [(j.run, j.confirmed) for j in judged] == [(0, False), (1, False), (2, False)]
    judged = rank_by_early_signals([run(1.0, 2.5), run(2.0, 1.0), run(2.5, 3.0)], 1000)
    assert [(j.run, j.confirmed) for j in judged] == [(0, True), (1, False), (2, False)]
    assert judged[2].reason.endswith("a higher loss alone is no good sign")


def test_the_median_over_the_window_and_the_same_tokens_for_all() -> None:
    spiky = run(1.0, 1.0)
    spiky[-1]["grad_norm"] = 1e6  # one spike is no verdict
    late = run(5.0, 1.0, steps=90)
    for record in late[50:]:
        record["grad_norm"] = 0.01  # beyond what the others have seen
    judged = rank_by_early_signals([late, spiky], 1000)
    assert [j.run for j in judged] == [1, 0]
    assert {j.tokens for j in judged} == {5000}
    early = run(1.0, 1.0)
    for record in early[:40]:
        record["grad_norm"] = 100.0  # before the window
    assert order(early, run(2.0, 1.0)) == [0, 1]
    assert order(early, run(2.0, 1.0), window=5000) == [1, 0]


def test_runs_that_diverged_come_last() -> None:
    assert order(run(math.inf, 1.0), run(3.0, 1.0), run(math.nan, 1.0)) == [1, 0, 2]
    judged = rank_by_early_signals([run(math.nan, 1.0), run(3.0, 1.0)], 1000)
    assert judged[1].reason == "a step was not finite"


def test_other_batches_are_refused_or_rescaled_by_the_root() -> None:
    small, large = run(2.0, 1.0, batch=100, steps=400), run(1.2, 1.0, batch=400, steps=100)
    with pytest.raises(UserError, match=r"batches differ \(100 to 400 tokens a step\)"):
        order(small, large)
    assert order(small, large, rescale=True) == [0, 1]  # 1.2 · sqrt(4) = 2.4
    judged = rank_by_early_signals([small, large], 1000, rescale=True)
    assert [j.grad_norm for j in judged] == pytest.approx([2.0, 2.4])
    nearly = run(1.2, 1.0, batch=105)
    assert order(run(2.0, 1.0), nearly) == [1, 0]


def test_runs_without_steps_in_the_window_are_refused() -> None:
    with pytest.raises(UserError, match="run 1 has no step"):
        order(run(1.0, 1.0), [])
    gap = run(1.0, 1.0)[:10] + run(1.0, 1.0)[-1:]
    gap[-1] = {**gap[-1], "grad_norm": None}
    with pytest.raises(UserError, match="run 0 has no step with loss and gradient norm in the last 50"):
        order([*gap[:5], {**gap[5], "tokens": 5000, "step": 50}], run(1.0, 1.0, steps=45), window=50)
    assert rank_by_early_signals([], 1000) == []


def test_noise_in_a_mean_gradient_falls_as_the_root_of_the_batch() -> None:
    """The rescaling rule against real gradients of a linear model at its optimum, where all is noise."""
    import torch

    torch.manual_seed(0)
    truth = torch.randn(20, dtype=torch.float64)

    def norm(batch: int) -> float:
        x = torch.randn(batch, 20, dtype=torch.float64)
        error = torch.randn(batch, dtype=torch.float64)
        weight = truth.clone().requires_grad_()
        ((x @ weight - x @ truth - error) ** 2).mean().backward()
        assert weight.grad is not None
        return float(weight.grad.norm())

    def median(draw: Callable[[], float]) -> float:
        return sorted(draw() for _ in range(201))[100]

    assert median(lambda: norm(64)) / median(lambda: norm(1024)) == pytest.approx(4.0, rel=0.1)


def test_records_as_a_run_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(json.dumps({**r, "seconds": 1.0}) for r in run(1.0, 2.0)))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert order(records, run(3.0, 2.0)) == [0, 1]
