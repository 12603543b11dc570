"""Whole sweeps of simulated trials on a fake clock: who survives, who fails, and what it costs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sweep_fakes
from shoestring.recipes import load_recipe
from shoestring.recipes.errors import DivergedError
from shoestring.train.signals import StopRequest
from shoestring.train.sweep_grid import Job, read_job
from shoestring.train.sweep_leg import Sweep
from shoestring.train.sweep_process import Outcome, Task
from shoestring.train.sweep_ranking import best_first
from shoestring.train.sweep_rungs import conduct
from shoestring.train.sweep_state import FILE, LegDone, State, Trial, load_state
from sweep_fakes import Simulated, sweep_of

NINE = "optimizer.learning_rate=1e-5,3e-5,1e-4,3e-4,1e-3,3e-3,1e-2,3e-2,1e-1"


def job_of(folder: Path, budget: str, over: str = NINE) -> Job:
    return read_job(str(sweep_fakes.recipe(folder)), [], [over], budget)


def carried_out(job: Job, run: Simulated) -> Sweep:
    sweep = sweep_of(job, run, now=lambda: run.now)
    assert conduct(sweep) == 0
    return sweep


def amounts(run: Simulated, unit: str) -> list[float]:
    """What each process was given, in order."""
    found = []
    for task in run.tasks:
        words = [w for w in task.arguments if not w.startswith("--pause") and not w.startswith("0.")]
        found.append(float(getattr(load_recipe(words[0], words[1:]).recipe.budget, unit)))
    return found


@pytest.mark.parametrize("unit", ["steps=400", "tokens=40k", "20min"])
def test_the_best_of_nine_lands_and_the_budget_is_kept(tmp_path: Path, unit: str) -> None:
    job, run = job_of(tmp_path, unit), Simulated()
    sweep = carried_out(job, run)
    state = sweep.state
    assert state.winner == "learning_rate=1e-3"
    assert [trial.state for trial in state.trials].count("out") == 8
    legs = {trial.name: len(trial.legs) for trial in state.trials}
    assert sorted(legs.values()) == [1] * 6 + [2] * 2 + [3]
    assert {name for name, count in legs.items() if count > 1} == {
        "learning_rate=3e-4",
        "learning_rate=1e-3",
        "learning_rate=3e-3",
    }
    spent = sum(trial.spent for trial in state.trials)
    if job.unit == "time":
        assert job.amount - 5.0 <= run.now <= job.amount
    else:
        assert job.amount - (100 if job.unit == "tokens" else 1) < spent <= job.amount
    assert len({amounts(run, job.unit)[place] for place in range(9)}) == 1
    winner = job.folder(state.winner)
    assert json.loads((winner / "summary.json").read_text())["final_progress"] >= 0.98


@pytest.mark.parametrize("seed", range(8))
def test_noisy_clocks_end_with_the_budget(tmp_path: Path, seed: int) -> None:
    """Starts, steps and pauses vary by a third, and all starts are 50 % slower than guessed."""
    run = Simulated(noise=0.33, seed=seed)
    run.seconds = {"first": 12.0, "again": 9.0, "step": 2.0, "pause": 2.0, "landing": 3.0}
    job = job_of(tmp_path, "15min")
    sweep = carried_out(job, run)
    assert 0.98 * job.amount <= run.now <= job.amount + 1.0
    assert sweep.state.winner == "learning_rate=1e-3"
    assert sum(trial.spent for trial in sweep.state.trials) == pytest.approx(run.now)


def test_all_trials_of_a_rung_are_given_the_same(tmp_path: Path) -> None:
    run = Simulated(noise=0.3)
    sweep = carried_out(job_of(tmp_path, "20min"), run)
    given = amounts(run, "time")
    assert given[:9] == [given[0]] * 9
    used = {leg.rung: leg for leg in sweep.state.trial("learning_rate=1e-3").legs}
    second = [amount for task, amount in zip(run.tasks, given, strict=True) if repr(1 / 3) in task.arguments]
    assert len(second) == 3
    grants = sweep.state.grants
    assert given[0] == pytest.approx(grants[0])
    for name, amount in zip(("3e-4", "1e-3", "3e-3"), second, strict=True):
        first = sweep.state.trial(f"learning_rate={name}").legs[0]
        assert amount == pytest.approx(first.clock + grants[1], abs=2.0)  # the pause itself is not carried
    assert used[2].progress >= 0.99


def test_two_trials_and_one_pause(tmp_path: Path) -> None:
    run = Simulated()
    sweep = carried_out(job_of(tmp_path, "steps=90", "optimizer.learning_rate=1e-2,1e-3"), run)
    assert [task.arguments[-1] for task in run.tasks[:2]] == [repr(1 / 3)] * 2
    assert "--pause-at" not in run.tasks[2].arguments
    assert sweep.state.notes == ["at 33 % of a trial's budget 1 of 2 go on"]


def test_ties_keep_the_order_of_the_grid(tmp_path: Path) -> None:
    # equally far from the best rate on both sides: equal losses, to the bit, as log10 is exact here
    run = Simulated()
    sweep = carried_out(job_of(tmp_path, "steps=300", "optimizer.learning_rate=1e-2,1e-4"), run)
    first, second = (trial.legs[0].loss for trial in sweep.state.trials)
    assert first == second
    assert sweep.state.winner == "learning_rate=1e-2"


def test_losers_lose_their_checkpoints_and_keep_their_figures(tmp_path: Path) -> None:
    job, run = job_of(tmp_path, "steps=1000"), Simulated()
    sweep = carried_out(job, run)
    for trial in sweep.state.trials:
        folder = job.folder(trial.name)
        assert (folder / "metrics.jsonl").stat().st_size > 0
        assert any(folder.glob("checkpoint-*")) == (trial.state == "won")
    assert (job.output / "final").is_symlink()
    assert (job.output / "final/weight").read_bytes() == (
        job.folder("learning_rate=1e-3") / "final/weight"
    ).read_bytes()
    best = load_recipe(str(job.output / "best.yaml")).recipe
    assert best.optimizer.learning_rate == 1e-3
    assert best.output_dir == f"{job.output}-best"
    assert best.budget.steps == sweep.state.trial("learning_rate=1e-3").legs[-1].step


def test_failing_trials_are_out_and_what_they_leave_goes_to_the_others(tmp_path: Path) -> None:
    job = job_of(tmp_path, "steps=1000")
    whole = carried_out(job, Simulated())
    plain = whole.state.trial("learning_rate=1e-3").legs[-1].step
    (tmp_path / "b").mkdir()
    job = job_of(tmp_path / "b", "steps=1000")
    run = Simulated(codes={"learning_rate=1e-5": 3, "learning_rate=3e-5": -9}, diverges_above=5e-3)
    state = carried_out(job, run).state
    assert state.winner == "learning_rate=1e-3"
    reasons = {trial.name: trial.reason for trial in state.trials if trial.state == "failed"}
    assert reasons == {
        "learning_rate=1e-5": "does not fit: it said this",
        "learning_rate=3e-5": "killed by signal 9",
        "learning_rate=1e-2": "diverged at step 1",
        "learning_rate=3e-2": "diverged at step 1",
        "learning_rate=1e-1": "diverged at step 1",
    }
    assert sum(trial.spent for trial in state.trials) == 1000
    assert state.trial("learning_rate=1e-3").legs[-1].step > plain + 100
    assert state.trial("learning_rate=1e-2").spent == 1


def test_a_winner_that_fails_late_is_replaced_by_the_next(tmp_path: Path) -> None:
    over = "optimizer.learning_rate=1e-4,3e-4,1e-3"
    run = Simulated(diverges_above=9e-4, diverges_at=0.5)
    state = carried_out(job_of(tmp_path, "steps=600", over), run).state
    assert state.winner == "learning_rate=3e-4"
    assert state.trial("learning_rate=1e-3").state == "failed"
    assert state.trial("learning_rate=1e-3").reason.startswith("diverged at step")
    assert sum(trial.spent for trial in state.trials) == 600


def test_all_fail(tmp_path: Path) -> None:
    job, run = job_of(tmp_path, "steps=1000"), Simulated(diverges_above=0.0)
    sweep = sweep_of(job, run, now=lambda: run.now)
    with pytest.raises(DivergedError, match="no trial is left") as caught:
        conduct(sweep)
    assert caught.value.exit_code == 4
    assert str(caught.value).count("diverged at step 1") == 9
    again = sweep_of(job, run, now=lambda: run.now)
    with pytest.raises(DivergedError):
        conduct(again)
    assert len(run.tasks) == 9


def test_a_lone_survivor_goes_through_without_pauses(tmp_path: Path) -> None:
    run = Simulated(diverges_above=2e-5)
    state = carried_out(job_of(tmp_path, "steps=1000"), run).state
    assert state.winner == "learning_rate=1e-5"
    assert len(run.tasks) == 10
    assert sum(trial.spent for trial in state.trials) == 1000


class Interrupting:
    """A runner that lets a signal come before its n-th task has done anything, or kills the sweep there."""

    def __init__(self, inner: Simulated, at: int, stop: StopRequest | None) -> None:
        self.inner, self.at, self.stop, self.count = inner, at, stop, 0

    def __call__(self, task: Task) -> Outcome:
        self.count += 1
        if self.count != self.at:
            return self.inner(task)
        if self.stop is None:
            raise MemoryError
        self.stop.signal_number = 15
        return Outcome(143, 0.0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """One that nothing interrupted."""
    return carried_out(job_of(tmp_path_factory.mktemp("whole"), "steps=300"), Simulated())


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("at", [1, 5, 9, 10, 12, 13])
def test_a_sweep_that_ended_anywhere_goes_on_to_the_same_result(
    whole: Sweep, tmp_path: Path, at: int, killed: bool
) -> None:
    job, run, stop = job_of(tmp_path, "steps=300"), Simulated(), StopRequest()
    broken = sweep_of(job, Interrupting(run, at, None if killed else stop), now=lambda: run.now, stop=stop)
    if killed:
        with pytest.raises(MemoryError):
            conduct(broken)
    else:
        assert conduct(broken) == 143
    again = carried_out(job, run)
    assert legs(again.state) == legs(whole.state)
    assert again.state.winner == whole.state.winner
    assert again.state.notes == whole.state.notes
    for trial in whole.state.trials:
        one, two = (s.job.folder(trial.name) / "metrics.jsonl" for s in (whole, again))
        assert [(r["loss"], r["grad_norm"]) for r in rows(one)] == [
            (r["loss"], r["grad_norm"]) for r in rows(two)
        ]


def legs(state: State) -> list[Any]:
    return [
        (trial.name, trial.state, [(leg.rung, leg.progress, leg.loss, leg.spent) for leg in trial.legs])
        for trial in state.trials
    ]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_time_of_a_killed_leg_is_counted_as_its_log_tells(tmp_path: Path) -> None:
    job, run = job_of(tmp_path, "20min"), Simulated()
    sweep = sweep_of(job, Interrupting(run, 3, None), now=lambda: run.now)
    with pytest.raises(MemoryError):
        conduct(sweep)
    before = load_state(job.output / FILE)
    assert before is not None
    assert before.running is not None
    folder = job.folder(before.running.name)
    folder.mkdir(parents=True, exist_ok=True)
    row = {"step": 1, "seconds": 77.0, "tokens": 100, "loss": 1.0, "tokens_per_second": 10.0}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    run.now = 0.0  # another process, another day
    again = sweep_of(job, run, now=lambda: run.now)
    assert again.seconds() == before.seconds
    assert conduct(again) == 0
    total = again.seconds()
    assert total == pytest.approx(before.seconds + 77.0 + run.now)
    assert job.amount - 5.0 <= total <= job.amount


def test_a_budget_that_is_gone_lands_the_best_so_far(tmp_path: Path) -> None:
    job, run = job_of(tmp_path, "20min"), Simulated()

    def slow(task: Task) -> Outcome:
        done = run(task)
        if len(run.tasks) == 9:
            run.now += 3000.0  # the machine slept
        return done

    sweep = sweep_of(job, slow, now=lambda: run.now)
    assert conduct(sweep) == 0
    assert sweep.state.winner == "learning_rate=1e-3"
    assert len(run.tasks) == 10
    assert "used up" in sweep.state.notes[-1]


def test_a_trial_that_stops_early_by_itself_may_win(tmp_path: Path) -> None:
    job, run = job_of(tmp_path, "steps=600", "optimizer.learning_rate=1e-4,1e-3"), Simulated()

    def early(task: Task) -> Outcome:
        if task.name == "learning_rate=1e-3":  # no pause: it runs to its end at once
            task = replace(task, arguments=task.arguments[:-2])
        return run(task)

    sweep = sweep_of(job, early, now=lambda: run.now)
    assert conduct(sweep) == 0
    winner = sweep.state.trial("learning_rate=1e-3")
    assert (winner.state, winner.finished, len(winner.legs)) == ("won", True, 1)


def trial_with(name: str, loss: float | None) -> Trial:
    return Trial(name, {}, legs=[LegDone(0, 0.5, 0.5, loss, 1.0, 1.0, 10, 1000, 1.0)])


def test_early_signals_prefer_the_lower_gradient_norm(tmp_path: Path) -> None:
    job = job_of(tmp_path, "steps=500", "adapter.r=8,16,32")
    trials = [trial_with(f"r={r}", loss) for r, loss in (("8", 1.0), ("16", 2.0), ("32", 3.0))]
    for trial, norm in zip(trials, (3.0, 1.0, 2.0), strict=True):
        folder = job.folder(trial.name)
        folder.mkdir(parents=True)
        # in the first half of the tokens the norms are the other way round
        lines = [
            {"step": k, "tokens": 100 * k, "loss": 1.0, "grad_norm": norm if k > 5 else 10 - norm}
            for k in range(1, 11)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [t.name for t in best_first(trials, job, by="early_signals")] == ["r=16", "r=32", "r=8"]
    assert [t.name for t in best_first(trials, job, by="held_out_loss")] == ["r=8", "r=16", "r=32"]
