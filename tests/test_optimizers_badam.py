"""BAdam: AdamW on the active block and nothing elsewhere; turns, memory, checkpoints, a model that learns."""

import re
import weakref
from collections import Counter
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from shoestring.checkpoint import load_optimizer_state, optimizer_state
from shoestring.optimizers import clip_by_global_norm
from shoestring.optimizers.badam import BAdam, build, largest_elements, state_bytes, trained_names
from shoestring.optimizers.blocks import BlockSchedule, find_blocks, take_turns
from shoestring.optimizers.in_backward import step_in_backward
from shoestring.recipes.errors import UserError
from torch import nn

ORDERS = ["descending", "ascending", "random", "lisa"]


class Net(nn.Module):
    """Named as a decoder; `layers` have 24 x 24 weights, or larger ones where a test wants 8-bit state."""

    def __init__(self, layers=4, width=24, dtype=torch.float64, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed_tokens = nn.Embedding(11, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, 11, bias=False)
        self.to(dtype)

    def forward(self, tokens):
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.lm_head(self.norm(x))


def loss_of(net, step):
    tokens = torch.randint(0, 11, (6, 5), generator=torch.Generator().manual_seed(step))
    return nn.functional.cross_entropy(net(tokens).flatten(0, 1).float(), tokens.roll(1, 1).flatten())


def run(net, optimizer, first, last):
    for step in range(first, last):
        loss_of(net, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def active_layers(net):
    names = [name for name, p in net.named_parameters() if p.requires_grad]
    return sorted({int(number) for name in names for number in re.findall(r"layers\.(\d+)", name)})


def values(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def bytes_in(optimizer):
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t))


def config(**changes):
    given = {
        "order": "random",
        "active_blocks": 1,
        "train_embeddings": False,
        "state_bits": 32,
        "weights": "master",
        "switch_block_every": 2,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.1,
    }
    return SimpleNamespace(**{**given, **changes})


# --- blocks


def test_layers_are_found_by_number_in_order():
    names = [
        "model.embed_tokens.weight",
        *(f"model.layers.{n}.mlp.w" for n in (10, 2, 1)),
        "model.norm.weight",
    ]
    blocks = find_blocks([*names, "lm_head.weight", "model.layers.2.self_attn.w"])
    assert blocks.embeddings == ("model.embed_tokens.weight",)
    assert blocks.layers == (
        ("model.layers.1.mlp.w",),
        ("model.layers.2.mlp.w", "model.layers.2.self_attn.w"),
        ("model.layers.10.mlp.w",),
    )
    assert blocks.output == ("model.norm.weight", "lm_head.weight")


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("transformer.h.3.attn.c_attn.weight", 3),
        ("transformer.blocks.0.ffn.weight", 0),
        ("bert.encoder.layer.7.output.dense.weight", 7),
        ("encoder.block.2.layer.0.SelfAttention.q.weight", 2),
        ("base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight", 1),
        ("model.layers.4.mlp.experts.blocks.9.w1", 4),
    ],
)
def test_names_of_other_models(name, number):
    others = [name.replace(f".{number}.", f".{n}.", 1) for n in range(10, 12)]
    assert find_blocks([others[0], name, others[1]]).layers[0] == (name,)


def test_encoder_and_decoder_are_two_stacks():
    names = [f"{stack}.layers.{n}.w" for stack in ("encoder", "decoder") for n in range(2)]
    assert find_blocks(names).layers == tuple((name,) for name in names)


def test_what_is_in_no_layer():
    names = [name for name, _ in Net(2).named_parameters()]
    layers = [[f"layers.{n}.weight", f"layers.{n}.bias"] for n in range(2)]
    embeddings, output = ["embed_tokens.weight"], ["norm.weight", "norm.bias", "lm_head.weight"]
    assert take_turns(names, order="random") == (layers, [])
    assert take_turns(names, order="random", train_embeddings=True) == ([embeddings, *layers, output], [])
    for train in (True, False):
        assert take_turns(names, order="lisa", train_embeddings=train) == (layers, embeddings + output)


def test_explicit_blocks_are_names_or_prefixes_up_to_a_dot():
    names = ["a.1.w", "a.10.w", "a.1.b", "b"]
    assert take_turns(names, order="random", blocks=["a.1", ["b", "a.10."]]) == (
        [["a.1.w", "a.1.b"], ["a.10.w", "b"]],
        [],
    )
    assert take_turns(names, order="lisa", blocks=[["a.1"]])[1] == ["a.10.w", "b"]


