"""Objectives: what the head sees, that both losses agree, that evaluating needs no more, and a user's own."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from accelerate import Accelerator
from shoestring.data import Batch, TokenRows, collate, make_rows
from shoestring.models import use_packed_attention
from shoestring.recipes import load_recipe
from shoestring.recipes.errors import UserError
from shoestring.train import objectives, supervised
from shoestring.train.engine import NativeEngine
from shoestring.train.evaluation import evaluate
from shoestring.train.objectives import LossModule, build_objective, chunked_loss, own_head_loss
from shoestring.train.run import train_recipe
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaForCausalLM

PAGE = Path(__file__).parent.parent / "docs/objectives.md"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    folder = tiny.model_folder(tmp_path_factory.mktemp("tiny"))
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    use_packed_attention(loaded)
    return loaded


@pytest.fixture(scope="module")
def rows() -> TokenRows:
    draw = np.random.default_rng(0)
    lengths = draw.integers(4, 30, size=12)
    return make_rows(
        [draw.integers(0, 20, size=n).astype(np.int32) for n in lengths],
        [np.arange(n) >= max(1, n - draw.integers(1, 5)) for n in lengths],
    )


def whole_loss(model: nn.Module, rows: TokenRows, indices: list[int]) -> float:
    """From the definition: one row at a time, all logits, the trained positions picked out by a loop."""
    total = 0.0
    for index in indices:
        tokens, trained = rows.row(index)
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].double()
        for position in range(1, len(tokens)):
            if trained[position]:
                total -= float(logits[position - 1].log_softmax(-1)[int(tokens[position])])
    return total


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("loss", [chunked_loss, own_head_loss])
def test_the_loss_is_the_definition(
    model: LlamaForCausalLM, rows: TokenRows, loss: Any, packed: bool
) -> None:
    indices = [3, 0, 7, 5]
    got = loss(model, collate(rows, indices, packed=packed))
    assert got.item() == pytest.approx(whole_loss(model, rows, indices), rel=1e-5)


def test_both_losses_have_the_same_gradients(model: LlamaForCausalLM, rows: TokenRows) -> None:
    gradients = []
    for loss in (chunked_loss, own_head_loss):
        model.zero_grad()
        loss(model, collate(rows, [1, 2, 9], packed=True)).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    for ours, own in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)


def test_the_plain_head_is_chunked_and_another_keeps_its_own(model: LlamaForCausalLM) -> None:
    assert objectives.supervised_loss(model) is chunked_loss
    handle = model.lm_head.register_forward_hook(lambda _module, _inputs, output: output.tanh() * 5.0)
    try:
        assert objectives.supervised_loss(ScaledLogits(model)) is own_head_loss
    finally:
        handle.remove()


class ScaledLogits(nn.Module):
    """A model whose logits are not what its head alone gives, as in Granite or Gemma 2."""

    def __init__(self, inner: LlamaForCausalLM) -> None:
        super().__init__()
        self.inner = inner

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.lm_head

    def get_decoder(self) -> nn.Module:
        return self.inner.get_decoder()

    def forward(self, **inputs: Any) -> Any:
        output = self.inner(**inputs)
        output.logits = output.logits * 0.25
        return output


def test_positions_without_a_label_never_reach_the_head(
    model: LlamaForCausalLM, rows: TokenRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = collate(rows, list(range(12)), packed=True)
    assert len(batch.labels) < batch.n_tokens / 3
    seen: list[int] = []

    def spy(hidden: Tensor, weight: Tensor, labels: Tensor, **keys: Any) -> Tensor:
        seen.append(len(hidden))
        return real(hidden, weight, labels, **keys)

    real = supervised.cross_entropy_sum
    monkeypatch.setattr(supervised, "cross_entropy_sum", spy)
    handle = model.lm_head.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].shape[-2]))
    try:
        chunked_loss(model, batch)
        own_head_loss(model, batch)
    finally:
        handle.remove()
    assert seen == [len(batch.labels)] * 2


class Largest(TorchDispatchMode):
    """Remembers the most elements that one operation's result had, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def test_evaluating_keeps_sums_and_makes_nothing_larger_than_training(
    model: LlamaForCausalLM, rows: TokenRows
) -> None:
    accelerator = Accelerator(cpu=True)
    engine = NativeEngine(
        accelerator,
        LossModule(model, build_objective(load_objective("sft"), model)),
        torch.optim.AdamW(model.parameters()),
        autocast=False,
    )
    batch = collate(rows, [0, 1, 2, 3], packed=True)
    with Largest() as training:
        engine.forward_backward([batch], len(batch.labels), lambda: False)
    engine.optimizer.zero_grad()
    with Largest() as evaluating:
        result = evaluate(
            engine, accelerator, rows, compared=4, micro_tokens=batch.n_tokens, micro_rows=None, packed=True
        )
    assert evaluating.elements <= training.elements
    assert result.loss == pytest.approx(
        whole_loss(model, rows, list(range(12))) / result.trained_tokens, rel=1e-5
    )
    assert result.comparable_loss == pytest.approx(
        whole_loss(model, rows, [0, 1, 2, 3]) / len(batch.labels), rel=1e-5
    )


