"""A restored optimizer continues to the bit, random generators too; what does not fit is refused by name."""

import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from shoestring.checkpoint import (
    load_optimizer_state,
    newest,
    optimizer_state,
    random_state,
    save,
    set_random_state,
)
from shoestring.recipes.errors import UserError
from torch import Tensor, nn

Build = Callable[[Iterable[Any]], torch.optim.Optimizer]


class OddState(torch.optim.Optimizer):
    """State of every permitted shape: nested lists, tuples and dicts of tensors and plain values, or none."""

    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params, {"lr": 0.01, "betas": (0.9, 0.99), "note": None, "scale": torch.tensor(2.0)})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dim() == 1:
                    continue  # stays without state
                state = self.state[parameter]
                if not state:
                    factors = [
                        torch.zeros(parameter.shape[0], dtype=torch.float32),
                        torch.ones(1, dtype=torch.int8),
                    ]
                    state.update(
                        factors=factors, pair=(factors[0], [None, True]), by={0: factors[1], "n": 0.1}
                    )
                    state["moment"] = torch.zeros(
                        parameter.shape, dtype=torch.float32
                    )  # wider than a bf16 parameter
                state["factors"][0] += parameter.grad.float().square().mean(1)
                state["moment"].lerp_(parameter.grad.float(), 0.1)
                state["by"]["n"] *= 1.1
                parameter.sub_(
                    (state["moment"] * group["scale"] * group["lr"] * state["by"]["n"]).to(parameter.dtype)
                )


OPTIMIZERS: dict[str, Build] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw amsgrad, tensor rate": lambda p: torch.optim.AdamW(
        p, lr=torch.tensor(0.01), amsgrad=True, foreach=False, capturable=False
    ),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "adamw_8bit": lambda p: bnb.optim.AdamW8bit(p, lr=0.01),
    "lion_8bit": lambda p: bnb.optim.Lion8bit(p, lr=0.01),
    "paged_adamw_8bit": lambda p: bnb.optim.PagedAdamW8bit(p, lr=0.01),
    "odd": OddState,
}


