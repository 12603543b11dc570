"""The Clock: limits, time, progress, refusals, several processes; with a clock that the test turns."""

import pickle
import time

import pytest
from clock_hand import Hand, make, run, spend, step
from shoestring.recipes import BudgetError, Every, UserError
from shoestring.recipes.running import BudgetConfig
from shoestring.schedules import Clock, Limits, Warmup, deadline_now

# Limits


@pytest.mark.parametrize(
    ("limits", "steps", "reason"),
    [
        (Limits(steps=7), 7, "steps"),
        (Limits(tokens=750), 7, "tokens"),
        (Limits(epochs=0.7), 7, "epochs"),
        (Limits(seconds=7.05), 7, "time"),
        (Limits(cost=7.05 / 3600 * 2.5, price_per_hour=2.5), 7, "cost"),
        (Limits(steps=7, tokens=10_000, epochs=3.0, seconds=100.0), 7, "steps"),
        (Limits(steps=100, tokens=750, epochs=3.0, seconds=100.0), 7, "tokens"),
        (Limits(steps=100, tokens=10_000, epochs=0.7, seconds=100.0), 7, "epochs"),
        (Limits(steps=100, tokens=10_000, epochs=3.0, seconds=7.05), 7, "time"),
        (Limits(seconds=100.0, cost=0.005, price_per_hour=2.5), 7, "cost"),
    ],
)
def test_the_first_limit_to_run_out_ends_the_run_at_progress_one(limits, steps, reason):
    clock, hand = make(limits)
    assert run(clock, hand, epochs_per_step=0.1) == steps
    assert clock.stop_reason == reason
    assert clock.progress == 1.0


def test_energy_is_a_limit_where_it_is_measured():
    hand = Hand()
    clock = Clock(Limits(joules=2000.0), started=0.0, now=hand, joules=lambda: 100.0 * hand.at)
    assert run(clock, hand) == 19
    assert clock.stop_reason == "energy"
    assert clock.joules == pytest.approx(1900.0)


def test_the_energy_of_the_reserve_is_kept():
    hand = Hand()
    clock = Clock(
        Limits(joules=2000.0),
        started=0.0,
        now=hand,
        joules=lambda: 100.0 * hand.at,
        reserve_guess={"save": 5},
    )
    run(clock, hand)
    hand.at += 5
    assert 1800.0 <= clock.joules <= 2000.0


def test_a_token_budget_is_never_exceeded_and_its_last_step_lands():
    clock, _ = make(Limits(tokens=1000))
    sizes = [300, 300, 250, 200]
    permits = []
    for size, following in zip(sizes, [*sizes[1:], 300], strict=True):
        permits.append(clock.plan_step(size, next_tokens=following))
        if permits[-1].go:
            clock.finish_step(1.0, size)
    assert [p.progress for p in permits] == [0.3, 0.6, 1.0, 1.0]
    assert [p.go for p in permits] == [True, True, True, False]
    assert clock.tokens == 850


def test_used_states_each_limit_given_and_used():
    clock, hand = make(Limits(seconds=100.0, price_per_hour=3.6, steps=50))
    step(clock, hand, 2.0, epochs=0.25)
    assert clock.used() == {
        "time": {"given": 100.0, "used": 2.0},
        "cost": {"given": None, "used": pytest.approx(0.002)},
        "energy": {"given": None, "used": None},
        "tokens": {"given": None, "used": 100},
        "steps": {"given": 50, "used": 1},
        "epochs": {"given": None, "used": 0.25},
    }


