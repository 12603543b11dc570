"""What the plan decides, with the measurement given by a formula: batch, rate, memory, time, refusals."""

import json
import re
from typing import Any

import pytest
from plan_cases import Meter, machine, rows
from plan_cases import make_tiny_plan as plan
from rich.console import Console
from shoestring.plan import Plan, data_facts, defaults
from shoestring.plan.show import duration, render
from shoestring.recipes.errors import BudgetError, UserError

# Batch, rate and budget


def test_an_untouched_recipe_gets_a_whole_plan() -> None:
    made = plan()
    assert made.packed
    assert made.micro_rows is None
    assert made.steps >= 100
    assert made.finish_seconds <= 600
    assert made.finish_seconds >= 0.97 * 600
    assert made.step_seconds <= defaults.MAX_STEP_SHARE * 600
    assert made.accumulation * made.micro_tokens >= made.batch_tokens
    assert made.memory["host"]["total"] == sum(v for k, v in made.memory["host"].items() if k != "total")
    assert set(made.reasons) >= {"memory", "packed", "batch_tokens", "micro_tokens", "learning_rate"}
    assert made.max_length == made.longest_row == 400


def test_shorter_budgets_take_smaller_batches_and_higher_rates() -> None:
    short, long = plan("budget=3min"), plan("budget=20h")
    assert short.batch_tokens < long.batch_tokens
    assert short.steps < long.steps
    assert short.batch_tokens >= defaults.MIN_BATCH_TOKENS
    assert long.batch_tokens <= defaults.MAX_BATCH_TOKENS


def test_counted_budgets_do_not_depend_on_the_speed_of_the_moment() -> None:
    for budget in ("budget.steps=200", "budget.tokens=100000", "budget.epochs=0.5"):
        quick = plan("budget.time=null", budget, measure=Meter(seconds=1e-4))
        slow = plan("budget.time=null", budget, measure=Meter(seconds=3e-3))
        for name in ("batch_tokens", "micro_tokens", "learning_rate", "steps", "eval_rows", "accumulation"):
            assert getattr(quick, name) == getattr(slow, name), (budget, name)
    assert plan("budget.time=null", "budget.steps=200").steps == 200
    assert plan("budget.time=null", "budget.tokens=100000").tokens_in_budget == pytest.approx(
        100_000, rel=0.01
    )
    half = plan("budget.time=null", "budget.epochs=0.5")
    assert half.epochs == pytest.approx(0.5, rel=0.02)
    assert half.bound_by == "budget.epochs"


def test_the_first_limit_counts() -> None:
    made = plan("budget.steps=5")
    assert (made.steps, made.bound_by) == (5, "budget.steps")
    assert plan("budget.steps=10000000").bound_by == "budget.time"


def test_cost_is_time_bought_at_a_price() -> None:
    made = plan("budget.time=null", "budget.cost=1 USD", 'budget.price="6 USD/h"')
    assert made.finish_seconds <= 600
    assert made.cost == pytest.approx(made.finish_seconds / 3600 * 6)
    assert made.currency == "USD"


def test_energy_that_nothing_measures_is_refused() -> None:
    with pytest.raises(UserError, match=r"budget\.energy"):
        plan("budget.energy=1 kWh")


def test_what_the_recipe_says_is_taken() -> None:
    made = plan(
        "train.batch_tokens=3000", "train.gradient_accumulation_steps=2", "optimizer.learning_rate=0.5"
    )
    assert (made.batch_tokens, made.accumulation, made.learning_rate) == (3000, 2, 0.5)
    made = plan("train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=3")
    assert (made.micro_rows, made.batch_rows) == (4, 12)
    assert made.order_arguments() == {
        "batch_tokens": None,
        "batch_rows": 12,
        "micro_tokens": None,
        "micro_rows": 4,
        "world_size": 1,
        "packed": True,
    }
    assert plan("data.max_length=128").max_length == 128


def test_a_batch_is_never_more_than_the_data() -> None:
    few = rows(count=10, eval_rows=2)
    assert plan("budget=20h", data=few).batch_tokens <= few.tokens


def test_two_processes_share_a_step() -> None:
    one, two = plan("train.batch_tokens=8192"), plan("train.batch_tokens=8192", world_size=2)
    assert two.batch_tokens == one.batch_tokens
    assert two.accumulation * two.world_size == one.accumulation
    assert two.tokens_per_second == pytest.approx(2 * one.tokens_per_second, rel=0.05)