def model_of(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    # 8,192 elements: quantised by bitsandbytes; 64: kept in fp32 by it.
    return nn.Sequential(nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 64)).to(dtype)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    return [
        {"params": matrices, "weight_decay": 0.1, "rate_scale": 4.0},
        {"params": vectors, "weight_decay": 0.0},
    ]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        batch = torch.randn(8, 128, generator=generator).to(next(model.parameters()).dtype)
        for group in optimizer.param_groups:
            if not isinstance(group["lr"], Tensor):
                group["lr"] = 0.01 / (1 + step)
        model(batch).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_optimizer_continues_to_the_bit(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    model = model_of(dtype)
    optimizer = OPTIMIZERS[name](groups(model))
    train(model, optimizer, range(3))
    tensors, rest = optimizer_state(optimizer, model.named_parameters())
    saved_model = {key: value.clone() for key, value in model.state_dict().items()}
    save(tmp_path, step=3, tensors={"optimizer": tensors, "model": saved_model}, json={"optimizer": rest})
    train(model, optimizer, range(3, 6))

    checkpoint = newest(tmp_path, lambda line: None)
    assert checkpoint is not None
    resumed = model_of(dtype)
    resumed.load_state_dict(checkpoint.tensors("model"))
    fresh = OPTIMIZERS[name](groups(resumed))
    load_optimizer_state(
        fresh, dict(resumed.named_parameters()), checkpoint.tensors("optimizer"), checkpoint.json("optimizer")
    )
    train(resumed, fresh, range(3, 6))

    for (key, old), new in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(old, new), key
        before, after = optimizer.state.get(old, {}), fresh.state.get(new, {})
        assert before.keys() == after.keys()
        for a, b in zip(tensors_in(before), tensors_in(after), strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b), key
    for old_group, new_group in zip(optimizer.param_groups, fresh.param_groups, strict=True):
        del old_group["params"], new_group["params"]
        assert repr(old_group) == repr(new_group)


def test_shared_tensors_are_stored_once_and_shared_again() -> None:
    model = model_of(torch.float32)
    optimizer = bnb.optim.AdamW8bit(model.parameters(), lr=0.01, min_8bit_size=1024)
    train(model, optimizer, range(1))
    tensors, rest = optimizer_state(optimizer, model.named_parameters())
    assert sum("qmap" in key for key in tensors) == 2
    assert rest["optimizer"] == "bitsandbytes.AdamW8bit"
    fresh = bnb.optim.AdamW8bit(model.parameters(), lr=0.01, min_8bit_size=1024)
    load_optimizer_state(fresh, model.named_parameters(), tensors, rest)
    first, second = (fresh.state[model[index].weight] for index in (0, 2))  # type: ignore[index]
    assert first["qmap1"] is second["qmap1"]
    assert first["step"] == 1
    assert type(first["step"]) is int


def test_a_loaded_optimizer_forgets_the_state_it_had() -> None:
    model = model_of(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    empty = optimizer_state(optimizer, model.named_parameters())
    train(model, optimizer, range(2))
    load_optimizer_state(optimizer, model.named_parameters(), *empty)
    assert len(optimizer.state) == 0


def test_the_order_of_parameters_does_not_matter() -> None:
    model = model_of(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, range(1))
    tensors, rest = optimizer_state(optimizer, model.named_parameters())
    other = torch.optim.AdamW(reversed(list(model.parameters())), lr=0.01)
    load_optimizer_state(other, model.named_parameters(), tensors, rest)
    for parameter in model.parameters():
        assert torch.equal(other.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])


def changed(change: Callable[[dict[str, Tensor], dict[str, Any]], object]) -> str:
    """The error for a saved state that `change` has altered; the optimizer must be left as it was."""
    model = model_of(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, range(1))
    tensors, rest = optimizer_state(optimizer, model.named_parameters())
    change(tensors, rest)
    fresh = torch.optim.AdamW(model.parameters(), lr=0.5)
    with pytest.raises(UserError) as told:
        load_optimizer_state(fresh, model.named_parameters(), tensors, rest)
    assert len(fresh.state) == 0
    assert fresh.param_groups[0]["lr"] == 0.5
    return str(told.value)


def test_each_mismatch_names_the_parameter() -> None:
    assert changed(lambda tensors, rest: rest.update(optimizer="bitsandbytes.Lion8bit")) == (
        "The optimizer state in the checkpoint was saved by bitsandbytes.Lion8bit, this run uses torch.AdamW."
        "\n"
        "The model or the optimizer of this run is another one: undo the change, or start over with --fresh."
    )
    assert "holds 2.weight of shape (3, 3), this run has (64, 64)" in changed(
        lambda tensors, rest: rest["parameters"]["2.weight"].update(shape=[3, 3])
    )
    assert "holds 0.bias in torch.bfloat16, this run has it in torch.float32" in changed(
        lambda tensors, rest: rest["parameters"]["0.bias"].update(dtype="torch.bfloat16")
    )
    assert "has the parameter lm_head in group 0; this run does not train it there" in changed(
        lambda tensors, rest: rest["groups"][0]["parameters"].append("lm_head")
    )
    assert "has no state for the parameter 2.bias, which this run trains in group 0" in changed(
        lambda tensors, rest: rest["groups"][0]["parameters"].remove("2.bias")
    )
    assert "has 2 parameter groups, this run has 1" in changed(
        lambda tensors, rest: rest["groups"].append({})
    )
    assert "lacks the tensor 0.weight/exp_avg of 0.weight" in changed(
        lambda tensors, rest: tensors.pop("0.weight/exp_avg")
    )
    assert "has 0.weight/exp_avg as torch.float64 (64, 128), not as its record says" in changed(
        lambda tensors, rest: tensors.update({"0.weight/exp_avg": tensors["0.weight/exp_avg"].double()})
    )


def test_what_cannot_be_stored_is_refused_by_name() -> None:
    model = model_of(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, range(1))
    with pytest.raises(ValueError, match="has no name"):
        optimizer_state(optimizer, {})
    optimizer.state[model[0].weight]["hook"] = print  # type: ignore[index]
    with pytest.raises(TypeError, match=r"0.weight/hook is a builtin_function_or_method: it cannot be saved"):
        optimizer_state(optimizer, model.named_parameters())


def test_paged_states_are_loaded_into_memory_the_optimizer_allocates() -> None:
    model = model_of(torch.float32)
    optimizer = bnb.optim.PagedAdamW8bit(model.parameters(), lr=0.01)
    optimizer.is_paged = False  # no paging on the CPU, so no warning either
    train(model, optimizer, range(1))
    tensors, rest = optimizer_state(optimizer, model.named_parameters())
    fresh = bnb.optim.PagedAdamW8bit(model.parameters(), lr=0.01)
    given: list[Tensor] = []

    def allocate(parameter: Tensor, dtype: torch.dtype) -> Tensor:
        given.append(torch.empty(parameter.shape, dtype=dtype))
        return given[-1]

    fresh.get_state_buffer = allocate
    load_optimizer_state(fresh, model.named_parameters(), tensors, rest)
    assert len(given) == 8
    assert fresh.state[model[0].weight]["state1"] is given[0]  # type: ignore[index]
    assert torch.equal(given[0], tensors["0.weight/state1"])
    assert fresh.state[model[0].weight]["absmax1"] is tensors["0.weight/absmax1"]  # type: ignore[index]


def test_random_generators_continue_to_the_bit(tmp_path: Path) -> None:
    named: dict[str, Any] = {
        "order": torch.Generator().manual_seed(7),
        "pcg": np.random.default_rng(1),
        "philox": np.random.Generator(np.random.Philox(1)),
        "twister": np.random.Generator(np.random.MT19937(1)),
    }

    def draw() -> list[Any]:
        return [
            random.random(),
            random.gauss(0, 1),
            np.random.randn(3).tolist(),
            torch.randn(5).tolist(),
            torch.rand(3, generator=named["order"]).tolist(),
            *(
                named[key].integers(0, 2**31, 3, dtype=np.int32).tolist()
                for key in ("pcg", "philox", "twister")
            ),
        ]

    draw()  # leaves a cached gauss in Python's and numpy's
    save(tmp_path, step=1, tensors={}, json={"random": random_state(named)})
    expected = [draw(), draw()]
    checkpoint = newest(tmp_path, lambda line: None)
    assert checkpoint is not None
    assert set_random_state(checkpoint.json("random"), named) == []
    assert [draw(), draw()] == expected


def test_cuda_generators_that_are_not_here_are_told() -> None:
    state = random_state()
    state["cuda"] = [state["torch"]] * (torch.cuda.device_count() + 1)
    (line,) = set_random_state(state)
    assert line.endswith("are here: other random numbers")


def test_a_bad_random_state_changes_nothing() -> None:
    good = random_state()
    for key, bad in {
        "python": [3, [1, 2], None],
        "numpy": ["MT19937", "AAAA", 0, 0, 0.0],
        "torch": "AAAA",
        "cuda": [5],
    }.items():
        with pytest.raises(UserError, match="The random generators in this checkpoint cannot be restored"):
            set_random_state({**good, key: bad})
    with pytest.raises(UserError, match=r"has the random generators \[\], this run has \['order'\]"):
        set_random_state(good, {"order": torch.Generator()})
    assert random_state() == good
