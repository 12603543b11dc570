"""Budgets that change on the way, prices that change, stages, and legs after the first."""

import json

import pytest
from clock_hand import Hand, make, run, spend, step
from shoestring.recipes import BudgetError, Every, UserError
from shoestring.schedules import Clock, Limits, Warmup


def resumed(clock, limits, **options):
    """Another process that goes on where `clock` stopped."""
    other, hand = make(limits, **options)
    other.load_state_dict(json.loads(json.dumps(clock.state_dict())))
    return other, hand


# Changes


@pytest.mark.parametrize(
    ("before", "after", "spent", "limit"),
    [
        (Limits(steps=100), Limits(steps=200), 40, 200),
        (Limits(steps=100), Limits(steps=50), 40, 50),
        (Limits(tokens=10_000), Limits(tokens=30_000), 40, 300),
        (Limits(epochs=1.0), Limits(epochs=0.8), 40, 80),
        (Limits(steps=100), Limits(epochs=1.5, tokens=50_000), 40, 150),
    ],
)
def test_a_change_of_counted_limits_slopes_from_where_progress_stands(before, after, spent, limit):
    """x = x0 + (1 - x0) * spent since / (spent since + left), in steps of 100 tokens and 1 % of the rows."""
    clock, hand = make(before)
    for i in range(spent):
        step(clock, hand, 1.0, epochs=(i + 1) / 100)
    x0 = clock.progress
    assert x0 == pytest.approx(spent / 100)
    clock.change(after)
    assert clock.progress == x0
    for n in range(spent + 1, limit + 1):
        permit = step(clock, hand, 1.0, epochs=n / 100)
        since, left = n - spent, limit - n
        assert permit.progress == pytest.approx(x0 + (1 - x0) * since / (since + left), abs=1e-12)
    assert clock.progress == 1.0
    assert not clock.plan_step(100, (limit + 1) / 100).go


@pytest.mark.parametrize("after", [70.0, 300.0])
def test_a_change_of_time_slopes_from_where_progress_stands(after):
    clock, hand = make(Limits(seconds=100.0))
    for _ in range(40):
        step(clock, hand, 1.0)
    x0 = clock.progress
    line = clock.change(Limits(seconds=after))
    assert line == f"budget: time 100 s -> {after:g} s; progress goes on from {x0:.0%}"
    for n in range(1, round(after) - 43):
        left = after * (1 - 0.002) - 40 - n - 1  # of the last step nobody knows whether it fits
        assert step(clock, hand, 1.0).progress == pytest.approx(x0 + (1 - x0) * n / (n + left), rel=2e-3)
    run(clock, hand)
    assert clock.progress == 1.0
    assert after - 1.5 <= clock.seconds <= after


def test_two_changes_are_one_after_the_other():
    clock, hand = make(Limits(steps=100))
    for limit, progress in ((100, 0.5), (150, 0.75), (110, None)):
        clock.change(Limits(steps=limit))
        while progress is not None and clock.progress < progress - 1e-9:
            step(clock, hand, 1.0)
    assert clock.steps == 100  # 50, and then 50 of the hundred that led from 50 % to 100 %
    assert [step(clock, hand, 1.0).progress for _ in range(10)] == pytest.approx(
        [0.75 + 0.25 * (n + 1) / 10 for n in range(10)]
    )


def test_equal_limits_change_nothing():
    clock, hand = make(Limits(steps=30, seconds=100.0))
    other, clockwork = make(Limits(steps=30, seconds=100.0))
    seen = []
    for n in range(30):
        if n == 11:
            assert clock.change(Limits(steps=30, seconds=100.0)) == "budget: unchanged"
        seen.append(step(clock, hand, 1.0) == step(other, clockwork, 1.0))
    assert all(seen)


def test_a_change_below_what_is_used_stops_at_the_next_permit():
    clock, hand = make(Limits(seconds=100.0))
    for _ in range(40):
        step(clock, hand, 1.0)
    with pytest.raises(BudgetError) as caught:
        clock.change(Limits(seconds=30.0))
    assert str(caught.value).splitlines() == [
        "budget.time  given 30 s, but this run has already used 40 s",
        "             It lands now",
    ]
    permit = clock.plan_step(100)
    assert (permit.go, permit.stop_reason) == (False, "time")
    assert clock.used()["time"]["given"] == 30.0