def test_rates_fall_with_size_and_grow_slowly_with_the_batch() -> None:
    def rate(**given: Any) -> float:
        usual = {"adapter": True, "optimizer": "adamw", "parameters": 135_000_000}
        return defaults.learning_rate_for(**{**usual, "batch_tokens": 2048, "steps": 300, **given})

    assert rate() == pytest.approx(1e-3)
    assert 2e-4 < rate(parameters=8_000_000_000) < 5e-4
    assert 1 < rate(batch_tokens=32_768) / rate() <= 2
    assert 1 < rate(steps=30) / rate() <= 1.5
    assert rate(adapter=False) == pytest.approx(1e-4)
    assert rate(adapter=False, parameters=70_000_000_000) == pytest.approx(2e-5)
    assert rate(optimizer="lion_8bit") == pytest.approx(rate() / 5)


@pytest.mark.parametrize(("minutes", "share"), [(5, 0.06), (9.9, 0.06), (10, 0.10), (30, 0.10)])
def test_evaluations_stay_a_tenth_of_the_time_and_less_of_a_short_one(minutes: float, share: float) -> None:
    made = plan(f"budget={minutes}min", "eval.every=10%", data=rows(eval_rows=3000))
    assert 16 < made.eval_rows < 3000
    assert 0.8 * share < made.timeline["evaluations"] / (60 * minutes) <= 1.05 * share
    assert made.reasons["eval_rows"].startswith(f"{made.eval_rows} of 3000 held-out rows: ")
    assert made.reasons["eval_rows"].endswith(f"more than {share:.0%}")


def test_a_few_held_out_rows_are_all_measured() -> None:
    assert plan("budget=3min", "eval.rows=20", data=rows(eval_rows=100)).eval_rows_between == 20


def test_rows_that_cannot_share_a_sequence_are_padded() -> None:
    assert not plan(can_pack=False).packed
    assert not plan("data.packing=false").packed
    with pytest.raises(UserError) as caught:
        plan("data.packing=true", can_pack=False)
    assert str(caught.value) == (
        "data.packing  true was given, but this architecture's attention cannot keep rows of one "
        "sequence apart.\n"
        "              Leave it out: data.packing=auto"
    )
    with pytest.raises(UserError, match=r"model\.attn_implementation=sdpa would let rows"):
        plan("data.packing=true", "model.attn_implementation=sdpa")


# Memory


def test_checkpointing_only_when_it_is_needed() -> None:
    roomy, tight = Meter(per_token=1e6), Meter(per_token=8e6)
    assert not plan(on=machine(host=4.0), measure=roomy).activation_checkpointing
    data = rows(longest=1000)
    made = plan(on=machine(host=3.0), measure=tight, data=data)
    assert made.activation_checkpointing
    assert made.reasons["activation_checkpointing"].startswith("needed")
    assert made.predicted_host_bytes <= 4.0e9
    assert [setting.checkpointing for setting in tight.asked] == [False, True]


def test_the_micro_batch_shrinks_before_anything_else() -> None:
    wide = plan("train.batch_tokens=8192", on=machine(host=8.0), measure=Meter(per_token=1e6))
    narrow = plan("train.batch_tokens=8192", on=machine(host=0.95), measure=Meter(per_token=1e6))
    assert narrow.micro_tokens < wide.micro_tokens
    assert not narrow.activation_checkpointing


def test_rows_are_cut_as_the_last_resort_where_the_recipe_leaves_it_open() -> None:
    made = plan(on=machine(host=6.6), measure=Meter(per_token=8e6), data=rows(longest=8000))
    assert made.max_length == 4096  # where the model ends
    made = plan(on=machine(host=3.6), measure=Meter(per_token=8e6), data=rows(longest=4096))
    assert made.max_length == 2048
    assert "rows are longer" in made.reasons["max_length"]


def test_what_does_not_fit_is_refused_with_parts_and_changes_that_were_planned() -> None:
    with pytest.raises(BudgetError) as caught:
        plan(
            "train.activation_checkpointing=false",
            "train.per_device_train_batch_size=16",
            "data.max_length=400",
            on=machine(host=2.6),
            measure=Meter(per_token=2e6),
        )
    lines = str(caught.value).splitlines()
    assert len(lines) <= 6
    start = (
        r"does not fit  needs \d\d\.\d GB of 3\.60 GB host memory \(free now\): activations 12\.9, other \d"
    )
    assert re.match(start, lines[0])
    assert lines[1].lstrip().startswith("cheapest change: train.per_device_train_batch_size=1  -> 2.")
    assert lines[1].endswith("as quick")
    assert lines[2].strip().startswith("or: train.activation_checkpointing=true  -> ")
    assert lines[2].endswith("33% slower")
    assert caught.value.exit_code == 3


