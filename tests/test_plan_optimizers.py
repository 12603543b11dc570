"""What the plan knows of each optimizer: gradients alive, second passes, rates, int8 weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plan_cases import tiny_facts
from shoestring.plan.precision import choose_precision
from shoestring.plan.sizes import accumulates, count_sizes, measures_first
from shoestring.plan.trained import find_trained
from shoestring.recipes import Recipe
from shoestring.recipes.errors import UserError

CPU = torch.device("cpu")


def recipe(optimizer: dict[str, Any], **train: Any) -> Recipe:
    return Recipe(model="m", data="d.jsonl", budget="1h", adapter=None, optimizer=optimizer, train=train)


def sizes(wanted: Recipe) -> Any:
    facts = tiny_facts()
    precision = choose_precision(wanted, CPU)
    return count_sizes(wanted, facts, find_trained(wanted, facts), precision, libraries=0)


def test_step_in_backward_holds_the_largest_gradient_unless_micro_batches_accumulate() -> None:
    facts = tiny_facts()
    largest = 4 * max(torch.Size(shape).numel() for _, shape in facts.parameter_shapes)
    whole = 4 * facts.parameters
    assert sizes(recipe({"name": "apollo"})).gradients == whole
    assert sizes(recipe({"name": "apollo", "step_in_backward": True})).gradients == largest
    more = {"gradient_accumulation_steps": 2}
    assert sizes(recipe({"name": "apollo", "step_in_backward": True}, **more)).gradients == whole
    assert sizes(recipe({"name": "lomo"})).gradients == largest
    assert sizes(recipe({"name": "lomo"})).trained == whole


def test_badam_holds_one_layer() -> None:
    facts = tiny_facts()
    layer = sum(torch.Size(shape).numel() for name, shape in facts.parameter_shapes if ".layers.0." in name)
    found = sizes(recipe({"name": "badam"}))
    assert found.gradients == 4 * layer
    assert found.optimizer >= 8 * layer
    assert found.trained == 4 * layer * facts.layers
    with pytest.raises(UserError, match=r"optimizer.name  badam: .*active_blocks"):
        sizes(recipe({"name": "badam", "active_blocks": 99}))


def test_int8_weights_are_counted_as_such() -> None:
    plain, coded = sizes(recipe({"name": "apollo"})), sizes(recipe({"name": "q_apollo"}))
    assert coded.weights < plain.weights
    assert coded.unquantised == plain.unquantised


def test_exact_clipping_in_the_backward_pass_is_known_to_cost_a_second_one() -> None:
    exact = {"name": "apollo", "step_in_backward": True, "clipping": "exact"}
    assert measures_first(recipe(exact))
    assert not measures_first(recipe({**exact, "clipping": "previous"}))
    assert not measures_first(recipe(exact, gradient_accumulation_steps=2))
    assert accumulates(recipe({"name": "apollo"}))
    assert not accumulates(recipe(exact))


def test_heavier_rules_are_known_to_take_longer() -> None:
    def seconds(name: str) -> float:
        return float(
            sizes(recipe({"name": name})).update.seconds(bytes_per_second=4e10, flops_per_second=8e11)
        )

    assert seconds("apollo_mini") < seconds("adamw")
    assert max(seconds("apollo"), seconds("galore")) < seconds("muon") < seconds("soap")