def test_a_change_that_cannot_be_measured_changes_nothing():
    clock, hand = make(Limits(steps=10))
    step(clock, hand, 1.0)
    for limits in (Limits(joules=5.0), Limits(cost=1.0), Limits()):
        with pytest.raises(UserError):
            clock.change(limits)
    assert clock.limits == Limits(steps=10)
    run(clock, hand)
    assert clock.steps == 10


def test_a_resumed_change_goes_on():
    first, hand = make(Limits(steps=100))
    for _ in range(40):
        step(first, hand, 1.0)
    first.change(Limits(steps=200))
    for _ in range(40):
        step(first, hand, 1.0)
    second, other = resumed(first, Limits(steps=200))
    assert [step(second, other, 1.0) for _ in range(120)] == [step(first, hand, 1.0) for _ in range(120)]
    assert second.progress == 1.0


def test_a_price_that_only_tells_the_cost_leaves_a_steps_budget_to_the_bit():
    first, hand = make(Limits(steps=30))
    for _ in range(7):
        step(first, hand, 1.0)
    second, other = resumed(first, Limits(steps=30, price_per_hour=3.6))
    assert [step(second, other, 1.0) for _ in range(23)] == [step(first, hand, 1.0) for _ in range(23)]
    assert second.cost == pytest.approx(0.030)


def test_states_from_before_there_were_changes_still_load():
    first, hand = make(Limits(steps=20), warmup=Warmup(share=0.2))
    for _ in range(9):
        step(first, hand, 1.0)
    state = first.state_dict()
    old = {key: state[key] for key in ("seconds", "joules", "steps", "tokens", "epochs", "progress")}
    old |= {"warmup_level": state["stage"]["level"], "warmup_ended_at": state["stage"]["warm_at"]}
    old["step_time"] = {
        "rate": state["step_time"]["rate"],
        "overhead": state["step_time"]["overhead"],
        "learned_seconds": 8.0,
        "learned_tokens": 800,
    }
    old["durations"] = {"measured": {"save": [2.0, 3.0]}, "totals": {"save": 5.0}}
    second, other = make(Limits(steps=20), warmup=Warmup(share=0.2))
    assert second.load_state_dict(json.loads(json.dumps(old))) is None
    assert second.durations.expected("save") == pytest.approx(3.0 * 1.03)
    assert [step(second, other, 1.0) for _ in range(11)] == [step(first, hand, 1.0) for _ in range(11)]


# Money


def test_a_price_is_billed_as_long_as_it_held():
    clock, hand = make(Limits(cost=2.0, price_per_hour=36.0))  # a cent a second
    hand.at = 50.0
    assert clock.cost == pytest.approx(0.5)
    clock.change(Limits(cost=2.0, price_per_hour=72.0))
    assert clock.cost == pytest.approx(0.5)
    assert clock.remaining_seconds() == pytest.approx(75.0)
    hand.at = 60.0
    assert clock.cost == pytest.approx(0.7)
    clock.change(Limits(cost=2.0, price_per_hour=3.6))
    hand.at = 160.0
    assert clock.cost == pytest.approx(0.8)
    assert clock.remaining_seconds() == pytest.approx(1200.0)


def test_the_bill_of_an_earlier_process_stays():
    first, hand = make(Limits(cost=2.0, price_per_hour=36.0))
    for _ in range(50):
        step(first, hand, 1.0)
    second, other = make(Limits(cost=2.0, price_per_hour=72.0))
    other.at = 10.0
    line = second.load_state_dict(json.loads(json.dumps(first.state_dict())), lost_seconds=5.0)
    assert line == "budget: price 36 an hour -> 72 an hour"
    assert second.cost == pytest.approx(0.55 + 0.2)  # what was lost was billed at its own price
    run(second, other)
    assert 1.95 <= second.cost <= 2.0


def test_a_price_given_late_counts_for_what_came_before_it():
    first, _ = make(Limits(seconds=100.0))
    first_state = first.state_dict() | {"seconds": 30.0}
    second, hand = make(Limits(seconds=100.0, price_per_hour=36.0))
    second.load_state_dict(first_state)
    hand.at = 10.0
    assert second.cost == pytest.approx(0.4)