# --- the schedule


def turns_of(schedule, count):
    result = [schedule.at(turn * schedule.every) for turn in range(count)]
    for turn, active in enumerate(result):
        assert all(schedule.at(turn * schedule.every + i) == active for i in range(schedule.every))
    return result


def test_descending_and_ascending():
    assert turns_of(BlockSchedule(3, "descending", 2), 4) == [(2,), (1,), (0,), (2,)]
    assert turns_of(BlockSchedule(3, "ascending", 2), 4) == [(0,), (1,), (2,), (0,)]
    assert turns_of(BlockSchedule(5, "descending", 3, active=2), 4) == [(3, 4), (1, 2), (0,), (3, 4)]


def test_random_visits_every_block_once_a_round_in_another_order():
    rounds = [turns_of(BlockSchedule(7, "random", 4), 28)[i : i + 7] for i in range(0, 28, 7)]
    assert all(sorted(order) == [(n,) for n in range(7)] for order in rounds)
    assert len({tuple(order) for order in rounds}) == 4
    assert turns_of(BlockSchedule(7, "random", 4, seed=1), 28)[:7] != rounds[0]


def test_lisa_draws_uniformly():
    turns = turns_of(BlockSchedule(6, "lisa", 2, active=2, seed=3), 6000)
    assert all(len(set(active)) == 2 for active in turns)
    counts = Counter(turns)
    assert len(counts) == 15
    assert all(300 < count < 500 for count in counts.values())  # 400 expected, five deviations


def test_the_drawn_order_is_the_same_forever():
    """Checkpoints of older versions resume in the same order."""
    assert turns_of(BlockSchedule(5, "random", 1), 5) == [(0,), (3,), (4,), (1,), (2,)]
    assert turns_of(BlockSchedule(5, "lisa", 1, active=2, seed=7), 3) == [(2, 4), (0, 1), (2, 4)]


def test_the_largest_sum_of_blocks_active_together():
    sizes = [5, 1, 1, 9, 9]
    assert BlockSchedule(5, "descending", active=2).largest(sizes) == 18
    assert BlockSchedule(5, "ascending", active=2).largest(sizes) == 10
    assert BlockSchedule(5, "random", active=3).largest(sizes) == 23
    assert BlockSchedule(5, "lisa", active=1).largest(sizes) == 9


# --- the update


@pytest.mark.parametrize("order", ORDERS)
def test_a_block_is_stepped_as_by_adamw_and_the_others_not_at_all(order):
    every, net = 5, Net()
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    optimizer = BAdam(net.named_parameters(), switch_block_every=every, order=order, seed=2, **options)
    for turn in range(6):
        active = {name for name, p in net.named_parameters() if p.requires_grad}
        assert active_layers(net) == list(optimizer.schedule.at(turn * every))
        if order == "lisa" and turn:
            break  # its always trained tensors keep their state: the next test
        before, reference = values(net), deepcopy(net)
        adamw = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], **options)
        run(reference, adamw, turn * every, (turn + 1) * every)
        run(net, optimizer, turn * every, (turn + 1) * every)
        for name, p in net.named_parameters():
            if name in active:
                assert not torch.equal(p, before[name])
                torch.testing.assert_close(p, reference.get_parameter(name), rtol=0, atol=1e-11)
            else:
                assert torch.equal(p, before[name])


def test_lisa_trains_embeddings_norm_and_head_at_every_step_with_one_state():
    net = Net()
    optimizer = BAdam(net.named_parameters(), lr=1e-2, order="lisa", active_blocks=2, switch_block_every=3)
    always = {"embed_tokens.weight", "norm.weight", "norm.bias", "lm_head.weight"}
    before = values(net)
    for step in range(12):
        layers = active_layers(net)
        assert len(layers) == 2
        run(net, optimizer, step, step + 1)
        changed = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
        assert changed == always | {f"layers.{n}.{part}" for n in layers for part in ("weight", "bias")}
        before = values(net)
        assert all(int(optimizer.state[net.get_parameter(name)]["step"]) == step + 1 for name in always)


