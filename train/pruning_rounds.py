"""Pruning while it trains: the model loses neurons or layers in rounds between two points of the budget's
progress, and the optimizer's states are cut with it (after arXiv:2501.12486).

Each round looks at training rows through the model as it is then. What has been cut is in the state of the
run: a resumed one cuts the published model alike and gives it the weights that were saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..models import plain_attention
from ..offload import OffloadedOptimizer
from ..pruning import Cut, cut_from_json, cut_to_json, everything, followed_by, ramp, read_anatomy, remove
from ..recipes import PruningConfig, pruning_span
from ..recipes.errors import UserError
from ..schedules import StepPermit
from .cutting import amounts_wanted, calibration_tokens, prune_now, refits
from .figures import count_text
from .parts import Run, Saved

_SHARE = 0.05
"""Of the time that is left: what all further rounds may look at rows for, where the recipe leaves it open."""
_LOOKING, _REFITTING = 0.35, 1.0
"""Seconds a token of looking, as a share of training's: a forward pass; with a refit two, and D² sums."""
_FEWEST = 512


def cut_again(model: Any, saved: Saved | None) -> None:
    """Cut a freshly loaded model as it was when the run was saved."""
    found = None if saved is None else saved.json("trainer")["state"].get("pruning")
    if found is not None:
        remove(model, cut_from_json(found["cut"]))


def begin_rounds(run: Run, longest: int) -> None:
    """Let the model be cut from now on, where the recipe says so. longest: tokens that the model reads.

    UserError: it cannot be, with this model, number of processes or placement of the optimizer's state.
    """
    span, pruning = pruning_span(run.recipe), run.recipe.pruning
    if span is None or pruning is None:
        return
    what = f"pruning.start={span[0]} prunes while it trains"
    if run.accelerator.num_processes > 1:
        raise UserError(
            f"{what}, which one process can do, and there are {run.accelerator.num_processes}.\n"
            "  Prune before training: pruning.start=0"
        )
    if isinstance(run.engine.optimizer, OffloadedOptimizer):
        raise UserError(
            f"{what}, and the optimizer's state has its places elsewhere.\n"
            "  Set offload.optimizer=device, or prune before training: pruning.start=0"
        )
    model: Any = run.engine.loss_module.model
    if run.state.pruning is None:
        amounts_wanted(read_anatomy(model), pruning)  # or the error, now and not half-way
    run.followers.append(lambda permit: _follow(run, pruning, span, longest, permit))


def due(span: tuple[float, float], rounds: int, progress: float) -> int:
    """How many of the rounds, evenly spread from one end of `span` to the other, are due at `progress`."""
    start, end = span
    if rounds == 1 or end <= start:
        return rounds if progress >= start else 0
    return sum(progress >= start + (end - start) * number / (rounds - 1) for number in range(rounds))


def _follow(
    run: Run, pruning: PruningConfig, span: tuple[float, float], longest: int, permit: StepPermit
) -> None:
    state = run.state
    done = 0 if state.pruning is None else int(state.pruning["rounds"])
    now = due(span, pruning.rounds, permit.progress)
    if now > done:
        run.snapshots.settle()  # which copies what is about to be cut
        with run.clock.spent("prune"), run.tracking.timed("prune") as event:
            line = _cut(run, pruning, now, longest)
            event["text"] = line
        run.screen.note(f"step {state.step}: {line}")


def _cut(run: Run, pruning: PruningConfig, number: int, longest: int) -> str:
    """Everything that is due up to round `number`, at once; one line on it."""
    state, engine = run.state, run.engine
    model: Any = engine.loss_module.model
    anatomy = read_anatomy(model)
    present = anatomy.parameters
    if state.pruning is None:
        whole, first = everything(anatomy), present
        widths = {"neurons": anatomy.blocks[0].neurons, "groups": anatomy.blocks[0].groups}
    else:
        whole, first = cut_from_json(state.pruning["cut"]), int(state.pruning["parameters"])
        widths = state.pruning["cut"]["widths"]
    # What rounding left of earlier rounds is made up for here.
    wanted = 1 - (1 - ramp(pruning.ratio, number, pruning.rounds)) * first / present
    unit = anatomy.blocks[0].parameters if pruning.chosen_parts == ("blocks",) else 1
    if wanted * present < unit / 2:
        state.pruning = _record(number, first, whole, widths)
        return f"round {number} of {pruning.rounds} has nothing to prune"
    with plain_attention(model), engine.precision():
        done = prune_now(
            model,
            pruning,
            run.data,
            run.accelerator.device,
            longest,
            seed=run.recipe.train.seed + number,
            ratio=wanted,
            tokens=_tokens(run, pruning, number),
            optimizer=engine.optimizer,
        )
    engine.find_parameters()
    # What was best before was a larger model.
    state.best_score = state.best_eval_loss = None
    state.best_step, state.evals_without_gain = -1, 0
    state.pruning = _record(number, first, followed_by(whole, done.cut), widths)
    return (
        f"round {number} of {pruning.rounds}: pruned by {pruning.name}, {count_text(done.before)} -> "
        f"{count_text(done.after)} parameters, {1 - done.after / first:.1%} less than at first"
    )


def _record(number: int, first: int, cut: Cut, widths: Mapping[str, int]) -> dict[str, Any]:
    """rounds: done so far; parameters: before the first; cut: of the model as it was published."""
    return {"rounds": number, "parameters": first, "cut": cut_to_json(cut, widths)}


def _tokens(run: Run, pruning: PruningConfig, number: int) -> int:
    """The recipe's, or what the time that is left allows."""
    tokens = calibration_tokens(pruning.calibration_tokens, run.accelerator.device)
    remaining, state = run.clock.remaining_seconds(), run.state
    if pruning.calibration_tokens is not None or remaining is None or not state.tokens:
        return tokens
    rounds_left = pruning.rounds - number + 1
    each = (_REFITTING if refits(pruning) else _LOOKING) * state.step_seconds / state.tokens
    return max(_FEWEST, min(tokens, int(_SHARE * max(0.0, remaining) / rounds_left / each)))
