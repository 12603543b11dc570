"""Streamed weights when the disk is slow, fails or lies, and when they are used wrongly."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from shoestring.offload.errors import OffloadError
from shoestring.offload.layer_buffers import LayerBuffers
from shoestring.offload.layer_layout import lay_out
from shoestring.offload.layer_store import Copier, HostLayers
from shoestring.optimizers.elementwise import AdamW
from shoestring.optimizers.in_backward import BackwardStepper, step_in_backward
from shoestring.optimizers.lomo import LOMO
from shoestring.recipes.errors import UserError
from streaming import SlowStore, llama, loss_of, rows, streamed, trained, with_lora


def buffers_of(layers=6, count=2, delay=0.0, sizes=(50, 300)):
    """Layers of two weights each, all elements of layer i being i, behind a store that may be slow."""
    draw = random.Random(0)
    places = lay_out(
        [[((draw.randint(*sizes), 7), torch.float32), ((3,), torch.bfloat16)] for _ in range(layers)]
    )
    memory = torch.zeros(sum(place.nbytes for place in places), dtype=torch.uint8)
    store = SlowStore(HostLayers(memory, Copier(memory.device)))
    largest = max(place.nbytes for place in places)
    buffers = LayerBuffers(places, [torch.zeros(largest, dtype=torch.uint8) for _ in range(count)], store)
    for layer, place in enumerate(places):
        buffers.put(layer, [torch.full(shape, float(layer)) for shape in place.shapes])
    buffers.flush()
    store.delay = delay
    return buffers, store, places


def assert_holds(place, memory, value):
    for view in place.views(memory):
        assert view.dtype in place.dtypes
        assert bool((view == value).all()), value


@pytest.mark.parametrize("count", [2, 3])
def test_every_use_sees_its_own_layer_from_beginning_to_end(count):
    """Random uses, nested ones too, random guesses of what follows, changes, and a store that dawdles."""
    buffers, store, places = buffers_of(count=count, delay=0.0005)
    values = [float(layer) for layer in range(6)]
    draw = random.Random(1)

    def use(depth):
        layer = draw.randrange(6)
        if layer in held:
            return
        changes = draw.random() < 0.5
        guesses = draw.sample(range(6), draw.randint(0, 5))
        held.add(layer)
        with buffers.using(layer, guesses, changes=changes) as now:
            assert_holds(places[layer], now.memory, values[layer])
            if depth < count - 1 and draw.random() < 0.4:
                use(depth + 1)
            assert_holds(places[layer], now.memory, values[layer])
            if changes:
                values[layer] = float(draw.randrange(100))
                for view in places[layer].views(now.memory):
                    view.fill_(values[layer])
                now.changed = True
        held.remove(layer)

    held: set[int] = set()
    for _ in range(300):
        use(0)
    buffers.flush()
    for layer, place in enumerate(places):
        assert_holds(place, store.store._memory[place.offset : place.offset + place.nbytes], values[layer])
    buffers.close()


def test_a_buffer_that_is_given_away_while_in_use_is_noticed(monkeypatch):
    buffers, _, _ = buffers_of()
    victim = type(buffers)._victim
    said = "all 2 buffers are in use"
    with buffers.using(0), buffers.using(1), pytest.raises(RuntimeError, match=said), buffers.using(2):
        pass

    def careless(self, keep):
        return next((slot for slot in self._slots if slot.users), None) or victim(self, keep)

    monkeypatch.setattr(type(buffers), "_victim", careless)
    said = "layer 3 was overwritten by layer 4 while it was in use"
    with pytest.raises(RuntimeError, match=said), buffers.using(3, following=[4]):
        pass
    buffers.close()


def test_a_read_waits_for_the_write_of_the_same_layer_from_another_buffer():
    buffers, store, places = buffers_of(count=3)
    release = threading.Event()
    write = store.store.write
    store.store.write = lambda offset, data: (release.wait(5), write(offset, data))
    with buffers.using(0, changes=True) as now:
        for view in places[0].views(now.memory):
            view.fill_(77.0)
        now.changed = True
    slot = buffers._holder(0)
    slot.layer = 99  # as if another layer had taken the buffer over, its read still waiting
    slot.last_use = 10**6  # so that the next read goes elsewhere
    threading.Timer(0.05, release.set).start()
    with buffers.using(0) as now:
        assert_holds(places[0], now.memory, 77.0)
    buffers.close()


def test_reading_ahead_overlaps_with_the_use():
    buffers, store, _ = buffers_of(delay=0.0)
    began, go_on = threading.Event(), threading.Event()
    read = store.store.read
    store.store.read = lambda offset, into: (began.set(), go_on.wait(5), read(offset, into))
    resident = [slot.layer for slot in buffers._slots]
    away = next(layer for layer in range(6) if layer not in resident)
    with buffers.using(resident[0], following=[away]):
        assert began.wait(5), "the next layer is read while this one is in use"
    go_on.set()
    buffers.close()


def test_a_disk_that_returns_other_bytes_is_noticed():
    buffers, store, places = buffers_of()
    with buffers.using(4, changes=True) as now:
        now.changed = True
    buffers.flush()
    for layer in (0, 1):
        with buffers.using(layer):
            pass
    memory = store.store._memory
    old = memory[places[4].offset : places[4].offset + places[4].nbytes]
    old[-64 + 8] -= 1  # the end is of the write before
    said = r"layer 4 was read back as \(layer, write\) \(4, 1\), expected \(4, 2\)"
    with pytest.raises(OffloadError, match=said), buffers.using(4):
        pass
    buffers.close()


def fault(verb):
    return OffloadError(f"offload.disk_path  cannot {verb}: Input/output error (EIO)")


def failing(offloaded):
    """The store of a streamed model, made one that can be told to fail."""
    store = SlowStore(offloaded.buffers._store)
    offloaded.buffers._store = store
    return store


@pytest.mark.parametrize("trainable", [False, True])
def test_a_read_that_fails_in_the_backward_pass_is_one_clear_error(tmp_path, trainable):
    model = llama(layers=6) if trainable else with_lora(llama(layers=6))
    with streamed(model, tmp_path, trainable=trainable) as offloaded:
        store = failing(offloaded)
        loss = loss_of(model, rows(0))
        store.fail["read"] = fault("read")
        with pytest.raises(OffloadError, match="cannot read"):
            loss.backward()
        for layer in offloaded.layers:
            assert layer.depth == 0
            assert all(p.untyped_storage().nbytes() == p.itemsize for p in layer.parameters)
        del store.fail["read"]  # the disk is back: nothing was lost, and nothing hangs
        model.zero_grad(set_to_none=True)
        loss_of(model, rows(0)).backward()
        got = {name: p.grad.clone() for name, p in trained(model).items()}
    plain = llama(layers=6) if trainable else with_lora(llama(layers=6))
    loss_of(plain, rows(0)).backward()
    assert all(torch.equal(got[name], p.grad) for name, p in trained(plain).items())


def test_a_write_that_fails_ends_the_training_for_good(tmp_path):
    model = llama(layers=5)
    with streamed(model, tmp_path, trainable=True) as offloaded:
        store = failing(offloaded)
        stepper = BackwardStepper(LOMO(model.named_parameters(), lr=0.1))
        stepper.step(lambda: loss_of(model, rows(0)))
        store.fail["write"] = fault("write")
        with pytest.raises(OffloadError, match="cannot write"):
            stepper.step(lambda: loss_of(model, rows(1)))
        del store.fail["write"]
        for _ in range(2):
            with pytest.raises(OffloadError, match="cannot write"):
                loss_of(model, rows(0))
        with pytest.raises(OffloadError, match="cannot write"), offloaded.mapped():
            pass


def test_nothing_is_left_on_the_disk(tmp_path):
    model = with_lora(llama())
    offloaded = streamed(model, tmp_path / "scratch")
    files = [path for path in (tmp_path / "scratch").rglob("*") if path.name == "weights"]
    assert [path.stat().st_size for path in files] == [sum(layer.place.nbytes for layer in offloaded.layers)]
    offloaded.close()
    offloaded.close()
    assert list((tmp_path / "scratch").iterdir()) == []
    assert "forward" not in model.base_model.model.model.layers[0].__dict__


def test_close_can_give_the_weights_back(tmp_path):
    model, plain = with_lora(llama()), with_lora(llama())
    layer = model.base_model.model.model.layers[1]
    calls = []
    inner = layer.forward
    layer.forward = lambda *args, **kwargs: (calls.append(1), inner(*args, **kwargs))[1]  # another's wrapper
    streamed(model, tmp_path).close(restore=True)
    ours = dict(model.named_parameters())
    assert all(torch.equal(ours[name], p) for name, p in plain.named_parameters())
    loss_of(model, rows(0))
    assert calls == [1]


def test_a_weight_that_is_away_is_nan_and_keeps_its_shape(tmp_path):
    model = with_lora(llama())
    with streamed(model, tmp_path) as offloaded:
        weight = model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight
        assert (weight.shape, weight.dtype, weight.requires_grad) == ((80, 48), torch.float32, False)
        assert bool(weight.isnan().all())
        assert weight.untyped_storage().nbytes() == 4
        with offloaded.present(0) as layer:
            assert not bool(layer.mlp.up_proj.base_layer.weight.isnan().any())
        assert bool(weight.isnan().all())


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
        lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
        lambda p: torch.optim.SGD(p, lr=1e-3),
        lambda p: AdamW(p, lr=1e-3),
        lambda p: LOMO(p, lr=1e-3),
    ],
)
def test_a_step_outside_the_backward_pass_is_refused_before_it_writes(tmp_path, make):
    model = llama()
    with streamed(model, tmp_path, trainable=True):
        loss_of(model, rows(0)).backward()
        optimizer = make(list(model.parameters()))
        with pytest.raises(RuntimeError, match=r"not in memory.*step_in_backward"):
            optimizer.step()
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0).step()  # others are left alone


def test_a_gradient_left_from_before_for_a_layer_that_is_not_reached_is_refused(tmp_path):
    """Its weight is away, and AdamW's fused kernel would write to any address."""
    model = llama()
    with streamed(model, tmp_path, trainable=True):
        loss_of(model, rows(0)).backward()
        optimizer = AdamW(model.parameters(), lr=1e-3)
        with pytest.raises(RuntimeError, match="Cannot access data pointer"), step_in_backward(optimizer):
            model.lm_head.weight.sum().backward()


def refusal(model, tmp_path, **options):
    with pytest.raises(UserError) as caught:
        streamed(model, tmp_path, **options)
    return str(caught.value)


def test_refusals_name_the_key_and_what_to_do(tmp_path):
    model = llama()
    assert "no frozen weight" in refusal(model, tmp_path)
    assert "nothing to stream layer by layer" in refusal(torch.nn.Linear(2, 2), tmp_path)
    model.requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(9, dtype=torch.uint8), False)
    assert "load_in_4bit=false" in refusal(model, tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="two buffers"):
        streamed(with_lora(llama()), tmp_path, buffers=1)
    assert list(tmp_path.iterdir()) == []
    adapted = with_lora(llama())
    with streamed(adapted, tmp_path):
        adapted.base_model.model.model.layers[1].input_layernorm.weight.requires_grad_(True)
        with pytest.raises(
            UserError, match=r"layers\.1\.input_layernorm\.weight is streamed as a frozen weight"
        ):
            loss_of(adapted, rows(0))