def test_switches_come_after_exactly_that_many_steps_and_counters_start_again():
    net = Net(3)
    optimizer = BAdam(net.named_parameters(), lr=1e-3, order="descending", switch_block_every=4)
    seen, counters = [], []
    for step in range(14):
        seen += active_layers(net)
        p = net.layers[seen[-1]].weight
        run(net, optimizer, step, step + 1)
        counters.append(int(optimizer.state[p]["step"]) if p in optimizer.state else 4)
    assert seen == [2] * 4 + [1] * 4 + [0] * 4 + [2] * 2
    assert counters == [1, 2, 3, 4] * 3 + [1, 2]
    assert optimizer.steps == 14


def test_embeddings_take_turns_or_never_change():
    net = Net(2)
    optimizer = BAdam(
        net.named_parameters(), lr=1e-3, order="ascending", switch_block_every=1, train_embeddings=True
    )
    seen = []
    for step in range(4):
        seen.append({name.split(".")[0] for name, p in net.named_parameters() if p.requires_grad})
        run(net, optimizer, step, step + 1)
    assert seen == [{"embed_tokens"}, {"layers"}, {"layers"}, {"norm", "lm_head"}]
    net, before = Net(2), values(Net(2))
    run(net, BAdam(net.named_parameters(), lr=1e-3, switch_block_every=1), 0, 4)
    assert {n for n, p in net.named_parameters() if not torch.equal(p, before[n])} == set(
        trained_names(before, config())
    )


def test_tensors_frozen_before_stay_frozen():
    net = Net(2)
    net.layers[0].bias.requires_grad_(False)
    optimizer = BAdam(net.named_parameters(), lr=1e-3, switch_block_every=1)
    run(net, optimizer, 0, 4)
    assert torch.equal(net.layers[0].bias, Net(2).layers[0].bias)
    optimizer.unfreeze()
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["layers.0.bias"]


def test_active_tensors_without_a_gradient_are_skipped():
    net = Net(2)
    optimizer = BAdam(net.named_parameters(), lr=1e-3, order="ascending", switch_block_every=3)
    loss_of(net, 0).backward()
    net.layers[0].bias.grad = None
    optimizer.step()
    assert net.layers[0].weight in optimizer.state
    assert net.layers[0].bias not in optimizer.state


