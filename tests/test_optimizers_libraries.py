"""Optimizers from libraries: each against its published rule in float64, bytes, resume, refusals."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from shoestring.checkpoint import load_optimizer_state, optimizer_state
from shoestring.optimizers import build_optimizer, parameter_groups, set_rate
from shoestring.optimizers.from_libraries import (
    averaged_weights,
    build_from_library,
    end_at_averaged_weights,
    library_state_bytes,
)
from shoestring.recipes import load_recipe
from shoestring.recipes.errors import UserError
from shoestring.recipes.optimizers import Adafactor, AdamMini, Came, Lion, ScheduleFreeAdamW
from shoestring.train.run import train_recipe
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config
from transformers.models.qwen3 import Qwen3ForCausalLM

ALL = [Adafactor(), AdamMini(), Came(), ScheduleFreeAdamW()]
REFUSE_BFLOAT16 = ("adam_mini", "schedule_free_adamw")
HEADS, HEAD_DIM = 3, 8


class Model(nn.Module):
    """A matrix wide and one high, a bias, a norm, and one weight that is frozen."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide = nn.Linear(40, 24, dtype=dtype)
        self.high = nn.Linear(24, 65, bias=False, dtype=dtype)
        self.norm = nn.RMSNorm(40, dtype=dtype)
        self.frozen = nn.Linear(4, 4, dtype=dtype).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.high(torch.tanh(self.wide(self.norm(x))))


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    options = {
        "hidden_size": HEADS * HEAD_DIM,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
        "vocab_size": 50,
        "tie_word_embeddings": True,
    }
    return LlamaForCausalLM(LlamaConfig(**(options | changes)))


