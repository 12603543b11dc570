"""What the Clock says about the step about to run: a few plain numbers that one process can send to the
others.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class StepPermit:
    """The decision for one step, made by one process and followed by all.

    go: run the step. stop_reason: which limit ended the run when `go` is false ("time", "cost", "energy",
    "tokens", "steps", "epochs", or what the caller gave to `stopped`).
    progress: share of the training that this budget buys, in [0, 1], at the end of the step.
    warmup: level of the warm-up in [0, 1]. annealed: progress after warm-up, in [0, 1], for the profile.
    place: progress through the stage, warm-up included, in [0, 1]; of a run with one stage it is `progress`.
    """

    go: bool
    progress: float
    warmup: float
    annealed: float
    stop_reason: str | None = None
    place: float = 0.0

    def stopped(self, reason: str) -> "StepPermit":
        """The same point in the run, but the run ends here for `reason` (a signal, early stopping)."""
        return replace(self, go=False, stop_reason=reason)


@dataclass(frozen=True)
class Running:
    """A permitted step that has not finished: when it began, what had been spent on other work by then, and
    the passes over the rows when it ends.
    """

    permit: StepPermit
    epochs: float
    began: float
    spent: float
