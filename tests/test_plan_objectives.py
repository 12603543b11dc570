"""What objectives cost: pairs, a reference, a teacher, and several stages in one budget."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from plan_cases import Meter, machine, pairs, recipe, rows, tiny_facts, tiny_folder
from plan_cases import make_tiny_plan as plan
from shoestring.data.rows import make_rows
from shoestring.models.facts import ModelFacts, build_skeleton
from shoestring.optimizers import build_optimizer
from shoestring.plan import Plan, data_facts, defaults, joined_reasons, largest, largest_phases, make_plan
from shoestring.plan.objectives import extra_of, reference_is_frozen
from shoestring.recipes import DpoObjective
from shoestring.recipes.errors import BudgetError, UserError

DPO = "objective=dpo"
FIXED = ("train.batch_tokens=4096", "budget.time=null", "budget.steps=100")


def distill(**options: Any) -> str:
    given = {"name": "distill", "teacher": tiny_folder(), **options}
    return "objective={" + ", ".join(f"{key}: {value}" for key, value in given.items()) + "}"


# Pairs


def test_facts_of_pairs_are_of_two_sequences() -> None:
    tokens = [np.arange(10, dtype=np.int32), np.arange(6, dtype=np.int32)]
    trained = [np.isin(tokens[0], (3, 8, 9)), np.isin(tokens[1], (2, 5))]
    facts = data_facts(
        replace(make_rows(tokens, trained), second=np.array([4, 3], np.int32)),
        replace(make_rows(tokens[:1], trained[:1]), second=np.array([7], np.int32)),
    )
    assert facts.lengths.tolist() == [10, 6]
    assert sorted(facts.sequences.tolist()) == [3, 3, 4, 6]
    assert (facts.longest, facts.longest_sequence, facts.padded_row) == (10, 7, 14)
    assert facts.typical_length == pytest.approx((16 + 36 + 9 + 9) / 16)
    assert [facts.longer_than(length) for length in (2, 3, 5, 6)] == [2, 1, 1, 0]
    short = facts.clipped(4)
    assert (short.lengths.tolist(), short.longest_sequence) == ([8, 6], 4)
    assert short.trained.tolist() == [3, 2]
    assert short.eval_lengths.tolist() == [7]
    plain = data_facts(make_rows(tokens, trained), make_rows([], []))
    assert (plain.longest, plain.longest_sequence, plain.padded_row) == (10, 10, 10)


def test_lengths_bound_a_sequence_and_memory_holds_a_pair() -> None:
    data = pairs(longest=6000)  # two sequences of 4,000 and 2,000: the model ends at 4,096
    made = plan(DPO, data=data)
    assert (made.max_length, made.longest_row) == (4000, 4000)
    cut = plan(DPO, "data.max_length=1000", data=data)
    assert (cut.max_length, cut.longest_row) == (1000, 4000)
    long = Meter(per_token=1e6)
    packed = plan(DPO, "train.per_device_train_batch_size=1", data=data, on=machine(host=99.0), measure=long)
    padded = plan(
        DPO, "train.per_device_train_batch_size=1", data=data, on=machine(host=99.0), can_pack=False
    )
    assert packed.micro_tokens == 6000
    assert padded.micro_tokens == 8000
    assert long.asked[0].row_length == round(data.typical_length)


def test_rows_cut_for_memory_are_read_again_shorter() -> None:
    made = plan(on=machine(host=3.6), measure=Meter(per_token=8e6), data=rows(longest=4096))
    assert (made.max_length, made.longest_row) == (2048, 4096)


# dpo


def test_dpo_pays_for_the_reference_and_for_its_head_again() -> None:
    sft, dpo = plan(*FIXED, data=pairs()), plan(*FIXED, DPO, data=pairs())
    assert dpo.step_seconds / sft.step_seconds == pytest.approx(4 / 3, rel=0.01)  # the meter's forward: 1/3
    assert dpo.timeline["evaluations"] == pytest.approx(2 * sft.timeline["evaluations"])
    assert dpo.reasons["objective"].endswith("its pass is 25% of a step")
    assert "objective" not in sft.reasons
    assert dpo.learning_rate == pytest.approx(0.1 * sft.learning_rate, rel=0.05)
    assert dpo.reasons["learning_rate"].endswith("; on pairs 0.1 of that")


def test_the_output_head_runs_again_for_the_reference_or_teacher_and_in_dpos_backward_pass() -> None:
    def seconds(*objective: str) -> float:
        data = pairs() if DPO in objective else rows()
        return plan(*FIXED, *objective, data=data, measure=Meter(seconds=0.0, head=1e-3)).step_seconds

    plain, on_pairs = (
        seconds(),
        plan(*FIXED, data=pairs(), measure=Meter(seconds=0.0, head=1e-3)).step_seconds,
    )
    assert seconds(DPO) / on_pairs == pytest.approx(5 / 3, rel=0.01)
    assert seconds(distill()) / plain == pytest.approx(4 / 3, rel=0.01)
    assert seconds(distill(top_k=8, teacher_logits="stored")) == pytest.approx(plain, rel=0.01)


def test_a_frozen_reference_is_a_copy_of_what_is_trained() -> None:
    once = ("checkpoint.every=50%", *FIXED)
    for adapter in ((), ("adapter=null",)):
        off = plan(*once, *adapter, data=pairs())
        frozen = plan(*once, *adapter, "objective={name: dpo, reference: frozen}", data=pairs())
        size = 4 * off.trained_parameters
        assert frozen.memory["host"]["reference"] == size
        assert frozen.snapshot_bytes - off.snapshot_bytes == 2 * size  # so do both snapshots
        assert frozen.predicted_host_bytes - off.predicted_host_bytes == 3 * size
        assert frozen.disk_bytes - off.disk_bytes == 2 * size  # both checkpoints hold it
    assert "reference" not in plan(*FIXED, DPO, data=pairs()).memory["host"]


ADAPTERS = (
    "adapter=lora",
    "adapter=null",
    "adapter={name: lora, init_lora_weights: pissa}",
    "adapter={name: lora, init_lora_weights: orthogonal}",
    "adapter={name: lora, bias: all}",
    "adapter={name: lora, modules_to_save: [embed_tokens]}",
)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_which_reference_agrees_with_training(adapter: str) -> None:
    from shoestring.train.dpo import reference_kind

    wanted = recipe(adapter).adapter
    for reference in (None, "frozen"):
        config = DpoObjective(reference=reference)
        assert reference_is_frozen(config, wanted) == (reference_kind(config, wanted) == "frozen")


@pytest.mark.parametrize("adapter", ["adapter=lora", "adapter=null"])
def test_the_reference_takes_what_training_really_copies(adapter: str) -> None:
    from shoestring.adapters import attach
    from shoestring.models.weights import load_model
    from shoestring.train.dpo import Reference

    wanted, facts = recipe(adapter, "objective={name: dpo, reference: frozen}"), tiny_facts()
    made = plan(adapter, "objective={name: dpo, reference: frozen}", data=pairs())
    dtype = getattr(torch, made.dtype)
    model = load_model(facts, wanted.model, device=torch.device("cpu"), dtype=dtype)
    trained = attach(model, wanted.adapter, facts, seed=0)
    reference = Reference("frozen", trained)
    reference.set(trained)
    copied = sum(tensor.nbytes for tensor in reference.state_dict().values())
    assert made.memory["host"]["reference"] == copied


# distill


def test_a_teacher_in_the_step_costs_its_weights_and_a_forward_pass() -> None:
    sft, online = plan(*FIXED), plan(*FIXED, distill())
    assert online.memory["host"]["teacher"] == 2 * tiny_facts().parameters  # bfloat16
    assert online.step_seconds / sft.step_seconds == pytest.approx(4 / 3, rel=0.01)
    assert online.memory["host"]["logits"] == 2 * sft.memory["host"]["logits"]
    assert online.timeline["evaluations"] == pytest.approx(2 * sft.timeline["evaluations"])
    assert "runs in every step and is 25% of it" in online.reasons["objective"]


def test_a_larger_teacher_costs_by_its_layers() -> None:
    facts = tiny_facts()
    layers = facts.parameters - facts.embedding_parameters
    larger = replace(
        facts, parameters=facts.parameters + layers, embedding_parameters=facts.embedding_parameters
    )
    extra = extra_of(recipe(distill(top_k=8, teacher_logits="stored")), facts, larger, itemsize=2)
    assert extra.teacher is not None
    assert extra.online is None
    assert extra.teacher.layers == pytest.approx(2.0)
    assert extra.teacher.bytes == 2 * larger.parameters
    assert extra.teacher.transient == 2 * (5 * 64 + 3 * 128)
    assert extra.teacher.bytes_per_target == 8 * (2 + 2) + 2
    wide = replace(facts, vocab_size=100_000)
    extra = extra_of(recipe(distill(top_k=8, teacher_logits="stored")), facts, wide, itemsize=2)
    assert extra.teacher is not None
    assert extra.teacher.bytes_per_target == 8 * (4 + 2) + 2


def test_stored_logits_are_a_pass_before_training_and_no_teacher_in_it() -> None:
    data = rows(count=400)
    sft, stored = plan(*FIXED, data=data), plan(*FIXED, distill(top_k=8, teacher_logits="stored"), data=data)
    assert stored.step_seconds == pytest.approx(sft.step_seconds)
    tokens = int(data.lengths.sum() + data.eval_lengths.sum())
    assert stored.timeline["teacher"] == pytest.approx(tokens * 1e-3 / 3, rel=0.01)
    assert sft.timeline["teacher"] == 0.0
    targets = int(data.trained.sum() + data.eval_trained.sum())
    assert stored.disk_bytes - sft.disk_bytes == targets * (8 * 4 + 2)
    assert "teacher" not in stored.memory["host"]  # training is the peak
    assert stored.phases["teacher"] > 0
    assert sum(stored.timeline.values()) == pytest.approx(stored.finish_seconds)
    assert "runs once over" in stored.reasons["objective"]
    with pytest.raises(BudgetError, match=r"the teacher's logits .*\n.*objective\.top_k"):
        plan(distill(top_k=8, teacher_logits="stored"), on=machine(disk=0.002))


def test_a_teacher_that_is_not_there_is_named_by_its_key() -> None:
    with pytest.raises(UserError, match=r"^objective\.teacher"):
        plan("objective={name: distill, teacher: ./no-such-folder}")


# Stages


def test_a_stage_gets_its_share_of_each_kind_of_limit() -> None:
    for budget in (("budget=60min",), ("budget.time=null", "budget.tokens=2M")):
        whole = plan(*budget, "train.batch_tokens=2048")
        part = plan(*budget, "train.batch_tokens=2048", share=0.25)
        assert part.tokens_in_budget == pytest.approx(0.25 * whole.tokens_in_budget, rel=0.02)
        assert part.finish_seconds == pytest.approx(whole.finish_seconds, rel=0.02)
        assert sum(part.timeline.values()) == pytest.approx(part.finish_seconds)
    assert plan("budget.time=null", "budget.steps=400", share=0.25).steps == 100
    assert plan("budget.time=null", "budget.epochs=4", share=0.25).epochs == pytest.approx(1.0, rel=0.02)
    small, large = plan("budget=20h", share=0.05), plan("budget=20h", share=0.95)
    assert small.batch_tokens < large.batch_tokens
    assert small.learning_rate != large.learning_rate
    slow = replace(machine(), given_rates=replace(machine().rates, copy=1e6))  # updates want large batches
    short = plan("budget=10min", "eval.samples=0", share=0.25, on=slow)
    assert short.reasons["batch_tokens"].startswith("so that a step takes at most")
    assert short.step_seconds <= 1.01 * defaults.MAX_STEP_SHARE * 0.25 * 600
    for share in (0.0, 1.1):
        with pytest.raises(ValueError, match="share is"):
            plan(share=share)


def test_stages_are_planned_one_by_one() -> None:
    with pytest.raises(ValueError, match="planned stage by stage"):
        plan("objective=sft_then_dpo", "data.preferences=pairs.jsonl")


def test_memory_of_stages_is_that_of_the_larger_one() -> None:
    sft = plan(*FIXED, measure=Meter(per_token=2e6))
    dpo = plan(*FIXED, "objective={name: dpo, reference: frozen}", data=pairs())
    assert largest([sft, dpo]) == sft.memory
    assert largest([dpo]) == dpo.memory
    phases = largest_phases([sft, dpo])
    assert phases["train"] == sft.phases["train"] > dpo.phases["train"]
    assert phases["export"] == dpo.phases["export"] > sft.phases["export"]
    reasons = joined_reasons({"sft": sft, "dpo": dpo})
    assert reasons["dtype"] == sft.reasons["dtype"]
    assert reasons["dpo.objective"] == dpo.reasons["objective"]
    assert reasons["sft.learning_rate"] != reasons["dpo.learning_rate"]
    assert "learning_rate" not in reasons


# Energy, and what the optimizer gets


def test_energy_alone_is_planned_by_a_guess_that_is_called_one() -> None:
    measured = replace(machine(), watts_source="rapl")
    made = plan("budget.time=null", "budget.energy=0.1 kWh", on=measured)
    assert made.finish_seconds == pytest.approx(360_000 / 80, rel=0.02)
    assert made.reasons["finish"] == "ends by budget.energy (80 W is a guess)"
    with pytest.raises(BudgetError) as caught:
        plan("budget.time=null", "budget.energy=100 J", on=measured)
    text = str(caught.value)
    assert text.startswith("budget.energy  2.77778e-05 kWh lasts 1 s at 80 W, a guess")
    proposed = text.split("budget.energy=")[1].split()[0]
    assert plan("budget.time=null", f"budget.energy={proposed}", on=measured).steps >= 10


def test_weight_decay_without_a_plan_is_none() -> None:
    model = torch.nn.Linear(4, 4)
    assert recipe().optimizer.weight_decay is None
    groups = build_optimizer(model, recipe().optimizer).param_groups
    assert {group["weight_decay"] for group in groups} == {0.0}
    decided = recipe().optimizer.model_copy(update={"weight_decay": 0.03})
    assert max(group["weight_decay"] for group in build_optimizer(model, decided).param_groups) == 0.03


def test_plans_of_before_still_load() -> None:
    plain = plan().to_json()
    del plain["weight_decay"]
    assert Plan.from_json(plain).weight_decay == 0.0


# Refusals


def larger_facts() -> ModelFacts:
    """The tiny model sixteen times as wide: its optimizer state is not lost among the libraries."""
    facts = tiny_facts()
    config = copy.deepcopy(facts.config)
    config.hidden_size, config.intermediate_size, config.head_dim = 1024, 2048, 256
    model = build_skeleton(config)
    return replace(
        facts,
        config=config,
        parameters=sum(p.numel() for p in model.parameters()),
        parameter_shapes=tuple((name, tuple(p.shape)) for name, p in model.named_parameters()),
    )


def test_full_training_that_does_not_fit_may_take_apollo_mini() -> None:
    facts = larger_facts()

    def refusal(*overrides: str) -> str:
        with pytest.raises(BudgetError) as caught:
            make_plan(
                recipe("train.activation_checkpointing=true", "data.max_length=400", *overrides),
                machine(),
                facts,
                rows(),
                world_size=1,
                measure=Meter(per_token=1e4),
                libraries=10**9,
                can_pack=True,
            )
        return str(caught.value)

    # Two moments of 4 bytes are 8 a parameter; APOLLO-Mini leaves those of the embedding.
    text = refusal("adapter=null", "offload.optimizer=device", "budget.host_memory=1.7GB")
    needed = float(text.split("needs ")[1].split(" GB")[0])
    found = re.search(r"optimizer=apollo_mini  -> (\d\.\d\d) GB, as quick", text)
    assert found is not None, text
    embedding = 1000 * 1024
    assert needed - float(found[1]) == pytest.approx(8 * (facts.parameters - embedding) / 1e9, abs=0.011)
    assert "apollo_mini" not in refusal("budget.host_memory=0.9GB")
    assert "apollo_mini" not in refusal("adapter=null", "optimizer=lion", "budget.host_memory=0.9GB")


def test_a_teacher_that_does_not_fit_may_speak_before_training() -> None:
    text = _refusal(distill(top_k=8), "budget.host_memory=1.10GB", "data.max_length=400")
    assert "objective.teacher_logits=stored" in text


def _refusal(*overrides: str) -> str:
    with pytest.raises(BudgetError) as caught:
        plan(*overrides)
    return str(caught.value)
