"""PEFT's other tuners: each starts at the base, is counted, trained, merged and stored; options by field."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import tiny
import torch
from peft import PeftModel
from shoestring.adapters import (
    adapter_config,
    adapter_lines,
    attach,
    compare_logits,
    frozen_factors,
    load_adapter_state,
    looks_at_rows,
    merge_in_place,
    on_meta,
    save_adapter,
    trainable_parameters,
)
from shoestring.adapters.tuners import option_fields
from shoestring.models import load_model, read_facts
from shoestring.models.facts import build_skeleton
from shoestring.optimizers import build_optimizer, set_rate, state_bytes
from shoestring.optimizers.roles import slots
from shoestring.plan import alternatives
from shoestring.plan.trained import find_trained
from shoestring.recipes import (
    AdamMini,
    AdamW,
    AdamW8bit,
    Apollo,
    BudgetError,
    ModelConfig,
    Muon,
    UserError,
    load_recipe,
)
from shoestring.recipes.peft_adapter import NOT_ON_4BIT, PeftAdapter, PeftType
from shoestring.train.run import train_recipe
from test_train_run import losses, summary, weights
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config, Qwen2ForCausalLM

IDS = torch.arange(48).reshape(2, 24) % 23
OPTIONS: dict[str, dict[str, Any]] = {
    "c3a": {"block_size": 16},
    "fourierft": {"n_frequency": 50},
    "gralora": {"r": 4, "gralora_k": 2},
    "ia3": {},
    "oft": {"oft_block_size": 16},
    "road": {"group_size": 16},
    "supertuning": {},
    "tinylora": {"r": 2, "u": 8},
    "vblora": {"r": 2, "num_vectors": 16, "vector_length": 32, "topk": 2},
    "waveft": {"n_frequency": 60},
}
TYPES: tuple[str, ...] = get_args(PeftType)
ON_4BIT = [name for name in TYPES if name not in NOT_ON_4BIT]
# q and o are 64 x 64, k and v 32 x 64, gate and up 128 x 64, down 64 x 128, in two layers
IN_AND_OUT = 2 * (2 * 128 + 2 * 96 + 3 * 192)
COUNTS = {
    "hira": 4 * IN_AND_OUT,
    "hra": 2 * 4 * (6 * 64 + 128),  # r vectors as long as the input
    "ia3": 2 * (2 * 64 + 2 * 32 + 2 * 128 + 128),  # one number an output, of down_proj an input
    "loha": 2 * 4 * IN_AND_OUT,  # two products of rank r
    "miss": 2 * 4 * (2 * 64 + 2 * 32 + 2 * 128 + 64),  # r rows as long as the output
    "road": 2 * 2 * (2 * 64 + 2 * 32 + 2 * 128 + 64) // 2,  # an angle and a length for each pair of outputs
    "tinylora": 2 * 7 * 8,  # u numbers a matrix
    "vera": 2 * (7 * 4 + 2 * 64 + 2 * 32 + 2 * 128 + 64),  # r numbers and one an output
    "waveft": 2 * 7 * 60,
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small are many times slower when several threads share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("base"))


def load(folder: Path, dtype: torch.dtype = torch.float32, four_bit: bool = False) -> tuple[Any, Any]:
    recipe = ModelConfig(model_name_or_path=str(folder), load_in_4bit=four_bit)
    facts = read_facts(recipe)
    return load_model(facts, recipe, device=torch.device("cpu"), dtype=dtype).eval(), facts


def adapter(name: str, **keys: Any) -> PeftAdapter:
    return PeftAdapter(peft_type=name, **{"options": OPTIONS.get(name, {"r": 4}), **keys})  # type: ignore[arg-type]


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    out: Tensor = model.eval()(input_ids=ids).logits.float()
    return out


def trained(model: Any, steps: int = 3, rate: float = 3e-2) -> list[float]:
    """The loss before each of some steps of AdamW; the model is changed."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    found = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def merges(model: Any, dtype: torch.dtype, ids: Tensor = IDS) -> bool:
    before = logits(model, ids)
    merged = merge_in_place(model)
    assert not any("base_layer" in name for name, _ in merged.named_parameters())
    assert merged.dtype == dtype
    return bool(compare_logits(before, logits(merged, ids), dtype=dtype)["within_tolerance"])