def test_changes_that_only_help_together_are_named_together() -> None:
    with pytest.raises(BudgetError) as caught:
        plan(
            "train.activation_checkpointing=false",
            "train.per_device_train_batch_size=16",
            "data.max_length=400",
            on=machine(host=0.6),
            measure=Meter(per_token=4e6),
        )
    text = str(caught.value)
    assert (
        "no single change is enough; together: train.per_device_train_batch_size=1 "
        "train.activation_checkpointing=true" in text
    )


def test_a_machine_that_is_too_small_for_anything() -> None:
    with pytest.raises(BudgetError) as caught:
        plan("budget.host_memory=900MB")
    text = str(caught.value)
    assert "of 0.90 GB host memory (budget.host_memory)" in text
    assert "not even: " in text
    assert "Take a smaller model" in text


def test_a_memory_budget_below_what_is_free_is_kept() -> None:
    made = plan("budget.host_memory=1.5GB", "train.batch_tokens=8192")
    assert made.predicted_host_bytes <= 1.5e9
    assert made.memory_limits["host"] == 1_500_000_000


def test_a_gpu_has_its_own_column() -> None:
    made = plan(on=machine("cuda", gpu=24.0), measure=Meter(per_token=1e5))
    assert made.predicted_device_bytes == made.memory["device"]["total"]
    assert made.micro_tokens >= 1024
    with pytest.raises(BudgetError, match="GPU memory"):
        plan("train.activation_checkpointing=true", on=machine("cuda", gpu=0.5), measure=Meter(per_token=1e7))


def test_the_disk_must_hold_what_is_kept() -> None:
    with pytest.raises(BudgetError) as caught:
        plan(on=machine(disk=0.0001))
    assert "disk at runs/test: 4 checkpoints of" in str(caught.value)
    assert "checkpoint.keep=1" in str(caught.value)


# Time


def test_a_budget_without_room_for_one_step_is_refused_with_the_numbers() -> None:
    with pytest.raises(BudgetError) as caught:
        plan("budget=8s", elapsed=6.0)
    lines = str(caught.value).splitlines()
    assert lines[0] == "budget.time  8 s is too short for this run on this machine"
    assert lines[1].startswith("needs        start and load 8 s, evaluations ")
    assert "export and report 3" in lines[1]
    assert lines[2].startswith("give         budget.time=")
    with pytest.raises(BudgetError, match="buys 4 s at 1/h"):
        plan("budget.time=null", "budget.cost=0.001 USD", 'budget.price="1 USD/h"', elapsed=6.0)


def test_the_proposed_time_is_enough() -> None:
    with pytest.raises(BudgetError) as caught:
        plan("budget=8s", elapsed=6.0)
    proposed = str(caught.value).split("budget.time=")[1].split()[0]
    assert plan(f"budget={proposed}", elapsed=6.0).steps >= 10


def test_the_time_line_adds_up() -> None:
    made = plan(elapsed=5.0)
    assert made.timeline["start"] == 5.0
    assert sum(made.timeline.values()) == pytest.approx(made.finish_seconds)
    assert made.timeline["training"] == pytest.approx(made.steps * made.step_seconds)
    assert set(made.reserve_guess) == {"eval", "samples", "save", "export", "report"}


# Form


def test_json_there_and_back() -> None:
    made = plan()
    assert Plan.from_json(json.dumps(made.to_json())) == made
    with pytest.raises(ValueError, match="not a plan of this version"):
        Plan.from_json({"model": "x"})


def test_the_plan_on_the_screen() -> None:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(plan()))
    text = console.export_text()
    for word in ("host memory", "activations", "libraries", "peak", "training", "finish", "learning_rate"):
        assert word in text
    assert "tokens/s" in text
    assert duration(4.21) == "4.2 s"
    assert duration(200) == "3 min 20 s"
    assert duration(7500) == "2 h 05 min"


def test_facts_of_rows() -> None:
    import numpy as np
    from shoestring.data.rows import make_rows

    one, two = np.arange(5, dtype=np.int32), np.arange(3, dtype=np.int32)
    train = make_rows([one, two], [one > 2, two > 0], source=[0, 1], weights=(1.0, 2.0))
    held = make_rows([two], [two > 1])
    facts = data_facts(train, held)
    assert facts.tokens == 5 + 2 * 3
    assert facts.trained_share == pytest.approx((2 + 2 * 2) / 11)
    assert (facts.rows, facts.longest, facts.eval_tokens) == (2, 5, 3)
    assert facts.dense_share(1) >= facts.trained_share
    assert facts.clipped(4).lengths.tolist() == [4, 3]
