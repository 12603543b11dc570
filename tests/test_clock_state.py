"""The Clock's events and its state: what recurs, and what a resumed run goes on with."""

import itertools
import json

import pytest
from clock_hand import Hand, make, run, spend, step
from shoestring.recipes import BudgetError, Every
from shoestring.schedules import Clock, Limits, Warmup

# Events


def fires(clock, hand, cadence, steps, seconds=1.0):
    at = []
    for _ in range(steps):
        if not step(clock, hand, seconds).go:
            break
        if clock.should_run(cadence):
            at.append(clock.steps)
        assert not clock.should_run(cadence)
    return at


def test_events_by_steps_share_and_seconds():
    clock, hand = make(Limits(steps=40))
    assert fires(clock, hand, clock.cadence(Every(steps=10)), 99) == [10, 20, 30]
    clock, hand = make(Limits(steps=40))
    assert fires(clock, hand, clock.cadence(Every(share=0.25)), 99) == [10, 20, 30]
    clock, hand = make(Limits(steps=40))
    assert fires(clock, hand, clock.cadence(Every(seconds=10.0)), 99) == [11, 21, 31]
    clock, hand = make(Limits(steps=40))
    assert fires(clock, hand, clock.cadence(Every(share=1.0)), 99) == []


def test_an_event_that_would_fall_into_the_landing_is_left_out():
    clock, hand = make(Limits(seconds=120.0), reserve_guess={"eval": 10.0})
    cadence = clock.cadence(Every(steps=10), "eval")
    at = []
    while step(clock, hand, 1.0).go:
        if clock.should_run(cadence):
            at.append(clock.steps)
            spend(clock, hand, "eval", 10.0)
    assert at == [10, 20, 30, 40, 50]
    assert clock.steps >= 55
    assert clock.progress == 1.0
    assert clock.seconds + 10.0 <= 120.0


@pytest.mark.parametrize(("seconds", "runs"), [(12.2, False), (12.7, True)])
def test_after_an_event_a_step_must_fit_with_some_to_spare(seconds, runs):
    clock, hand = make(Limits(seconds=20.0 + seconds), reserve_guess={"eval": 1.0})
    cadence = clock.cadence(Every(steps=10), "eval")
    spend(clock, hand, "eval", 5.0)
    while clock.steps < 10:
        step(clock, hand, 1.5)
    # 1.4 steps of 1.5 s, the event and the landing of 5.15 s each make 12.4 s; 0.2 % is kept for noise.
    assert clock.should_run(cadence) is runs


def test_several_passed_multiples_are_one_event():
    clock, hand = make(Limits(tokens=10_000))
    cadence = clock.cadence(Every(share=0.1))
    step(clock, hand, 1.0, tokens=500)
    assert not clock.should_run(cadence)
    step(clock, hand, 1.0, tokens=4000)
    assert clock.should_run(cadence)
    assert not clock.should_run(cadence)


@pytest.mark.parametrize("every", [Every(steps=7), Every(share=0.17), Every(seconds=7.0)])
def test_a_resumed_run_has_the_same_events(every):
    whole, hand = make(Limits(steps=50))
    expected = fires(whole, hand, whole.cadence(every), 99)
    first, hand = make(Limits(steps=50))
    cadence = first.cadence(every)
    before = fires(first, hand, cadence, 21)
    state = json.loads(json.dumps([first.state_dict(), cadence.state_dict()]))
    second, hand = make(Limits(steps=50))
    again = second.cadence(every)
    second.load_state_dict(state[0])
    again.load_state_dict(state[1])
    assert before + fires(second, hand, again, 99) == expected


def test_a_resumed_run_may_have_another_cadence():
    first, hand = make(Limits(steps=50))
    cadence = first.cadence(Every(steps=4))
    fires(first, hand, cadence, 21)
    second, hand = make(Limits(steps=50))
    again = second.cadence(Every(steps=10))
    second.load_state_dict(first.state_dict())
    again.load_state_dict(cadence.state_dict())
    assert fires(second, hand, again, 99) == [30, 40]


# State