@pytest.mark.parametrize("name", TYPES)
def test_it_is_counted_trained_stored_and_merged(name: str, folder: Path, tmp_path: Path) -> None:
    base, facts = load(folder)
    before = logits(base)
    model: Any = attach(base, adapter(name), facts, seed=0)
    # a bank of random vectors is all that vblora is made of, so it starts near the base
    assert (logits(model) - before).abs().max() < (2e-2 if name == "vblora" else 1e-5)
    shapes = {slot.name: slot.shape for slot in slots(model)}
    planned = on_meta(adapter(name), facts)
    assert {slot.name: slot.shape for slot in slots(planned)} == shapes
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable_parameters(adapter(name), facts) == count
    assert COUNTS.get(name, count) == count
    assert frozen_factors(planned) == frozen_factors(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert f"{name}: {count:,} trained numbers" in adapter_lines(model, adapter(name))[0]
    losses = trained(model)
    assert losses[-1] < losses[0]
    after = logits(model)
    assert (after - before).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.equal(logits(model), before)

    save_adapter(model, tmp_path, portable=True)
    again: Any = attach(load(folder)[0], adapter(name), facts, seed=0, saved=adapter_config(model))
    load_adapter_state(again, tmp_path)
    assert torch.equal(logits(again), after)
    plain = PeftModel.from_pretrained(load(folder)[0], tmp_path)
    torch.testing.assert_close(logits(plain), after, rtol=1e-4, atol=1e-5)
    assert merges(model, torch.float32)
    assert merges(again, torch.float32)


@pytest.mark.parametrize("name", TYPES)
def test_what_is_not_stored_follows_from_the_seed(name: str, folder: Path) -> None:
    """A resumed run builds the adapter anew and loads what was trained alone."""
    states = []
    for noise in (1, 2):
        base, facts = load(folder)
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        states.append(attach(base, adapter(name), facts, seed=7).state_dict())
        assert torch.equal(torch.get_rng_state(), before)
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


@pytest.mark.parametrize("name", TYPES)
def test_a_bfloat16_base(name: str, folder: Path) -> None:
    base, facts = load(folder, torch.bfloat16)
    before = logits(base)
    model: Any = attach(base, adapter(name), facts, seed=0)
    assert (logits(model) - before).abs().max() < 2e-2
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    trained(model)
    assert (logits(model) - before).abs().max() > 2e-2
    assert merges(model, torch.bfloat16)


@pytest.mark.parametrize("name", ON_4BIT)
def test_a_4bit_base(name: str, folder: Path) -> None:
    base, facts = load(folder, torch.bfloat16, four_bit=True)
    before = logits(base)
    model: Any = attach(base, adapter(name), facts, seed=0)
    assert (logits(model) - before).abs().max() < 2e-2
    losses = trained(model)
    assert losses[-1] < losses[0]
    assert merges(model, torch.bfloat16)


@pytest.mark.parametrize("name", NOT_ON_4BIT)
def test_types_that_4bit_weights_exclude_are_refused_before_loading(
    name: str, folder: Path, tmp_path: Path
) -> None:
    recipe = tiny.recipe(tmp_path, adapter={"name": "peft", "peft_type": name})
    with pytest.raises(UserError, match=rf"peft_type={name} cannot be trained on .*take one of c3a"):
        load_recipe(str(recipe), ["model.load_in_4bit=true"])
    base, facts = load(folder, four_bit=True)
    with pytest.raises(UserError, match=rf"adapter.peft_type: {name} cannot be trained on packed 4-bit"):
        attach(base, adapter(name), facts, seed=0)


@pytest.mark.parametrize("name", ["ia3", "road", "oft", "glora"])
def test_biases_are_merged_too(name: str) -> None:
    """Types that scale or turn outputs change the bias as well."""
    config = Qwen2Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
    )
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        base = Qwen2ForCausalLM(config).to(dtype)
        for key, value in base.named_parameters():
            if key.endswith("bias"):
                torch.nn.init.normal_(value, std=0.3)
        model = attach(base, adapter(name), facts_of(config), seed=0)
        trained(model)
        assert merges(model, dtype)