# Energy


def test_energy_is_not_known_when_an_earlier_process_could_not_measure_it():
    first, hand = make(Limits(steps=10))
    step(first, hand, 1.0)
    second, _ = make(Limits(steps=10), joules=lambda: 5.0)
    second.load_state_dict(first.state_dict())
    assert second.joules is None
    third, _ = make(Limits(steps=10, joules=100.0), joules=lambda: 5.0)
    with pytest.raises(UserError, match=r"^budget\.energy  an earlier process of this run could not measure"):
        third.load_state_dict(first.state_dict())


def test_the_energy_source_names_both_processes_when_they_differ():
    first, hand = make(Limits(steps=10), joules=lambda: 5.0, energy_source="GPU 0 (NVML)")
    step(first, hand, 1.0)
    assert first.energy_source == "GPU 0 (NVML)"
    same, _ = resumed(first, Limits(steps=10), joules=lambda: 2.0, energy_source="GPU 0 (NVML)")
    assert (same.energy_source, same.joules) == ("GPU 0 (NVML)", 7.0)
    other, _ = resumed(first, Limits(steps=10), joules=lambda: 2.0, energy_source="CPU package 0 (RAPL)")
    assert other.energy_source == "CPU package 0 (RAPL); before: GPU 0 (NVML)"
    assert make(Limits(steps=10))[0].energy_source is None


# Stages


def test_a_stage_runs_warm_up_and_profile_once_over_its_part():
    clock, hand = make(Limits(steps=100), warmup=Warmup(steps=5))
    assert clock.stage_end == 1.0
    clock.begin_stage(0.3)
    first = [step(clock, hand, 1.0) for _ in range(30)]
    assert (clock.progress, clock.stage_end) == (0.3, 0.3)
    clock.begin_stage(1.0)
    assert clock.progress == 0.3
    second = [step(clock, hand, 1.0) for _ in range(70)]
    for permits, start, end in ((first, 0.0, 0.3), (second, 0.3, 1.0)):
        assert [p.warmup for p in permits[:6]] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
        assert permits[-1].annealed == 1.0
        warm = (permits[4].progress - start) / (end - start)
        for permit in permits[5:]:
            place = (permit.progress - start) / (end - start)
            assert permit.annealed == pytest.approx((place - warm) / (1 - warm), abs=1e-9)
    assert [p.progress for p in first + second] == [(n + 1) / 100 for n in range(100)]


def test_the_end_of_a_stage_is_reached_whatever_the_last_bit_of_a_float():
    clock, hand = make(Limits(steps=10))
    clock.begin_stage(0.1 + 0.2)  # a bit more than 0.3
    assert [step(clock, hand, 1.0).annealed for _ in range(3)] == pytest.approx([1 / 3, 2 / 3, 1.0], abs=1e-9)
    assert clock.progress < clock.stage_end


def test_a_stage_of_a_timed_budget_ends_annealed_at_its_share_of_the_training():
    clock, hand = make(Limits(seconds=200.0), reserve_guess={"save": 5.0})
    clock.begin_stage(0.25)
    count = 0
    while clock.progress < clock.stage_end:
        last = step(clock, hand, 1.0)
        count += 1
    assert last.annealed == 1.0
    assert count == pytest.approx(0.25 * 194, abs=2)
    clock.begin_stage(1.0)
    run(clock, hand)
    assert clock.progress == 1.0


def test_a_stage_is_part_of_the_state():
    first, hand = make(Limits(steps=40), warmup=Warmup(share=0.2))
    for _ in range(10):
        step(first, hand, 1.0)
    first.begin_stage(0.75)
    for _ in range(7):
        step(first, hand, 1.0)
    second, other = resumed(first, Limits(steps=40), warmup=Warmup(share=0.2))
    assert second.stage_end == 0.75
    assert [step(second, other, 1.0) for _ in range(23)] == [step(first, hand, 1.0) for _ in range(23)]


# Legs


def finished(limits=None, **options):
    clock, hand = make(limits or Limits(seconds=100.0), reserve_guess={"save": 5.0}, **options)
    run(clock, hand)
    spend(clock, hand, "save", 5.0)
    return clock, hand


