"""The short measurement: live bytes counted right, and shallow copies that speak for the deep model."""

import pytest
import torch
from plan_cases import recipe, tiny_facts
from shoestring.models.facts import read_facts
from shoestring.offload.activation_model import recompute_first
from shoestring.offload.activations import apply_activations
from shoestring.plan.live_bytes import LiveBytes
from shoestring.plan.measure import _inputs, measure
from shoestring.plan.measurement import Setting, mixed
from shoestring.plan.precision import choose_precision
from shoestring.plan.replica import build_replica
from shoestring.recipes import Recipe

CPU = torch.device("cpu")


def setting(wanted: Recipe, *, packed: bool = True, checkpointing: bool = False) -> Setting:
    return Setting(
        precision=choose_precision(wanted, CPU),
        packed=packed,
        checkpointing=checkpointing,
        tokens=(64, 192),
        row_length=48,
        trained_share=0.5,
        repeats=1,
    )


def test_live_bytes_sees_births_deaths_and_the_peak() -> None:
    with LiveBytes(CPU) as live:
        first = torch.ones(1000)
        view = first[10:]
        assert live.now == 4000
        second = first * 2
        assert (live.now, live.peak) == (8000, 8000)
        second.add_(1)
        del second
        assert live.now == 4000
        del first
        assert live.now == 4000  # the view keeps it
        del view
        assert live.now == 0
    assert live.peak == 8000


def test_live_bytes_sees_what_backward_keeps() -> None:
    weight = torch.ones(100, 100, requires_grad=True)
    with LiveBytes(CPU) as live:
        out = (weight.exp()).sum()  # exp keeps its result
        assert 40_000 <= live.now <= 40_100
        del out
        assert live.now == 0


@pytest.mark.parametrize("overrides", [(), ("adapter=null", "data.packing=false")])
def test_two_layers_predict_four(overrides: tuple[str, ...]) -> None:
    wanted = recipe(*overrides)
    facts = tiny_facts()
    how = setting(wanted, packed=not overrides)
    measured = measure(wanted, facts, CPU, how)
    model = build_replica(
        wanted,
        facts,
        facts.layers,
        device=CPU,
        dtype=how.precision.dtype,
        packed=how.packed,
        checkpointing=False,
    )
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    inputs = _inputs(how, 192, CPU)
    context = torch.autocast("cpu", dtype=torch.bfloat16, enabled=how.precision.autocast)
    with context:
        hidden = base.get_decoder()(**inputs).last_hidden_state
    hidden.backward(torch.ones_like(hidden))
    with LiveBytes(CPU) as live:
        with context:
            hidden = base.get_decoder()(**inputs).last_hidden_state
        saved = live.now
        hidden.backward(torch.ones_like(hidden))
        peak = live.peak
    assert measured.saved.at(facts.layers, 192) == pytest.approx(saved, rel=0.03)
    assert measured.peak.at(facts.layers, 192) == pytest.approx(peak, rel=0.08)
    assert measured.seconds.at(facts.layers, 192) > 0


def test_checkpointing_keeps_less() -> None:
    wanted = recipe()
    facts = tiny_facts()
    kept = measure(wanted, facts, CPU, setting(wanted))
    again = measure(wanted, facts, CPU, setting(wanted, checkpointing=True))
    assert again.saved.at(30, 1000) < 0.5 * kept.saved.at(30, 1000)


def test_random_generators_are_left_alone() -> None:
    wanted = recipe()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    measure(wanted, tiny_facts(), CPU, setting(wanted))
    assert torch.equal(before, torch.get_rng_state())


def test_four_bits_are_measured_as_they_are_trained() -> None:
    pytest.importorskip("bitsandbytes")
    wanted = recipe("model.load_in_4bit=true")
    measured = measure(wanted, read_facts(wanted.model), CPU, setting(wanted))
    assert measured.saved.at(4, 192) > 0


@pytest.mark.parametrize("overrides", [(), ("adapter=null", "data.packing=false")])
def test_some_layers_computed_again_are_predicted_from_none_and_all(overrides: tuple[str, ...]) -> None:
    wanted, facts = recipe(*overrides), tiny_facts()
    packed = not overrides
    how = setting(wanted, packed=packed)
    both = [
        measure(wanted, facts, CPU, setting(wanted, packed=packed, checkpointing=again))
        for again in (False, True)
    ]
    layers = facts.layers
    model = build_replica(
        wanted, facts, layers, device=CPU, dtype=how.precision.dtype, packed=packed, checkpointing=False
    )
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    inputs = _inputs(how, 192, CPU)

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how.precision.autocast):
            hidden: torch.Tensor = base.get_decoder()(**inputs).last_hidden_state
        return hidden

    warm = forward()  # gradients exist from here on, and count for no measurement
    warm.backward(torch.ones_like(warm))
    del warm
    for again in range(layers):
        with apply_activations(model, recompute_first(again, layers)), LiveBytes(CPU) as live:
            hidden = forward()
            saved = live.now
            hidden.backward(torch.ones_like(hidden))
            peak = live.peak
            del hidden
        predicted = mixed(*both, again / layers)
        assert predicted.saved.at(layers, 192) == pytest.approx(saved, rel=0.05)
        assert predicted.peak.at(layers, 192) == pytest.approx(peak, rel=0.05)