def facts_of(config: Any) -> Any:
    class Facts:
        source, parameters, tied = "org/model", 0, True

        def skeleton(self) -> Any:
            return build_skeleton(config)

    return Facts()


def test_modules_and_layers_are_chosen_for_every_type(folder: Path) -> None:
    """Types whose configuration cannot exclude modules or choose layers get whole names."""
    base, facts = load(folder)
    chosen = adapter("ia3", layers_to_transform=[1], exclude_modules=["down_proj", "o_proj"])
    names = [slot.name for slot in slots(attach(base, chosen, facts, seed=0))]
    assert len(names) == 5
    assert all(".layers.1." in name and "down_proj" not in name for name in names)
    expression = adapter("vera", target_modules=r".*\.[qv]_proj")
    assert trainable_parameters(expression, facts) == 2 * (2 * 4 + 64 + 32)
    with pytest.raises(UserError, match="'wo' matches no module"):
        trainable_parameters(adapter("vera", target_modules=["wo"]), facts)
    with pytest.raises(UserError, match="there is no layer 9"):
        trainable_parameters(adapter("vera", layers_to_transform=[9]), facts)
    assert not looks_at_rows(chosen)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("vera", {"rank": 8}, r"options\.rank is no option of vera.*\n.*r, projection_prng_key, vera_dropout"),
    ("vera", {"d_inital": 0.1}, r"options\.d_inital is no option of vera.   Did you mean d_initial \?"),
    ("vera", {"r": "8"}, r"options\.r is '8', .*valid integer.*\n.*default is 256"),
    ("deft", {"decomposition_method": "x"}, r"decomposition_method is 'x', .*'relu' or 'qr'"),
    ("vera", {"target_modules": ["q_proj"]}, r"decided by shoestring.*\n.*there is adapter\.target_modules"),
    ("vera", {"task_type": "SEQ_CLS"}, r"options\.task_type is decided by shoestring"),
    ("vera", {"inference_mode": True}, r"options\.inference_mode is decided by shoestring"),
    ("loha", {"init_weights": False}, r"options\.init_weights is decided by shoestring"),
    ("ia3", {"init_ia3_weights": False}, r"options\.init_ia3_weights is decided by shoestring"),
    ("oft", {"bias": "all"}, r"options\.bias is decided by shoestring.*\n.*there is nothing: leave it out"),
    ("vblora", {"save_only_topk_weights": True}, r"save_only_topk_weights is decided by shoestring"),
    ("c3a", {"block_size": 7}, r"PEFT's c3a does not take block_size: 7 for this model: .*factor"),
    ("c3a", {}, r"PEFT's c3a does not take its defaults for this model: .*256"),
    ("vera", {"r": 0}, r"PEFT's vera does not take r: 0"),
    ("psoft", {"r": 500}, r"PEFT's psoft does not take r: 500 .*less than or equal to"),
    ("road", {"variant": "road_9"}, r"PEFT's road does not take variant: road_9 .*road_1, road_2 or road_4"),
    ("hra", {"r": 3}, r"options\.r is 3; hra starts at the base model only with an even one"),
]


@pytest.mark.parametrize(("name", "options", "text"), WRONG)
def test_a_wrong_option_is_told(name: str, options: dict[str, Any], text: str, folder: Path) -> None:
    facts = read_facts(ModelConfig(model_name_or_path=str(folder)))
    with pytest.raises(UserError, match=text):
        trainable_parameters(adapter(name, options=options), facts)


def test_a_layer_that_a_type_cannot_wrap_is_told() -> None:
    small = GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=96, n_positions=64)
    for name in ("loha", "hra", "peanut", "psoft"):
        with pytest.raises(UserError, match=rf"PEFT's {name} does not take .*Conv1D"):
            trainable_parameters(adapter(name), facts_of(small))
    assert trainable_parameters(adapter("vera"), facts_of(small)) > 0


def test_no_type_offers_what_the_recipe_decides() -> None:
    decided = {"target_modules", "modules_to_save", "bias", "init_weights", "peft_type", "task_type"}
    for name in TYPES:
        assert not decided & set(option_fields(name))


