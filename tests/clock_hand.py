"""A clock that the test turns, and the few moves of a run with it."""

from shoestring.schedules import Clock


class Hand:
    """A clock that only moves when told to."""

    def __init__(self, at=0.0):
        self.at = at

    def __call__(self):
        return self.at


def make(limits, hand=None, **options):
    hand = hand or Hand()
    return Clock(limits, started=0.0, now=hand, **options), hand


def step(clock, hand, seconds, tokens=100, epochs=0.0):
    permit = clock.plan_step(tokens, epochs)
    if permit.go:
        hand.at += seconds
        clock.finish_step(seconds, tokens)
    return permit


def spend(clock, hand, kind, seconds, size=1.0):
    with clock.spent(kind, size):
        hand.at += seconds


def run(clock, hand, seconds=1.0, tokens=100, epochs_per_step=0.0):
    count = 0
    while step(clock, hand, seconds, tokens, (count + 1) * epochs_per_step).go:
        count += 1
    return count
