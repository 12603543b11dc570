"""Frozen layers that lie coded on the disk: every bit comes back, damage is an error, memory is as said."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from shoestring.offload import coded_layers, layer_tier
from shoestring.offload.arena import PAGE, Arena
from shoestring.offload.code_rate import cannot_decode, decoding_threads, measure_decoding
from shoestring.offload.coded_layers import CodedLayers
from shoestring.offload.direct_file import DirectFile
from shoestring.offload.errors import OffloadError
from shoestring.offload.layer_buffers import THREADS
from shoestring.offload.layer_store import Copier
from shoestring.offload.transfers import ThreadTransfers
from shoestring.ops import native
from shoestring.plan.live_bytes import LiveBytes
from streaming import llama, loss_of, rows, streamed, trained, with_lora

SMALL = 4 * PAGE
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=f"no C++ here: {native.missing()}")


@pytest.fixture
def small(monkeypatch):
    """Parts of four pages, so that small layers have many."""
    monkeypatch.setattr(coded_layers, "PART", SMALL)
    monkeypatch.setattr(layer_tier, "PART", SMALL)


def weights(nbytes, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(nbytes // 2, generator=draw) * 0.02).bfloat16().view(torch.uint8)


def noise(nbytes, seed=0):
    return torch.randint(256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def mixture(nbytes, seed):
    """Pages of weights, of bytes that no code makes shorter, and of zeros, in any order."""
    draw = random.Random(seed)
    made = [weights, noise, lambda count, _: torch.zeros(count, dtype=torch.uint8)]
    pages = []
    while len(pages) * PAGE < nbytes:
        kind, run = draw.choice(made), draw.randint(1, 12)
        pages += kind(run * PAGE, draw.randrange(1000)).split(PAGE)
    return torch.cat(pages)[:nbytes]


@contextmanager
def store_of(folder, layers, *, staged=False, part=SMALL, threads=1):
    """A store with these layers (uint8) in it, one after the other; and where each of them begins."""
    starts = [sum(map(len, layers[:at])) for at in range(len(layers) + 1)]
    largest = max(map(len, layers))
    room = Arena(2 * THREADS * largest + THREADS * part)
    staging = [room.take(largest) for _ in range(THREADS)] if staged else []
    spare = [room.take(part) for _ in range(THREADS)]
    with DirectFile(Path(folder) / "weights", starts[-1]) as file:
        transfers = ThreadTransfers(file, 3, PAGE)
        options = {"path": file.path, "coded": starts[:-1], "spare": spare, "threads": threads}
        store = CodedLayers(transfers, staging, Copier(CPU), **options)
        buffer = room.take(largest)
        for start, layer in zip(starts, layers, strict=False):
            buffer[: len(layer)] = layer
            store.write(start, buffer[: len(layer)])
        yield SimpleNamespace(store=store, starts=starts, buffer=buffer, file=file, transfers=transfers)
        transfers.close()


@pytest.mark.parametrize("staged", [False, True], ids=["in host memory", "staged"])
def test_every_bit_comes_back_whatever_the_layer_holds(tmp_path, small, staged):
    sizes = [PAGE, SMALL - PAGE, SMALL, SMALL + PAGE, 3 * SMALL, 7 * SMALL + 3 * PAGE]
    layers = [weights(size, size) for size in sizes]
    layers += [mixture(random.Random(seed).randint(1, 30) * PAGE, seed) for seed in range(60)]
    with store_of(tmp_path, layers, staged=staged, threads=2) as made:
        for start, layer in zip(made.starts, layers, strict=False):
            into = made.buffer[: len(layer)]
            into.fill_(0xA5)
            made.store.read(start, into)
            assert torch.equal(into, layer)
        kinds = {part.length is None for parts in made.store._parts.values() for part in parts}
        assert kinds == {True, False}
        coded = [made.store.is_coded(start) for start in made.starts[:-1]]
        assert not coded[0], "nothing is shorter than one page"
        assert all(coded[2:6])


def test_no_part_is_decoded_over_what_is_still_to_be(tmp_path, small):
    """By the layout itself, at any moment: where each part ends, and where the codes after it begin."""
    layers = [mixture(random.Random(seed).randint(1, 40) * PAGE, seed) for seed in range(80)]
    with store_of(tmp_path, layers) as made:
        for start, layer in zip(made.starts, layers, strict=False):
            parts = made.store._parts.get(start, [])
            assert [part.start for part in parts] == [0, *(part.end for part in parts)][: len(parts)]
            at = len(layer) - sum(part.room for part in parts[:-1])
            for part in parts[:-1]:
                assert part.end <= at
                assert part.room <= part.end - part.start
                at += part.room
            assert all(part.at % PAGE == part.room % PAGE == 0 for part in parts)


def test_it_moves_less_and_only_the_first_contents_are_coded(tmp_path, small):
    layer, changed = weights(40 * PAGE), weights(40 * PAGE, 1)
    with store_of(tmp_path, [layer, noise(8 * PAGE)]) as made:
        assert made.store.bytes_written == made.store.share * 48 * PAGE == 38 * PAGE
        before = made.store.bytes_read
        made.store.read(0, made.buffer)
        assert made.store.bytes_read - before == 30 * PAGE
        made.buffer.copy_(changed)
        made.store.write(0, made.buffer)
        assert not made.store.is_coded(0)
        made.buffer.zero_()
        made.store.read(0, made.buffer)
        assert torch.equal(made.buffer, changed)
        assert made.store.bytes_read - before == 70 * PAGE
        assert not made.store.is_coded(40 * PAGE)


def test_two_threads_at_once(tmp_path, small):
    layers = [mixture(33 * PAGE, seed) for seed in range(4)]
    arena = Arena(4 * 33 * PAGE)
    buffers = [arena.take(33 * PAGE) for _ in layers]
    with store_of(tmp_path, layers) as made, ThreadPoolExecutor(4) as pool:

        def again(at):
            for _ in range(25):
                buffers[at].zero_()
                made.store.read(made.starts[at], buffers[at])
                if not torch.equal(buffers[at], layers[at]):
                    return False
            return True

        assert all(pool.map(again, range(4)))


@pytest.mark.parametrize("staged", [False, True])
def test_damage_names_the_file_and_what_to_do(tmp_path, small, staged):
    layer = weights(17 * PAGE)
    with store_of(tmp_path, [layer], staged=staged) as made:
        kinds = [part.length is None for part in made.store._parts[0]]
        assert kinds == [True, False, False, False, False], "a page alone is kept as it is"
        for part in made.store._parts[0]:
            page = made.buffer[:PAGE]
            made.transfers.read(part.at, page).wait()
            page[100] ^= 4
            made.transfers.write(part.at, page).wait()
            with pytest.raises(OffloadError) as caught:
                made.store.read(0, made.buffer)
            said = str(caught.value)
            assert said.startswith(
                f"offload.disk_path  {made.file.path} holds other bytes at {part.at:,} than"
            )
            assert "checksum differs" in said
            assert "start the run again: it goes on from its last checkpoint" in said
            made.transfers.read(part.at, page).wait()
            page[100] ^= 4
            made.transfers.write(part.at, page).wait()
        made.store.read(0, made.buffer)
        assert torch.equal(made.buffer, layer)


def test_a_read_that_fails_ends_when_nothing_is_on_its_way_any_more(tmp_path, small):
    """The buffer belongs to another layer then."""
    with store_of(tmp_path, [weights(20 * PAGE)]) as made:
        read, ended = made.file.read, []
        fail = OffloadError("offload.disk_path  cannot read: Input/output error (EIO)")

        def slow(offset, into):
            if offset == 0:
                raise fail
            time.sleep(0.02)
            read(offset, into)
            ended.append(offset)

        made.file.read = slow
        with pytest.raises(OffloadError, match="Input/output"):
            made.store.read(0, made.buffer)
        rooms = sum(part.room for part in made.store._parts[0])
        assert len(ended) >= (rooms - made.store._parts[0][0].room) // PAGE, "all of the other parts"
        del made.file.read
        made.store.read(0, made.buffer)
        assert torch.equal(made.buffer, weights(20 * PAGE))


def test_decoding_takes_no_more_memory_than_the_spare_part(tmp_path):
    part = coded_layers.PART
    with store_of(tmp_path, [weights(3 * part + PAGE)], part=part) as made, LiveBytes(CPU) as live:
        made.store.read(0, made.buffer)
        assert live.peak < part / 100, "counts of blocks alone"


def big(**changes):
    return llama(torch.bfloat16, hidden_size=256, intermediate_size=320, **changes)


def steps(model, first=0, count=4):
    """Losses and gradients."""
    found = []
    for step in range(first, first + count):
        loss = loss_of(model, rows(step))
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in trained(model).values())]
        model.zero_grad(set_to_none=True)
    return found


def same(ours, theirs):
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("buffers", [2, 3])
def test_lora_steps_are_those_of_the_model_in_memory(tmp_path, small, buffers):
    wanted = steps(with_lora(big()))
    model = with_lora(big())
    with streamed(model, tmp_path, buffers=buffers, coded=True) as offloaded:
        total = sum(layer.place.nbytes for layer in offloaded.layers)
        assert 0.69 < offloaded.bytes_written / total < 0.8
        line = f"in {16 * offloaded.bytes_written / total:.1f} of 16 bits a weight"
        assert line in offloaded.lines[-1]
        assert same(steps(model), wanted)
        assert offloaded.bytes_read < 0.8 * 2 * 4 * total
        with torch.no_grad():
            assert torch.equal(loss_of(model, rows(9)), loss_of(with_lora(big()), rows(9)))


def test_mapped_and_restored(tmp_path, small):
    model, plain = with_lora(big()), with_lora(big())
    by_name = dict(plain.named_parameters())
    offloaded = streamed(model, tmp_path, coded=True)
    assert any(offloaded._tier.store.is_coded(layer.place.offset) for layer in offloaded.layers)
    for _ in range(2):
        with offloaded.mapped() as stored:
            for name, parameter in model.named_parameters():
                if parameter in stored:
                    assert torch.equal(stored[parameter], by_name[name])
    assert not any(offloaded._tier.store.is_coded(layer.place.offset) for layer in offloaded.layers)
    assert same(steps(model), steps(plain))
    offloaded.close(restore=True)
    assert all(torch.equal(p, by_name[name]) for name, p in model.named_parameters())
    assert list(tmp_path.iterdir()) == []


def test_damage_in_a_backward_pass_is_one_error_and_no_old_numbers(tmp_path, small):
    model = with_lora(big())
    with streamed(model, tmp_path, coded=True) as offloaded:
        loss = loss_of(model, rows(0))
        held = offloaded._tier.held
        place = offloaded.layers[1].place
        page = Arena(PAGE).take(PAGE)
        held.read(place.offset, page.numpy().data)
        page[200] ^= 1
        held.write(place.offset, page.numpy().data)
        with pytest.raises(OffloadError, match=r"weights holds other bytes at [\d,]+ than were written"):
            loss.backward()
        assert bool(model.base_model.model.model.layers[1].mlp.up_proj.base_layer.weight.isnan().all())


def test_layers_of_several_types(tmp_path, small):
    def build():
        model = big()
        model.model.layers[1].mlp.float()
        model.model.layers[2].float()
        return with_lora(model)

    wanted = build()
    wanted = [p.clone() for layer in wanted.base_model.model.model.layers for p in layer.parameters()]
    model = build()
    offloaded = streamed(model, tmp_path, coded=True)
    coded = [offloaded._tier.store.is_coded(layer.place.offset) for layer in offloaded.layers]
    assert coded == [True, True, False, True, True]
    offloaded.close(restore=True)
    got = [p for layer in model.base_model.model.model.layers for p in layer.parameters()]
    assert same(got, wanted)


@pytest.mark.parametrize("why", ["float32", "trained", "host"])
def test_what_is_not_coded(tmp_path, why):
    model = llama() if why == "float32" else big()
    model = model if why == "trained" else with_lora(model)
    options = {"trainable": why == "trained", "tier": "host" if why == "host" else "disk"}
    with streamed(model, tmp_path, coded=True, **options) as offloaded:
        assert not isinstance(offloaded._tier.store, CodedLayers)
        assert offloaded.bytes_written == sum(layer.place.nbytes for layer in offloaded.layers)
        assert not any("bits" in line or "coded" in line for line in offloaded.lines)


def test_without_the_decoder_layers_lie_as_they_are_and_a_line_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "missing", lambda: "there is no C++ compiler")
    assert measure_decoding("cpu") is None
    model = with_lora(big())
    with streamed(model, tmp_path, coded=True) as offloaded:
        assert offloaded.lines[-1] == (
            "frozen layers lie on disk as they are, not coded, since there is no C++ compiler"
        )
        assert not isinstance(offloaded._tier.store, CodedLayers)
        assert same(steps(model, count=1), steps(with_lora(big()), count=1))


def test_the_decoder_that_is_forbidden_by_name(monkeypatch):
    assert cannot_decode() is None
    monkeypatch.setenv("SHOESTRING_OPS", "lossless=torch")
    assert cannot_decode() == "SHOESTRING_OPS=lossless=torch forbids the C++ decoder"


def test_the_memory_that_it_takes_is_the_one_that_is_planned(tmp_path, monkeypatch):
    taken = []
    take = Arena.take
    monkeypatch.setattr(Arena, "take", lambda self, n: (taken.append(n), take(self, n))[1])
    with streamed(with_lora(big()), tmp_path):
        plain = sum(taken)
    with streamed(with_lora(big()), tmp_path, coded=True):
        assert sum(taken) - 2 * plain == THREADS * coded_layers.PART


def test_decoding_is_measured(monkeypatch):
    found = measure_decoding("cpu")
    assert 1e8 < found.bytes_per_second < 1e11
    assert 0.69 < found.share < 0.71
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(16))
    assert (decoding_threads("cpu"), decoding_threads("cuda")) == (1, 4)
