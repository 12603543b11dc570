"""What surrounds the steps: the measurements before the first one, and all that follows the last."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from ..data import TokenRows
from ..offload import Stored
from ..ops import give_back_freed_memory
from ..plan import largest
from ..plan.sizes import PROBE_TOKENS
from ..recipes import pruning_span
from .export import Exported, export_final
from .measuring import eval_kind, evaluate_and_record, keep_loss, measure, record
from .parts import PAUSED, Run
from .report import write_report
from .rundir import write_json
from .samples import answer
from .saving import save_checkpoint
from .streaming import reload_streamed
from .tracking import Summary


def first_measurements(run: Run) -> None:
    """Held-out loss and sample answers of the untrained model; a resumed run has them in its state."""
    state = run.state
    if state.step == 0 and run.plan.eval_rows:
        run.screen.status("measuring the untrained model")
        evaluate_and_record(run, rows=run.plan.eval_rows)
        state.evals_without_gain = 0
    if run.is_main and state.step == 0:
        state.samples_before = _samples(run, run.engine.loss_module.model)
        _write_samples(run, [])
    live_report(run)


def begin_stage(run: Run, number: int) -> None:
    """Make stage `number` the present one: its share of the budget, its reference model, its measurements.

    What was the best of the stage before is not compared with what comes: it is another loss.
    """
    state = run.state
    state.stage, state.stage_began = number, state.step
    stage = run.stage
    run.clock.begin_stage(stage.end)
    run.engine.loss_module.objective = stage.objective
    run.eval_due.kinds = (eval_kind(run.stages, stage),)
    if stage.objective.reference is not None:
        stage.objective.reference.set(run.engine.loss_module.model)
    if number == 0:
        return
    run.tracking.event("stage", text=f"{stage.name} begins at progress {run.clock.progress:.3f}")
    run.screen.note(f"step {state.step}: {stage.name} begins, peak rate {stage.plan.learning_rate:.1e}")
    state.best_score = state.best_eval_loss = None
    state.best_step, state.evals_without_gain = -1, 0
    if stage.plan.eval_rows:
        evaluate_and_record(run, rows=stage.plan.eval_rows)
    state.last_saved = -1
    save_checkpoint(run)


def pause(run: Run) -> None:
    """Measure, save, and leave: the same command goes on from here, with what of the budget is left."""
    state = run.state
    if run.plan.eval_rows:
        evaluate_and_record(run, rows=run.plan.eval_rows)
    save_checkpoint(run)
    live_report(run)
    if run.is_main:
        paused = {
            "progress": run.clock.progress,
            "step": state.step,
            "seconds": run.clock.seconds,
            "tokens": state.tokens,
            "eval_loss": state.eval_loss,
            "eval_loss_before": state.eval_loss_before,
        }
        write_json(run.run_dir.paused, paused)
    run.tracking.event("stop", step=state.step, reason=PAUSED)
    run.tracking.finish()
    where = f"step {state.step}, progress {run.clock.progress:.2f}"
    run.screen.note(f"paused at {where}; the same command goes on")


def live_report(run: Run) -> None:
    """report.html as far as the run has come."""
    if run.is_main:
        with run.clock.spent("report"):
            write_report([run.run_dir.path], run.run_dir.report)


def finish(run: Run, reason: str) -> Summary:
    """Evaluate, save, export, let it answer, report: the landing, for which the clock kept the reserve.

    The answers come late since they alone can be cut short: they take up what the rest took too long.
    """
    state = run.state
    run.clock.stop(reason)
    run.snapshots.settle()
    run.screen.status("landing: last evaluation, checkpoint, export")
    _last_measurements(run)
    save_checkpoint(run)
    exported = _export(run)
    if not run.is_main:
        return Summary()
    answering = run.engine.loss_module.model if exported is None else exported.model
    samples = _write_samples(run, _samples(run, answering))
    if exported is not None and exported.streamed is not None:
        exported.streamed.close()
    run.tracking.event("stop", step=state.step, reason=reason)
    summary = summarise(run, reason, exported)
    with _timed(run, "report"):
        run.run_dir.paused.unlink(missing_ok=True)
        summary.write(run.run_dir.summary)
        write_report([run.run_dir.path], run.run_dir.report)
    run.tracking.finish(summary)
    summary.seconds = run.clock.seconds
    summary.budget = run.clock.used()  # type: ignore[assignment]  # None stands for a limit that was not given
    summary.write(run.run_dir.summary)
    if exported is not None:
        run.screen.note(exported.line)
    run.screen.finish(summary, samples, report=run.run_dir.report)
    return summary


def _last_measurements(run: Run) -> None:
    """The present stage; and the first one where that was another, for its loss is the run's."""
    if run.plan.eval_rows:
        evaluate_and_record(run, rows=run.plan.eval_rows)
    first = run.stages[0]
    if run.state.stage > 0 and first.plan.eval_rows:
        result = measure(run, first, rows=first.plan.eval_rows)
        keep_loss(run, result)
        record(run, first, result)


