"""Bad inputs whose cause is the model, the run directory or the budget."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from bad_input_files import (
    PAIR,
    Case,
    config,
    cut,
    each,
    file,
    finished,
    full_disk,
    locked,
    rows,
    unfinished,
    without_energy_counters,
)

TRAIN, CHECK, PLAN = (("train", "recipe.yaml"), ("check", "recipe.yaml"), ("plan", "recipe.yaml"))
LONG = {"prompt": "a bee has " * 40, "completion": "five eyes " * 40}
OFFLINE = {"HF_HUB_OFFLINE": "1"}


def _adapter_as_model(folder: Path) -> None:
    (folder / "model/adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "some/base"})
    )
    (folder / "model/config.json").unlink()


def _gguf(folder: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_block_count(2)
    writer.add_token_list([f"t{number}" for number in range(100)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    os.truncate(folder / "model.gguf", 200)


MODELS = [
    Case("no such model folder", 2, "does not exist", (*CHECK, "model=./modell")),
    Case(
        "an empty model folder",
        2,
        "is empty",
        (*CHECK, "model=empty"),
        lambda folder: (folder / "empty").mkdir(),
    ),
    Case(
        "a folder that is no model",
        2,
        "no config.json",
        CHECK,
        lambda folder: (folder / "model/config.json").unlink(),
    ),
    Case("a config that is no JSON", 2, "cannot be read", CHECK, file("model/config.json", "{")),
    Case(
        "a model without weights",
        2,
        "no weights",
        CHECK,
        lambda folder: (folder / "model/model.safetensors").unlink(),
    ),
    Case("truncated weights", 2, "cut off or damaged", TRAIN, cut("model/model.safetensors")),
    Case(
        "a Git LFS pointer as weights",
        2,
        "Git LFS pointer",
        TRAIN,
        file("model/model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    ),
    Case("weights of another size", 2, "another shape", TRAIN, config(hidden_size=128)),
    Case(
        "no tokenizer",
        2,
        "tokenizer",
        CHECK,
        lambda folder: [path.unlink() for path in folder.glob("model/tokenizer*")],
    ),
    Case("a truncated GGUF file", 2, "is cut off", (*CHECK, "model=model.gguf"), _gguf),
    Case("a text called .gguf", 2, "model.gguf", (*CHECK, "model=model.gguf"), file("model.gguf", "hello")),
    Case(
        "an encoder-decoder",
        2,
        "encoder-decoder",
        CHECK,
        config(model_type="t5", architectures=["T5ForConditionalGeneration"]),
    ),
    Case(
        "an unknown architecture",
        2,
        "model_type",
        CHECK,
        config(model_type="llama99", architectures=["Llama99ForCausalLM"]),
    ),
    Case(
        "a model with code of its own",
        2,
        "trust_remote_code",
        CHECK,
        config(model_type="mine", auto_map={"AutoConfig": "mine.Config"}),
    ),
    Case("an adapter as model", 2, "is an adapter", CHECK, _adapter_as_model),
    Case("a package without a model", 2, "holds no .gguf", (*CHECK, "model=package:yaml")),
    Case(
        "a model package that is not installed", 2, "not installed", (*CHECK, "model=package:no_such_model")
    ),
    Case(
        "a hub model, offline",
        2,
        "HF_HUB_OFFLINE",
        (*CHECK, "model=some/model"),
        environment=OFFLINE,
        process=True,
    ),
    Case("a model neither path nor hub id", 2, "neither", (*CHECK, "model=some model")),
]

RUNS = [
    Case("output_dir is a file", 2, "is a file", (*TRAIN, "output_dir=chats.jsonl")),
    Case("output_dir below a file", 2, "is a file", (*TRAIN, "output_dir=chats.jsonl/run")),
    Case("output_dir in use", 2, "process 4711", TRAIN, around=locked),
    Case(
        "the newest checkpoint cut off, an older one whole",
        0,
        "checkpoint-000004",
        TRAIN,
        unfinished(cut("run/checkpoint-000004/trained.safetensors")),
        longer=99,
    ),
    Case(
        "only broken checkpoints",
        2,
        "--fresh",
        TRAIN,
        unfinished(
            each(
                cut("run/checkpoint-000004/trained.safetensors"),
                cut("run/checkpoint-000002/trained.safetensors"),
            )
        ),
        longer=8,
    ),
    Case(
        "a changed byte in the only checkpoint",
        2,
        "--fresh",
        TRAIN,
        unfinished(
            each(
                lambda folder: shutil.rmtree(folder / "run/checkpoint-000002"),
                file("run/checkpoint-000004/trainer.json", "{}"),
            )
        ),
    ),
    Case(
        "another recipe in the same folder",
        2,
        "optimizer.learning_rate",
        (*TRAIN, "optimizer.learning_rate=1e-3"),
        unfinished(),
        longer=8,
    ),
    Case("other data in the same folder", 2, "data", TRAIN, unfinished(rows(*[PAIR] * 40)), longer=8),
    Case("a finished run again", 0, "holds a finished run", TRAIN, finished()),
    Case(
        "the disk is full at the second save",
        2,
        "older checkpoints are as they were",
        TRAIN,
        around=full_disk,
    ),
    Case(
        "a tracker that is not installed",
        2,
        "wandb",
        (*TRAIN, "track.report_to=wandb"),
        environment={"WANDB_MODE": "offline"},
    ),
    Case("report of a folder that is no run", 2, "no run directory", ("report", "model")),
    Case("report of no folder", 2, "no run directory", ("report", "runs/none")),
    Case("eval of a folder that is no run", 2, "no run directory", ("eval", "model")),
    Case(
        "eval on data that is not there",
        2,
        "does not exist",
        ("eval", "run", "--data", "more.jsonl"),
        finished(),
    ),
    Case("chat with a folder that is no run", 2, "no run directory", ("chat", "model")),
    Case(
        "chat with a run that has no model yet",
        2,
        "final/",
        ("chat", "run"),
        finished(lambda folder: shutil.rmtree(folder / "run/final")),
    ),
    Case("export of a folder that is no run", 2, "no run directory", ("export", "model")),
    Case(
        "export to nonsense",
        2,
        "merged, adapter",
        ("export", "run", "--to", "nonsense"),
        finished(),
        process=True,
    ),
    Case(
        "export of a checkpoint that is not there",
        2,
        "checkpoint-000099",
        ("export", "run", "--checkpoint", "checkpoint-000099"),
        finished(),
    ),
    Case(
        "export of a run without its plan",
        2,
        "plan.json",
        ("export", "run"),
        finished(lambda folder: (folder / "run/plan.json").unlink()),
    ),
]

BUDGETS = [
    Case("a time budget that is too short", 3, "budget.time", ("train", "recipe.yaml", "budget.time=1s")),
    Case("a token budget below one step", 3, "budget.tokens", ("train", "recipe.yaml", "budget={tokens: 5}")),
    Case(
        "too little host memory",
        3,
        "cheapest change: train.",
        (*PLAN, "budget.host_memory=0.9GB", "train={per_device_train_batch_size: 500}"),
        rows(*[LONG] * 800),
        process=True,
    ),
    Case("host memory that nothing fits", 3, "Take a smaller model", (*PLAN, "budget.host_memory=50MB")),
    Case("too little disk", 3, "cheapest change", (*TRAIN, "budget.disk=100kB")),
    Case(
        "energy that cannot be measured",
        2,
        "cannot be measured on this machine",
        (*TRAIN, "budget={energy: 1kWh}"),
        around=without_energy_counters,
    ),
    Case(
        "a rate at which the held-out loss is not finite",
        4,
        "optimizer.learning_rate=",
        (*TRAIN, "adapter=null", "optimizer.learning_rate=1e30", "optimizer.max_grad_norm=null"),
    ),
    Case(
        "a rate that diverges",
        4,
        "gradient norm",
        (
            *TRAIN,
            "adapter=null",
            "eval.every=1000",
            "optimizer.learning_rate=1e30",
            "optimizer.max_grad_norm=null",
        ),
    ),
]
