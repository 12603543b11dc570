"""Memory arithmetic, and the sizes that it starts from against what is really allocated."""

from dataclasses import replace

import pytest
import torch
from plan_cases import recipe, tiny_facts
from shoestring.adapters import trainable_parameters
from shoestring.models.weights import load_model
from shoestring.optimizers import Cost
from shoestring.plan.curves import Line, Polyline, line_through, plane_through
from shoestring.plan.memory import Sizes, footprint
from shoestring.plan.precision import choose_precision
from shoestring.plan.sizes import count_sizes, resident_bytes
from shoestring.plan.trained import find_trained

CPU = torch.device("cpu")


def test_a_plane_goes_through_its_four_points() -> None:
    plane = plane_through(lambda lay, tok: 5 + 2 * lay + 3 * tok + 7 * lay * tok, (1, 2), (10, 30))
    assert plane.at(1, 10) == pytest.approx(107)
    assert plane.at(30, 4096) == pytest.approx(5 + 60 + 3 * 4096 + 7 * 30 * 4096)


def test_slopes_below_zero_are_noise() -> None:
    assert line_through(1, 5.0, 2, 4.0) == Line(4.0, 0.0)
    plane = plane_through(lambda lay, tok: 10 - lay, (1, 2), (10, 30))
    assert plane.at(30, 1000) == pytest.approx(8)


def test_a_polyline_follows_its_points_and_then_its_slope() -> None:
    line = Polyline(((10, 100.0), (20, 150.0), (40, 160.0)), after=2.0)
    assert [line.at(x) for x in (0, 10, 15, 30, 50)] == [50, 100, 125, 155, 180]


MEGA = 10**6
SIZES = Sizes(
    weights=1000 * MEGA,
    unquantised=1000 * MEGA,
    adapter=MEGA,
    trained=2 * MEGA,
    gradients=2 * MEGA,
    optimizer=4 * MEGA,
    update=Cost(0.0),
    largest=300 * MEGA,
    libraries=500 * MEGA,
    merged=1000 * MEGA,
)


def test_the_prediction_is_the_worst_phase_not_their_sum() -> None:
    training = footprint("cpu", SIZES, activations=5000 * MEGA, logits=100 * MEGA)
    assert training.phases["train"] == training.host_total
    assert training.host["activations"] == 5000 * MEGA
    assert training.device == {}
    exporting = footprint("cpu", replace(SIZES, compared=300 * MEGA), activations=10 * MEGA, logits=0)
    assert max(exporting.phases, key=lambda name: exporting.phases[name]) == "export"
    assert exporting.host["compared"] == 300 * MEGA


def test_an_export_holds_a_second_copy_of_what_was_trained_alone() -> None:
    """An adapter's base is freed before the merged model is loaded and compared; trained weights stay."""
    adapter = footprint("cpu", replace(SIZES, compared=300 * MEGA), activations=0, logits=0)
    assert adapter.host["exported copy"] == MEGA
    whole = footprint("cpu", replace(SIZES, adapter=0, trained=1000 * MEGA), activations=0, logits=0)
    assert whole.host["exported copy"] == 1000 * MEGA


def test_a_gpu_holds_the_model_and_the_host_the_copies() -> None:
    needed = footprint("cuda", SIZES, activations=5000 * MEGA, logits=100 * MEGA)
    assert needed.device["weights"] == 1001 * MEGA
    assert needed.host["libraries"] == 500 * MEGA
    assert needed.host["copies"] == 2000 * MEGA
    assert "activations" not in needed.host


def held(model: torch.nn.Module) -> int:
    total = 0
    for parameter in model.parameters():
        total += parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            total += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    return total


@pytest.mark.parametrize("overrides", [(), ("adapter=null",), ("model.load_in_4bit=true",)])
def test_weights_are_what_a_loaded_model_holds(overrides: tuple[str, ...]) -> None:
    wanted = recipe(*overrides)
    if wanted.model.load_in_4bit:
        pytest.importorskip("bitsandbytes")
    facts = tiny_facts()
    precision = choose_precision(wanted, CPU)
    sizes = count_sizes(wanted, facts, find_trained(wanted, facts), precision, libraries=0)
    model = load_model(facts, wanted.model, device=CPU, dtype=precision.dtype)
    assert sizes.weights == pytest.approx(held(model), rel=0.01)


@pytest.mark.parametrize(
    "overrides",
    [(), ("adapter=null",), ("adapter.modules_to_save=[embed_tokens]",), ("adapter.use_dora=true",)],
)
def test_trained_parameters_agree_with_the_adapters(overrides: tuple[str, ...]) -> None:
    wanted = recipe(*overrides)
    trained = find_trained(wanted, tiny_facts())
    assert trained.parameters == trainable_parameters(wanted.adapter, tiny_facts())


def test_full_training_counts_gradients_and_two_moments() -> None:
    wanted = recipe("adapter=null")
    facts = tiny_facts()
    sizes = count_sizes(
        wanted, facts, find_trained(wanted, facts), choose_precision(wanted, CPU), libraries=7
    )
    assert sizes.weights == sizes.gradients == 4 * facts.parameters
    assert sizes.optimizer == pytest.approx(8 * facts.parameters, rel=0.01)
    assert sizes.libraries == 7
    assert sizes.compared == 2 * 256 * facts.vocab_size * 4


def test_nothing_is_compared_where_nothing_is_exported() -> None:
    wanted, facts = recipe("export.final=none"), tiny_facts()
    precision = choose_precision(wanted, CPU)
    assert count_sizes(wanted, facts, find_trained(wanted, facts), precision, libraries=0).compared == 0


def test_precision_follows_what_is_trained() -> None:
    assert (choose_precision(recipe(), CPU).weights, choose_precision(recipe(), CPU).autocast) == (
        "bfloat16",
        False,
    )
    whole = choose_precision(recipe("adapter=null"), CPU)
    assert (whole.weights, whole.autocast) == ("float32", True)
    given = choose_precision(recipe("adapter=null", "model.dtype=float32"), CPU)
    assert (given.weights, given.autocast) == ("float32", False)


def test_resident_bytes_are_those_of_a_process_with_torch() -> None:
    assert 100e6 < resident_bytes() < 20e9