def test_groups_keep_their_decay_and_rate():
    net = Net(2)
    groups = [
        {"params": [(n, p) for n, p in net.named_parameters() if p.ndim > 1], "weight_decay": 0.5, "lr": 0.1},
        {"params": [(n, p) for n, p in net.named_parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = BAdam(groups, lr=0.0, switch_block_every=10, order="ascending")
    before = values(net)
    for p in optimizer.active_parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(net.layers[0].weight, before["layers.0.weight"] * 0.95)
    assert torch.equal(net.layers[0].bias, before["layers.0.bias"])


def test_one_block_is_adamw_for_good():
    net, reference = Net(2), Net(2)
    optimizer = BAdam(net.named_parameters(), lr=1e-2, switch_block_every=2, blocks=[["layers"]])
    adamw = torch.optim.AdamW(reference.layers.parameters(), lr=1e-2, weight_decay=0.0)
    run(net, optimizer, 0, 7)
    run(reference, adamw, 0, 7)
    for name, p in net.layers.named_parameters():
        torch.testing.assert_close(p, reference.layers.get_parameter(name), rtol=0, atol=1e-11)


# --- memory


def test_gradients_and_state_are_only_those_of_the_active_block():
    net = Net(3)
    optimizer = BAdam(net.named_parameters(), lr=1e-3, order="ascending", switch_block_every=2)
    for step in range(6):
        active = set(optimizer.active_parameters())
        assert active == {p for p in net.parameters() if p.requires_grad}
        loss_of(net, step).backward()
        assert {p for p in net.parameters() if p.grad is not None} == active
        kept = [weakref.ref(t) for state in optimizer.state.values() for t in state.values()]
        kept += [weakref.ref(p.grad) for p in active]
        optimizer.step()
        if step % 2:
            assert optimizer.state == {}
            assert all(ref() is None for ref in kept)  # freed by the switch, not by a collector later
            assert all(p.grad is None for p in net.parameters())
        else:
            assert set(optimizer.state) == active
        optimizer.zero_grad()


def test_backward_stops_at_the_shallowest_active_layer():
    net = Net(3)
    BAdam(net.named_parameters(), lr=1e-3, order="descending")
    inputs = []
    for layer in net.layers:
        layer.register_forward_hook(lambda _module, given, _out: inputs.append(given[0].requires_grad))
    loss_of(net, 0)
    assert inputs == [False, False, False]
    assert net.layers[2].weight.requires_grad


def test_without_freezing_all_blocks_get_gradients_but_one_is_stepped():
    frozen, free = Net(3), Net(3)
    optimizers = [
        BAdam(net.named_parameters(), lr=1e-2, switch_block_every=2, freeze=net is frozen)
        for net in (frozen, free)
    ]
    assert [name for name, p in free.named_parameters() if not p.requires_grad] == [
        "embed_tokens.weight",
        "norm.weight",
        "norm.bias",
        "lm_head.weight",
    ]
    for step in range(7):
        for net, optimizer in zip((frozen, free), optimizers, strict=True):
            loss_of(net, step).backward()
            clip_by_global_norm(optimizer.active_parameters(), 0.1)
            if net is free:
                assert all(p.grad is not None for p in net.layers.parameters())
            optimizer.step()
            assert {p for p in net.parameters() if p.grad is not None} <= set(optimizer.state)
            optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(frozen.parameters(), free.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [32, 16, 8])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"order": "descending", "active_blocks": 2, "train_embeddings": True},
        {"order": "lisa", "active_blocks": 2},
        {"weights": "kahan", "train_embeddings": True},
        {"weights": "sr", "order": "ascending", "active_blocks": 3},
    ],
    ids=str,
)
def test_state_and_gradient_bytes_are_exact(options, bits, dtype):
    net = Net(4, width=70, dtype=dtype)  # above the size that 8 bits begin at, no multiple of a block
    net.layers[1] = nn.Linear(70, 70, bias=False, dtype=dtype)
    shapes = [(name, tuple(p.shape)) for name, p in net.named_parameters()]
    given = config(state_bits=bits, **options)
    optimizer = build(net, given)
    state = gradients = 0
    for step in range(2 * 12):
        loss_of(net, step).backward()
        gradients = max(gradients, sum(p.grad.nbytes for p in net.parameters() if p.grad is not None))
        # before the switch that may end this step
        optimizer.activate, activate = (lambda: None), optimizer.activate
        optimizer.step()
        state = max(state, bytes_in(optimizer))
        optimizer.activate = activate
        optimizer.activate()
        optimizer.zero_grad()
    assert state == state_bytes(shapes, given, dtype)
    assert gradients == largest_elements(shapes, given) * dtype.itemsize


# --- weights in bfloat16


@pytest.mark.parametrize("weights", ["master", "sr", "kahan"])
def test_many_turns_of_moves_below_the_last_digit_add_up(weights):
    size, turns, every, rate = (
        20_000,
        40,
        5,
        2.0**-13,
    )  # the last digit of 1 is 2^-7: each turn moves 0.08 of it
    net = nn.ModuleDict({"layers": nn.ModuleList(nn.ParameterList([torch.ones(size)]) for _ in range(2))})
    net.bfloat16()
    optimizer = BAdam(
        net.named_parameters(), lr=rate, order="ascending", switch_block_every=every, weights=weights
    )
    for _ in range(2 * turns * every):
        for p in optimizer.active_parameters():
            p.grad = torch.full_like(p, -1.0)
        optimizer.step()
        optimizer.zero_grad()
    for p in net.parameters():
        moved = p.detach().double() - 1
        # AdamW moves by the rate where the gradient is constant
        assert float(moved.mean()) == pytest.approx(turns * every * rate, rel=0.02)
        assert float(moved.max()) > float(moved.min())


def test_plain_weights_lose_such_moves():
    p = nn.Parameter(torch.ones(50, dtype=torch.bfloat16))
    optimizer = BAdam([("layers.0.w", p)], lr=2.0**-13, weights="plain")
    for _ in range(20):
        p.grad = torch.full_like(p, -1.0)
        optimizer.step()
    assert torch.equal(p, torch.ones_like(p))