@pytest.mark.parametrize("name", ["vera", "oft", "c3a", "miss"])
@pytest.mark.parametrize("kind", [AdamW, AdamW8bit, Apollo, Muon])
def test_optimizers_step_where_there_are_no_matrices_or_stacks_of_them(
    kind: Any, name: str, folder: Path
) -> None:
    """vera has vectors alone, c3a stacks; the state that the plan counts is the state there is."""
    base, facts = load(folder)
    model: Any = attach(base, adapter(name), facts, seed=0)
    config = kind()
    optimizer: Any = build_optimizer(model, config, seed=0)
    set_rate(optimizer, 1e-2)
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = [p.detach() for p in model.parameters() if p.requires_grad]
    moved = sum(int(not torch.equal(a, b)) for a, b in zip(before, after, strict=True))
    assert moved >= len(before) // 2
    held = {
        id(value): value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    }
    counted = state_bytes(config, slots(on_meta(adapter(name), facts)), torch.float32)
    if kind is not AdamW8bit:  # whose tables and steps are kept by bitsandbytes
        assert counted == sum(held.values())


def test_an_optimizer_that_cannot_says_so(folder: Path) -> None:
    base, facts = load(folder)
    with pytest.raises(UserError, match=r"adam_mini cannot tell the blocks of .*c3a_kernel"):
        build_optimizer(attach(base, adapter("c3a"), facts, seed=0), AdamMini(), seed=0)


def test_the_plan_knows_what_is_trained_and_held(folder: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(tiny.recipe(tmp_path, adapter={"name": "peft", "peft_type": "randlora",
                                                            "options": {"r": 8}}))).recipe  # fmt: skip
    facts = read_facts(recipe.model)
    found = find_trained(recipe, facts)
    model = attach(load(folder)[0], recipe.adapter, facts, seed=0)
    assert found.own == ()
    assert found.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.factors == sum(b.numel() for name, b in model.named_buffers() if "randlora_" in name) > 0


@pytest.mark.parametrize(("name", "offered"), [("hira", True), ("hra", False)])
def test_4_bits_are_not_proposed_where_the_type_excludes_them(
    name: str, offered: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned, tried = alternatives._planned, []

    def recorded(text: str, *given: Any) -> Any:
        tried.append(text)
        return planned(text, *given)

    monkeypatch.setattr(alternatives, "_planned", recorded)
    recipe = tiny.recipe(tmp_path, adapter={"name": "peft", "peft_type": name, "options": {"r": 4}})
    given = ("budget.host_memory=500MB", f"output_dir={tmp_path / 'run'}")
    with pytest.raises(BudgetError, match="does not fit"):
        train_recipe(str(recipe), given, fresh=False, started=time.monotonic())
    assert "optimizer=adamw_8bit" in tried
    assert ("model.load_in_4bit=true" in tried) is offered


RUNS: dict[str, dict[str, Any]] = {"vera": {"r": 16, "d_initial": 1.0}, "oft": {"oft_block_size": 16}}


@pytest.mark.parametrize("name", RUNS)
def test_a_paused_run_goes_on_to_the_bit_and_both_exports_load(name: str, tmp_path: Path) -> None:
    section = {"name": "peft", "peft_type": name, "options": RUNS[name]}
    recipe = tiny.recipe(tmp_path, adapter=section, budget={"steps": 6}, eval={"samples": 0})

    def train(run: str, *overrides: str, pause_at: float | None = None) -> int:
        given = (f"output_dir={tmp_path / run}", *overrides)
        return train_recipe(str(recipe), given, fresh=False, started=time.monotonic(), pause_at=pause_at)

    assert train("whole") == 0
    whole, paused = tmp_path / "whole", tmp_path / "paused"
    assert summary(whole)["eval_loss"] < summary(whole)["eval_loss_before"]
    train("paused", "export.final=adapter", pause_at=0.5)
    assert not (paused / "final").exists()
    torch.manual_seed(999)
    assert train("paused", "export.final=adapter") == 0
    assert losses(paused) == losses(whole)
    assert weights(paused) == weights(whole)
    merged = AutoModelForCausalLM.from_pretrained(whole / "final", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    config = json.loads((paused / "final/adapter_config.json").read_text())
    assert config["peft_type"] == name.upper()
    before = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, paused / "final"))
    assert (adapted - before).abs().max() > 1e-3
    torch.testing.assert_close(logits(merged), adapted, rtol=1e-4, atol=1e-5)
