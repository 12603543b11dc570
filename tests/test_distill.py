"""Distillation with real models: online and stored agree, a store outlives a kill, a student comes nearer."""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import time
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import tiny
import torch
from shoestring.data import TokenRows, make_rows
from shoestring.models import read_facts, use_packed_attention
from shoestring.recipes import DistillObjective, ModelConfig
from shoestring.recipes.errors import UserError
from shoestring.train import teacher_store
from shoestring.train.objectives import build_objective
from shoestring.train.teacher import OnlineTeacher, StoredTeacher, open_teacher
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A student and a teacher of other weights and another depth."""
    folder = tmp_path_factory.mktemp("models")
    student = tiny.model_folder(folder / "student", layers=1, seed=1)
    teacher = tiny.model_folder(folder / "teacher", layers=2, seed=2)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # a teacher that is sure of something
    model.save_pretrained(teacher)
    return student, teacher


def load(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    use_packed_attention(model)
    return model


def some_rows(count: int = 9, seed: int = 0) -> TokenRows:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(3, 25, size=count)
    return make_rows(
        [draw.integers(0, 20, size=n).astype(np.int32) for n in lengths],
        [np.arange(n) >= max(1, n - draw.integers(1, 9)) for n in lengths],
    )


def opened(folders: tuple[Path, Path], rows: list[TokenRows], cache: Path | None = None, **given: Any) -> Any:
    config = DistillObjective(teacher=str(folders[1]), **given)
    model = ModelConfig(model_name_or_path=str(folders[0]))
    teacher = open_teacher(
        config,
        read_facts(model),
        model,
        rows,
        device=CPU,
        dtype=torch.float32,
        packed=True,
        micro_tokens=40,
        cache_dir=cache,
    )
    return config, teacher


def by_definition(
    student: nn.Module, teacher: nn.Module, rows: TokenRows, indices: list[int], **given: Any
) -> Tensor:
    """Row by row, position by position, from all logits in float64."""
    alpha, temperature = given["alpha"], given["temperature"]
    loss = torch.zeros((), dtype=torch.float64)
    for index in indices:
        tokens, trained = rows.row(index)
        ids = torch.from_numpy(tokens.astype(np.int64))[None]
        z, t = (model(input_ids=ids).logits[0].double() for model in (student, teacher))
        for position in range(1, len(tokens)):
            if trained[position]:
                log_p = (z[position - 1] / temperature).log_softmax(-1)
                log_q = (t[position - 1] / temperature).log_softmax(-1).detach()
                loss = loss + alpha * temperature**2 * (log_q.exp() * (log_q - log_p)).sum()
                loss = loss - (1 - alpha) * z[position - 1].log_softmax(-1)[int(tokens[position])]
    return loss


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize("top_k", [None, "all"])
def test_the_loss_is_the_formula(
    folders: tuple[Path, Path], packed: bool, own_head: bool, top_k: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if own_head:
        monkeypatch.setattr("shoestring.train.distill.head_is_plain", lambda model: False)
        monkeypatch.setattr("shoestring.train.teacher.head_is_plain", lambda model: False)
    rows, student = some_rows(), load(folders[0])
    vocabulary = student.config.vocab_size
    config, teacher = opened(folders, [rows], alpha=0.7, temperature=2.0, top_k=vocabulary if top_k else None)
    objective = build_objective(config, student, teacher=teacher)
    assert objective.per == "token"
    indices = [4, 0, 7]
    loss, sums = objective.loss(student, objective.collate(rows, indices, packed=packed))  # type: ignore[misc]
    expected = by_definition(student, load(folders[1]), rows, indices, alpha=0.7, temperature=2.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient(student, loss), gradient(student, expected), rtol=1e-3, atol=1e-5)
    measured = objective.metrics(loss.item(), 10, **{name: float(value) for name, value in sums.items()})
    assert measured["loss"] == pytest.approx(
        0.7 * 4.0 * measured["kl"] + 0.3 * measured["cross_entropy"], rel=1e-5
    )
    assert measured["perplexity"] == pytest.approx(np.exp(measured["cross_entropy"]))


def test_from_itself_there_is_nothing_to_learn(folders: tuple[Path, Path]) -> None:
    rows, student = some_rows(), load(folders[1])
    config, teacher = opened(folders, [rows], alpha=1.0)
    objective = build_objective(config, student, teacher=teacher)
    loss, _ = objective.loss(student, objective.collate(rows, [0, 1, 2], packed=True))  # type: ignore[misc]
    assert abs(loss.item()) < 1e-4
    assert gradient(student, loss).abs().max() < 1e-4


@pytest.mark.parametrize("packed", [True, False])
def test_stored_equals_online(folders: tuple[Path, Path], tmp_path: Path, packed: bool) -> None:
    train, held = some_rows(), some_rows(5, seed=1)
    student = load(folders[0])
    given = {"alpha": 0.8, "temperature": 1.5, "top_k": 6}
    config, online = opened(folders, [train, held], **given)
    stored_config, stored = opened(folders, [train, held], tmp_path, teacher_logits="stored", **given)
    assert isinstance(online, OnlineTeacher)
    assert isinstance(stored, StoredTeacher)
    both = [build_objective(c, student, teacher=t) for c, t in ((config, online), (stored_config, stored))]
    for rows, indices in ((train, [4, 0, 7]), (held.part(2, 5), [1, 0]), (train, [])):
        losses = [
            objective.loss(student, objective.collate(rows, indices, packed=packed))[0]  # type: ignore[index]
            for objective in both
        ]
        assert losses[1].item() == pytest.approx(losses[0].item(), rel=2e-3)
        first, second = (gradient(student, loss) for loss in losses)
        assert (first - second).norm() <= 5e-3 * first.norm()
    with pytest.raises(KeyError, match="was not asked about this row"):
        stored.collate(some_rows(3, seed=9), [0], packed=packed)


def test_a_store_is_kept_for_later_runs(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = some_rows()
    given: dict[str, Any] = {"teacher_logits": "stored", "top_k": 3}
    _, first = opened(folders, [rows], tmp_path, **given)
    batch = first.collate(rows, [2, 3], packed=True)
    loads: list[int] = []
    real = __import__("shoestring.train.teacher", fromlist=["load_model"]).load_model
    monkeypatch.setattr(
        "shoestring.train.teacher.load_model", lambda *args, **keys: loads.append(1) or real(*args, **keys)
    )
    _, again = opened(folders, [rows], tmp_path, **given)
    assert not loads
    sent = pickle.loads(pickle.dumps(again)).collate(rows, [2, 3], packed=True)
    for name, tensor in batch.extra.items():
        assert torch.equal(tensor, sent.extra[name])
    # other rows, another k, another temperature: another store
    for rows_now, changed in ((some_rows(4, seed=3), {}), (rows, {"top_k": 4}), (rows, {"temperature": 2.0})):
        opened(folders, [rows_now], tmp_path, **{**given, **changed})
    assert len(loads) == 3
    # files that were cut are made again
    store = first.store
    os.truncate(store.path("log_probs"), 10)
    _, mended = opened(folders, [rows], tmp_path, **given)
    assert len(loads) == 4
    assert torch.equal(mended.collate(rows, [2], packed=True).extra["teacher_indices"],
                       batch.extra["teacher_indices"][: rows.trained_counts[2]])  # fmt: skip


def test_sizes_and_types_of_the_files(folders: tuple[Path, Path], tmp_path: Path) -> None:
    rows = some_rows()
    _, teacher = opened(folders, [rows], tmp_path, teacher_logits="stored", top_k=3)
    positions = int(rows.trained_counts.sum())
    sizes = {path.name: path.stat().st_size for path in teacher.store.folder.iterdir()}
    del sizes["store.json"]
    assert sizes == {
        "indices": 6 * positions,
        "log_probs": 6 * positions,
        "log_rest": 2 * positions,
        "done": 9,
    }
    wide = teacher_store.open_store(
        [rows], teacher="t", vocabulary=70_000, top_k=3, temperature=1.0, cache_dir=tmp_path
    )
    assert wide.map("indices").dtype == np.int32
    probabilities = np.exp(np.array(teacher.store.map("log_probs"), np.float64)).sum(axis=1)
    rest = np.exp(np.array(teacher.store.map("log_rest"), np.float64))
    assert np.allclose(probabilities + rest, 1.0, atol=2e-3)


def test_rows_that_are_twice_are_stored_once(folders: tuple[Path, Path], tmp_path: Path) -> None:
    rows = some_rows(4)
    _, teacher = opened(folders, [rows, rows.part(1, 3)], tmp_path, teacher_logits="stored", top_k=2)
    assert len(teacher.store.hashes) == 4


def test_what_was_done_stays_when_filling_stops(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = some_rows(40)
    monkeypatch.setattr(teacher_store, "_FLUSH_ROWS", 4)
    asked: list[int] = []
    real = OnlineTeacher.at

    def at(self: OnlineTeacher, batch: Any) -> Any:
        asked.extend(batch.rows)
        if len(asked) > limit:
            raise KeyboardInterrupt
        return real(self, batch)

    monkeypatch.setattr(OnlineTeacher, "at", at)
    limit = 20
    with pytest.raises(KeyboardInterrupt):
        opened(folders, [rows], tmp_path, teacher_logits="stored", top_k=3)
    first, limit = set(asked), 1000
    asked.clear()
    _, teacher = opened(folders, [rows], tmp_path, teacher_logits="stored", top_k=3)
    assert len(asked) < 40 - len(first) // 2
    assert first | set(asked) == set(range(40))
    monkeypatch.setattr(OnlineTeacher, "at", real)
    _, whole = opened(folders, [rows], tmp_path / "other", teacher_logits="stored", top_k=3)
    for name in ("indices", "log_probs", "log_rest", "done"):
        assert np.array_equal(teacher.store.map(name), whole.store.map(name)), name


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[1])
import test_distill
from pathlib import Path
from shoestring.train import teacher_store
teacher_store._FLUSH_ROWS = 4
real = teacher_store._ask
def slow(*given):
    print("asked", flush=True)
    time.sleep(0.05)
    return real(*given)
teacher_store._ask = slow
folders, rows = (Path(sys.argv[2]), Path(sys.argv[3])), test_distill.some_rows(60)
test_distill.opened(folders, [rows], Path(sys.argv[4]), teacher_logits="stored", top_k=3)
"""


