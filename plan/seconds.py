"""Where the time of a run goes: pure arithmetic over measured rates."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from ..recipes.quantities import Every
from . import defaults
from .memory import Sizes
from .objectives import Work
from .rates import Rates
from .sizes import checkpoint_bytes

if TYPE_CHECKING:
    from ..offload.rates import DiskRates


@dataclass(frozen=True)
class StepTime:
    """One optimizer step of `tokens` tokens over all processes, in `accumulation` micro-batches each."""

    seconds: float
    accumulation: int
    tokens: int

    @property
    def tokens_per_second(self) -> float:
        """Throughput of all processes together."""
        return self.tokens / self.seconds


def optimizer_seconds(
    sizes: Sizes, rates: Rates, disk: DiskRates | None = None, *, accelerated: bool = False
) -> float:
    """Clip and step: the gradient is read and scaled once more, and an update takes about twice its floor.

    State that is elsewhere comes and goes at the same time, so the slowest of update, link and disk counts.
    disk: where the state is on one. accelerated: an accelerator computes, and host memory is behind a link.
    """
    clip = 2 * sizes.gradients / (2 * rates.copy)
    floor = sizes.update.seconds(bytes_per_second=2 * rates.copy, flops_per_second=rates.matmul_bf16)
    update = defaults.UPDATE_OVER_FLOOR * floor
    moved = sizes.moved
    if moved.updated_on_host:
        on_host = sizes.update.bytes / defaults.HOST_BYTES_PER_SECOND
        crossing = max(sizes.gradients, sizes.trained)
        update = max(on_host, crossing / defaults.LINK_BYTES_PER_SECOND)
    elif accelerated and moved.tier != "device":
        update = max(update, moved.elsewhere / defaults.LINK_BYTES_PER_SECOND)
    if moved.tier == "disk":
        assert disk is not None
        update = max(update, moved.step.seconds(disk.mixed))
    return clip + update + 1e-3


def streaming_seconds(layers: int, disk: DiskRates | None, *, trained: bool) -> tuple[float, float]:
    """Seconds for `layers` bytes of weights in a forward pass, and in a forward and a backward pass.

    disk: None where they come from host memory. trained: what changed in the backward pass goes back.
    """
    if disk is None:
        forward = layers / defaults.LINK_BYTES_PER_SECOND
        return forward, 2 * forward  # the way back is another direction
    forward = layers / disk.read
    return forward, forward + (2 * layers / disk.mixed if trained else forward)


def step_time(
    work: Work,
    *,
    micro_tokens: int,
    batch_tokens: int,
    world_size: int,
    trained_share: float,
    update_seconds: float,
    passes: int = 1,
) -> StepTime:
    """Time of a step; micro-batches of a step are taken as equally full. passes: over each of them."""
    accumulation = max(1, ceil(batch_tokens / (micro_tokens * world_size)))
    tokens = batch_tokens / (accumulation * world_size)
    micro = work.train_seconds(tokens, tokens * trained_share)
    return StepTime(passes * accumulation * micro + update_seconds, accumulation, batch_tokens)


@dataclass(frozen=True)
class Fixed:
    """Seconds of everything that is no training step, once each, before a better figure is measured."""

    load: float
    eval: float  # one evaluation at the start or the end
    eval_between: float
    samples: float  # one round of sample answers
    save: float
    export: float
    report: float
    teacher: float  # its pass over all rows before training

    def reserve_guess(self) -> dict[str, float]:
        """First guesses for the Clock of what must still happen after the last step."""
        return {
            "eval": self.eval,
            "samples": self.samples,
            "save": self.save,
            "export": self.export,
            "report": self.report,
        }


def fixed_seconds(
    *,
    sizes: Sizes,
    rates: Rates,
    layers: int,
    eval_seconds: float,
    eval_between_seconds: float,
    samples: int,
    max_new_tokens: int,
    teacher_seconds: float = 0.0,
    disk: DiskRates | None = None,
) -> Fixed:
    """First guesses; the Clock replaces each by what it measures. disk: that of the optimizer's state."""
    saved = checkpoint_bytes(sizes)
    gathered = 0.0 if disk is None else sizes.moved.step.read / disk.read
    token = layers * defaults.DECODE_SECONDS_PER_LAYER + sizes.weights / (2 * rates.copy)
    written = sizes.merged + sizes.exported or sizes.adapter
    read = sizes.unquantised + sizes.streamed
    return Fixed(
        load=defaults.LOAD_SECONDS + (read + sizes.teacher) / defaults.LOAD_BYTES_PER_SECOND,
        eval=eval_seconds,
        eval_between=eval_between_seconds,
        samples=max_new_tokens * token if samples else 0.0,
        save=defaults.SAVE_SECONDS + gathered + saved / rates.disk_write,
        export=defaults.EXPORT_SECONDS
        + written / rates.disk_write
        + max(written, read) / defaults.EXPORT_BYTES_PER_SECOND,
        report=defaults.REPORT_SECONDS,
        teacher=teacher_seconds,
    )


def occasions(every: Every, *, seconds: float, steps: float) -> int:
    """How often something that is due `every` so often happens strictly between the start and the end."""
    if every.steps is not None:
        return max(0, ceil(steps / every.steps) - 1)
    if every.share is not None:
        return max(0, ceil(1 / every.share - 1e-9) - 1)
    assert every.seconds is not None
    return max(0, ceil(seconds / every.seconds) - 1)


@dataclass(frozen=True)
class Timeline:
    """Predicted seconds by kind, from process start to the last file."""

    parts: dict[str, float]
    steps: int
    tokens: int

    @property
    def total(self) -> float:
        """Seconds of the whole run."""
        return sum(self.parts.values())


def overhead(fixed: Fixed, *, elapsed: float, evals: int, saves: int) -> dict[str, float]:
    """All seconds outside training steps: both ends are evaluated and sampled, the end is saved."""
    return {
        "start": elapsed,
        "load": fixed.load,
        "teacher": fixed.teacher,
        "evaluations": evals * fixed.eval_between + 2 * fixed.eval,
        "samples": 2 * fixed.samples,
        "saves": (saves + 1) * fixed.save,
        "export": fixed.export,
        "report": fixed.report,
    }
