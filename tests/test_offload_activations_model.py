"""The choice against every other one, with bytes and seconds counted layer by layer."""

from __future__ import annotations

import random
from itertools import pairwise, product
from pathlib import Path
from typing import get_args

import pytest
from shoestring.offload.activation_model import (
    ActivationChoice,
    Fate,
    HostLink,
    LayerCost,
    choose_activations,
    peak_bytes,
    swapped_bytes,
)

MB = 1_000_000
FATES: tuple[Fate, ...] = get_args(Fate)


def simulated_peak(layer: LayerCost, fates: tuple[Fate, ...], share: float, head: int = 0) -> float:
    """Bytes on the device, moment by moment: forward from the first layer, backward from the last."""
    saved = layer.kept - layer.block_kept + share * layer.block_kept
    size = {"keep": saved, "recompute": layer.input, "swap": saved}
    present: dict[int, float] = {}
    moments = []
    swaps = [i for i, fate in enumerate(fates) if fate == "swap"]
    for i, fate in enumerate(fates):
        present[i] = size[fate]
        moments.append(sum(present.values()))
        if fate == "swap":  # the one before has left by now
            for j in swaps[: swaps.index(i)]:
                present.pop(j, None)
    moments.append(sum(present.values()) + head)
    for i in reversed(range(len(fates))):
        if fates[i] == "swap" and swaps.index(i) > 0:
            before = swaps[swaps.index(i) - 1]
            present[before] = size["swap"]  # asked for ahead
        present[i] = layer.kept  # whole: what was not saved is computed again
        moments.append(sum(present.values()))
        del present[i]
    assert not present
    return max(moments)


def reference_seconds(
    layer: LayerCost, fates: tuple[Fate, ...], share: float, link: HostLink | None
) -> float:
    """The equation of the module, term by term."""
    forward = backward = again = sent = 0.0
    for fate in fates:
        forward += layer.seconds
        backward += 2 * layer.seconds
        again += layer.seconds if fate == "recompute" else (1 - share) * layer.block_seconds
        sent += layer.kept - layer.block_kept * (1 - share) if fate == "swap" else 0.0
    if not sent:
        return again
    assert link is not None
    copying = sent / link.rate
    first = (layer.kept - layer.block_kept * (1 - share)) / link.rate
    return again + max(0.0, copying - forward) + max(0.0, copying - backward - again) + first


def best_of_all(
    layer: LayerCost, layers: int, device: int, head: int, link: HostLink | None, shares: list[float]
) -> float | None:
    """Fewest seconds over all assignments and `shares`; None where nothing fits."""
    seconds = []
    allowed = FATES if link is not None else ("keep", "recompute")
    for fates in product(allowed, repeat=layers):
        for share in shares:
            sent = fates.count("swap") * (layer.kept - layer.block_kept * (1 - share))
            if simulated_peak(layer, fates, share, head) <= device and (link is None or sent <= link.bytes):
                seconds.append(reference_seconds(layer, fates, share, link))
    return min(seconds, default=None)


