"""What a run is made of: its parts, its stages, and the state that goes into every checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedTokenizerBase

from ..checkpoint import Checkpoint, ShardedSnapshot, Snapshot
from ..data import Order, Prepared, Step
from ..plan import Plan
from ..recipes import Recipe
from ..schedules import Cadence, Clock, Schedule, StepPermit
from .budget_file import BudgetFile
from .engine import NativeEngine
from .legs import Leg
from .meters import Memory
from .objectives import Objective
from .rundir import RunDir
from .screen import Screen
from .signals import StopRequest
from .tracking import Tracking

if TYPE_CHECKING:
    from .snapshots import Snapshots  # which takes them of a Run

Saved = Checkpoint | Snapshot | ShardedSnapshot
"""What a run goes on from."""
STAGE_OVER = "stage"
PAUSED = "paused"
_WHOLE = 1e-9


@dataclass
class State:
    """What has happened so far; all of it goes into every checkpoint."""

    step: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    epoch: float = 0.0
    train_loss: float | None = None
    learning_rate: float | None = None
    step_seconds: float = 0.0
    eval_loss_before: float | None = None
    eval_loss_before_compared: float | None = None
    """On the rows that every evaluation measures: what the last loss is set beside where it had no time for
    more."""
    eval_loss: float | None = None
    best_eval_loss: float | None = None
    best_score: float | None = None
    best_step: int = -1
    evals_without_gain: int = 0
    last_saved: int = -1
    samples_before: list[str] = field(default_factory=list)
    stage: int = 0
    stage_began: int = 0
    """Step at which the stage began: the order of its rows counts from there."""
    before_decay: int | None = None
    """Step whose checkpoint is kept for `shoestring extend`."""
    pruning: dict[str, Any] | None = None
    """What was cut out of the model on the way, see pruning_rounds.py."""


@dataclass
class Stage:
    """A part of the budget with an objective and rows of its own; most runs have one.

    end: progress through the budget at which it ends.
    """

    name: str
    objective: Objective
    data: Prepared
    plan: Plan
    order: Order
    end: float = 1.0

    def count(self, step: Step) -> int:
        """What the summed loss of a step is divided by, over all processes."""
        return step.trained_tokens if self.objective.per == "token" else step.rows


@dataclass
class Run:
    """All parts of one run, built by `run.py`."""

    recipe: Recipe
    accelerator: Accelerator
    engine: NativeEngine
    tokenizer: PreTrainedTokenizerBase
    schedule: Schedule
    clock: Clock
    stages: list[Stage]
    run_dir: RunDir
    tracking: Tracking
    screen: Screen
    memory: Memory
    stop: StopRequest
    identity: dict[str, Any]
    eval_due: Cadence
    save_due: Cadence
    budget_file: BudgetFile
    snapshots: Snapshots
    legs: list[Leg] = field(default_factory=list)
    followers: list[Callable[[StepPermit], None]] = field(default_factory=list)
    """What else moves with the budget, told before each step."""
    pause_at: float | None = None
    state: State = field(default_factory=State)
    resumed_from: str | None = None

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and decides."""
        return bool(self.accelerator.is_main_process)

    @property
    def stage(self) -> Stage:
        """The one that trains now."""
        return self.stages[self.state.stage]

    @property
    def plan(self) -> Plan:
        """The plan of the present stage."""
        return self.stage.plan

    @property
    def data(self) -> Prepared:
        """The rows of the present stage."""
        return self.stage.data

    @property
    def peak_rate(self) -> float:
        """The rate that the schedule's factor multiplies."""
        return self.plan.learning_rate * (self.legs[-1].peak if self.legs else 1.0)

    def interval(self) -> str | None:
        """Why the loop must return before the next step: the stage is over, or a pause was asked for here.

        The same on every process, since progress is.
        """
        progress = self.clock.progress + _WHOLE
        if self.pause_at is not None and progress >= self.pause_at:
            return PAUSED
        return STAGE_OVER if self.state.stage + 1 < len(self.stages) and progress >= self.stage.end else None


def agree(run: Run, decide: Callable[[], Any]) -> Any:
    """The main process decides, the others follow: clocks of two processes are never equal."""
    if run.accelerator.num_processes == 1:
        return decide()
    holder = [decide() if run.is_main else None]
    broadcast_object_list(holder)
    return holder[0]
