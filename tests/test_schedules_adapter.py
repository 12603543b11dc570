"""BudgetLR in other people's loops: plain torch, a gradient scaler, Accelerate, transformers' Trainer."""

from __future__ import annotations

import gc
import io
import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from shoestring.optimizers import build_optimizer
from shoestring.optimizers.apollo import APOLLO
from shoestring.recipes import (
    AdamW,
    BudgetError,
    CosineSchedule,
    LinearSchedule,
    RexSchedule,
    UserError,
    WsdSchedule,
)
from shoestring.schedules import BudgetLR, Clock, Limits, Schedule, Warmup, build_schedule
from shoestring.schedules.profiles import cosine, linear
from torch import nn

LINEAR = build_schedule(LinearSchedule(warmup_steps=0.0))
WARM = build_schedule(CosineSchedule(warmup_steps=4.0, min_factor=0.1))


def sgd(*rates: float) -> torch.optim.SGD:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(2))], "lr": rate} for rate in rates])


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def factors(schedule: Schedule, total: int) -> list[float]:
    """What the package's own loop gives the steps."""
    clock = Clock(Limits(steps=total), started=0.0, now=lambda: 0.0, warmup=schedule.warmup)
    found = []
    while (permit := clock.plan_step(1)).go:
        found.append(schedule.factor(permit))
        clock.finish_step(0.0, 1)
    return found


def used(optimizer: torch.optim.Optimizer, scheduler: BudgetLR, count: int) -> list[float]:
    """The rates of the first group with which `count` steps are made."""
    found = []
    for _ in range(count):
        found.append(rates(optimizer)[0])
        optimizer.step()
        scheduler.step()
    return found


# --- the sequence


@pytest.mark.parametrize("total", [1, 2, 20])
@pytest.mark.parametrize(
    "schedule", [LINEAR, WARM, build_schedule(RexSchedule()), build_schedule(WsdSchedule())]
)
def test_the_steps_have_the_rates_of_our_own_loop(schedule: Schedule, total: int) -> None:
    optimizer = sgd(0.5)
    scheduler = BudgetLR(optimizer, schedule, total_steps=total)
    expected = [0.5 * factor for factor in factors(schedule, total)]
    assert used(optimizer, scheduler, total) == pytest.approx(expected, abs=1e-15)
    assert scheduler.done


def test_each_group_keeps_its_own_peak() -> None:
    optimizer = sgd(1.0, 0.1)
    optimizer.param_groups[1]["initial_lr"] = 0.2  # as a resumed one has it; torch's convention
    scheduler = BudgetLR(optimizer, LINEAR, total_steps=4)
    assert scheduler.base_lrs == [1.0, 0.2]
    assert rates(optimizer) == pytest.approx([0.75, 0.15])
    assert scheduler.get_last_lr() == pytest.approx([0.75, 0.15])
    optimizer.step()
    assert scheduler.get_last_lr() == pytest.approx([0.75, 0.15])
    scheduler.step()
    assert scheduler.get_last_lr() == rates(optimizer) == pytest.approx([0.5, 0.1])


def test_a_tensor_rate_is_filled_in_place() -> None:
    rate = torch.tensor(1.0)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))], lr=rate)
    scheduler = BudgetLR(optimizer, LINEAR, total_steps=4)
    held = optimizer.param_groups[0]["lr"]
    used(optimizer, scheduler, 1)
    assert optimizer.param_groups[0]["lr"] is held
    assert float(held) == 0.5
    assert float(scheduler.get_last_lr()[0]) == 0.5


def test_past_the_end_the_rate_stays_at_the_floor() -> None:
    optimizer = sgd(1.0)
    scheduler = BudgetLR(optimizer, Schedule("cosine", cosine, min_factor=0.1), total_steps=5)
    used(optimizer, scheduler, 4)
    assert not scheduler.done
    assert used(optimizer, scheduler, 10) == pytest.approx([0.1] * 10, abs=1e-15)
    assert scheduler.done


# --- what counts are the optimizer's steps


def test_calling_step_again_changes_nothing() -> None:
    plain, often = sgd(1.0), sgd(1.0)
    one, two = BudgetLR(plain, WARM, total_steps=12), BudgetLR(often, WARM, total_steps=12)
    for _ in range(12):
        assert rates(plain) == rates(often)
        plain.step()
        one.step()
        for _ in range(3):
            two.step()
        often.step()
        for _ in range(5):
            two.step()


