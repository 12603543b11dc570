"""DPO against its formula on whole logits, what the reference is, and what a wrong constant would change."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from shoestring.data import TokenRows, collate, make_rows
from shoestring.models import use_packed_attention
from shoestring.ops import use_fused, use_int8_weights
from shoestring.recipes import DpoObjective, LoraAdapter, SftThenDpoObjective
from shoestring.recipes.errors import UserError
from shoestring.train.dpo import Reference, label_log_probs, per_answer, preference_metrics, reference_kind
from shoestring.train.objectives import LossModule, build_objective
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

PAIRS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def model(folder: Path) -> LlamaForCausalLM:
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    use_packed_attention(loaded)
    return loaded


@pytest.fixture(scope="module")
def rows() -> TokenRows:
    draw = np.random.default_rng(0)
    tokens, trained, second = [], [], []
    for _ in range(PAIRS):
        prompt = draw.integers(0, 20, size=draw.integers(2, 9))
        answers = [draw.integers(0, 20, size=draw.integers(1, 9)) for _ in range(2)]
        tokens.append(np.concatenate([prompt, answers[0], prompt, answers[1]]).astype(np.int32))
        second.append(len(prompt) + len(answers[0]))
        mask = np.zeros(len(tokens[-1]), np.bool_)
        mask[len(prompt) : second[-1]] = True
        mask[second[-1] + len(prompt) :] = True
        trained.append(mask)
    return make_rows(tokens, trained, second=second)


def shifted(model: nn.Module, scale: float = 0.05) -> nn.Module:
    """The same model with other weights where it is trained."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)
    return model


def log_prob(model: nn.Module, tokens: np.ndarray, trained: np.ndarray) -> tuple[Tensor, int]:
    """Of one answer, from all logits in float64: the sum over its tokens, and how many they are."""
    logits = model(input_ids=torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].double()
    total = torch.zeros((), dtype=torch.float64)
    for position in range(1, len(tokens)):
        if trained[position]:
            total = total + logits[position - 1].log_softmax(-1)[int(tokens[position])]
    return total, int(trained.sum())


