"""The sections on how the run is carried out: budget, train, eval, checkpoint, track, export."""

from typing import Literal

from pydantic import Field

from .quantities import Every, Seconds
from .section import (
    Auto,
    BytesText,
    CountText,
    EveryText,
    JoulesText,
    MoneyText,
    PriceText,
    SecondsText,
    Section,
)


class BudgetConfig(Section):
    """What may be spent; the first limit that runs out ends the run, landed and saved."""

    time: SecondsText | None = Field(
        default=None,
        description="Wall clock from the start of the process to the last file written, all included.",
    )
    cost: MoneyText | None = Field(default=None, description="Money; needs `price`.")
    price: PriceText | None = Field(default=None, description="What the machine costs an hour.")
    energy: JoulesText | None = Field(default=None, description="Energy, where the machine can measure it.")
    tokens: CountText | None = Field(default=None, description="Tokens seen in training, prompts included.")
    steps: CountText | None = Field(default=None, description="Optimizer steps.")
    epochs: float | None = Field(
        default=None, gt=0, description="Passes over the training rows; 0.5 is half a pass."
    )
    device_memory: Auto[BytesText] = Field(
        default=None, description="Accelerator memory to stay in; auto is what is free."
    )
    host_memory: Auto[BytesText] = Field(
        default=None,
        description="Host memory to stay in; auto is what is free within the limit of the container.",
    )
    disk: Auto[BytesText] = Field(
        default=None, description="Disk to stay in under output_dir; auto is what is free."
    )


class TrainConfig(Section):
    """How a step is made."""

    batch_tokens: Auto[int] = Field(
        default=None,
        ge=1,
        description="Tokens in an optimizer step, all processes together; excludes "
        "per_device_train_batch_size.",
    )
    per_device_train_batch_size: Auto[int] = Field(
        default=None, ge=1, description="Rows in one forward pass of one process; excludes batch_tokens."
    )
    gradient_accumulation_steps: Auto[int] = Field(
        default=None, ge=1, description="Forward passes of one process in an optimizer step."
    )
    activation_checkpointing: Auto[bool] = Field(
        default=None, description="Compute activations again in the backward pass instead of keeping them."
    )
    wta_crs_ratio: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Share of its input's rows that a trained linear layer keeps for its weight's gradient, "
        "sampled without bias (arXiv:2305.15265); null keeps all.",
    )
    fused_ops: bool = Field(
        default=True, description="Use the faster, equivalent operations of shoestring where they fit."
    )
    seed: int = Field(default=42, ge=0, lt=2**63, description="Seed of all that is random.")


class EvalConfig(Section):
    """When and how the model is measured while it trains."""

    every: EveryText = Field(
        default=Every(share=0.25),
        description="Steps (`500`), a share of the budget (`10%`) or time (`5min`); the start and the end "
        "are always measured.",
    )
    rows: int | None = Field(
        default=None,
        ge=1,
        description="Rows in the measurements between start and end; null takes all held-out rows.",
    )
    samples: int = Field(
        default=3, ge=0, le=100, description="Answers written out before and after, to read."
    )
    max_new_tokens: int = Field(default=64, ge=1, description="Longest sample answer, in tokens.")
    early_stopping_patience: int | None = Field(
        default=None,
        ge=1,
        description="Stop after so many measurements without a new best; null never stops early.",
    )
    metric_for_best_model: str = Field(
        default="loss",
        min_length=1,
        description="Metric that decides which checkpoint is best: less is better, but of accuracy, margin "
        "and chosen_reward more is.",
    )


class CheckpointConfig(Section):
    """How often the state is saved, and how much is kept."""

    every: EveryText = Field(
        default=Every(seconds=Seconds.parse("5min")),
        description="Steps (`500`), a share of the budget (`10%`) or time (`5min`).",
    )
    keep: int = Field(default=2, ge=1, description="Newest checkpoints kept.")
    keep_best: bool = Field(default=True, description="Keep the best one too, whatever its age.")
    in_memory: Auto[bool] = Field(
        default=None,
        description="Keep snapshots in host memory too, in a process that outlives a killed run; auto does "
        "where they take no more than half of the memory that the run leaves free.",
    )
    snapshot_every: Auto[EveryText] = Field(
        default=None,
        description="Between two snapshots in memory: steps (`1`), a share of the budget or time (`10s`); "
        "auto weighs what one costs against what a killed run would lose.",
    )
    keep_pre_decay: bool = Field(
        default=False,
        description="Keep the state before the last decay of `wsd` too, so that `shoestring extend` can go "
        "on from there.",
    )


class TrackConfig(Section):
    """Where figures are logged besides the run directory."""

    report_to: list[Literal["wandb", "tensorboard", "trackio"]] = Field(
        default=[],
        description="Trackers: `wandb`, `tensorboard`, `trackio`. metrics.jsonl and report.html are "
        "always written.",
    )
    project: str = Field(
        default="shoestring", min_length=1, description="Project at the tracker (WANDB_PROJECT)."
    )
    run_name: str | None = Field(
        default=None, min_length=1, description="Name at the tracker (WANDB_NAME); null is the folder's name."
    )
    logging_steps: int = Field(default=1, ge=1, description="Steps between two lines of metrics.jsonl.")


class ExportConfig(Section):
    """What the run leaves in `final/`."""

    final: Auto[Literal["merged", "adapter", "none"]] = Field(
        default=None,
        description="`merged` loads with transformers alone, `adapter` with PEFT, `none` writes nothing; "
        "auto is merged. A merged 4-bit base is written dequantised, in `model.dtype`.",
    )