def test_a_finished_run_goes_on_with_a_budget_of_its_own():
    clock, hand = finished(warmup=Warmup(steps=3))
    before, steps = clock.seconds, clock.steps
    assert (clock.leg, clock.progress, clock.stop_reason) == (0, 1.0, "time")
    clock.extend(Limits(seconds=60.0))
    assert (clock.leg, clock.progress, clock.stop_reason, clock.stage_end) == (1, 0.0, None, 1.0)
    assert clock.used()["time"] == {"given": before + 60.0, "used": before}
    assert clock.remaining_seconds() == pytest.approx(60.0)
    first = step(clock, hand, 1.0)
    assert first.warmup == pytest.approx(1 / 3)
    assert first.progress == pytest.approx(1 / 54, rel=0.03)
    run(clock, hand)
    spend(clock, hand, "save", 5.0)
    assert (clock.progress, clock.stop_reason) == (1.0, "time")
    assert before + 57.0 <= clock.seconds <= before + 60.0
    assert clock.steps > steps + 50
    assert clock.reserve == 0.0


def test_a_leg_may_have_limits_of_another_kind():
    clock, hand = finished()
    steps = clock.steps
    clock.extend(Limits(steps=10, price_per_hour=3.6))
    assert [step(clock, hand, 1.0).progress for _ in range(10)] == pytest.approx(
        [n / 10 for n in range(1, 11)]
    )
    assert not clock.plan_step(100).go
    assert clock.used()["steps"] == {"given": steps + 10, "used": steps + 10}
    assert clock.cost == pytest.approx(clock.seconds * 0.001)


def test_a_change_and_a_resume_within_a_leg_count_from_its_beginning():
    first, hand = finished(Limits(steps=50))
    first.extend(Limits(steps=20))
    for _ in range(5):
        step(first, hand, 1.0)
    second, other = resumed(first, Limits(steps=20))
    assert (second.leg, second.used()["steps"]["given"]) == (1, 70)
    assert second.change(Limits(steps=10)).startswith("budget: steps 20 -> 10")
    assert run(second, other) == 5
    assert (second.steps, second.progress) == (60, 1.0)
    assert [step(first, hand, 1.0).progress for _ in range(15)][-1] == 1.0


def test_events_by_shares_come_again_in_each_leg():
    clock, hand = make(Limits(steps=20))
    cadence = clock.cadence(Every(share=0.25))
    while step(clock, hand, 1.0).go:
        clock.should_run(cadence)
    saved = cadence.state_dict()
    clock.extend(Limits(steps=8))
    loaded = clock.cadence(Every(share=0.25))
    loaded.load_state_dict(saved)
    at = {"kept": [], "loaded": []}
    while step(clock, hand, 1.0).go:
        for name, event in (("kept", cadence), ("loaded", loaded)):
            if clock.should_run(event):
                at[name].append(clock.steps - 20)
    assert at == {"kept": [2, 4, 6], "loaded": [2, 4, 6]}


def test_a_leg_that_holds_no_step_is_refused_by_its_own_budget():
    clock, _ = finished()
    clock.extend(Limits(seconds=5.5))
    with pytest.raises(BudgetError) as caught:
        clock.plan_step(100)
    assert str(caught.value).splitlines()[0] == (
        "budget.time  given 5.5 s: no step can be made and landed in it"
    )


def test_energy_and_money_of_a_leg_come_on_top():
    hand = Hand()
    clock = Clock(
        Limits(joules=1000.0, cost=1.0, price_per_hour=36.0),
        started=0.0,
        now=hand,
        joules=lambda: 20 * hand.at,
    )
    run(clock, hand)
    assert clock.stop_reason == "energy"
    clock.extend(Limits(joules=400.0, cost=10.0, price_per_hour=72.0))
    joules, cost = clock.joules, clock.cost
    assert clock.used()["energy"]["given"] == pytest.approx(joules + 400)
    assert clock.used()["cost"]["given"] == pytest.approx(cost + 10)
    assert run(clock, hand) in (18, 19)
    assert clock.cost == pytest.approx(cost + 0.02 * (clock.seconds - joules / 20))