@pytest.mark.slow
def test_a_killed_process_goes_on_where_it_was(folders: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = [str(Path(__file__).parent), *map(str, folders), str(tmp_path / "killed")]
    output = tmp_path / "output"
    process = forked.Popen([sys.executable, "-c", KILLED, *arguments], output=output)
    while not output.exists() or output.read_text().count("asked") < 8:
        assert process.poll() is None, output.read_text()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (store,) = (tmp_path / "killed" / "teacher").iterdir()
    done = np.fromfile(store / "done", np.uint8)
    assert 0 < done.sum() < 60
    rows = some_rows(60)
    _, resumed = opened(folders, [rows], tmp_path / "killed", teacher_logits="stored", top_k=3)
    _, whole = opened(folders, [rows], tmp_path / "whole", teacher_logits="stored", top_k=3)
    for name in ("indices", "log_probs", "log_rest", "done"):
        assert np.array_equal(resumed.store.map(name), whole.store.map(name)), name


def test_a_student_comes_nearer_to_its_teacher(folders: tuple[Path, Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows, held = some_rows(40), some_rows(10, seed=7)
    student = load(folders[0]).train()
    config, teacher = opened(
        folders, [rows, held], tmp_path, teacher_logits="stored", top_k=8, alpha=0.9, temperature=2.0
    )
    objective = build_objective(config, student, teacher=teacher)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)

    def distance() -> float:
        with torch.no_grad():
            return by_definition(
                student, load(folders[1]), held, list(range(10)), alpha=1.0, temperature=1.0
            ).item()

    before = distance()
    draw = np.random.default_rng(0)
    for _ in range(40):
        batch = objective.collate(rows, draw.integers(0, 40, size=12).tolist(), packed=True)
        loss, _ = objective.loss(student, batch)  # type: ignore[misc]
        (loss / len(batch.labels)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert distance() < 0.75 * before


def test_what_is_wrong_with_a_teacher(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    other = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
        )
    )
    other.save_pretrained(tmp_path / "other")
    rows = [some_rows(3)]
    vocabulary = load(folders[0]).config.vocab_size
    with pytest.raises(UserError) as caught:
        opened((folders[0], tmp_path / "other"), rows)
    assert str(caught.value) == (
        f"objective.teacher: {tmp_path / 'other'} has 50 tokens in its vocabulary, and the student "
        f"{folders[0]} has {vocabulary}; they must be the same.\n"
        "  Choose a teacher of the student's family, or objective=sft on the teacher's answers"
    )
    with pytest.raises(UserError, match=r"objective.teacher: .*nowhere"):
        opened((folders[0], tmp_path / "nowhere"), rows)
    with pytest.raises(UserError, match=rf"objective.top_k: 999 is more than the {vocabulary} tokens"):
        opened(folders, rows, top_k=999)
    with pytest.raises(UserError, match=r"stored needs objective.top_k(.|\n)*objective.top_k=64"):
        opened(folders, rows, tmp_path, teacher_logits="stored")
    usage = __import__("shutil").disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(
        UserError, match=r"objective.teacher_logits: stored needs 0.0 GB in (.|\n)*smaller objective.top_k"
    ):
        opened(folders, rows, tmp_path / "full", teacher_logits="stored", top_k=4)
    with pytest.raises(ValueError, match="distill needs a teacher"):
        build_objective(DistillObjective(teacher="x"), load(folders[0]))


@pytest.mark.slow
def test_a_run_of_distillation(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shoestring.train.run import train_recipe

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    results = {}
    for kind in ("online", "stored"):
        folder = tmp_path / kind
        folder.mkdir()
        recipe = tiny.recipe(
            folder,
            model={"model_name_or_path": str(folders[0]), "dtype": "float32"},
            objective={
                "name": "distill",
                "teacher": str(folders[1]),
                "top_k": 8,
                "teacher_logits": kind,
                "alpha": 0.9,
            },
        )
        assert train_recipe(str(recipe), [], fresh=False, started=time.monotonic()) == 0
        results[kind] = json.loads((folder / "run" / "summary.json").read_text())
        assert results[kind]["eval_loss"] < results[kind]["eval_loss_before"]
    assert results["stored"]["eval_loss"] == pytest.approx(results["online"]["eval_loss"], rel=1e-2)
