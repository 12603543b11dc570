"""The bad inputs: for each what is broken, the exit code, and words that its message must have."""

from __future__ import annotations

import json
import os
from pathlib import Path

from bad_input_files import (
    PAIR,
    RECIPE,
    Case,
    file,
    line,
    recipe,
    rows,
)
from bad_input_runs import BUDGETS, MODELS, RUNS
from bad_input_verbs import SPENDING, STATE

TRAIN, CHECK = (("train", "recipe.yaml"), ("check", "recipe.yaml"))
OFFLINE = {"HF_HUB_OFFLINE": "1"}
BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 8)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)


def _parquet(folder: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(
        pa.table({key: [value] * 2000 for key, value in PAIR.items()}), folder / "rows.parquet"
    )
    os.truncate(folder / "rows.parquet", 300)


RECIPES = [
    Case("unknown key", 2, "It is called adapter.r here", CHECK, line("r: 4", "rank: 4")),
    Case("misspelt section", 2, "Did you mean optimizer", CHECK, line("optimizer:", "optimiser:")),
    Case(
        "key in the wrong section",
        2,
        "schedule.warmup_steps",
        CHECK,
        line("steps: 4", "steps: 4, warmup_steps: 3"),
    ),
    Case(
        "axolotl's micro_batch_size",
        2,
        "per_device_train_batch_size",
        CHECK,
        recipe(RECIPE + "micro_batch_size: 2\n"),
    ),
    Case("LLaMA-Factory's cutoff_len", 2, "data.max_length", CHECK, recipe(RECIPE + "cutoff_len: 512\n")),
    Case("a text where a number belongs", 2, "adapter.r is 'four'", CHECK, line("r: 4", "r: four")),
    Case("an unknown unit", 2, "budget.time", ("check", "recipe.yaml", "budget.time=3 fortnights")),
    Case("a budget of epochs as time", 2, "budget.epochs=3", CHECK, line("{steps: 4}", "3 epochs")),
    Case("no budget", 2, "budget is missing", CHECK, line("budget: {steps: 4}\n", "")),
    Case("an empty budget", 2, "at least one of time", CHECK, line("budget: {steps: 4}", "budget: {}")),
    Case("cost without price", 2, "needs budget.price", CHECK, line("steps: 4", "cost: 2 USD")),
    Case("two currencies", 2, "different currencies", CHECK, line("steps: 4", "cost: 2 USD, price: 1 EUR/h")),
    Case("a negative budget", 2, "budget.time", ("check", "recipe.yaml", "budget.time=-3min")),
    Case("a key given twice", 2, "recipe.yaml:10", CHECK, recipe(RECIPE + "adapter: lora\n")),
    Case("a tab as indentation", 2, "tab", CHECK, recipe("model: model\ndata:\n\ttrain: chats.jsonl\n")),
    Case("broken YAML", 2, "recipe.yaml:", CHECK, line("steps: 4}", "steps: 4")),
    Case("an empty recipe", 2, "is empty", CHECK, recipe("")),
    Case("a recipe that is a list", 2, "is a list", CHECK, recipe("- model\n- data\n")),
    Case("no such recipe", 2, "Did you mean recipe.yaml", ("train", "recipes.yaml"), process=True),
    Case("a folder as recipe", 2, "model", ("train", "model")),
    Case("a recipe that is not UTF-8", 2, "UTF-8", CHECK, recipe(RECIPE.encode() + b"# caf\xe9\n")),
    Case("an alias bomb", 2, "recipe.yaml", CHECK, recipe(BOMB)),
    Case(
        "batch in tokens and in rows",
        2,
        "exclude each other",
        ("check", "recipe.yaml", "train.per_device_train_batch_size=2"),
    ),
    Case(
        "PiSSA on a 4-bit base",
        2,
        "pissa",
        ("check", "recipe.yaml", "model.load_in_4bit=true", "adapter.init_lora_weights=pissa"),
    ),
    Case(
        "4-bit without an adapter",
        2,
        "load_in_4bit",
        ("check", "recipe.yaml", "model.load_in_4bit=true", "adapter=null"),
    ),
    Case("an unknown preset", 2, "Did you mean cpu-demo", ("train", "cpu-dem")),
    Case("an unknown preset to copy", 2, "cpu-demo", ("new", "cpu-dem")),
    Case(
        "an override of an unknown key",
        2,
        "Did you mean optimizer.learning_rate",
        (*CHECK, "optimizer.learnin_rate=1"),
    ),
    Case("an override without =", 2, "KEY=VALUE", (*CHECK, "fresh")),
    Case("an override with a bad value", 2, "allowed", (*CHECK, "optimizer.name=adam")),
    Case("an override through a value", 2, "output_dir", (*CHECK, "output_dir.name=x")),
    Case("warm-up of a step and a half", 2, "whole number of steps", (*CHECK, "schedule.warmup_steps=1.5")),
    Case("a landing above the peak", 2, "schedule.min_factor", (*CHECK, "schedule.min_factor=2")),
    Case("a key of another schedule", 2, "polynomial", (*CHECK, "schedule={name: cosine, power: 2}")),
    Case("an unknown tracker", 2, "tensorboard", (*CHECK, "track.report_to=tensorbord")),
    Case("an objective that cannot be imported", 2, "cannot be imported", (*TRAIN, "objective=nowhere:mine")),
    Case("an objective without functions", 2, "collate, loss, metrics", (*TRAIN, "objective=json:dumps")),
    Case("a metric that is not measured", 2, "allowed: loss", (*TRAIN, "eval.metric_for_best_model=bleu")),
    Case(
        "an adapter target that matches nothing",
        2,
        "target_modules",
        (*TRAIN, "adapter.target_modules=[q_prj]"),
    ),
    Case("a layer that is not there", 2, "layers_to_transform", (*TRAIN, "adapter.layers_to_transform=[7]")),
    Case("an unknown verb", 2, "No such command", ("trian", "recipe.yaml")),
    Case("an unknown option", 2, "No such option", ("train", "recipe.yaml", "--frsh"), longer=12),
]

DATA = [
    Case("no such data file", 2, "does not exist", CHECK, line("chats.jsonl", "chat.jsonl")),
    Case("an empty data file", 2, "is empty", CHECK, file("chats.jsonl", "")),
    Case(
        "a broken line of JSON",
        2,
        "chats.jsonl:2",
        CHECK,
        file("chats.jsonl", json.dumps(PAIR) + '\n{"prompt": \n'),
    ),
    Case(
        "rows without an assistant's turn",
        2,
        "no assistant turn",
        CHECK,
        rows(
            *[{"messages": [{"role": "user", "content": "a bee"}]}] * 3,
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bee"}]},
        ),
    ),
    Case(
        "only rows without an assistant's turn",
        2,
        "none of 9 rows",
        (*CHECK, "data.on_bad_row=skip"),
        rows(*[{"messages": [{"role": "user", "content": "a bee"}]}] * 9),
    ),
    Case(
        "an unknown role",
        2,
        "unknown role",
        CHECK,
        rows({"messages": [{"role": "narrator", "content": "a bee"}]}),
    ),
    Case("unknown columns", 2, "no known format", CHECK, rows({"frage": "a", "antwort": "bee"})),
    Case(
        "preferences for sft",
        2,
        "preferences",
        CHECK,
        rows({"prompt": "a", "chosen": "bee", "rejected": "cat"}),
    ),
    Case(
        "a named column that is not there",
        2,
        "no column 'input'",
        (*CHECK, "data.columns={prompt: input, completion: completion}"),
        rows(PAIR),
    ),
    Case(
        "a CSV without the columns",
        2,
        "rows.csv",
        (*CHECK, "data.train=rows.csv"),
        file("rows.csv", "a,b\n1,2\n"),
    ),
    Case(
        "a CSV with a name twice",
        2,
        "repeated names",
        (*CHECK, "data.train=rows.csv"),
        file("rows.csv", "a,a\n1,2\n"),
    ),
    Case("a truncated parquet file", 2, "copied whole", (*CHECK, "data.train=rows.parquet"), _parquet),
    Case(
        "a kind of file that is not read",
        2,
        "does not read",
        (*CHECK, "data.train=rows.xlsx"),
        file("rows.xlsx", "PK"),
    ),
    Case("a glob that matches nothing", 2, "no file matches", (*CHECK, "data.train='*.parquet'")),
    Case("a glob as an override, not quoted", 2, "quotes", (*CHECK, "data.train=*.parquet")),
    Case(
        "a folder without data",
        2,
        "no file of a known kind",
        (*CHECK, "data.train=empty"),
        lambda folder: (folder / "empty").mkdir(),
    ),
    Case(
        "a package that is not installed",
        2,
        "no package",
        (*CHECK, "data.train=package:no_such_corpus/*.yml"),
    ),
    Case(
        "a path out of the package", 2, "below the package", (*CHECK, "data.train=package:yaml/../../*.jsonl")
    ),
    Case(
        "data that is not UTF-8",
        2,
        "chats.jsonl:1",
        CHECK,
        file("chats.jsonl", b'{"prompt": "caf\xe9", "completion": "a"}\n'),
    ),
    Case("data in UTF-16", 2, "UTF-16", CHECK, file("chats.jsonl", json.dumps(PAIR).encode("utf-16"))),
    Case(
        "a hub data set, offline",
        2,
        "Check id, split and connection",
        (*CHECK, "data.train=some/dataset"),
        environment={**OFFLINE, "HF_DATASETS_OFFLINE": "1"},
        process=True,
    ),
    Case("rows cut before their answers", 2, "max_length", (*CHECK, "data.max_length=3")),
    Case(
        "long rows refused",
        2,
        "longer than data.max_length",
        (*CHECK, "data.max_length=8", "data.on_long_row=error"),
    ),
    Case("a single row", 0, "nothing is held out", TRAIN, rows(PAIR), longer=99),
    Case(
        "one line of 65 MiB", 2, "MiB", CHECK, file("chats.jsonl", b'{"text": "' + b"a " * (33 << 20) + b'"}')
    ),
    Case("held-out rows that are not there", 2, "does not exist", (*CHECK, "data.eval=held.jsonl")),
    Case(
        "a template that is no template",
        2,
        "is not a Jinja template",
        (*CHECK, "model.chat_template_path=t.jinja"),
        file("t.jinja", "{% for m in messages %}"),
    ),
]

GROUPS: dict[str, list[Case]] = {
    "Recipes": RECIPES,
    "Data": DATA,
    "Models": MODELS,
    "Run directories": RUNS,
    "Budgets": BUDGETS,
    "Spending a budget in other ways": SPENDING,
    "Offload and engines": STATE,
}
CASES = [case for group in GROUPS.values() for case in group]
