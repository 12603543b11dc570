"""What repeats are worth, by the law itself, and what the plan makes of it."""

import math
from dataclasses import replace

import numpy as np
import pytest
from plan_cases import make_tiny_plan as plan
from plan_cases import rows
from shoestring.plan.repetition import (
    Repeats,
    SourceUse,
    effective_epochs,
    epochs_until_worth,
    filter_break_even,
    repeats_of,
    weight_decay_for,
    worn_source,
    worth_of_next,
)


def worth_by_steps(epochs: float, pieces: int = 200_000) -> float:
    """The law by its meaning: the first pass counts whole, each token after R repeats exp(-R / R*)."""
    if epochs <= 1:
        return epochs
    edges = np.linspace(0.0, epochs - 1.0, pieces + 1)
    middle = (edges[1:] + edges[:-1]) / 2
    return 1.0 + float(np.exp(-middle / 15.387756).sum() * (edges[1] - edges[0]))


@pytest.mark.parametrize("epochs", [0.3, 1.0, 2.0, 4.0, 16.4, 44.0, 300.0])
def test_effective_epochs_add_up_what_each_token_is_worth(epochs: float) -> None:
    assert effective_epochs(epochs) == pytest.approx(worth_by_steps(epochs), rel=1e-8)


def test_published_readings_of_the_law() -> None:
    assert effective_epochs(4) / 4 == pytest.approx(0.93, abs=0.01)  # "almost as good as fresh"
    assert effective_epochs(1e6) == pytest.approx(1 + 15.387756)
    assert worth_of_next(1 + 15.387756) == pytest.approx(1 / math.e)
    assert worth_of_next(0.5) == worth_of_next(1.0) == 1.0
    assert epochs_until_worth(0.5) == pytest.approx(11.67, abs=0.01)
    assert epochs_until_worth(0.1) == pytest.approx(36.43, abs=0.01)
    assert worth_of_next(epochs_until_worth(0.1)) == pytest.approx(0.1)


def test_a_filter_pays_for_less_the_fewer_epochs_there_are() -> None:
    needed = [filter_break_even(epochs, 0.5) for epochs in (0.5, 1, 4, 16, 1000)]
    assert needed[0] == 1.0
    assert needed == sorted(needed)
    assert needed[-1] == pytest.approx(2.0)
    assert filter_break_even(4, 0.5) == pytest.approx(worth_by_steps(4) / (0.5 * worth_by_steps(8)), rel=1e-6)


def decay(epochs: float, *, adapter: bool = False, optimizer: str = "adamw", steps: int = 100) -> float:
    return weight_decay_for(epochs, adapter=adapter, optimizer=optimizer, rate=1e-4, steps=steps)


def test_weight_decay_rises_from_4_to_16_epochs_and_to_thirty_times_the_usual() -> None:
    assert [decay(epochs) for epochs in (0.5, 4, 7, 10, 16, 100)] == [0.0, 0.0, 0.075, 0.15, 0.3, 0.3]
    assert [decay(epochs, adapter=True) for epochs in (4, 10, 16)] == [0.0, 0.015, 0.03]


def test_weight_decay_pulls_alike_whatever_the_rate_and_never_far() -> None:
    assert decay(16, optimizer="lion") == pytest.approx(5 * 0.3)  # a fifth of AdamW's rate
    assert decay(16, optimizer="galore") == pytest.approx(0.3 / 8, rel=0.02)
    long = decay(16, steps=20_000)
    assert long < 0.3
    assert long * 1e-4 * 20_000 == pytest.approx(0.1, rel=0.01)
    assert decay(16, adapter=True, steps=20_000) == 0.03


def one(passes: float) -> Repeats:
    return Repeats((SourceUse(0, 1000, 1.0, passes),))


def test_the_share_that_gives_most_of_it_is_the_inverse_of_the_law() -> None:
    for passes in (0.5, 3.0, 40.0):
        share = one(passes).share_worth(0.95)
        assert worth_by_steps(share * passes) == pytest.approx(0.95 * worth_by_steps(passes), rel=1e-6)
    assert one(0.5).share_worth(0.95) == pytest.approx(0.95)


def mixture(weight: float = 20.0) -> tuple[SourceUse, ...]:
    few = np.arange(4000) < 100
    data = replace(rows(), source=few.astype(np.int64), seen=np.where(few, weight, 1.0))
    return repeats_of(data, 2.0 * data.tokens).sources


def test_sources_are_counted_by_their_weights() -> None:
    first, second = mixture()
    assert (first.number, first.passes, second.number, second.passes) == (0, 2.0, 1, 40.0)
    both = Repeats((first, second))
    by_hand = first.tokens * worth_by_steps(2.0) + second.tokens * worth_by_steps(40.0)
    assert both.effective * (first.tokens + second.tokens) == pytest.approx(by_hand, rel=1e-6)
    drawn = 2.0 * first.tokens * worth_of_next(2.0) + 40.0 * second.tokens * worth_of_next(40.0)
    assert both.next_worth == pytest.approx(drawn / (2.0 * first.tokens + 40.0 * second.tokens))
    half = repeats_of(replace(rows(), seen=np.full(4000, 0.3)), 0.3 * rows().tokens)
    assert half.epochs == pytest.approx(0.3, rel=1e-3)  # one epoch of a third of the rows


