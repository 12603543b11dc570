"""Bad inputs of the verbs that spend a budget in other ways, and of the keys that move state."""

from __future__ import annotations

from pathlib import Path

from bad_input_files import Case, finished

PLAN, TRAIN = (("plan", "recipe.yaml"), ("train", "recipe.yaml"))
SWEEP = ("sweep", "recipe.yaml", "budget.steps=40")
RATES = ("--over", "optimizer.learning_rate=1e-3,1e-2")
FULL = ("adapter=null",)


def _drop_checkpoints(folder: Path) -> None:
    for path in (folder / "run").glob("checkpoint-*"):
        path.rename(path.with_name(f"gone-{path.name}"))


SPENDING = [
    Case("a sweep over nothing", 2, "--over", SWEEP),
    Case("a sweep over an unknown key", 2, "learning_rate", (*SWEEP, "--over", "optimizer.rate=1e-3,1e-2")),
    Case("a sweep over one value", 2, "makes one trial", (*SWEEP, "--over", "optimizer.learning_rate=1e-3")),
    Case(
        "a sweep over a value that is none",
        2,
        "fast",
        (*SWEEP, "--over", "optimizer.learning_rate=1e-3,fast"),
    ),
    Case("a sweep over the budget", 2, "budget", (*SWEEP, "--over", "budget.steps=3,4")),
    Case("a sweep of no held-out rows", 2, "data.eval is 0", (*SWEEP, *RATES, "data.eval=0")),
    Case("a sweep of a run's own folder", 2, "run", (*SWEEP, *RATES), finished()),
    Case("to extend what is no run", 2, "nowhere", ("extend", "nowhere", "--budget", "4 steps")),
    Case("to extend without a budget", 2, "--budget", ("extend", "run"), finished()),
    Case(
        "to extend by what is no budget",
        2,
        "fortnight",
        ("extend", "run", "--budget", "a fortnight"),
        finished(),
    ),
    Case(
        "to extend a run whose checkpoints are gone",
        2,
        "checkpoint",
        ("extend", "run", "--budget", "steps=4"),
        finished(_drop_checkpoints),
    ),
    Case("a budget for what is no run", 2, "nowhere", ("budget", "nowhere", "1h")),
    Case(
        "a budget for a run that has ended", 2, "shoestring extend run", ("budget", "run", "1h"), finished()
    ),
    Case("sft_then_dpo without pairs", 2, "data.preferences", (*PLAN, "objective=sft_then_dpo")),
    Case(
        "a split of no supervised rows",
        2,
        "objective.split",
        (*PLAN, "objective={name: sft_then_dpo, split: 0}", "data.preferences=chats.jsonl"),
    ),
    Case("dpo on rows without pairs", 2, "chosen", (*PLAN, "objective=dpo")),
    Case(
        "a teacher that is not there",
        2,
        "objective.teacher",
        (*PLAN, "objective={name: distill, teacher: ./big}"),
    ),
]

STATE = [
    Case("state to an unknown tier", 2, "disk", (*PLAN, "offload.optimizer=tape")),
    Case("a state that cannot move", 2, "stays", (*PLAN, *FULL, "optimizer=lomo", "offload.optimizer=disk")),
    Case(
        "more writes than allowed",
        3,
        "offload.max_disk_writes",
        (*PLAN, *FULL, "offload.optimizer=disk", "offload.max_disk_writes=1MB"),
    ),
    Case(
        "a scratch folder that cannot be made",
        2,
        "disk_path",
        (*TRAIN, *FULL, "offload.optimizer=disk", "offload.disk_path=recipe.yaml/x"),
    ),
    Case("too few buffers", 2, "offload.buffer_count", (*PLAN, "offload.buffer_count=1")),
    Case(
        "trained layers streamed without a step in backward",
        2,
        "step_in_backward",
        (*PLAN, *FULL, "offload.weights=disk"),
    ),
    Case("4-bit layers streamed", 2, "4-bit", (*PLAN, "model.load_in_4bit=true", "offload.weights=disk")),
    Case("an unknown engine", 2, "deepspeed", (*PLAN, "engine=deepsped")),
    Case("a stage that there is not", 2, "zero_stage", (*PLAN, "engine={name: deepspeed, zero_stage: 4}")),
    Case(
        "NVMe below stage 3",
        2,
        "zero_stage",
        (*PLAN, *FULL, "engine={name: deepspeed, zero_stage: 2, offload_optimizer: nvme, nvme_path: x}"),
    ),
    Case(
        "keys of NVMe without it",
        2,
        "nvme",
        (*PLAN, "engine={name: deepspeed, zero_stage: 3, buffer_count: 8}"),
    ),
    Case(
        "two ways to move state at once", 2, "offload", (*PLAN, "engine=deepspeed", "offload.optimizer=disk")
    ),
    Case("an optimizer that shards would cut", 2, "adamw", (*PLAN, "engine=deepspeed", "optimizer=apollo")),
    Case("fsdp2 with 4-bit weights", 2, "4bit", (*PLAN, "engine=fsdp2", "model.load_in_4bit=true")),
]