def test_steps_without_a_call_between_them_are_counted() -> None:
    optimizer = sgd(1.0)
    scheduler = BudgetLR(optimizer, LINEAR, total_steps=10)
    for _ in range(3):
        optimizer.step()
    scheduler.step()
    assert rates(optimizer) == pytest.approx([0.6])


class SkippingScaler:
    """What torch.amp.GradScaler does where a gradient is not finite: the optimizer is not stepped."""

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        finite = all(bool(p.grad.isfinite().all()) for g in optimizer.param_groups for p in g["params"])
        if finite:
            optimizer.step()


def test_a_step_that_a_scaler_skipped_is_not_counted() -> None:
    optimizer, scaler = sgd(1.0), SkippingScaler()
    scheduler = BudgetLR(optimizer, LINEAR, total_steps=4)
    parameter = optimizer.param_groups[0]["params"][0]
    seen = []
    for gradient in (1.0, float("inf"), 1.0, float("nan"), 1.0):
        parameter.grad = torch.full((2,), gradient)
        scaler.step(optimizer)
        scheduler.step()
        seen.append(rates(optimizer)[0])
    assert seen == pytest.approx([0.5, 0.5, 0.25, 0.25, 0.0])


def test_the_real_scaler_is_understood() -> None:
    optimizer = sgd(1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scheduler = BudgetLR(optimizer, LINEAR, total_steps=4)
    parameter = optimizer.param_groups[0]["params"][0]
    seen = []
    for weight in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale((parameter * weight).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        seen.append(rates(optimizer)[0])
    assert seen == pytest.approx([0.5, 0.5, 0.25])


def test_a_scheduler_that_is_gone_costs_nothing() -> None:
    optimizer = sgd(1.0)
    calls = []
    BudgetLR(optimizer, LINEAR, progress=lambda: calls.append(1) or 0.5)  # type: ignore[func-returns-value]
    gc.collect()
    before = len(calls)
    optimizer.step()
    optimizer.step()
    assert len(calls) == before


# --- the other drivers


def test_progress_of_the_callers_own() -> None:
    optimizer = sgd(1.0)
    source = iter([0.1, 0.3, 0.2, 0.9, 1.7, 0.0])
    schedule = Schedule("linear", linear, min_factor=0.5)
    scheduler = BudgetLR(optimizer, schedule, progress=lambda: next(source))
    expected = [0.95, 0.85, 0.85, 0.55, 0.5]  # what falls is held, what leaves [0, 1] is clamped
    assert used(optimizer, scheduler, 5) == pytest.approx(expected)
    assert scheduler.done


def test_warm_up_takes_its_steps_when_progress_jumps() -> None:
    optimizer = sgd(1.0)
    schedule = Schedule("constant", lambda x: 1.0, warmup=Warmup(share=0.03))
    scheduler = BudgetLR(optimizer, schedule, progress=lambda: 0.5)
    assert used(optimizer, scheduler, 4) == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])


def test_a_clock_of_seconds_lands_on_time() -> None:
    now = 0.0
    schedule = build_schedule(RexSchedule(warmup_steps=0.05, min_factor=0.2))
    clock = Clock(
        Limits(seconds=100.0),
        started=0.0,
        now=lambda: now,
        reserve_guess={"save": 5.0},
        seconds_per_token_guess=1.0,
        warmup=schedule.warmup,
    )
    optimizer = sgd(1.0)
    scheduler = BudgetLR(optimizer, schedule, clock=clock)
    seen = []
    while not scheduler.done:
        seen.append(rates(optimizer)[0])
        now += 1.0
        optimizer.step()
        scheduler.step()
        scheduler.step()
    assert 90.0 <= now <= 95.0
    assert len(seen) == clock.steps == int(now)
    assert seen[-1] == pytest.approx(0.2, abs=0.02)
    top = seen.index(max(seen))
    assert top <= 10
    assert all(a >= b for a, b in itertools.pairwise(seen[top:]))
    used(optimizer, scheduler, 3)
    assert clock.steps == len(seen)
    assert rates(optimizer) == [0.2]


