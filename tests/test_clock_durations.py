"""What the Clock expects of the next evaluation or save, from earlier ones and from the pace of the steps."""

import json

import clock_hand
import pytest
from shoestring.schedules import Limits
from shoestring.schedules.durations import Durations

MARGIN = 1.03


def measured(*seconds, pace=None):
    """Durations that measured these evaluations, in this order."""
    durations = Durations({"eval": 4.0})
    durations.set_pace(pace)
    for one in seconds:
        durations.add("eval", one)
    return durations


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ([6.0], 6.0),
        ([6.0, 6.3], 6.3),
        ([6.0, 5.0], 5.5),  # it fell: a tenth of doubt
        ([6.0, 5.9], 6.0),  # hardly: no more than the one before
        ([26.0, 6.0], 6.6),  # the first was a stalled moment
        ([6.0, 26.0], 12.0),  # perhaps this one is: twice the one before, until it is confirmed
        ([6.0, 26.0, 27.0], 27.0),
        ([6.0, 6.0, 26.0], 9.0),  # two agree that it is not the usual
        ([6.0, 6.0, 26.0, 26.0], 26.0),
        ([6.0, 26.0, 6.0], 6.6),
        ([26.0, 6.0, 24.0], 24.0),  # back to what it was
        ([5.0, 6.0, 7.5], 7.5 * 1.2),  # it rises and rises
        ([5.0, 5.1, 5.2], 5.2),
    ],
)
def test_the_next_of_a_series(seconds, expected):
    assert measured(*seconds).expected("eval") == pytest.approx(MARGIN * expected)
    assert measured(*seconds).next("eval") == pytest.approx(MARGIN * expected)


def test_a_guess_holds_until_there_is_a_measurement():
    assert measured().expected("eval") == pytest.approx(4.0 * 1.05)
    assert measured().expected("export") == 0.0


def test_the_landing_is_as_large_as_the_largest_and_the_next_event_as_the_last():
    durations = Durations()
    durations.add("eval", 20.0, size=200)
    durations.add("eval", 5.0, size=50)
    assert durations.expected("eval") == pytest.approx(20.0 * MARGIN)
    assert durations.next("eval") == pytest.approx(5.0 * MARGIN)
    durations.add("eval", 6.0, size=50)  # 20 % slower for each row
    assert durations.expected("eval") == pytest.approx(24.0 * MARGIN)


@pytest.mark.parametrize(
    ("change", "factor"),
    [(1.3, 1.3 / 1.05), (0.5, 0.5 * 1.05), (1.04, 1.0), (0.97, 1.0), (9.0, 4.0), (0.1, 0.25)],
)
def test_what_was_measured_changes_with_the_pace_of_the_steps(change, factor):
    durations = measured(10.0, pace=0.02)
    durations.set_pace(0.02 * change)
    assert durations.expected("eval") == pytest.approx(10.0 * factor * MARGIN)


def test_what_was_measured_before_the_first_step_counts_at_the_first_pace():
    durations = measured(10.0)
    durations.set_pace(0.02)
    assert durations.expected("eval") == pytest.approx(10.0 * MARGIN)
    durations.set_pace(0.03)
    assert durations.expected("eval") == pytest.approx(10.0 * 1.5 / 1.05 * MARGIN)


def test_a_slow_start_is_seen_by_what_is_measured_again():
    durations = measured(18.0)
    durations.add("samples", 9.0)
    durations.set_pace(0.02)
    durations.add("eval", 6.0)  # the same work, later: everything was three times slower at the start
    assert durations.expected("samples") == pytest.approx(3.0 * MARGIN)
    durations.add("save", 1.0)
    assert durations.expected("save") == pytest.approx(1.0 * MARGIN)


def test_a_start_was_at_most_three_times_slower():
    durations = measured(60.0)
    durations.add("samples", 9.0)
    durations.set_pace(0.02)
    durations.add("eval", 6.0)
    assert durations.expected("samples") == pytest.approx(3.0 * MARGIN)


def test_a_start_that_was_quick_proves_nothing():
    durations = measured(6.0)
    durations.add("samples", 3.0)
    durations.set_pace(0.02)
    durations.add("eval", 9.0)
    assert durations.expected("samples") == pytest.approx(3.0 * MARGIN)


def test_the_state_keeps_what_was_measured_and_at_which_pace():
    first = measured(10.0, 12.0, pace=0.02)
    second = Durations({"eval": 4.0})
    second.load_state_dict(json.loads(json.dumps(first.state_dict())), 0.02)
    assert second.expected("eval") == first.expected("eval")
    assert second.totals == {"eval": 22.0}
    second.set_pace(0.04)  # a machine half as fast
    assert second.expected("eval") == pytest.approx(12.0 * 2.0 / 1.05 * MARGIN)


def test_a_slow_machine_keeps_at_most_twice_the_usual_for_what_can_be_made_smaller():
    durations = measured(6.0, 30.0, 30.0)
    assert durations.expected("eval") == pytest.approx(30.0 * MARGIN)
    durations.least["eval"] = 0.1  # of the size 1 that was measured
    assert durations.expected("eval") == pytest.approx(2.0 * 6.0)  # 6 s is the quickest, 4 s was the guess
    durations.least["eval"] = 0.5  # never less than what is done in any case
    assert durations.expected("eval") == pytest.approx(15.0 * MARGIN)
    assert durations.unhurried("eval") == pytest.approx(30.0 * MARGIN)


def test_what_was_never_measured_grows_with_the_steps_and_does_not_shrink():
    durations = Durations({"export": 2.0})
    durations.set_pace(0.02)
    assert durations.expected("export") == pytest.approx(2.0 * 1.05)
    durations.set_pace(0.025)
    assert durations.expected("export") == pytest.approx(2.0 * 1.25 / 1.05 * 1.05)
    durations.set_pace(0.08)
    assert durations.expected("export") == pytest.approx(2.0 * 2.0 * 1.05)
    durations.set_pace(0.01)
    assert durations.expected("export") == pytest.approx(2.0 * 1.05)


@pytest.mark.parametrize(
    ("taken", "rest", "fits"),
    [
        (1.0, 3.0, True),  # as expected: 4 s for it, 2 for half of the answers and the export
        (1.0, 3.3, True),  # 0.45 s over, since what follows is slower alike
        (1.0, 3.4, False),  # 0.6 s over
        (2.0, 2.0, True),
        (2.0, 2.5, False),
    ],
)
def test_the_landing_measures_the_rest_where_it_fits(taken, rest, fits):
    guess = {kind: seconds / 1.05 for kind, seconds in (("eval", 4.0), ("samples", 2.0), ("export", 1.0))}
    clock, hand = clock_hand.make(Limits(seconds=100.0), reserve_guess=guess)
    assert clock.rest_fits("eval", 50.0, 500.0)  # before the landing there is no hurry
    clock.stop("time")
    hand.at = 94.0 + taken
    assert clock.rest_fits("eval", taken, rest) is fits