def summarise(run: Run, reason: str, exported: Exported | None) -> Summary:
    """The whole result in one object; what could not be measured is None."""
    state, clock = run.state, run.clock
    predicted = largest([stage.plan for stage in run.stages])
    return Summary(
        stop_reason=reason,
        steps=state.step,
        tokens=state.tokens,
        trained_tokens=state.trained_tokens,
        seconds=clock.seconds,
        budget=clock.used(),  # type: ignore[arg-type]  # None stands for a limit that was not given
        final_progress=clock.progress,
        final_learning_rate=state.learning_rate,
        train_loss=state.train_loss,
        eval_loss_before=state.eval_loss_before,
        eval_loss=state.eval_loss,
        best_eval_loss=state.best_eval_loss,
        tokens_per_second=state.tokens / state.step_seconds if state.step_seconds else None,
        peak_device_bytes=run.memory.peak_device_bytes,
        peak_host_bytes=run.memory.peak_host_bytes,
        predicted_device_bytes=predicted["device"].get("total"),
        predicted_host_bytes=predicted["host"]["total"],
        optimizer_state_bytes=_state_bytes(run.engine.optimizer),
        disk_bytes_written=psutil.Process().io_counters().write_bytes if psutil.LINUX else None,
        energy_joules=clock.joules,
        cost=clock.cost,
        resumed_from=run.resumed_from,
        final_path=None if exported is None else str(exported.path),
        legs=len(run.legs) + 1,
        energy_source=clock.energy_source,
    )


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """On whatever tier. By place: bitsandbytes' tables are in the state of every tensor, and there once."""
    held = {
        value.data_ptr() if isinstance(value, Tensor) else id(value): value.nbytes
        for entry in optimizer.state.values()
        for value in entry.values()
        if isinstance(value, Tensor | Stored)
    }
    return sum(held.values())


def probe_tokens(rows: TokenRows) -> Tensor:
    """[1, L] tokens of real rows, L up to 256, on which two models are compared."""
    enough = int(np.searchsorted(rows.offsets - rows.offsets[0], PROBE_TOKENS, side="left"))
    start, stop = int(rows.offsets[0]), int(rows.offsets[min(enough, len(rows))])
    return torch.from_numpy(np.array(rows.tokens[start : min(stop, start + PROBE_TOKENS)], dtype=np.int64))[
        None
    ]


@contextmanager
def _timed(run: Run, kind: str) -> Iterator[dict[str, Any]]:
    with run.clock.spent(kind), run.tracking.timed(kind) as event:
        yield event


def _samples(run: Run, model: nn.Module) -> list[str]:
    prompts = run.stages[0].data.eval_prompts  # the same before and after, whatever was trained last
    count = min(run.recipe.eval.samples, len(prompts))
    if not count:
        return []
    clock = run.clock
    remaining = clock.remaining_seconds()
    # The last answers may take what the rest of the landing does not need; the first ones are never hurried.
    most = None
    if run.state.step and remaining is not None:
        expected = clock.durations.expected("samples")
        most = max(expected / 2, remaining - clock.reserve + expected)
    with (
        # The first answers warm the caches, and an untrained model talks longer: what they take beyond the
        # plan's guess is not kept for the last ones.
        clock.spent("samples", at_most=clock.durations.guess.get("samples")),
        run.tracking.timed("samples"),
        run.engine.averaged(),
        run.engine.precision(),
    ):
        return answer(
            model,
            run.tokenizer,
            prompts[:count],
            max_new_tokens=run.recipe.eval.max_new_tokens,
            max_seconds=most,
        )


def _write_samples(run: Run, after: list[str]) -> dict[str, list[dict[str, str]]]:
    data = run.stages[0].data

    def entries(answers: list[str]) -> list[dict[str, str]]:
        return [
            {"prompt": prompt[-1]["content"], "reference": reference, "answer": text}
            for prompt, reference, text in zip(data.eval_prompts, data.eval_references, answers, strict=False)
        ]

    samples = {"before": entries(run.state.samples_before), "after": entries(after)}
    run.run_dir.write_samples(samples)
    return samples


def _export(run: Run) -> Exported | None:
    wanted = run.recipe.export.final or "merged"
    exported = None
    rows = run.stages[0].data
    if run.is_main and wanted != "none":
        run.engine.end_training()
        give_back_freed_memory()  # the last step's activations, before a second model is loaded
        with _timed(run, "export") as event:
            exported = export_final(
                run.engine.loss_module,
                run.tokenizer,
                run.run_dir.final,
                merged=wanted == "merged",
                probe=probe_tokens(rows.eval if len(rows.eval) else rows.train),
                card=model_card(run),
                autocast=run.plan.autocast,
                streamed=run.engine.streamed,
                load_again=functools.partial(reload_streamed, run.recipe, run.plan, run.accelerator.device),
            )
            event["path"] = str(exported.path)
    elif run.is_main and run.run_dir.final.exists():
        shutil.rmtree(run.run_dir.final)
    run.accelerator.wait_for_everyone()
    return exported


def model_card(run: Run) -> str:
    """README.md of the exported model: what it is, how it was made, how to load it."""
    state, recipe = run.state, run.recipe
    before = "not measured" if state.eval_loss_before is None else f"{state.eval_loss_before:.4f}"
    after = "not measured" if state.eval_loss is None else f"{state.eval_loss:.4f}"
    sources = ", ".join(source.path for source in recipe.data.train)
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [shoestring]\n---\n\n"
        f"# {run.run_dir.name}\n\n"
        f"{run.plan.model}, fine-tuned with shoestring on {sources}.\n\n"
        "| | |\n|---|---|\n"
        f"| steps | {state.step} |\n| tokens seen | {state.tokens:,} ({state.trained_tokens:,} trained) |\n"
        f"| held-out loss | {before} → {after} |\n"
        f"| peak learning rate | {run.plan.learning_rate:.2e}, {recipe.schedule.name} |\n{_pruned(run)}\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("this/folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("this/folder")\n```\n'
    )


def _pruned(run: Run) -> str:
    pruning = run.recipe.pruning
    if pruning is None:
        return ""
    when = "before training" if pruning_span(run.recipe) is None else "while it trained"
    return f"| pruned | {pruning.ratio:.0%} of its {pruning.ratio_of}, by {pruning.name}, {when} |\n"