def test_a_clock_of_tokens_counts_those_of_each_step() -> None:
    clock = Clock(Limits(tokens=1000), started=0.0, now=lambda: 0.0, warmup=LINEAR.warmup)
    optimizer = sgd(1.0)
    scheduler = BudgetLR(optimizer, LINEAR, clock=clock, tokens_per_step=250)
    assert used(optimizer, scheduler, 4) == pytest.approx([0.75, 0.5, 0.25, 0.0])
    assert scheduler.done
    assert clock.tokens == 1000


# --- state


@pytest.mark.parametrize("at", range(21))
@pytest.mark.parametrize("optimizer_first", [True, False])
def test_state_saved_at_any_step_goes_on_as_if_nothing_had_happened(at: int, optimizer_first: bool) -> None:
    def make() -> tuple[torch.optim.Optimizer, BudgetLR]:
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(3))], lr=0.3)
        return optimizer, BudgetLR(optimizer, WARM, total_steps=20)

    whole = used(*make(), 22)
    optimizer, scheduler = make()
    first = used(optimizer, scheduler, at)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    optimizer, scheduler = make()
    if optimizer_first:
        optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    if not optimizer_first:
        optimizer.load_state_dict(saved["optimizer"])
    assert scheduler.get_last_lr() == rates(optimizer)
    assert first + used(optimizer, scheduler, 22 - at) == whole


def test_state_saved_between_the_two_calls_goes_on_too() -> None:
    optimizer = sgd(1.0)
    scheduler = BudgetLR(optimizer, LINEAR, total_steps=10)
    optimizer.step()
    saved = scheduler.state_dict()
    fresh = sgd(1.0)
    again = BudgetLR(fresh, LINEAR, total_steps=10)
    again.load_state_dict(saved)
    assert rates(fresh) == pytest.approx([0.8])
    again.step()
    assert rates(fresh) == pytest.approx([0.8])