def test_limits_come_from_the_recipe_as_plain_numbers():
    budget = BudgetConfig.model_validate(
        {
            "time": "1h30m",
            "cost": "20 USD",
            "price": "2.5 USD/h",
            "energy": "1 Wh",
            "tokens": "2M",
            "epochs": 1.5,
        }
    )
    limits = Limits.from_recipe(budget)
    assert limits == Limits(
        seconds=5400.0, cost=20.0, price_per_hour=2.5, joules=3600.0, tokens=2_000_000, steps=None, epochs=1.5
    )
    assert type(limits.seconds) is float
    assert type(limits.tokens) is int
    assert limits.cost_seconds == pytest.approx(8 * 3600)


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        (
            Limits(price_per_hour=1.0),
            "budget  nothing limits this run; give one of time, cost, energy, tokens, steps, epochs"
            "   e.g. budget.time=2h",
        ),
        (
            Limits(cost=3.0),
            "budget.cost  cannot be measured without what the machine costs an hour"
            '   Give it: budget.price="2.49 USD/h"',
        ),
        (
            Limits(joules=3.0),
            "budget.energy  cannot be measured on this machine: no NVIDIA energy counter and no readable "
            "/sys/class/powercap counter   Use budget.time instead, or see: shoestring doctor",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(limits, text):
    with pytest.raises(UserError) as caught:
        make(limits)
    assert str(caught.value) == text


# Refusals


def test_a_budget_that_holds_no_step_is_refused_with_its_parts():
    clock, hand = make(
        Limits(seconds=180.0),
        reserve_guess={"eval": 8.0, "save": 2.0},
        seconds_per_token_guess=0.04,
    )
    spend(clock, hand, "load", 140.0)
    spend(clock, hand, "data", 28.0)
    with pytest.raises(BudgetError) as caught:
        clock.plan_step(100)
    assert str(caught.value).splitlines() == [
        "budget.time  given 180 s: no step can be made and landed in it",
        "             168 s are gone before the first step (load 140 s, data 28 s); a step takes about 4.0 s",
        "             10 s are kept for what follows the last one (eval 8 s, save 2 s)",
        "             Give about budget.time=260s or more",
    ]


@pytest.mark.parametrize("seconds", [0.5, 20.0])
def test_a_budget_that_is_over_before_the_first_step_is_refused(seconds):
    clock, hand = make(Limits(seconds=seconds))
    hand.at = 20.0
    with pytest.raises(BudgetError, match=r"20 s are gone before the first step \(start of the process\)"):
        clock.plan_step(100)


def test_a_budget_of_money_is_proposed_as_money():
    clock, hand = make(Limits(cost=0.1, price_per_hour=3.6))
    spend(clock, hand, "load", 200.0)
    with pytest.raises(BudgetError) as caught:
        clock.plan_step(100)
    assert "budget.cost  given 0.1 at 3.6 an hour" in str(caught.value)
    assert "Give about 0.3 or more" in str(caught.value)


def test_a_token_budget_below_one_step_is_refused():
    clock, _ = make(Limits(tokens=50))
    with pytest.raises(BudgetError) as caught:
        clock.plan_step(100)
    assert str(caught.value).splitlines() == [
        "budget.tokens  given 50, but the first step alone has 100 tokens",
        "               Give more, e.g. budget.tokens=2000, or a smaller train.batch_tokens",
    ]


# Time


def test_time_runs_from_the_start_of_the_process_and_never_backwards():
    hand = Hand(1000.0)
    clock = Clock(Limits(seconds=100.0), started=970.0, now=hand)
    assert clock.seconds == 30.0
    hand.at = 990.0
    assert clock.seconds == 30.0
    assert clock.remaining_seconds() == 70.0
    hand.at = 2000.0
    assert clock.remaining_seconds() == 0.0


def test_a_suspended_process_has_used_its_time():
    clock, hand = make(Limits(seconds=100.0))
    for _ in range(5):
        step(clock, hand, 1.0)
    permit = clock.plan_step(100)
    hand.at += 94.5
    clock.finish_step(1.0, 100)
    assert permit.go
    assert not clock.plan_step(100).go
    assert clock.stop_reason == "time"


def test_the_deadline_axis_is_that_of_the_monotonic_clock():
    before, now, after = time.monotonic(), deadline_now(), time.monotonic()
    assert before - 0.05 <= now <= after + 0.05
    readings = [deadline_now() for _ in range(1000)]
    assert readings == sorted(readings)


def test_spent_is_counted_by_kind_without_what_is_inside():
    clock, hand = make(Limits(seconds=100.0))
    with clock.spent("eval"):
        hand.at += 3.0
        spend(clock, hand, "samples", 2.0)
        hand.at += 1.0
    assert clock.durations.totals == {"eval": 4.0, "samples": 2.0}


def test_what_ends_in_an_error_is_counted_but_not_learned():
    clock, hand = make(Limits(seconds=100.0), reserve_guess={"save": 10.0})
    reserve = clock.reserve

    def broken_save():
        with clock.spent("save"):
            hand.at += 1.0
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        broken_save()
    assert clock.durations.totals == {"save": 1.0}
    assert clock.reserve == reserve


def test_the_reserve_follows_what_was_measured():
    clock, hand = make(Limits(seconds=1000.0), reserve_guess={"eval": 10.0, "save": 2.0, "export": 5.0})
    assert clock.reserve == pytest.approx(1.05 * 17.0)
    spend(clock, hand, "eval", 30.0)
    assert clock.reserve == pytest.approx(1.03 * 30.0 + 1.05 * 7.0)
    spend(clock, hand, "eval", 20.0)
    assert clock.reserve == pytest.approx(1.03 * 1.1 * 20.0 + 1.05 * 7.0)
    spend(clock, hand, "load", 50.0)
    assert clock.reserve == pytest.approx(1.03 * 1.1 * 20.0 + 1.05 * 7.0)


def test_finish_in_counts_down_through_the_landing():
    clock, hand = make(Limits(seconds=100.0), reserve_guess={"eval": 10.0, "save": 5.0})
    step(clock, hand, 1.0)
    assert clock.finish_in() == pytest.approx(99.0)
    run(clock, hand)
    assert clock.finish_in() == pytest.approx(15.0, rel=0.06)
    spend(clock, hand, "eval", 10.0)
    assert clock.finish_in() == pytest.approx(5.0, rel=0.06)
    spend(clock, hand, "save", 5.0)
    assert clock.finish_in() == 0.0


@pytest.mark.parametrize("limits", [Limits(steps=50), Limits(tokens=5000), Limits(epochs=0.5)])
def test_finish_in_knows_counted_limits_by_the_measured_speed(limits):
    clock, hand = make(limits, reserve_guess={"save": 4.0})
    assert clock.finish_in() is None
    clock.cadence(Every(steps=10), "eval")
    for i in range(10):
        step(clock, hand, 2.0, epochs=(i + 1) / 100)
    spend(clock, hand, "eval", 6.0)
    assert clock.remaining_seconds() is None
    assert clock.finish_in() == pytest.approx(40 * 2 + 4 * 6 + 4, rel=0.08)


# Progress


def test_start_up_and_a_slow_first_step_do_not_move_the_schedule():
    clock, hand = make(Limits(seconds=1000.0), seconds_per_token_guess=0.02)
    spend(clock, hand, "load", 400.0)
    assert clock.plan_step(100).progress == pytest.approx(2 / 600, rel=0.01)
    step(clock, hand, 90.0)
    # What it cost beyond the expected 2 s is missing in the seconds that are left, not in progress.
    assert clock.progress == pytest.approx(2 / 600, rel=0.01)
    left = 1.0 - 2 / 600
    assert clock.plan_step(100).progress == pytest.approx(2 / 600 + left * 2 / 510, rel=0.01)


def test_time_gives_the_progress_of_the_formula():
    """x = x' + (1 - x') e / (e + left), from the true seconds and none of the Clock's estimates."""
    clock, hand = make(Limits(seconds=100.0), seconds_per_token_guess=0.01)
    expected = 0.0
    for _ in range(60):
        spare = 100.0 * (1 - 0.002) - hand.at  # no reserve; the last step is not counted
        left = spare - 1.0 - 1.0
        expected += (1 - expected) * 1.0 / (1.0 + left)
        assert step(clock, hand, 1.0).progress == pytest.approx(expected, abs=1e-12)


def test_steps_of_different_sizes_are_predicted_by_their_tokens():
    clock, hand = make(Limits(seconds=100.0))
    for tokens in (100, 100, 300, 200, 100):
        step(clock, hand, tokens / 100, tokens)
    assert clock.step_time.predict(1000) == pytest.approx(10.0)
    hand.at = 95.0
    assert not clock.plan_step(600).go
    clock.stop_reason = None
    assert clock.plan_step(400).go


def test_time_between_steps_is_learned_too():
    clock, hand = make(Limits(seconds=1000.0))
    for _ in range(20):
        step(clock, hand, 1.0)
        hand.at += 0.5
        spend(clock, hand, "eval", 3.0)
    assert clock.step_time.predict(100) == pytest.approx(1.5)


def test_one_stall_is_not_taken_for_the_new_speed_but_a_slowdown_is():
    clock, hand = make(Limits(seconds=10_000.0))
    for _ in range(10):
        step(clock, hand, 1.0)
    step(clock, hand, 60.0)
    assert clock.step_time.predict(100) < 1.3
    for _ in range(30):
        step(clock, hand, 4.0)
    assert clock.step_time.predict(100) == pytest.approx(4.0, rel=0.1)


@pytest.mark.parametrize("pace", [0.02, 50.0])
def test_a_wholly_different_speed_is_believed_after_two_steps(pace):
    clock, hand = make(Limits(seconds=10_000.0))
    for _ in range(30):
        step(clock, hand, 1.0)
    step(clock, hand, pace)
    assert clock.step_time.predict(100) < 1.2
    step(clock, hand, pace)
    assert clock.step_time.predict(100) == pytest.approx(pace)


def test_progress_never_falls_when_the_estimate_does():
    clock, hand = make(Limits(seconds=300.0))
    seen = []
    for seconds in [1.0] * 20 + [5.0] * 10 + [0.5] * 30:
        seen.append(step(clock, hand, seconds).progress)
    assert seen == sorted(seen)
    assert seen[-1] < 1.0


def test_events_ahead_are_part_of_the_arithmetic():
    plain, hand = make(Limits(seconds=1000.0), reserve_guess={"eval": 50.0})
    busy, other = make(Limits(seconds=1000.0), reserve_guess={"eval": 50.0})
    busy.cadence(Every(share=0.1), "eval")
    for clock, at in ((plain, hand), (busy, other)):
        for _ in range(10):
            step(clock, at, 1.0)
    # Nine evaluations of 50 s leave about half of the 950 s to train in.
    assert busy.progress / plain.progress == pytest.approx(2.0, rel=0.1)


def test_a_steps_budget_does_not_depend_on_time():
    def trace(pace):
        clock, hand = make(Limits(steps=20), warmup=Warmup(share=0.1))
        seen = []
        for i in range(20):
            permit = clock.plan_step(100 + i)
            seen.append((permit.progress, permit.warmup, permit.annealed))
            hand.at += pace(i)
            clock.finish_step(pace(i), 100 + i)
        return seen

    assert trace(lambda i: 1.0) == trace(lambda i: 0.1 + (i * 7919) % 13)


# Several processes


def test_the_others_follow_a_permit():
    first, hand = make(Limits(seconds=30.0), warmup=Warmup(share=0.1))
    second, _ = make(Limits(seconds=30.0), warmup=Warmup(share=0.1))
    while True:
        permit = pickle.loads(pickle.dumps(first.plan_step(100, 0.5)))
        assert second.apply(permit, 0.5) is permit
        if not permit.go:
            break
        hand.at += 1.0
        first.finish_step(1.0, 100)
        second.finish_step(0.7, 100)
    for name in ("steps", "tokens", "epochs", "progress", "stop_reason"):
        assert getattr(first, name) == getattr(second, name)


def test_a_step_without_a_permit_is_our_mistake():
    clock, _ = make(Limits(steps=3))
    with pytest.raises(RuntimeError, match="call plan_step, or apply, first"):
        clock.finish_step(1.0, 100)


def test_a_stop_for_another_reason_keeps_the_point_in_the_schedule():
    clock, hand = make(Limits(steps=10))
    step(clock, hand, 1.0)
    permit = clock.plan_step(100)
    stopped = permit.stopped("SIGTERM")
    assert (stopped.go, stopped.stop_reason, stopped.progress) == (False, "SIGTERM", permit.progress)
    clock.stop("SIGTERM")
    clock.stop("early_stopping")
    assert clock.stop_reason == "SIGTERM"
