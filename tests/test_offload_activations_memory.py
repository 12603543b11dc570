"""Memory really falls, the pool does not grow, and the side stream of a GPU is used in the right order."""

from __future__ import annotations

import random
from collections import deque
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from activation_models import LAYERS, LateLink, batch, gradients, llama, loss_of, same_bits
from shoestring.offload.activation_model import ActivationChoice, Fate
from shoestring.offload.activations import apply_activations
from shoestring.offload.arena import Arena
from shoestring.offload.pool import ALIGNMENT, HostPool
from shoestring.offload.swap import StreamLink, link_for
from shoestring.plan.live_bytes import LiveBytes

CPU = torch.device("cpu")


def fates(kept: int, other: Fate = "recompute") -> tuple[Fate, ...]:
    return (other,) * (LAYERS - kept) + ("keep",) * kept


def measured(choice: ActivationChoice, host: HostPool | None = None) -> tuple[int, int]:
    """(bytes alive after the forward pass, and at the peak) of a model whose gradients are there already."""
    model, inputs = llama(hidden_size=64, intermediate_size=256), batch(64)
    with apply_activations(model, choice, pool=host, smallest=1 << 10):
        gradients(model, inputs)
        with LiveBytes(CPU) as live:
            loss = loss_of(model, inputs)
            saved = live.now
            loss.backward()
        return saved, live.peak


def test_fewer_layers_kept_take_fewer_bytes() -> None:
    found = [measured(ActivationChoice(fates(kept))) for kept in range(LAYERS, -1, -1)]
    saved, peaks = zip(*found, strict=True)
    steps = [some - fewer for some, fewer in pairwise(saved)]
    assert min(steps) > 0
    assert max(steps) < 1.05 * min(steps)  # layers are alike
    falls = [some - fewer for some, fewer in pairwise(peaks)]
    assert all(abs(fall / step - 1) < 0.02 for fall, step in zip(falls[:-1], steps, strict=False))
    assert falls[-1] < 0.02 * steps[-1]  # the last layer's are all there when backward begins with it
    assert peaks[0] > 2.5 * peaks[-1]


def test_a_smaller_share_of_tokens_takes_fewer_bytes() -> None:
    saved = [measured(ActivationChoice(fates(LAYERS), share))[0] for share in (1.0, 0.75, 0.5, 0.25, 0.0)]
    steps = [some - fewer for some, fewer in pairwise(saved)]
    quarter = LAYERS * 32 * 4 * 3 * 256  # gate, up and their product for a quarter of 128 tokens, in float32
    assert steps == [quarter] * 4
    again = measured(ActivationChoice(fates(0)))[0]
    assert saved[-1] > again


def test_swapped_activations_are_in_the_pool() -> None:
    host = HostPool(8 << 20)
    kept, again = (measured(ActivationChoice(fates(count)))[0] for count in (LAYERS, 0))
    swapped, _ = measured(ActivationChoice(fates(0, "swap")), host)
    assert swapped < again < kept
    assert 0.8 * (kept - swapped) < host.peak < 1.3 * (kept - swapped)


def test_each_storage_travels_once_and_what_layers_share_stays() -> None:
    model, link, seen = llama(), LateLink(), []
    inputs = batch()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def watch(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tensor)
        return tensor

    layer = model.model.layers[1]
    given: dict[str, Any] = {}
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: given.update(x=args[0], **kwargs), with_kwargs=True
    )
    own = type(layer).forward
    layer.forward = lambda *a, **k: _with_hooks(watch, own, layer, *a, **k)
    loss_of(model, inputs)
    del layer.forward
    shared = {t.data_ptr() for t in (given["attention_mask"], *given["position_embeddings"])}
    storages = {t.untyped_storage().data_ptr() for t in seen}
    assert shared & storages
    expected = len(storages - shared - parameters)
    assert expected < len(seen) - len(parameters & storages)
    with apply_activations(
        model,
        ActivationChoice(("keep", "swap", "keep", "keep")),
        pool=HostPool(8 << 20),
        link=link,
        smallest=1,
    ):
        loss_of(model, inputs)
    assert link.sent == expected


def _with_hooks(watch: Any, own: Any, *args: Any, **kwargs: Any) -> Any:
    with torch.autograd.graph.saved_tensors_hooks(watch, lambda tensor: tensor):
        return own(*args, **kwargs)


# The pool


def test_the_pool_does_not_grow_over_fifty_steps() -> None:
    model, host = llama(packed=True), HostPool(8 << 20)
    reached = []
    with apply_activations(
        model, ActivationChoice(("swap",) * LAYERS), pool=host, link=LateLink(), smallest=1
    ):
        for _ in range(50):
            gradients(model, batch(32, packed=True))
            assert host.used == 0
            reached.append(host.reach)
        assert len(set(reached)) == 1
        for length in range(8, 33):  # rows of other lengths, the longest as before
            gradients(model, batch(length, packed=True))
            assert host.used == 0
    assert host.reach == reached[0]
    assert host.refused == 0