def test_another_horizon_is_said_and_never_makes_the_rate_jump(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = sgd(1.0)
    scheduler = BudgetLR(optimizer, LINEAR, total_steps=10)
    used(optimizer, scheduler, 5)
    longer, shorter = sgd(1.0), sgd(1.0)
    with caplog.at_level(logging.WARNING):
        again = BudgetLR(longer, LINEAR, total_steps=20)
        again.load_state_dict(scheduler.state_dict())
    assert [r.getMessage() for r in caplog.records] == ["BudgetLR: saved with another budget: steps 10 -> 20"]
    assert used(longer, again, 15) == pytest.approx([0.5 * (1 - (k + 1) / 15) for k in range(15)], abs=1e-15)
    sooner = BudgetLR(shorter, LINEAR, total_steps=7)
    sooner.load_state_dict(scheduler.state_dict())
    assert used(shorter, sooner, 2) == pytest.approx([0.25, 0.0], abs=1e-15)
    assert sooner.done
    with pytest.raises(BudgetError, match="steps"):
        BudgetLR(sgd(1.0), LINEAR, total_steps=4).load_state_dict(scheduler.state_dict())


def test_state_of_another_optimizer_is_refused() -> None:
    saved = BudgetLR(sgd(1.0, 2.0), LINEAR, total_steps=10).state_dict()
    with pytest.raises(UserError, match="total_steps and 2 parameter groups; this one has total_steps and 1"):
        BudgetLR(sgd(1.0), LINEAR, total_steps=10).load_state_dict(saved)
    with pytest.raises(UserError, match=r"saved with total_steps and 2 .*has progress and 2"):
        BudgetLR(sgd(1.0, 2.0), LINEAR, progress=lambda: 0.5).load_state_dict(saved)


# --- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing given; exactly one of total_steps, clock, progress"),
        ({"total_steps": 5, "progress": lambda: 0.1}, "total_steps and progress given; exactly one"),
        ({"total_steps": 0}, "total_steps is 0; allowed: a whole number of at least 1"),
        ({"clock": Clock(Limits(epochs=3.0), started=0.0)}, "epochs=3 cannot be counted"),
        ({"clock": Clock(Limits(steps=3), started=0.0, warmup=Warmup(steps=2))}, "warmup=schedule.warmup"),
    ],
    ids=["none", "two", "no steps", "epochs", "warm-up"],
)
def test_mistakes_are_explained(options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        BudgetLR(sgd(1.0), LINEAR, **options)


def test_an_epoch_is_refused() -> None:
    with pytest.raises(UserError, match="epoch is 3; the optimizer's own steps are counted"):
        BudgetLR(sgd(1.0), LINEAR, total_steps=5).step(3)


def test_a_rate_of_zero_is_refused() -> None:
    """A schedule multiplies; `build_optimizer` leaves the rate to whoever steps."""
    with pytest.raises(UserError, match=r"Give the peak, such as BudgetLR\(..., rate=1e-3\)"):
        BudgetLR(build_optimizer(nn.Linear(4, 4), AdamW()), LINEAR, total_steps=5)


# --- our optimizers, Accelerate, transformers


def test_our_optimizers_and_lora_plus() -> None:
    optimizer = build_optimizer(nn.Linear(4, 4), AdamW(weight_decay=0.1))
    optimizer.param_groups[1]["rate_scale"] = 4.0
    scheduler = BudgetLR(optimizer, LINEAR, total_steps=4, rate=1e-3)
    assert rates(optimizer) == pytest.approx([0.75e-3, 3e-3])
    used(optimizer, scheduler, 1)
    assert rates(optimizer) == pytest.approx([0.5e-3, 2e-3])


def test_an_optimizer_of_matrices_moves_by_the_rate() -> None:
    layer = nn.Linear(8, 8, bias=False)
    optimizer = APOLLO(layer.parameters(), lr=0.1, rank=2)
    scheduler = BudgetLR(optimizer, LINEAR, total_steps=3)
    moved = []
    for _ in range(3):
        before = layer.weight.detach().clone()
        layer.weight.grad = torch.ones(8, 8)
        optimizer.step()
        scheduler.step()
        moved.append(float((layer.weight.detach() - before).norm()))
    assert moved[0] > moved[1] > moved[2] == 0.0


@pytest.mark.parametrize("split_batches", [False, True])
@pytest.mark.parametrize("prepared_first", [False, True])
def test_through_accelerate_with_accumulation(
    split_batches: bool, prepared_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerate steps a scheduler once for each process; three of them are feigned."""
    from accelerate import Accelerator, DataLoaderConfiguration
    from accelerate.state import AcceleratorState

    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=2,
        dataloader_config=DataLoaderConfiguration(split_batches=split_batches),
    )
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    plain = torch.optim.SGD(model.parameters(), lr=1.0)
    rows = torch.utils.data.DataLoader(torch.randn(24, 4), batch_size=3)  # 8 batches: 4 steps
    if prepared_first:
        model, optimizer, rows = accelerator.prepare(model, plain, rows)
        scheduler = accelerator.prepare(BudgetLR(optimizer, LINEAR, total_steps=4))
    else:
        model, optimizer, rows, scheduler = accelerator.prepare(
            model, plain, rows, BudgetLR(plain, LINEAR, total_steps=4)
        )
    monkeypatch.setattr(AcceleratorState, "num_processes", property(lambda self: 3), raising=False)
    seen = []
    for batch in rows:
        with accelerator.accumulate(model):
            accelerator.backward(model(batch).square().mean())
            seen.append(rates(plain)[0])
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    assert seen == pytest.approx([0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0.0, 0.0])
    assert scheduler.get_last_lr() == [0.0]


def test_through_the_trainer_of_transformers(tmp_path: Path) -> None:
    """Logged rates, a checkpoint in the middle, and a resumed run that ends as the unbroken one."""
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    folder = tiny.model_folder(tmp_path / "model")
    rows = [{"input_ids": torch.arange(8) % 20, "labels": torch.arange(8) % 20} for _ in range(24)]

    def trainer(where: str) -> Trainer:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(folder)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = BudgetLR(optimizer, WARM, total_steps=6)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / where),
            max_steps=6,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            logging_steps=1,
            save_steps=3,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        return Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, scheduler))

    whole = trainer("whole")
    whole.train()
    expected = [1e-2 * factor for factor in factors(WARM, 6)]
    logged = [entry["learning_rate"] for entry in whole.state.log_history if "learning_rate" in entry]
    assert logged == pytest.approx(expected, rel=1e-9)
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    again = [entry["learning_rate"] for entry in resumed.state.log_history if "learning_rate" in entry]
    assert again == logged
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