def test_the_proposed_weight_shows_the_worn_source_four_times() -> None:
    found = worn_source(mixture())
    assert found is not None
    worst, others, weight = found
    assert (worst.number, others) == (1, 2.0)
    seen = sum(source.tokens * source.passes for source in mixture())
    few = np.arange(4000) < 100
    data = replace(rows(), source=few.astype(np.int64), seen=np.where(few, weight, 1.0))
    again = repeats_of(data, seen)
    assert again.sources[1].passes == pytest.approx(4.0, rel=0.05)
    assert again.effective > Repeats(mixture()).effective
    assert worn_source(mixture(weight=1.5)) is None
    assert worn_source(one(40.0).sources) is None


# In the plan


SMALL = rows(count=100, eval_rows=10)


def test_a_short_budget_sees_a_subset_and_says_which() -> None:
    made = plan("budget=3min")
    assert made.epochs < 1
    assert made.reasons["epochs"].startswith(
        f"{made.epochs:.0%} of the tokens, rows drawn at random, each once"
    )
    assert "filter" not in made.reasons
    assert made.weight_decay == 0.0


def test_a_few_epochs_need_nothing() -> None:
    made = plan("budget.time=null", "budget.epochs=2")
    assert made.reasons["epochs"] == "2 passes teach like 1.97 of fresh rows: repeats cost almost nothing"
    assert made.reasons["weight_decay"] == "none up to 4 passes over the rows"
    assert "worth 1.06 of the mean row" in made.reasons["filter"]


def test_more_epochs_are_regularised_adapters_less() -> None:
    wanted = ("budget.time=null", "budget.epochs=8")
    adapter, whole = plan(*wanted, data=SMALL), plan(*wanted, "adapter=null", data=SMALL)
    assert 0 < adapter.weight_decay == pytest.approx(0.1 * whole.weight_decay, rel=0.05)
    assert "towards the base" in adapter.reasons["weight_decay"]
    assert "a further token is worth 0.64 of a fresh one" in adapter.reasons["epochs"]
    given = plan(*wanted, "optimizer.weight_decay=0.5", data=SMALL)
    assert (given.weight_decay, given.reasons["weight_decay"]) == (0.5, "optimizer.weight_decay")
    assert plan(*wanted, "optimizer.weight_decay=auto", data=SMALL).weight_decay == adapter.weight_decay


@pytest.mark.parametrize(
    "budget",
    [
        ("budget=20min",),
        ("budget.epochs=40",),
        ("budget.tokens=1M",),
        ("budget.steps=300", "train.batch_tokens=2048"),
        ("budget.cost=1 USD", 'budget.price="6 USD/h"'),
    ],
)
def test_far_more_names_a_smaller_budget_that_is_nearly_as_good(budget: tuple[str, ...]) -> None:
    time = () if budget[0].startswith("budget=") else ("budget.time=null",)
    whole = plan(*time, *budget, data=SMALL)
    line = whole.reasons["epochs"]
    assert line.endswith(" gives 95% of that")
    proposed = line.split(". ")[-1].removesuffix(" gives 95% of that").replace('"', "")
    assert proposed.startswith(budget[0].split("=")[0])
    less = plan(*time, *budget, proposed, data=SMALL)
    gained = effective_epochs(less.epochs) / effective_epochs(whole.epochs)
    assert gained == pytest.approx(0.95, abs=0.02)
    assert less.finish_seconds < 0.95 * whole.finish_seconds
    assert whole.weight_decay == 0.03


def test_steps_are_proposed_with_the_batch_that_they_are_meant_for() -> None:
    whole = plan("budget.time=null", "budget.steps=600", data=SMALL)
    first, second = whole.reasons["epochs"].split(". ")[-1].split(" ")[:2]
    assert second == f"train.batch_tokens={whole.batch_tokens}"
    less = plan("budget.time=null", "budget.steps=600", first, second, data=SMALL)
    assert effective_epochs(less.epochs) == pytest.approx(0.95 * effective_epochs(whole.epochs), rel=0.02)


def test_a_source_that_wears_out_is_named_with_its_weight() -> None:
    few = np.arange(4000) < 100
    data = replace(rows(), source=few.astype(np.int64), seen=np.where(few, 20.0, 1.0))
    wanted = (
        "data.train=[{path: a.jsonl}, {path: b.jsonl, weight: 20}]",
        "budget.time=null",
        "budget.epochs=2",
    )
    made = plan(*wanted, data=data)
    assert made.reasons["sources"] == (
        "b.jsonl is seen 40 times, the others 2 times: data.train.1.weight=1.4 makes that 4"
    )
    assert "sources" not in plan("budget=3min").reasons