def by_the_formula(
    policy: nn.Module,
    reference: nn.Module,
    rows: TokenRows,
    indices: list[int],
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
) -> tuple[Tensor, dict[str, float]]:
    """Equation 7 of arXiv:2305.18290, a pair at a time."""
    loss = torch.zeros((), dtype=torch.float64)
    sums = {"correct": 0.0, "margin": 0.0, "chosen_reward": 0.0, "rejected_reward": 0.0}
    for index in indices:
        (chosen, length), (rejected, _) = (log_prob(policy, *side) for side in rows.sequences(index))
        with torch.no_grad():
            (fixed_chosen, _), (fixed_rejected, _) = (
                log_prob(reference, *side) for side in rows.sequences(index)
            )
        rewards = beta * (chosen - fixed_chosen), beta * (rejected - fixed_rejected)
        margin = rewards[0] - rewards[1]
        right, wrong = torch.sigmoid(margin).log(), torch.sigmoid(-margin).log()
        loss = loss - (1 - label_smoothing) * right - label_smoothing * wrong
        loss = loss - sft_weight * chosen / length
        sums["correct"] += float(margin > 0)
        sums["margin"] += margin.item()
        sums["chosen_reward"] += rewards[0].item()
        sums["rejected_reward"] += rewards[1].item()
    return loss, sums


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beta": 0.7},
        {"label_smoothing": 0.2, "beta": 0.5},
        {"sft_weight": 0.3},
        {"beta": 2.0, "label_smoothing": 0.1, "sft_weight": 1.5},
    ],
)
def test_the_loss_is_the_formula(
    model: LlamaForCausalLM,
    rows: TokenRows,
    settings: dict[str, float],
    packed: bool,
    own_head: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if own_head:
        monkeypatch.setattr("shoestring.train.dpo.head_is_plain", lambda model: False)
    start = copy.deepcopy(model)
    objective = build_objective(DpoObjective(**settings), model)
    assert objective.per == "row"
    assert objective.reference is not None
    objective.reference.set(model)
    shifted(model)
    indices = [3, 0, 4]
    loss, sums = LossModule(model, objective)(objective.collate(rows, indices, packed=packed))
    loss.backward()
    ours = gradients(model)
    expected, expected_sums = by_the_formula(model, start, rows, indices, **settings)
    expected.backward()
    theirs = gradients(model)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert {name: float(value) for name, value in sums.items()} == pytest.approx(expected_sums, rel=1e-4)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert (gradient - theirs[name]).norm() <= 1e-4 * theirs[name].norm() + 1e-7, name


MUTATIONS = {
    "beta": {"beta": 0.2},
    "smoothing": {"label_smoothing": 0.0},
    "sft": {"sft_weight": 0.2},
}


@pytest.mark.parametrize("mutation", [*MUTATIONS, "sign", "mean", "no reference"])
def test_a_wrong_constant_shows(model: LlamaForCausalLM, rows: TokenRows, mutation: str) -> None:
    """The reference itself with one thing wrong differs by far more than the comparison allows."""
    start = copy.deepcopy(model)
    shifted(model)
    right = {"beta": 0.1, "label_smoothing": 0.1, "sft_weight": 0.1}
    indices = list(range(PAIRS))
    expected, _ = by_the_formula(model, start, rows, indices, **right)
    wrong: Tensor
    if mutation in MUTATIONS:
        wrong, _ = by_the_formula(model, start, rows, indices, **{**right, **MUTATIONS[mutation]})
    elif mutation == "sign":
        wrong, _ = by_the_formula(start, model, rows, indices, **right)
    elif mutation == "no reference":
        wrong, _ = by_the_formula(model, model, rows, indices, **right)
    else:
        wrong = expected / PAIRS
    assert abs(wrong.item() - expected.item()) > 1e-3 * expected.item()


def test_answers_are_summed_not_averaged(model: LlamaForCausalLM, rows: TokenRows) -> None:
    batch = collate(rows, [2, 1], packed=True)
    got = per_answer(label_log_probs(model)(model, batch), batch)
    expected = [[log_prob(model, *side)[0].item() for side in rows.sequences(k)] for k in (2, 1)]
    torch.testing.assert_close(
        got.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-4
    )


def test_at_the_start_the_loss_is_log_two_and_moves_the_answers_apart(
    model: LlamaForCausalLM, rows: TokenRows
) -> None:
    objective = build_objective(DpoObjective(beta=0.5), model)
    assert objective.reference is not None
    objective.reference.set(model)
    batch = collate(rows, list(range(PAIRS)), packed=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses, margins = [], []
    for _ in range(8):
        loss, sums = objective.loss(model, batch)
        (loss / PAIRS).backward()
        optimizer.step()
        optimizer.zero_grad()
        measured = objective.metrics(
            loss.item(), PAIRS, **{name: float(value) for name, value in sums.items()}
        )
        losses.append(measured["loss"])
        margins.append(measured["margin"])
        assert measured["margin"] == pytest.approx(
            measured["chosen_reward"] - measured["rejected_reward"], abs=1e-5
        )
    assert losses[0] == pytest.approx(np.log(2.0), rel=1e-6)
    assert margins[0] == 0.0
    assert losses[-1] < losses[0] - 0.05
    assert margins == sorted(margins)
    assert measured["accuracy"] == 1.0


def test_metrics_are_means_over_pairs() -> None:
    assert preference_metrics(2.0, 4, correct=3.0, margin=6.0, chosen_reward=2.0, rejected_reward=-4.0) == {
        "loss": 0.5,
        "accuracy": 0.75,
        "margin": 1.5,
        "chosen_reward": 0.5,
        "rejected_reward": -1.0,
    }


def with_lora(model: Any, **given: Any) -> Any:
    torch.manual_seed(1)
    settings = {"r": 4, "lora_dropout": 0.3, "target_modules": ["q_proj", "v_proj"], **given}
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    use_fused(wrapped)
    return wrapped.train()


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_adapter_off_is_the_frozen_start(folder: Path, rows: TokenRows, use_dora: bool) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    use_packed_attention(base)
    model = with_lora(base, use_dora=use_dora)
    batch = collate(rows, [0, 1, 2], packed=True)
    references = {kind: Reference(kind, model) for kind in ("adapter_off", "frozen")}
    for reference in references.values():
        reference.set(model)
    log_probs = label_log_probs(model)
    before = log_probs(model.eval(), batch).detach()
    shifted(model.train())
    flags = [p.requires_grad for p in model.parameters()]
    for kind, reference in references.items():
        with reference.applied(model):
            found = log_probs(model, batch)
        assert not found.requires_grad
        torch.testing.assert_close(found, before, rtol=1e-5, atol=1e-5, msg=kind)
        assert [p.requires_grad for p in model.parameters()] == flags
        assert model.training
    assert references["adapter_off"].state_dict() == {}
    assert len(references["frozen"].state_dict()) == sum(flags)
    # dropout is at work in the model and not in its reference
    later = Reference("frozen", model)
    later.set(model)
    with torch.no_grad():
        assert not torch.equal(log_probs(model, batch), log_probs(model, batch))
        expected = log_probs(model.eval(), batch)
    with later.applied(model.train()):
        assert torch.equal(log_probs(model, batch), expected)


def test_what_is_off_keeps_its_gradients_off(folder: Path) -> None:
    """Block-wise rules train a part of the adapter at a time: the pass must not wake the rest."""
    model = with_lora(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    adapters = [p for p in model.parameters() if p.requires_grad]
    adapters[0].requires_grad_(False)
    with Reference("adapter_off", model).applied(model):
        pass
    assert [p.requires_grad for p in adapters] == [False] + [True] * (len(adapters) - 1)


def test_autocast_keeps_no_cast_of_the_reference(model: LlamaForCausalLM, rows: TokenRows) -> None:
    """Casts of weights are kept within autocast: those of the reference must not be the model's."""
    start = copy.deepcopy(model)
    objective = build_objective(DpoObjective(beta=1.0), model)
    assert objective.reference is not None
    objective.reference.set(model)
    shifted(model, scale=0.2)
    indices = [0, 1, 2]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = objective.loss(model, collate(rows, indices, packed=True))
    loss.backward()
    ours = gradients(model)
    expected, _ = by_the_formula(model, start, rows, indices, beta=1.0)
    expected.backward()
    theirs = gradients(model)
    assert loss.item() == pytest.approx(expected.item(), rel=0.1)
    assert ours.keys() == theirs.keys()
    for name in ("model.layers.0.mlp.up_proj.weight", "lm_head.weight"):
        cosine = torch.nn.functional.cosine_similarity(ours[name].flatten(), theirs[name].flatten(), dim=0)
        assert cosine > 0.98, name


def test_the_frozen_reference_is_part_of_a_checkpoint(model: LlamaForCausalLM, rows: TokenRows) -> None:
    batch = collate(rows, [0, 1], packed=False)
    first = build_objective(DpoObjective(), model)
    assert first.reference is not None
    first.reference.set(model)
    saved = {name: tensor.clone() for name, tensor in first.reference.state_dict().items()}
    shifted(model)
    expected, _ = first.loss(model, batch)
    second = build_objective(DpoObjective(), model)
    assert second.reference is not None
    with pytest.raises(RuntimeError, match="was not set"):
        second.loss(model, batch)
    second.reference.load_state_dict(saved)
    assert float(second.loss(model, batch)[0]) == float(expected)
    assert float(expected) != pytest.approx(2 * np.log(2.0), abs=1e-6)
    with pytest.raises(ValueError, match=r"lm_head|model\."):
        second.reference.load_state_dict({"other": torch.zeros(1)})


def test_weights_in_int8_have_a_reference_too(model: LlamaForCausalLM, rows: TokenRows) -> None:
    batch = collate(rows, [0, 1], packed=True)
    reference = Reference("frozen", model)  # built before the weights are quantised, as a run does
    assert use_int8_weights(model, 32)
    reference.set(model)
    log_probs = label_log_probs(model)
    with torch.no_grad():
        before = log_probs(model, batch)
        weight: Any = model.model.layers[0].self_attn.q_proj.weight
        weight.copy_(weight.dequantise(torch.float32) + 0.1)
        moved = log_probs(model, batch)
    saved = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    reference.load_state_dict(saved)
    with reference.applied(model):
        found = log_probs(model, batch)
    assert torch.equal(found, before)
    assert torch.equal(log_probs(model, batch), moved)
    assert not torch.equal(moved, before)


def test_an_error_inside_leaves_the_model_as_it_was(model: LlamaForCausalLM) -> None:
    reference = Reference("frozen", model)
    reference.set(model)
    shifted(model.train())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(KeyError), reference.applied(model):
        raise KeyError("inside")
    assert model.training
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_batch_without_pairs(model: LlamaForCausalLM, rows: TokenRows) -> None:
    objective = build_objective(DpoObjective(sft_weight=1.0), model)
    assert objective.reference is not None
    objective.reference.set(model)
    loss, sums = objective.loss(model, collate(rows, [], packed=True))
    loss.backward()
    assert float(loss) == 0.0
    assert all(float(value) == 0.0 for value in sums.values())
    assert not any(gradient.any() for gradient in gradients(model).values())


@pytest.mark.parametrize(
    ("adapter", "kind"),
    [
        (None, "frozen"),
        ({}, "adapter_off"),
        ({"init_lora_weights": "gaussian"}, "adapter_off"),
        ({"init_lora_weights": "orthogonal"}, "adapter_off"),
        ({"init_lora_weights": "eva"}, "adapter_off"),
        ({"init_lora_weights": "pissa"}, "frozen"),
        ({"init_lora_weights": "pissa_niter_4"}, "frozen"),
        ({"init_lora_weights": "olora"}, "frozen"),
        ({"init_lora_weights": "loftq"}, "frozen"),
        ({"modules_to_save": ["lm_head"]}, "frozen"),
        ({"bias": "all"}, "frozen"),
    ],
)
def test_auto_takes_the_base_only_where_it_is_the_start(adapter: dict[str, Any] | None, kind: str) -> None:
    given = None if adapter is None else LoraAdapter(**adapter)
    assert reference_kind(DpoObjective(), given) == kind
    assert reference_kind(DpoObjective(reference="frozen"), given) == "frozen"
    if kind == "frozen" and not (adapter or {}).get("modules_to_save"):
        with pytest.raises(
            UserError, match=r"objective.reference: adapter_off .*\n  Set objective.reference=froz"
        ):
            reference_kind(DpoObjective(reference="adapter_off"), given)


def test_two_objectives_in_a_row_are_built_one_by_one(model: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="one by one"):
        build_objective(SftThenDpoObjective(), model)


@pytest.mark.slow
def test_a_run_of_dpo_prefers_what_was_chosen(tmp_path: Path) -> None:
    """Chosen answers end in one word, rejected ones in another: held-out pairs show that it is learned."""
    from shoestring.train.run import train_recipe

    draw = np.random.default_rng(0)
    with (tmp_path / "pairs.jsonl").open("w") as file:
        for _ in range(96):
            prompt, chosen, rejected = (" ".join(draw.choice(tiny.WORDS, size=4)) for _ in range(3))
            row = {"prompt": prompt, "chosen": f"{chosen} five", "rejected": f"{rejected} sun"}
            file.write(json.dumps(row) + "\n")
    recipe = tiny.recipe(
        tmp_path,
        data={"train": str(tmp_path / "pairs.jsonl"), "eval": 0.2},
        objective={"name": "dpo", "beta": 0.5},
        budget={"steps": 30},
        train={"batch_tokens": 512},
    )
    assert train_recipe(str(recipe), [], fresh=False, started=time.monotonic()) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval_loss_before"] == pytest.approx(np.log(2.0), rel=1e-4)
    assert summary["eval_loss"] < 0.4
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    last = [event for event in events if event.get("kind") == "eval"][-1]
    assert last["accuracy"] > 0.9
    assert last["margin"] > 0.5