@pytest.mark.parametrize("arena", [False, True])
def test_the_pool_against_a_list_of_bytes(arena: bool) -> None:
    blocks = 64
    with Arena((blocks + 8) * ALIGNMENT) as memory:
        host = HostPool(blocks * ALIGNMENT + 100, arena=memory if arena else None)
        assert host.nbytes == blocks * ALIGNMENT
        assert memory.used == (host.nbytes if arena else 0)
        taken = [False] * blocks  # the slow way: one flag a block
        out: list[tuple[torch.Tensor, int, int]] = []
        draw = random.Random(0)
        first = host.take(1)
        assert first is not None
        base = first.data_ptr()
        host.give(first)
        refused = 0
        for number in range(2000):
            if out and draw.random() < 0.48:
                buffer, start, size = out.pop(draw.randrange(len(out)))
                assert bool((buffer == start).all())  # nobody wrote into it
                host.give(buffer)
                taken[start : start + size] = [False] * size
                continue
            nbytes = draw.randint(1, 9 * ALIGNMENT)
            size = -(-nbytes // ALIGNMENT)
            start = next((i for i in range(blocks - size + 1) if not any(taken[i : i + size])), -1)
            buffer = host.take(nbytes)
            if start < 0:
                assert buffer is None
                refused += 1
                continue
            assert buffer is not None, number
            assert buffer.shape == (nbytes,)
            assert buffer.data_ptr() == base + start * ALIGNMENT
            buffer.fill_(start)
            taken[start : start + size] = [True] * size
            out.append((buffer, start, size))
            assert host.used == sum(taken) * ALIGNMENT
        assert host.refused == refused > 100
        for buffer, _, _ in out:
            host.give(buffer)
        whole = host.take(host.nbytes)
        assert whole is not None  # all holes are one again
        assert host.peak == host.reach == host.nbytes
        with pytest.raises(ValueError, match="not out"):
            host.give(torch.empty(ALIGNMENT, dtype=torch.uint8))
        host.give(whole)
        with pytest.raises(ValueError, match="not out"):
            host.give(whole)


def test_a_pool_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="a pool of 100 bytes holds no buffer"):
        HostPool(100)


# The side stream, without a GPU: streams that record what waits for what


class Stream:
    """Jobs in the order of their number; `seen` is the last job of each other stream that is waited for."""

    def __init__(self, name: str) -> None:
        self.name, self.jobs = name, 0
        self.seen: dict[str, int] = {}

    def wait_stream(self, other: Stream) -> None:
        self.seen[other.name] = other.jobs

    def record_event(self) -> Event:
        return Event(self)

    def wait_event(self, event: Event) -> None:
        self.seen[event.stream] = max(self.seen.get(event.stream, 0), event.jobs)


class Event:
    def __init__(self, stream: Stream) -> None:
        self.stream, self.jobs = stream.name, stream.jobs


def test_the_side_stream_waits_and_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    main, side = Stream("main"), Stream("side")
    current = deque([main])

    @contextmanager
    def inside(stream: Stream) -> Any:
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", inside)
    sent: list[int] = []
    let_go: list[int] = []
    fetched: list[tuple[object, int]] = []

    class Watched(StreamLink):
        def send(self, source: torch.Tensor, buffer: torch.Tensor) -> None:
            main.jobs += 1  # what made the source
            super().send(source, buffer)
            side.jobs += 1
            sent.append(side.jobs)
            assert side.seen["main"] == main.jobs

        def settle(self) -> None:
            before = self._before
            super().settle()
            if before is not None:
                assert main.seen["side"] >= before[1].jobs  # waited for, and only then let go
                let_go.append(before[1].jobs)

        def fetch(self, buffer: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, object]:
            main.jobs += 1
            side.jobs += 1
            target, ticket = super().fetch(buffer, device)
            assert side.seen["main"] == main.jobs
            assert self._before is None
            fetched.append((ticket, side.jobs))
            return target, ticket

        def wait(self, ticket: object) -> None:
            super().wait(ticket)
            assert main.seen["side"] >= next(jobs for known, jobs in fetched if known is ticket)

    model, inputs, host = llama(), batch(), HostPool(8 << 20)
    plain = gradients(model, inputs)
    with apply_activations(
        model, ActivationChoice(("swap",) * LAYERS), pool=host, link=Watched(CPU), smallest=1
    ):
        assert same_bits(gradients(model, inputs), plain)
    assert len(let_go) == LAYERS - 1  # one layer late; the last is let go before the first copy back
    assert sorted(sent) == sent
    assert len(fetched) == len(sent)
    assert isinstance(link_for(torch.device("cuda")), StreamLink)