@pytest.mark.parametrize("weights", ["master", "sr", "kahan"])
def test_bfloat16_follows_float32(weights):
    exact, rounded = Net(3, dtype=torch.float32), Net(3, dtype=torch.float32).bfloat16()
    exact.load_state_dict(rounded.state_dict())
    start = values(exact)
    options = {"lr": 3e-3, "switch_block_every": 10, "order": "descending"}
    run(exact, BAdam(exact.named_parameters(), **options), 0, 60)
    run(rounded, BAdam(rounded.named_parameters(), weights=weights, **options), 0, 60)
    for layer, other, n in zip(exact.layers, rounded.layers, range(3), strict=True):
        moved = (layer.weight - start[f"layers.{n}.weight"]).norm()
        assert (layer.weight - other.weight.float()).norm() < 0.35 * moved


# --- checkpoints


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("dtype", "weights", "bits"),
    [
        (torch.float64, "plain", 32),
        (torch.bfloat16, "master", 16),
        (torch.bfloat16, "sr", 8),
        (torch.bfloat16, "kahan", 32),
    ],
)
@pytest.mark.parametrize("stop", [4, 8, 9])  # in the first turn, at a switch, in a later turn
def test_resume_is_exact(order, dtype, weights, bits, stop):
    def fresh(**changes):
        net = Net(3, width=70, dtype=dtype)
        options = {"order": order, "seed": 5, "weights": weights, "state_bits": bits, **changes}
        return net, BAdam(
            net.named_parameters(), lr=1e-3, switch_block_every=8 if stop == 4 else 4, **options
        )

    whole, optimizer = fresh()
    run(whole, optimizer, 0, stop)
    # what was saved counts, not what the new ones were made with, nor what they have done
    nets, resumed = zip(fresh(seed=6), fresh(seed=6), strict=True)
    for net, other in zip(nets, resumed, strict=True):
        run(net, other, 0, 2)
        net.load_state_dict(whole.state_dict())
    resumed[0].load_state_dict(deepcopy(optimizer.state_dict()))
    tensors, json = optimizer_state(optimizer, whole.named_parameters())
    copies = {name: t.clone() for name, t in tensors.items()}
    load_optimizer_state(resumed[1], nets[1].named_parameters(), copies, json)
    resumed[1].activate()
    for net, other in zip(nets, resumed, strict=True):
        assert other.steps == stop
        assert [p.requires_grad for p in net.parameters()] == [p.requires_grad for p in whole.parameters()]
    run(whole, optimizer, stop, stop + 10)
    for net, other in zip(nets, resumed, strict=True):
        run(net, other, stop, stop + 10)
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), net.parameters(), strict=True))
        assert bytes_in(optimizer) == bytes_in(other)


def test_a_forgotten_activation_is_an_error():
    net = Net(3)
    optimizer = BAdam(net.named_parameters(), switch_block_every=1, order="ascending")
    saved = optimizer_state(optimizer, net.named_parameters())
    run(net, optimizer, 0, 1)
    load_optimizer_state(optimizer, net.named_parameters(), *saved)
    with pytest.raises(RuntimeError, match=r"call activate\(\) before the forward pass"):
        optimizer.step()
    optimizer.activate()
    assert active_layers(net) == [0]


def test_a_state_dict_loads_without_pickled_code(tmp_path):
    net = Net(2)
    optimizer = BAdam(net.named_parameters(), switch_block_every=2)
    run(net, optimizer, 0, 3)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert optimizer.steps == 3


# --- step in backward


def test_tensors_stepped_inside_backward_come_out_the_same():
    whole, parted = Net(3), Net(3)
    one, other = (BAdam(net.named_parameters(), lr=1e-2, switch_block_every=2) for net in (whole, parted))
    run(whole, one, 0, 7)
    for step in range(7):
        with step_in_backward(other) as done:
            loss_of(parted, step).backward()
        assert done.stepped == 2
        assert all(p.grad is None for p in parted.parameters())
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parted.parameters(), strict=True))


def test_tensors_stepped_by_hooks_that_stay():
    whole, parted = Net(3), Net(3)
    one, other = (BAdam(net.named_parameters(), lr=1e-2, switch_block_every=2) for net in (whole, parted))
    other.unfreeze()  # torch takes hooks only for tensors that require a gradient; they outlive freezing

    def step(p):
        other.step_parameter(p)
        p.grad = None

    for p in parted.layers.parameters():
        p.register_post_accumulate_grad_hook(step)
    other.activate()
    run(whole, one, 0, 7)
    run(parted, other, 0, 7)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parted.parameters(), strict=True))


# --- a model