def batches(dtype: torch.dtype, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 40, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def backward(model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    model(x).square().mean().backward()


def build(model: nn.Module, config: Any) -> torch.optim.Optimizer:
    if config.name == "lion":  # ours; it stands here for its reference and its published peer
        return build_optimizer(model, config)
    return build_from_library(model, config, parameter_groups(model, weight_decay=config.weight_decay or 0.0))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


# --- the published rules, slowly


def adafactor(
    p: Tensor, g: Tensor, state: dict[str, Any], t: int, rate: float, decay: float, name: str
) -> None:
    """arXiv:1804.04235, algorithms 4 and 5 in PyTorch's form: beta2_t = 1 - t ** -0.8, no momentum."""
    beta = 1 - t**-0.8
    alpha = max(1e-3, rms(p)) * min(rate, 1 / math.sqrt(t))
    p.mul_(1 - rate * decay)
    square = g * g
    if p.ndim == 2:
        state["r"] = beta * state.get("r", 0.0) + (1 - beta) * square.mean(1)
        state["c"] = beta * state.get("c", 0.0) + (1 - beta) * square.mean(0)
        v = torch.outer(state["r"], state["c"]) / state["r"].mean()
    else:
        state["v"] = v = beta * state.get("v", 0.0) + (1 - beta) * square
    u = g / v.sqrt()
    p.sub_(alpha * u / max(1.0, rms(u)))


def lion(p: Tensor, g: Tensor, state: dict[str, Any], t: int, rate: float, decay: float, name: str) -> None:
    """arXiv:2302.06675, algorithm 2."""
    m = state.get("m", torch.zeros_like(p))
    update = torch.sign(0.9 * m + 0.1 * g)
    p.sub_(rate * (update + decay * p))
    state["m"] = 0.99 * m + 0.01 * g


def adam_mini(
    p: Tensor, g: Tensor, state: dict[str, Any], t: int, rate: float, decay: float, name: str
) -> None:
    """arXiv:2406.16793, algorithm 1: a second moment for each head of q and k, row, or norm."""
    p.mul_(1 - rate * decay)
    if p.ndim == 2:
        rows = HEAD_DIM if "q_proj" in name or "k_proj" in name else 1
        mean = (g * g).view(-1, rows * p.shape[1]).mean(1).repeat_interleave(rows)[:, None]
    else:
        mean = (g * g).mean() if "norm" in name else g * g
    state["m"] = 0.9 * state.get("m", 0.0) + 0.1 * g
    state["v"] = 0.999 * state.get("v", 0.0) + 0.001 * mean
    p.sub_(rate * (state["m"] / (1 - 0.9**t)) / ((state["v"] / (1 - 0.999**t)).sqrt() + 1e-8))


def came(p: Tensor, g: Tensor, state: dict[str, Any], t: int, rate: float, decay: float, name: str) -> None:
    """arXiv:2307.02047, algorithm 2, with the regularisers of its code (1e-30 and 1e-16)."""

    def factored(key: str, square: Tensor, beta: float) -> Tensor:
        state[key + "r"] = beta * state.get(key + "r", 0.0) + (1 - beta) * square.mean(1)
        state[key + "c"] = beta * state.get(key + "c", 0.0) + (1 - beta) * square.mean(0)
        estimate: Tensor = torch.outer(state[key + "r"], state[key + "c"]) / state[key + "r"].mean()
        return estimate

    square = g * g + 1e-30
    if p.ndim == 2:
        v = factored("v", square, 0.999)
    else:
        state["v"] = v = 0.999 * state.get("v", 0.0) + 0.001 * square
    u = g / v.sqrt()
    u = u / max(1.0, rms(u))
    state["m"] = m = 0.9 * state.get("m", 0.0) + 0.1 * u
    update = m / factored("s", (u - m) ** 2 + 1e-16, 0.9999).sqrt() if p.ndim == 2 else m
    p.sub_(rate * (update + decay * p))


def schedule_free(
    p: Tensor, g: Tensor, state: dict[str, Any], t: int, rate: float, decay: float, name: str
) -> None:
    """arXiv:2405.15682, algorithm 1, with x kept apart; a step weighs the largest rate squared in it."""
    if not state:
        state.update(z=p.clone(), x=p.clone(), v=torch.zeros_like(p), weights=0.0, largest=0.0)
    state["v"] = 0.999 * state["v"] + 0.001 * g * g
    step = g / ((state["v"] / (1 - 0.999**t)).sqrt() + 1e-8) + decay * p
    state["z"] = state["z"] - rate * step
    state["largest"] = max(state["largest"], rate)
    state["weights"] += state["largest"] ** 2
    c = state["largest"] ** 2 / state["weights"]
    state["x"] = (1 - c) * state["x"] + c * state["z"]
    p.copy_(0.1 * state["z"] + 0.9 * state["x"])


RULES: dict[str, Callable[..., None]] = {
    "adafactor": adafactor,
    "lion": lion,
    "adam_mini": adam_mini,
    "came": came,
    "schedule_free_adamw": schedule_free,
}


def gradients(parameters: dict[str, nn.Parameter], steps: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        {
            name: torch.randn(p.shape, generator=generator, dtype=torch.float64) * (1 + step)
            for name, p in parameters.items()
        }
        for step in range(steps)
    ]


@pytest.mark.parametrize("config", [*ALL, Lion()], ids=lambda c: c.name)
@pytest.mark.parametrize("make", [Model, llama], ids=["linear", "llama"])
def test_ten_steps_are_the_published_rule_in_float64(config: Any, make: Any) -> None:
    config = config.model_copy(update={"weight_decay": 0.1})
    model = make().double()
    optimizer = build(model, config)
    parameters = trained(model)
    copies = {name: p.detach().clone() for name, p in parameters.items()}
    states: dict[str, dict[str, Any]] = {name: {} for name in parameters}
    for step, grads in enumerate(gradients(parameters, 10), start=1):
        rate = 1e-2 / step
        for name, p in parameters.items():
            p.grad = grads[name].clone()
            decay = 0.1 if p.ndim >= 2 else 0.0
            RULES[config.name](copies[name], grads[name], states[name], step, rate, decay, name)
        set_rate(optimizer, rate)
        optimizer.step()
    tolerance = {"rtol": 1e-9, "atol": 1e-11}
    for name, p in parameters.items():
        torch.testing.assert_close(p.detach(), copies[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")
    with averaged_weights(optimizer):
        for name, p in parameters.items():
            torch.testing.assert_close(p.detach(), states[name].get("x", copies[name]), **tolerance)


@pytest.mark.oracle
def test_lion_is_lion_pytorchs() -> None:
    import lion_pytorch as library

    ours, theirs = Model(), Model()
    optimizer = build(ours, Lion(weight_decay=0.1))
    reference = library.Lion(parameter_groups(theirs, weight_decay=0.1), lr=1e-3)
    for x in batches(torch.float32, 10):
        backward(ours, x)
        for name, p in trained(theirs).items():
            p.grad = trained(ours)[name].grad.clone()
        set_rate(optimizer, 1e-3)
        optimizer.step()
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# --- what all have in common


def bytes_in(optimizer: torch.optim.Optimizer) -> int:
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for tensor in state.values()
        if isinstance(tensor, Tensor)
    }
    return sum(storages.values())


@pytest.mark.parametrize("config", ALL, ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_falls_and_the_state_has_exactly_the_bytes_stated(
    config: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two of them refuse bfloat16 weights; their bytes are stated all the same.
    monkeypatch.setattr("shoestring.optimizers.from_libraries._refuse_16_bits", lambda name, groups: None)
    model = Model(dtype)
    optimizer = build(model, config)
    x = batches(dtype, 1)[0]
    before = float(model(x).detach().square().mean())
    for _ in range(20):
        backward(model, x)
        set_rate(optimizer, {"adafactor": 1e-1, "came": 1e-3}.get(config.name, 1e-2))
        optimizer.step()
    if dtype == torch.float32 or config.name not in REFUSE_BFLOAT16:
        assert float(model(x).detach().square().mean()) < 0.8 * before
    tensors = [(name, tuple(p.shape)) for name, p in trained(model).items()]
    assert bytes_in(optimizer) == library_state_bytes(config, tensors, dtype)


def test_the_bytes_of_adam_mini_know_heads() -> None:
    model = llama()
    optimizer = build(model, AdamMini())
    for p in trained(model).values():
        p.grad = torch.ones_like(p)
    set_rate(optimizer, 1e-3)
    optimizer.step()
    tensors = [(name, tuple(p.shape)) for name, p in trained(model).items()]
    assert bytes_in(optimizer) == library_state_bytes(AdamMini(), tensors, torch.float32, head_dim=HEAD_DIM)
    rows = HEADS * HEAD_DIM + HEAD_DIM  # of q and k, which have heads of 8 rows
    without = library_state_bytes(AdamMini(), tensors, torch.float32)
    assert without == bytes_in(optimizer) + 4 * (rows - rows // HEAD_DIM)


def test_stacks_of_matrices_have_the_bytes_stated() -> None:
    for config in (Adafactor(), Came(), ScheduleFreeAdamW()):
        model = nn.Module()
        model.experts = nn.Parameter(torch.randn(3, 5, 7))
        optimizer = build(model, config)
        model.experts.grad = torch.ones(3, 5, 7)
        optimizer.step()
        assert bytes_in(optimizer) == library_state_bytes(config, [("experts", (3, 5, 7))], torch.float32)


@pytest.mark.parametrize("config", ALL, ids=lambda c: c.name)
def test_a_restored_optimizer_goes_on_bit_for_bit(config: Any) -> None:
    config = config.model_copy(update={"weight_decay": 0.1})
    whole, first, second = Model(), Model(), Model()
    data = batches(torch.float32, 8)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, start: int, xs: list[Tensor]) -> None:
        for step, x in enumerate(xs, start=start):
            backward(model, x)
            set_rate(optimizer, 1e-2 / (1 + step))
            optimizer.step()

    train(whole, build(whole, config), 0, data)
    optimizer = build(first, config)
    train(first, optimizer, 0, data[:4])
    tensors, rest = optimizer_state(optimizer, dict(first.named_parameters()))
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    rest = json.loads(json.dumps(rest))
    second.load_state_dict(first.state_dict())
    restored = build(second, config)
    load_optimizer_state(restored, dict(second.named_parameters()), tensors, rest)
    train(second, restored, 4, data[4:])
    for (name, a), b in zip(whole.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("config", ALL, ids=lambda c: c.name)
def test_groups_have_their_rate_and_decay(config: Any) -> None:
    model = Model()
    config = config.model_copy(update={"weight_decay": 0.1})
    groups = parameter_groups(model, weight_decay=0.1)
    for group in groups:
        group["rate_scale"] = 16.0 if group["name"] == "decay" else 1.0
    optimizer = build_from_library(model, config, groups)
    assert {group["lr"] for group in optimizer.param_groups} == {0.0}
    set_rate(optimizer, 1e-3)
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert (group["lr"], group["weight_decay"]) == ((16e-3, 0.1) if p.ndim == 2 else (1e-3, 0.0))


@pytest.mark.parametrize("config", ALL, ids=lambda c: c.name)
def test_rows_without_gradient_stay_finite(config: Any) -> None:
    model = Model()
    optimizer = build(model, config)
    for _ in range(3):
        for p in trained(model).values():
            p.grad = torch.zeros_like(p)
        model.wide.weight.grad[0] = 1e-6
        set_rate(optimizer, 1e-3)
        optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_adafactor_takes_small_gradients_for_what_they_are() -> None:
    """PyTorch's ε1 would make the step of gradients of 1e-5 in bfloat16 hundreds of times shorter."""
    moved = []
    for scale in (1.0, 1e-5):
        model = nn.Linear(32, 32, bias=False, dtype=torch.bfloat16)
        nn.init.constant_(model.weight, 1.0)
        optimizer = build(model, Adafactor())
        model.weight.grad = torch.full_like(model.weight, scale)
        set_rate(optimizer, 0.5)
        optimizer.step()
        moved.append(1 - float(model.weight.detach().mean()))
    assert moved[0] == pytest.approx(moved[1], rel=0.02)


# --- refusals


@pytest.mark.parametrize(
    ("config", "module", "package"),
    [
        (AdamMini(), "adam_mini", "adam-mini"),
        (Came(), "came_pytorch", "came-pytorch"),
        (ScheduleFreeAdamW(), "schedulefree", "schedulefree"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_missing_package_is_one_message(
    config: Any, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError) as caught:
        build(Model(), config)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"optimizer.name  {config.name} needs the package {package}: ")
    assert lines[1].strip() == (
        'Install it: pip install "shoestring[optimizers]"   or use optimizer.name=adamw'
    )
    assert len(lines) == 2


@pytest.mark.parametrize("config", [AdamMini(), ScheduleFreeAdamW()], ids=lambda c: c.name)
def test_a_second_moment_that_could_not_shrink_is_refused(config: Any) -> None:
    stuck = torch.ones((), dtype=torch.bfloat16)
    assert stuck.mul_(0.999) == 1  # why
    with pytest.raises(UserError, match=f"{config.name} keeps its state in the weights' dtype") as caught:
        build(Model(torch.bfloat16), config)
    assert "Use model.dtype=float32" in str(caught.value)


def qwen(**changes: Any) -> nn.Module:
    options = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "vocab_size": 50}
    return Qwen3ForCausalLM(
        Qwen3Config(**options, num_attention_heads=3, num_key_value_heads=1, head_dim=16, **changes)
    )


def test_adam_mini_takes_the_heads_from_the_configuration() -> None:
    """Qwen3's heads are wider than hidden_size / heads, where the package alone would cut across them."""
    optimizer: Any = build(qwen(), AdamMini())
    assert optimizer.head_numel == 16 * 24
    kinds = [group["name"] for group in optimizer.param_groups]
    assert (kinds.count("q_proj"), kinds.count("norm"), kinds.count("bias")) == (2, 5, 0)


def test_adam_mini_takes_adapters_by_row() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear"))
    optimizer = build(model, AdamMini())
    assert {group["name"] for group in optimizer.param_groups} == {"mlp"}


def stack() -> nn.Module:
    model = nn.Module()
    model.experts = nn.Parameter(torch.zeros(2, 3, 4))
    return model


def headless() -> nn.Module:
    model = nn.Module()
    model.q_proj = nn.Linear(4, 4)
    return model


def other_heads() -> nn.Module:
    model = llama()
    model.model.layers[0].self_attn.q_proj = nn.Linear(24, 40, bias=False)
    return model


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (
            lambda: GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=1, n_head=3, vocab_size=50)),
            r"attn.c_attn.weight \[24, 72\]: queries, keys and values share it",
        ),
        (stack, r"experts \[2, 3, 4\]: it has 3 dimensions"),
        (headless, r"q_proj.weight \[4, 4\]: the model's configuration has no num_attention_heads"),
        (other_heads, r"q_proj.weight \[40, 24\]: it is not made of 3 heads of 8"),
    ],
    ids=["fused", "experts", "no configuration", "other heads"],
)
def test_adam_mini_refuses_what_it_would_cut_wrongly(make: Any, why: str) -> None:
    with pytest.raises(UserError, match=why) as caught:
        build(make(), AdamMini())
    assert len(str(caught.value).splitlines()) == 2


# --- averaged weights


@pytest.mark.parametrize("config", ALL, ids=lambda c: c.name)
def test_averaged_weights_are_a_visit(config: Any) -> None:
    model = Model()
    optimizer = build(model, config)
    with averaged_weights(optimizer):  # before the first step there is nothing to average
        pass
    for x in batches(torch.float32, 5):
        backward(model, x)
        set_rate(optimizer, 1e-2)
        optimizer.step()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with averaged_weights(optimizer):
        inside = {name: p.detach().clone() for name, p in model.named_parameters()}
        with averaged_weights(optimizer):
            assert all(torch.equal(inside[name], p) for name, p in model.named_parameters())
        assert all(torch.equal(inside[name], p) for name, p in model.named_parameters())
    moved = any(not torch.equal(before[name], value) for name, value in inside.items())
    assert moved == (config.name == "schedule_free_adamw")
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    backward(model, batches(torch.float32, 1)[0])
    optimizer.step()
    with averaged_weights(optimizer):
        expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    end_at_averaged_weights(optimizer)
    assert all(torch.equal(expected[name], p) for name, p in model.named_parameters())


def test_averaged_weights_come_back_after_an_error() -> None:
    model = Model()
    optimizer = build(model, ScheduleFreeAdamW())
    for x in batches(torch.float32, 2):
        backward(model, x)
        set_rate(optimizer, 1e-2)
        optimizer.step()
    before = model.wide.weight.detach().clone()
    with pytest.raises(KeyError), averaged_weights(optimizer):
        raise KeyError
    assert torch.equal(before, model.wide.weight)
    backward(model, batches(torch.float32, 1)[0])
    optimizer.step()


# --- a whole run


def run(recipe: Path, *overrides: str) -> int:
    return train_recipe(str(recipe), overrides, fresh=False, started=time.monotonic())


def schedule_free_recipe(folder: Path, **sections: Any) -> Path:
    chosen = {"name": "schedule_free_adamw", "learning_rate": 1e-2}
    return tiny.recipe(folder, optimizer=chosen, schedule={"name": "constant"}, **sections)


@pytest.mark.parametrize("adapter", [None, {"name": "lora", "r": 4}], ids=["full", "lora"])
def test_a_schedule_free_run_resumes_to_the_bit_and_leaves_averaged_weights(
    tmp_path: Path, adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shoestring.train.engine import NativeEngine
    from transformers import AutoModelForCausalLM

    recipe = schedule_free_recipe(tmp_path, adapter=adapter)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(recipe, f"output_dir={whole}") == 0

    real, calls = NativeEngine.step, [0]

    def dies(self: NativeEngine, max_grad_norm: float | None) -> Tensor:
        calls[0] += 1
        if calls[0] == 7:
            raise KeyboardInterrupt
        return real(self, max_grad_norm)

    with monkeypatch.context() as patch:
        patch.setattr(NativeEngine, "step", dies)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, f"output_dir={broken}")
    assert run(recipe, f"output_dir={broken}") == 0
    assert json.loads((broken / "summary.json").read_text())["resumed_from"] == "checkpoint-000004"
    last = "checkpoint-000012"
    for name in ("trained.safetensors", "optimizer.safetensors"):
        assert (whole / last / name).read_bytes() == (broken / last / name).read_bytes()

    summary = json.loads((whole / "summary.json").read_text())
    assert summary["eval_loss"] < summary["eval_loss_before"]
    assert summary["final_learning_rate"] == pytest.approx(1e-2)
    if adapter is None:
        from safetensors.torch import load_file

        key = "model.layers.0.mlp.up_proj.weight"
        trained_at = load_file(whole / last / "trained.safetensors")[key]
        final, saved = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()[key]
            for folder in (whole / "final", whole / last)
        )
        assert torch.equal(final, saved)
        assert not torch.equal(final, trained_at)


def test_schedule_free_wants_a_constant_schedule(tmp_path: Path) -> None:
    recipe = schedule_free_recipe(tmp_path)
    load_recipe(str(recipe), [])
    with pytest.raises(UserError, match=r"Set schedule=constant, or optimizer\.name=adamw"):
        load_recipe(str(recipe), ["schedule=linear"])