def load_objective(text: str) -> Any:
    given = ["model=m", "data=d.jsonl", "budget.steps=1", f"objective={text}"]
    return load_recipe("cpu-demo", given).recipe.objective


def example(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Write one of the page's programs into a folder and go there; the overrides of its command."""
    page = PAGE.read_text(encoding="utf-8")
    programs = re.findall(r"as a file `(\w+)\.py`.*?```python\n(.*?)```", page, flags=re.DOTALL)
    (code,) = [code for found, code in programs if found == name]
    (command,) = re.findall(rf"shoestring train my.yaml (objective={name}:.*)", page)
    (folder / f"{name}.py").write_text(code)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.path", [entry for entry in __import__("sys").path if entry])
    return str(command).split()


def test_the_example_of_the_page_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = example("smooth", tmp_path, monkeypatch)
    recipe = tiny.recipe(tmp_path, budget={"steps": 8})
    for name, overrides in (("plain", []), ("smooth", command)):
        given = [*overrides, f"output_dir={tmp_path / name}"]
        assert train_recipe(str(recipe), given, fresh=False, started=time.monotonic()) == 0
    plain, smooth = (
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("plain", "smooth")
    )
    assert smooth["eval_loss_before"] == pytest.approx(plain["eval_loss_before"], rel=1e-5)  # not smoothed
    assert smooth["eval_loss"] < smooth["eval_loss_before"]
    assert smooth["train_loss"] != plain["train_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["true", "false"])
def test_the_reward_model_of_the_page_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: str
) -> None:
    """Chosen answers hold one word, rejected ones another: rewards of held-out answers tell them apart."""
    command = example("reward", tmp_path, monkeypatch)
    draw = np.random.default_rng(0)
    with (tmp_path / "pairs.jsonl").open("w") as file:
        for _ in range(120):
            prompt, answer = (" ".join(draw.choice(tiny.WORDS, size=4)) for _ in range(2))
            row = {"prompt": prompt, "chosen": f"{answer} five", "rejected": f"{answer} sun"}
            file.write(json.dumps(row) + "\n")
    recipe = tiny.recipe(
        tmp_path,
        data={"train": "left to the command", "eval": 0.2},
        budget={"steps": 30},
        train={"batch_tokens": 768},
        eval={"samples": 0},
    )
    given = [*command, f"data.packing={packing}"]
    assert train_recipe(str(recipe), given, fresh=False, started=time.monotonic()) == 0
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    measured = [event for event in events if event.get("kind") == "eval"]
    assert measured[0]["loss"] == pytest.approx(np.log(2.0), abs=0.1)
    assert measured[-1]["loss"] < 0.3
    assert measured[-1]["accuracy"] > 0.9
    assert measured[-1]["margin"] > 1.0


def test_a_loss_without_gradient_stops_at_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "silent.py").write_text(
        "from shoestring.data import collate\n"
        "from shoestring.train.objectives import loss_metrics as metrics, own_head_loss\n"
        "class Silent:\n"
        "    collate, metrics = staticmethod(collate), staticmethod(metrics)\n"
        "    loss = staticmethod(lambda model, batch: own_head_loss(model, batch) * 0.0)\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no trained weight has a gradient"):
        train_recipe(
            str(tiny.recipe(tmp_path)), ["objective=silent:Silent"], fresh=False, started=time.monotonic()
        )


@pytest.mark.parametrize(
    ("code", "name", "says"),
    [
        ("", "Missing", "cannot be imported"),
        ("class Half:\n    loss = print\n", "Half", "has no function collate, metrics"),
        ("import nonesuch\n", "X", "No module named 'nonesuch'"),
        (
            "class Odd:\n    collate = loss = metrics = print\n    per = 'batch'\n",
            "Odd",
            "has per='batch'; allowed: token, row",
        ),
    ],
)
def test_what_is_wrong_with_an_objective(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: LlamaForCausalLM, code: str, name: str, says: str
) -> None:
    module = f"mine_{name.lower()}"
    (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=says):
        build_objective(load_objective(f"{module}:{name}"), model)


def test_an_empty_batch_is_a_loss_of_zero_with_a_gradient(model: LlamaForCausalLM, rows: TokenRows) -> None:
    batch: Batch = collate(rows, [], packed=True)
    loss = chunked_loss(model, batch)
    loss.backward()
    assert float(loss) == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    model.zero_grad()