@pytest.mark.parametrize("order", ["random", "lisa"])
def test_a_llama_with_gradient_checkpointing_learns(tmp_path, order):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.model_folder(tmp_path, layers=4))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    plain = deepcopy(model)
    plain.gradient_checkpointing_disable()
    tokens = torch.randint(0, 20, (4, 32), generator=torch.Generator().manual_seed(0))
    optimizer = BAdam(model.named_parameters(), lr=5e-3, switch_block_every=5, order=order)
    losses = []
    for _ in range(3 * 4 * 5):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        if not losses:  # nothing of the input requires a gradient, and yet they are all there
            plain(input_ids=tokens, labels=tokens).loss.backward()
            for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
                if p.requires_grad:
                    torch.testing.assert_close(p.grad, q.grad, msg=name)
        assert {p for p in model.parameters() if p.grad is not None} == set(optimizer.active_parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    rounds = [sum(losses[i : i + 20]) / 20 for i in range(0, 60, 20)]
    assert losses[0] > rounds[0] > rounds[1] > rounds[2]
    # a head and embeddings of random numbers set a limit to what layers alone can do
    assert rounds[2] < losses[0] - (0.5 if order == "random" else 2.0)


# --- the engine


def test_the_engine_saves_all_that_is_trained_and_resumes(tmp_path):
    from accelerate import Accelerator
    from shoestring.train.engine import NativeEngine

    def engine():
        net = Net(3, dtype=torch.float32)
        optimizer = build(net, config(), seed=1)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * group["rate_scale"]
        module = nn.Module()
        module.model = net
        return net, NativeEngine(Accelerator(cpu=True), module, optimizer, autocast=False)

    def train(net, native, first, last):
        for step in range(first, last):
            loss_of(net, step).backward()
            native.step(1.0)

    net, native = engine()
    train(net, native, 0, 5)
    tensors, settings = native.state_dict()
    assert list(tensors["trained"]) == trained_names([n for n, _ in net.named_parameters()], config())
    copies = {file: {name: t.clone() for name, t in kept.items()} for file, kept in tensors.items()}
    other, resumed = engine()
    resumed.load_state_dict(copies, settings)
    train(net, native, 5, 11)
    train(other, resumed, 5, 11)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


# --- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "sideways"}, "order is 'sideways'; allowed: 'descending', 'ascending', 'random', 'lisa'"),
        ({"switch_block_every": 0}, "switch_block_every is 0; it must be at least 1"),
        ({"active_blocks": 4}, "active_blocks is 4; the model has 3 blocks to choose from"),
        ({"blocks": []}, "blocks is empty; give a list"),
        (
            {"blocks": [["layers.7"]]},
            r"blocks\[0\]: no trained parameter is called 'layers.7' or layers.7....",
        ),
        ({"blocks": [["layers.1"], ["layers"]]}, r"layers.1.weight is in blocks\[0\] and in blocks\[1\]"),
        ({"blocks": [["layers"]], "train_embeddings": True}, "make the embeddings one of `blocks`"),
        ({"lr": -1.0}, "lr is -1.0; it must not be negative"),
        ({"state_bits": 4}, "state_bits is 4; allowed: 32, 16, 8"),
    ],
)
def test_options_out_of_range(options, message):
    net = Net(3)
    with pytest.raises(ValueError, match=message):
        BAdam(net.named_parameters(), **options)
    assert all(p.requires_grad for p in net.parameters())


def test_models_without_layers_or_names():
    net = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"no layers found: .* \(0.weight, 0.bias\); give blocks=\[\["):
        BAdam(net.named_parameters())
    with pytest.raises(
        ValueError, match=r"a parameter of shape \(2, 2\) came without: give model.named_parameters"
    ):
        BAdam(net.parameters())
    with pytest.raises(UserError, match=r"optimizer.name  badam: no layers found"):
        build(net, config())
    with pytest.raises(ValueError, match="empty parameter list"):
        BAdam([])


def test_groups_cannot_be_added():
    with pytest.raises(ValueError, match="give all groups to the constructor"):
        BAdam(Net().named_parameters()).add_param_group({"params": [nn.Parameter(torch.ones(2))]})


def test_the_example_of_the_page_runs(capsys):
    page = (Path(__file__).parent.parent / "docs" / "badam.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (promised,) = re.findall(r"It prints `(.*)`", page)
    exec(compile(example, "docs/badam.md", "exec"), {})
    assert capsys.readouterr().out.strip() == promised