def test_a_resumed_steps_budget_is_bit_identical():
    def trace(clock, hand, count):
        return [step(clock, hand, 1.0) for _ in range(count)]

    warmup = Warmup(share=0.2)
    whole, hand = make(Limits(steps=20), warmup=warmup)
    expected = trace(whole, hand, 20)
    for cut in range(20):
        first, hand = make(Limits(steps=20), warmup=warmup)
        seen = trace(first, hand, cut)
        state = json.loads(json.dumps(first.state_dict()))
        second, hand = make(Limits(steps=20), warmup=warmup)
        second.load_state_dict(state)
        assert seen + trace(second, hand, 20 - cut) == expected


def test_time_money_and_energy_go_on_where_the_last_process_stopped():
    def process():
        hand = Hand()
        limits = Limits(seconds=100.0, cost=1.0, price_per_hour=36.0, joules=1e6)
        return Clock(limits, started=0.0, now=hand, joules=lambda: 50.0 * hand.at), hand

    first, hand = process()
    for _ in range(10):
        step(first, hand, 2.0)
    state = first.state_dict()
    second, hand = process()
    hand.at = 5.0
    second.load_state_dict(state, lost_seconds=1.5)
    assert second.seconds == pytest.approx(26.5)
    assert second.cost == pytest.approx(0.265)
    assert second.joules == pytest.approx(1250.0)
    assert second.step_time.predict(100) == pytest.approx(2.0)
    run(second, hand, 2.0)
    assert 97.0 <= second.seconds <= 100.0


@pytest.mark.parametrize("factor", [0.8, 2.0])
def test_another_budget_at_a_resume_is_a_change(factor):
    first, hand = make(Limits(seconds=100.0))
    for _ in range(50):
        step(first, hand, 1.0)
    reached = first.progress
    second, hand = make(Limits(seconds=100.0 * factor))
    line = second.load_state_dict(first.state_dict())
    assert line == f"budget: time 100 s -> {100 * factor:g} s"
    seen = [reached]
    while (permit := step(second, hand, 1.0)).go:
        seen.append(permit.progress)
    # A straight line from where it stood to the new end.
    rises = [b - a for a, b in itertools.pairwise(seen[: seen.index(1.0)])]
    slope = (1 - reached) / (100 * factor - 50)
    assert 0.99 * slope <= min(rises) <= max(rises) <= 1.08 * slope
    assert seen.index(1.0) >= 100 * factor - 50 - 2


def test_a_smaller_budget_lands_all_the_same():
    first, hand = make(Limits(seconds=200.0))
    for _ in range(50):
        step(first, hand, 1.0)
    second, hand = make(Limits(seconds=80.0))
    second.load_state_dict(first.state_dict())
    run(second, hand)
    assert second.progress == 1.0
    assert 78.0 <= second.seconds <= 80.0


def test_a_run_killed_in_its_landing_lands_again():
    first, hand = make(Limits(seconds=100.0), reserve_guess={"save": 5.0})
    run(first, hand)
    state = first.state_dict()
    second, hand = make(Limits(seconds=100.0), reserve_guess={"save": 5.0})
    hand.at = 10.0
    second.load_state_dict(state)
    permit = second.plan_step(100)
    assert (permit.go, permit.stop_reason) == (False, "time")


def test_the_state_is_the_same_wherever_the_axis_of_time_begins():
    states = []
    for begin in (0.0, 12345.0):
        hand = Hand(begin)
        clock = Clock(Limits(seconds=100.0), started=begin, now=hand)
        for _ in range(5):
            step(clock, hand, 1.0)
        states.append(clock.state_dict())
    assert states[0] == states[1] == json.loads(json.dumps(states[0]))


@pytest.mark.parametrize(
    ("limits", "lines"),
    [
        (
            Limits(seconds=5.0),
            [
                "budget.time  given 5 s, but this run has already used 10 s",
                "             Give more than that to go on, or start again with --fresh",
            ],
        ),
        (
            Limits(steps=9),
            [
                "budget.steps  given 9, but this run has already used 10",
                "              Give more than that to go on, or start again with --fresh",
            ],
        ),
    ],
)
def test_resuming_with_less_than_was_used_is_refused(limits, lines):
    clock, hand = make(Limits(steps=10))
    run(clock, hand)
    with pytest.raises(BudgetError) as caught:
        make(limits)[0].load_state_dict(clock.state_dict())
    assert str(caught.value).splitlines() == lines
