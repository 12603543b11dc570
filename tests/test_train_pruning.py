"""Runs that prune: before training, and in rounds while it trains; `shoestring prune`; what is refused."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import forked
import forked_children
import pytest
import tiny
import torch
from safetensors.torch import load_file
from shoestring.models import read_facts
from shoestring.recipes import load_recipe, pruning_span
from shoestring.recipes.errors import UserError
from shoestring.train.cutting import calibration_batches
from shoestring.train.inspect import run_recipe, show_plan
from shoestring.train.prune_verb import prune_recipe
from shoestring.train.pruned import predicted_facts, trained_recipe
from shoestring.train.pruning_rounds import due
from shoestring.train.reexport import export_run
from shoestring.train.run import train_recipe
from transformers import AutoModelForCausalLM

FEW = {"calibration_tokens": 512}


def train(recipe: Path, *overrides: str, pause_at: float | None = None, fresh: bool = False) -> int:
    return train_recipe(str(recipe), overrides, fresh=fresh, started=time.monotonic(), pause_at=pause_at)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted(run.glob("checkpoint-*"))[-1] / "trained.safetensors")


def losses(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def size(folder: Path) -> int:
    return sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# Before training


@pytest.mark.parametrize(
    "pruning",
    [
        {"name": "cfsp", "ratio": 0.2},
        {"name": "flap", "ratio": 0.2, "parts": ["neurons", "groups"], "compensate": True},
        {"name": "shortgpt", "ratio": 0.45},
    ],
    ids=["refit", "groups and biases", "blocks"],
)
def test_an_adapter_is_trained_on_the_pruned_model(tmp_path: Path, pruning: dict[str, Any]) -> None:
    recipe = tiny.recipe(tmp_path, pruning=pruning | FEW)
    dense = size(tmp_path / "model")
    assert train(recipe) == 0
    run = tmp_path / "run"
    record = json.loads((run / "pruned/pruning.json").read_text())
    assert size(run / "pruned") == record["parameters"] < dense
    assert size(run / "final") == record["parameters"]
    assert record["refit"] == (pruning["name"] == "cfsp")  # where neurons leave uncompensated
    assert abs(1 - record["parameters"] / dense - pruning["ratio"]) < 0.1
    assert json.loads((run / "plan.json").read_text())["model"] == str(run / "pruned")
    assert "| pruned | " in (run / "final/README.md").read_text()
    # Any checkpoint of the run is exported from the pruned model too.
    export_run(run, to="merged", checkpoint="last", output=tmp_path / "again")
    assert same(load_file(tmp_path / "again/model.safetensors"), load_file(run / "final/model.safetensors"))


def test_a_pruned_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, pruning={"ratio": 0.2} | FEW)
    assert train(recipe, f"output_dir={tmp_path / 'whole'}") == 0
    assert train(recipe, pause_at=0.5) == 0
    made = (tmp_path / "run/pruned/model.safetensors").stat().st_mtime_ns
    assert train(recipe) == 0
    assert (tmp_path / "run/pruned/model.safetensors").stat().st_mtime_ns == made
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_run_stays_with_its_pruned_model(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, pruning={"ratio": 0.2} | FEW)
    assert train(recipe, pause_at=0.5) == 0
    first = size(tmp_path / "run/pruned")
    with pytest.raises(UserError, match=r"ratio was 0\.2, and is 0\.3"):
        train(recipe, "pruning.ratio=0.3")
    assert train(recipe, "pruning.ratio=0.3", fresh=True) == 0
    assert size(tmp_path / "run/pruned") < first


def test_a_killed_pruning_leaves_nothing_that_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny.recipe(tmp_path, pruning={"ratio": 0.2} | FEW)

    def power_cut(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shoestring.train.pruned.sync_folder", power_cut)
    with pytest.raises(KeyboardInterrupt):
        train(recipe)
    run = tmp_path / "run"
    assert not (run / "pruned").exists()
    assert any(path.name.startswith(".pruned.tmp") for path in run.iterdir())
    monkeypatch.undo()
    assert train(recipe) == 0
    assert not any(path.name.startswith(".pruned.tmp") for path in run.iterdir())


def test_recovery_by_the_dense_model_and_ranks_by_importance(tmp_path: Path) -> None:
    dense = tiny.model_folder(tmp_path / "model")
    recipe = tiny.recipe(
        tmp_path,
        pruning={"ratio": 0.2} | FEW,
        objective={"name": "distill", "teacher": str(dense)},
        adapter={"name": "lora", "r": 4, "rank_allocation": "block_influence"},
    )
    assert train(recipe) == 0
    trained = json.loads((tmp_path / "run/summary.json").read_text())
    assert trained["eval_loss"] < trained["eval_loss_before"]
    assert size(tmp_path / "run/final") < size(dense)


@pytest.mark.parametrize(
    "pruning",
    [
        {"ratio": 0.2},
        {"name": "flap", "ratio": 0.2, "parts": ["groups", "neurons"]},
        {"name": "shortgpt", "ratio": 0.3},
    ],
    ids=["neurons", "groups", "blocks"],
)
def test_the_plan_before_pruning_is_that_of_the_pruned_model(tmp_path: Path, pruning: dict[str, Any]) -> None:
    path = tiny.recipe(tmp_path, pruning=pruning | FEW)
    recipe = load_recipe(str(path), []).recipe
    dense = read_facts(recipe.model)
    predicted = predicted_facts(recipe, dense)
    prune_recipe(str(path), [], fresh=False)
    real = read_facts(trained_recipe(recipe, tmp_path / "run").model)
    assert predicted.parameters == real.parameters < dense.parameters
    assert dict(predicted.parameter_shapes) == dict(real.parameter_shapes)
    assert (predicted.layers, predicted.linear_modules) == (real.layers, real.linear_modules)
    assert dense.config.intermediate_size == 128  # the facts that were given are as they were


@pytest.mark.slow
def test_one_of_two_processes_prunes_and_both_train_what_it_wrote(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, pruning={"ratio": 0.2} | FEW)
    command = [sys.executable, "-c", forked_children.COMMAND, "train", str(recipe), "--num-processes", "2"]
    done = forked.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pruned by cfsp") == 1
    assert size(tmp_path / "run/final") == size(tmp_path / "run/pruned") < size(tmp_path / "model")


# While it trains


def full(folder: Path, **sections: Any) -> Path:
    return tiny.recipe(
        folder,
        **{"adapter": None, "budget": {"steps": 16}, "pruning": {"ratio": 0.2, "rounds": 3} | FEW} | sections,
    )


def test_the_model_shrinks_between_a_quarter_and_three_quarters(tmp_path: Path) -> None:
    assert train(full(tmp_path)) == 0
    run = tmp_path / "run"
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    rounds = [event["text"] for event in events if event["event"] == "prune"]
    assert [text[:12] for text in rounds] == ["round 1 of 3", "round 2 of 3", "round 3 of 3"]
    # 1 - (1 - i/3)^3 of a fifth: 14.1, 19.3 and 20 %, to the next whole neuron in each layer
    gone = [float(text.rpartition(", ")[2].partition("%")[0]) for text in rounds]
    assert gone == pytest.approx([14.1, 19.3, 20.0], abs=0.6)
    dense = size(tmp_path / "model")
    assert 1 - size(run / "final") / dense == pytest.approx(0.2, abs=0.006)
    before, after = (
        json.loads((run / "summary.json").read_text())[key] for key in ("eval_loss_before", "eval_loss")
    )
    assert after < before


@pytest.mark.parametrize("optimizer", ["adamw", "schedule_free_adamw"])
@pytest.mark.parametrize("pause", [0.4, 0.6])
def test_a_run_that_is_pruned_on_the_way_goes_on_to_the_bit(
    tmp_path: Path, optimizer: str, pause: float
) -> None:
    schedule = {"name": "constant" if optimizer.startswith("schedule_free") else "rex"}
    sections = {"optimizer": {"name": optimizer, "learning_rate": 1e-2}, "schedule": schedule}
    recipe = full(tmp_path, **sections)
    assert train(recipe, f"output_dir={tmp_path / 'whole'}") == 0
    assert train(recipe, pause_at=pause) == 0
    assert train(recipe) == 0
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    export_run(tmp_path / "run", to="merged", checkpoint="last", output=tmp_path / "again")
    assert size(tmp_path / "again") == size(tmp_path / "whole/final")


def test_layers_leave_on_the_way_too(tmp_path: Path) -> None:
    tiny.model_folder(tmp_path / "model", layers=6)
    recipe = full(tmp_path, pruning={"name": "shortgpt", "ratio": 0.5, "rounds": 3} | FEW)
    assert train(recipe, pause_at=0.6) == 0
    assert train(recipe) == 0
    config = json.loads((tmp_path / "run/final/config.json").read_text())
    assert config["num_hidden_layers"] == 3
    assert size(tmp_path / "run/final") < 0.6 * size(tmp_path / "model")


def test_rounds_are_spread_evenly_from_one_end_to_the_other() -> None:
    at = [due((0.25, 0.75), 3, progress) for progress in (0.0, 0.249, 0.25, 0.49, 0.5, 0.74, 0.75, 1.0)]
    assert at == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [due((0.5, 0.5), 4, progress) for progress in (0.49, 0.5)] == [0, 4]
    assert [due((0.5, 0.9), 1, progress) for progress in (0.49, 0.5)] == [0, 1]


def test_calibration_reads_rows_that_are_spread_over_all() -> None:
    import numpy as np
    from shoestring.data import TokenRows

    lengths = np.full(40, 30)
    rows = TokenRows(
        tokens=np.arange(1200, dtype=np.int32),
        trained=np.ones(1200, dtype=bool),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        trained_counts=lengths.astype(np.int32),
        source=np.zeros(40, dtype=np.int32),
    )
    (ids,) = calibration_batches(rows, 400, longest=100)
    assert ids.shape == (4, 100)
    assert ids[:, 0].tolist() == [0, 300, 600, 900]
    assert ids[1].tolist() == list(range(300, 400))
    (few,) = calibration_batches(rows.part(10, 12), 4000, longest=512)
    assert few.flatten().tolist() == list(range(300, 360))


@pytest.mark.parametrize("adapter", [None, "lora"], ids=["on the way", "before"])
def test_a_ratio_that_cannot_be_is_refused_before_anything_is_trained(tmp_path: Path, adapter: Any) -> None:
    recipe = tiny.recipe(tmp_path, adapter=adapter, pruning={"ratio": 0.9} | FEW)
    for verb in (lambda: show_plan(str(recipe), [], as_json=False), lambda: train(recipe)):
        with pytest.raises(UserError, match=r"0\.9 of all parameters cannot leave with neurons"):
            verb()
    metrics = tmp_path / "run/metrics.jsonl"
    assert not metrics.exists() or metrics.read_text() == ""


# The recipe


@pytest.mark.parametrize(
    ("sections", "span"),
    [
        ({"adapter": None}, (0.25, 0.75)),
        ({}, None),
        ({"adapter": None, "optimizer": "apollo"}, None),
        ({"adapter": None, "pruning": {"ratio": 0.2, "start": 0.0}}, None),
        ({"adapter": None, "pruning": {"ratio": 0.2, "start": 0.8}}, (0.8, 0.8)),
        ({"adapter": None, "pruning": {"ratio": 0.2, "end": 0.5}}, (0.25, 0.5)),
    ],
)
def test_when_a_recipe_prunes(tmp_path: Path, sections: dict[str, Any], span: Any) -> None:
    path = tiny.recipe(tmp_path, **{"pruning": {"ratio": 0.2}} | sections)
    assert pruning_span(load_recipe(str(path), []).recipe) == span


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"parts": ["blocks"]}, "cfsp does not judge blocks; allowed: neurons"),
        ({"name": "random", "parts": ["blocks", "neurons"]}, "blocks leave alone"),
        ({"refit": True, "compensate": True}, "excludes pruning.compensate=true"),
        ({"name": "shortgpt", "refit": True}, "excludes pruning.parts without neurons"),
        ({"name": "shortgpt", "compensate": True}, "nothing to compensate"),
        ({"start": 0.5}, "adapter=lora is tied to the shapes of now"),
        ({"start": 0.5, "end": 0.4}, "pruning.end=0.4 is before pruning.start=0.5"),
        ({"end": 0.1}, "pruning.end=0.1 is before pruning.start=0.25"),
        ({"ratio": 1.5}, "pruning.ratio"),
        ({"parts": []}, "pruning.parts"),
        ({"name": "wander"}, "wanda"),
        ({"rations": 0.2}, "pruning.ratio"),
    ],
)
def test_what_a_recipe_cannot_mean(tmp_path: Path, given: dict[str, Any], words: str) -> None:
    path = tiny.recipe(tmp_path, pruning={"ratio": 0.2} | given)
    with pytest.raises(UserError) as caught:
        load_recipe(str(path), [])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"optimizer": {"name": "apollo"}}, "optimizer.name=apollo has states that cannot be cut"),
        ({"optimizer": {"name": "adamw", "state_bits": 8}}, "adamw with state_bits=8 has states"),
        ({"optimizer": {"name": "adamw", "step_in_backward": True}}, "holds on to every weight"),
        ({"engine": "fsdp2"}, "engine=fsdp2 has cut the weights up itself"),
        ({"offload": {"optimizer": "disk"}}, "offload.optimizer=disk has fixed places"),
        ({"train": {"wta_crs_ratio": 0.3}}, "train.wta_crs_ratio replaces the layers"),
        ({"pruning": {"name": "flap", "ratio": 0.2, "start": 0.3, "parts": ["groups"]}}, "groups of heads"),
        ({"pruning": {"name": "flap", "ratio": 0.2, "start": 0.3, "compensate": True}}, "pruned once"),
    ],
)
def test_what_cannot_be_cut_on_the_way_says_so(tmp_path: Path, sections: dict[str, Any], words: str) -> None:
    given = {"adapter": None, "pruning": {"ratio": 0.2, "start": 0.3}} | sections
    with pytest.raises(UserError) as caught:
        load_recipe(str(tiny.recipe(tmp_path, **given)), [])
    assert words in str(caught.value)
    assert "Set pruning.start=0" in str(caught.value)


# The verb


def test_prune_shows_what_is_gained_and_training_goes_on_from_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny.recipe(tmp_path, pruning={"ratio": 0.2} | FEW)
    prune_recipe(str(recipe), [], fresh=False)
    said = capsys.readouterr().out
    rows = {line.split("  ")[1].strip(): line for line in said.splitlines() if line.startswith("  ")}
    assert {"parameters", "weights", "forward pass, one token", "held-out loss, untrained"} <= set(rows)
    assert "-20." in rows["parameters"]
    assert "-20." in rows["weights"]
    made = (tmp_path / "run/pruned/model.safetensors").stat().st_mtime_ns
    prune_recipe(str(recipe), [], fresh=False)
    assert "this pruned model already" in capsys.readouterr().out
    assert train(recipe) == 0
    assert (tmp_path / "run/pruned/model.safetensors").stat().st_mtime_ns == made
    assert run_recipe(tmp_path / "run").pruning is not None
    with pytest.raises(UserError, match=r"ratio was 0\.2, and is 0\.4"):
        prune_recipe(str(recipe), ["pruning.ratio=0.4"], fresh=False)
    prune_recipe(str(recipe), ["pruning.ratio=0.4"], fresh=True)
    assert size(tmp_path / "run/pruned") < size(tmp_path / "run/final")


def test_a_share_of_the_time_is_measured_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def half_in_neurons(*_: Any, **__: Any) -> Any:  # of so small a model, times measured are chance
        return lambda neurons, groups, blocks: 1e-3 + 1e-3 * neurons / 128

    monkeypatch.setattr(sys.modules["shoestring.pruning.prune"], "measure_times", half_in_neurons)
    given = {"ratio": 0.1, "ratio_of": "latency", "latency_tokens": 64}
    recipe = tiny.recipe(tmp_path, pruning=given | FEW)
    prune_recipe(str(recipe), [], fresh=False)
    said = " ".join(capsys.readouterr().out.split())
    assert "10.2% of the time foreseen, " in said
    assert "% measured), by 512 tokens" in said
    record = json.loads((tmp_path / "run/pruned/pruning.json").read_text())
    assert record["ratio_of"] == "latency"
    assert record["latency"]["tokens"] == 64
    assert len(record["neurons"][0]) == 102  # a fifth of the neurons, rounded up, are a tenth of the time


def test_prune_says_what_is_missing(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path)
    with pytest.raises(UserError, match="prunes nothing"):
        prune_recipe(str(recipe), [], fresh=False)
    with pytest.raises(UserError, match=r"pruning\.start=0"):
        prune_recipe(str(recipe), ["adapter=null", "pruning.ratio=0.2"], fresh=False)