def cases() -> list[tuple[LayerCost, int, HostLink | None]]:
    draw = random.Random(0)
    found = []
    for number in range(16):
        kept = draw.randint(20, 60) * MB
        block = draw.randint(0, kept * 2 // 3)
        seconds = draw.uniform(0.01, 0.1)
        layer = LayerCost(
            kept, draw.randint(1, 5) * MB, seconds, block, seconds * draw.uniform(0.3, 0.7) if block else 0.0
        )
        rate = kept / seconds * draw.choice([0.2, 0.7, 1.0, 1.5, 5.0])
        link = None if number % 4 == 0 else HostLink(rate, draw.randint(10, 400) * MB)
        found.append((layer, draw.randint(1, 5), link))
    return found


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_peak_is_that_of_the_moments(share: float) -> None:
    for layer, layers, _ in cases():
        for fates in product(FATES, repeat=layers):
            for head in (0, 15 * MB, 90 * MB):
                found = peak_bytes(layer, ActivationChoice(fates, share), head)
                assert found == pytest.approx(simulated_peak(layer, fates, share, head))


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("number", range(16))
def test_no_other_choice_is_quicker(number: int, split: bool) -> None:
    layer, layers, link = cases()[number]
    shares = [k / 24 for k in range(25)] if split else [1.0]
    head = (0, layer.kept // 2, 3 * layer.kept)[number % 3]
    all_kept = layers * layer.kept + head
    chosen_seconds = []
    for part in (0.2, 0.45, 0.7, 0.95, 1.0):
        device = int(part * all_kept)
        best = best_of_all(layer, layers, device, head, link, shares)
        chosen = choose_activations(layer, layers, device, head_bytes=head, link=link, split=split)
        if chosen is None:
            assert best is None
            continue
        fates, share = chosen.choice.layers, chosen.choice.token_share
        peak = simulated_peak(layer, fates, share, head)
        assert peak <= device
        assert chosen.device_bytes == pytest.approx(peak, abs=1)
        assert chosen.seconds == pytest.approx(reference_seconds(layer, fates, share, link))
        assert link is None or chosen.host_bytes <= link.bytes
        if best is not None:  # a share between those tried here may fit where they do not
            assert chosen.seconds <= best + 1e-9 + 1e-5 * layer.seconds
        chosen_seconds.append(chosen.seconds)
    assert chosen_seconds == sorted(chosen_seconds, reverse=True)  # more room is never slower
    assert chosen_seconds[-1] == 0.0


def test_eight_layers_on_a_cpu_recompute_the_fewest_that_make_it_fit() -> None:
    layer = LayerCost(kept=100 * MB, input=10 * MB, seconds=0.5)
    for device in range(160, 820, 20):
        chosen = choose_activations(layer, 8, device * MB)
        best = best_of_all(layer, 8, device * MB, 0, None, [1.0])
        if device < 170:
            assert chosen is best is None
            continue
        assert chosen is not None
        assert chosen.seconds == best
        again = chosen.choice.layers.count("recompute")
        assert 100 * (8 - again) + 10 * again <= device or again == 8
        assert 100 * (9 - again) + 10 * (again - 1) > device or again == 0
        assert chosen.choice.layers == ("recompute",) * again + ("keep",) * (8 - again)
        assert "swap" not in chosen.choice.layers


@pytest.mark.parametrize("slower", [0.5, 0.8, 1.0, 2.0])
@pytest.mark.parametrize("host_share", [0.5, 0.75, 2.0])
def test_memos_share(slower: float, host_share: float) -> None:
    """min(1, T B / bytes, host / total), as arXiv:2407.12117 has it, where a byte's copy is the dearest."""
    layers = 40
    layer = LayerCost(kept=100 * MB, input=100 * MB, seconds=0.1, block_kept=100 * MB, block_seconds=0.01)
    link = HostLink(slower * layer.kept / layer.seconds, int(host_share * layers * layer.kept))
    chosen = choose_activations(layer, layers, 220 * MB, link=link, split=True)
    assert chosen is not None
    swapped = chosen.choice.layers.count("swap")
    assert swapped >= layers - 2  # the last ones find room on the device
    per_layer = layers / swapped  # whose part of link and host goes to the others
    expected = min(
        1.0, layer.seconds * link.rate * per_layer / layer.kept, link.bytes / (swapped * layer.kept)
    )
    assert chosen.choice.token_share == pytest.approx(expected, abs=1e-5)


def test_swapped_layers_are_spread() -> None:
    layer = LayerCost(kept=100 * MB, input=90 * MB, seconds=0.1)
    link = HostLink(0.5 * layer.kept / layer.seconds, 10_000 * MB)
    chosen = choose_activations(layer, 12, 900 * MB, link=link)
    assert chosen is not None
    places = [i for i, fate in enumerate(chosen.choice.layers) if fate == "swap"]
    assert len(places) == 4  # no more than are needed, though more would take no longer
    gaps = {b - a for a, b in pairwise(places)}
    assert max(gaps) - min(gaps) <= 1
    assert chosen.choice.layers[-1] == "keep"


def test_a_line_says_what_and_why() -> None:
    layer = LayerCost(kept=100 * MB, input=10 * MB, seconds=0.5)
    roomy, tight = (choose_activations(layer, 24, size * MB) for size in (2400, 2000))
    assert roomy is not None
    assert roomy.line == "activations of 24 layers: 24 kept; 2.40 of 2.40 GB, at no cost"
    assert tight is not None
    assert tight.line == (
        "activations of 24 layers: 19 kept, 5 computed again; 1.95 of 2.00 GB, 2.5 s a micro-batch "
        "(computing all again: 12 s)"
    )


def test_no_layers_and_no_link() -> None:
    layer = LayerCost(kept=100, input=10, seconds=0.5)
    nothing = choose_activations(layer, 0, 0)
    assert nothing is not None
    assert nothing.choice.layers == ()
    assert swapped_bytes(layer, ActivationChoice(("swap", "keep"))) == 100


# The page


PAGE = Path(__file__).parent.parent / "docs" / "activations.md"


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = [part.split("```")[0] for part in PAGE.read_text(encoding="utf-8").split("```python\n")[1:]]
    (block,) = blocks
    exec(compile(block, str(PAGE), "exec"), {})
    printed = PAGE.read_text(encoding="utf-8").split("```text\n")[1].split("```")[0]
    assert capsys.readouterr().out == printed
