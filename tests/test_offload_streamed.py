"""Streamed weights against the same model in memory: every loss, gradient and weight to the bit."""

from __future__ import annotations

import contextlib

import pytest
import torch
from shoestring.offload.layer_buffers import LayerBuffers
from shoestring.ops import register, use_fused
from shoestring.optimizers import APOLLO, GaLore, Muon
from shoestring.optimizers.adalomo import AdaLOMO
from shoestring.optimizers.elementwise import AdamW
from shoestring.optimizers.in_backward import BackwardStepper
from shoestring.optimizers.lomo import LOMO
from shoestring.plan.live_bytes import LiveBytes
from streaming import llama, loss_of, rows, streamed, trained, with_lora
from torch import nn

DTYPES = [torch.float32, torch.bfloat16]
STEPPED = {
    "adamw": lambda params: AdamW(params, lr=1e-2, weight_decay=0.1),
    "adamw_master": lambda params: AdamW(params, lr=1e-2, weights="master"),
    "adamw_8bit": lambda params: AdamW(params, lr=1e-2, state_bits=8, weights="kahan"),
    "apollo": lambda params: APOLLO(params, lr=1e-2, rank=4),
    "galore": lambda params: GaLore(params, lr=1e-2, rank=4, update_proj_gap=3),
    "muon": lambda params: Muon(params, lr=1e-2),
    "lomo": lambda params: LOMO(params, lr=1e-1),
    "adalomo": lambda params: AdaLOMO(params, lr=1e-1, weight_decay=0.1),
}


def lora_steps(model, steps=10, micro_batches=1, autocast=False, **inputs):
    """Losses, the gradients of each step, and the weights after them all."""
    parameters = trained(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    torch.manual_seed(5)
    losses, gradients = [], []
    for step in range(steps):
        for part in range(micro_batches):
            with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
                loss = loss_of(model, rows(step * micro_batches + part), **inputs)
            loss.backward()
            losses.append(loss.detach())
        gradients.append({name: p.grad.clone() for name, p in parameters.items()})
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses, gradients, {name: p.detach().clone() for name, p in parameters.items()}


def assert_same(got, wanted):
    for ours, theirs in zip(got[0], wanted[0], strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip([*got[1], got[2]], [*wanted[1], wanted[2]], strict=True):
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tier", ["disk", "host"])
@pytest.mark.parametrize("buffers", [2, 3])
def test_lora_steps_are_those_of_the_model_in_memory(tmp_path, dtype, tier, buffers):
    wanted = lora_steps(with_lora(llama(dtype)))
    model = with_lora(llama(dtype))
    with streamed(model, tmp_path, tier, buffers=buffers) as offloaded:
        assert_same(lora_steps(model), wanted)
        assert offloaded.bytes_written == sum(layer.place.nbytes for layer in offloaded.layers)


def test_the_gradients_are_those_of_a_slow_formula(tmp_path):
    """One linear layer's adapter, by hand in float64: dB = s g^T (x A^T), dA = s (g B)^T x."""
    model = with_lora(llama(torch.float64))
    layer = model.base_model.model.model.layers[2].mlp.down_proj
    seen = {}
    handle = layer.register_full_backward_hook(lambda _, __, grad: seen.update(g=grad[0].clone()))
    layer.register_forward_pre_hook(lambda _, args: seen.update(x=args[0].detach().clone()))
    with streamed(model, tmp_path):
        loss_of(model, rows(0)).backward()
    handle.remove()
    g, x = seen["g"].flatten(0, 1), seen["x"].flatten(0, 1)
    scale, a, b = layer.scaling["default"], layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(b.grad.double(), scale * g.T @ (x @ a.double().T), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(a.grad.double(), scale * (g @ b.double()).T @ x, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_dropout_fused_modules_accumulation_and_packed_rows(tmp_path, dtype):
    register()
    ids_of_rows = {
        "position_ids": torch.cat([torch.arange(5), torch.arange(7)])[None],
        "segments": (0, 5, 12),
    }

    def build(dropout):
        model = with_lora(llama(dtype), dropout)
        assert use_fused(model)
        model.base_model.model.set_attn_implementation("shoestring")
        return model

    def steps(model):
        parameters = trained(model)
        torch.manual_seed(5)
        for step in range(6):
            loss_of(model, rows(step, count=1), **ids_of_rows).backward()
        return {name: p.grad for name, p in parameters.items()}

    for dropout in (0.0, 0.3):
        wanted = steps(build(dropout))
        model = build(dropout)
        with streamed(model, tmp_path):
            got = steps(model)
        assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == []


def test_dropout_changes_the_numbers_or_the_test_above_proves_nothing(tmp_path):
    losses = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        model = with_lora(llama(), 0.3)
        torch.manual_seed(seed)
        losses.append(float(loss_of(model, rows(0))))
    assert losses[0] != losses[1]


def test_autocast_is_the_same_again_and_keeps_no_copies(tmp_path):
    wanted = lora_steps(with_lora(llama()), 3, autocast=True)
    model = with_lora(llama())
    with streamed(model, tmp_path):
        assert_same(lora_steps(model, 3, autocast=True), wanted)
        assert torch.is_autocast_cache_enabled()


def test_autocast_keeps_no_half_of_the_layers(tmp_path):
    """Its cache would hold each trained weight in bfloat16 until the context ends."""
    model = llama(layers=8, hidden_size=256, intermediate_size=512)
    with streamed(model, tmp_path, trainable=True) as offloaded, LiveBytes(torch.device("cpu")) as live:
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, rows(0, count=1, length=4))
            assert live.now < offloaded.layers[0].place.nbytes / 4
        loss.backward()


def test_checkpointing_inside_and_accumulation(tmp_path):
    wanted = lora_steps(with_lora(llama(), 0.2), 3, micro_batches=3)
    model = with_lora(llama(), 0.2)
    model.base_model.model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    with streamed(model, tmp_path):
        assert_same(lora_steps(model, 3, micro_batches=3), wanted)


def full_steps(model, kind, max_grad_norm=1.0, clipping="previous", autocast=False, steps=10):
    optimizer = STEPPED[kind](model.named_parameters())
    stepper = BackwardStepper(optimizer, max_grad_norm, clipping)
    losses, norms = [], []
    for step in range(steps):

        def loss(step=step):
            with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
                value = loss_of(model, rows(step))
            losses.append(value.detach())
            return value

        done = stepper.step(loss)
        norms.append(done.norm)
        assert all(p.grad is None for p in model.parameters())
    return losses, norms


def weights_of(model, offloaded=None):
    if offloaded is None:
        return {name: p.detach().clone() for name, p in model.named_parameters()}
    with offloaded.mapped() as stored:
        return {name: stored.get(p, p.detach()).clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", STEPPED)
def test_full_tuning_steps_are_those_of_the_model_in_memory(tmp_path, dtype, kind):
    plain = llama(dtype, tie_word_embeddings=True)
    wanted = full_steps(plain, kind)
    model = llama(dtype, tie_word_embeddings=True)
    with streamed(model, tmp_path, trainable=True, buffers=3 if kind == "adamw" else 2) as offloaded:
        assert full_steps(model, kind) == wanted
        after, start = weights_of(model, offloaded), weights_of(llama(dtype, tie_word_embeddings=True))
        total = sum(layer.place.nbytes for layer in offloaded.layers)
        assert offloaded.bytes_written == 11 * total, "the first contents, then once a step"
    of_memory = weights_of(plain)
    assert [name for name in of_memory if not torch.equal(after[name], of_memory[name])] == []
    assert all(
        not torch.equal(after[name], start[name]) for name in start if "layers" in name and "proj" in name
    )


@pytest.mark.parametrize("tier", ["disk", "host"])
def test_full_tuning_clipped_exactly_and_under_autocast(tmp_path, tier):
    plain = llama()
    wanted = full_steps(plain, "adamw", 0.05, "exact", autocast=True, steps=4)
    model = llama()
    with streamed(model, tmp_path, tier, trainable=True) as offloaded:
        assert full_steps(model, "adamw", 0.05, "exact", autocast=True, steps=4) == wanted
        total = sum(layer.place.nbytes for layer in offloaded.layers)
        assert offloaded.bytes_written <= 9 * total, "the pass that only measures writes too"
        after = weights_of(model, offloaded)
    assert all(torch.equal(after[name], p) for name, p in plain.named_parameters())


def test_a_training_step_reads_each_layer_twice_but_those_that_are_there(tmp_path):
    model = with_lora(llama(layers=6))
    with streamed(model, tmp_path, buffers=3) as offloaded:
        loss_of(model, rows(0)).backward()
        before = offloaded.bytes_read
        loss_of(model, rows(1)).backward()
        per_layer = offloaded.layers[0].place.nbytes
        assert offloaded.bytes_read - before == 2 * (6 - 3) * per_layer
        assert offloaded.seconds_waited >= 0.0


def test_what_is_read_ahead(tmp_path, monkeypatch):
    """The layer above in the forward pass, the one below in the backward pass, the first after the last."""
    model = with_lora(llama(layers=3))
    seen = []
    using = LayerBuffers.using

    def watched(self, layer, following=(), **options):
        seen.append((layer, *following[:1]))
        return using(self, layer, following, **options)

    monkeypatch.setattr(LayerBuffers, "using", watched)
    with streamed(model, tmp_path):
        loss_of(model, rows(0)).backward()
        with torch.no_grad():
            loss_of(model, rows(0))
    assert seen == [(0, 1), (1, 2), (2,), (2, 1), (1, 0), (0,), (0, 1), (1, 2), (2, 0)]


def test_evaluation_and_generation(tmp_path):
    plain = with_lora(llama()).eval()
    model = with_lora(llama()).eval()
    prompt = rows(0, count=1, length=5)
    with streamed(model, tmp_path) as offloaded, torch.no_grad():
        assert torch.equal(loss_of(model, rows(1)), loss_of(plain, rows(1)))
        wanted = plain.generate(input_ids=prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
        before = offloaded.bytes_read
        got = model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert torch.equal(got, wanted)
        passes = (offloaded.bytes_read - before) / sum(layer.place.nbytes for layer in offloaded.layers)
        assert 0.5 < passes / (wanted.shape[1] - 5) <= 1.2, "about one reading of the model a token"
        assert torch.equal(loss_of(model, rows(2)), loss_of(plain, rows(2)))


def test_a_cache_in_training_is_left_out(tmp_path):
    model = with_lora(llama())
    with streamed(model, tmp_path):
        out = model(input_ids=rows(0), labels=rows(0))  # transformers' default is use_cache=True
        out.loss.backward()
    plain = with_lora(llama())
    plain(input_ids=rows(0), labels=rows(0)).loss.backward()
    assert all(torch.equal(p.grad, trained(plain)[name].grad) for name, p in trained(model).items())


def test_only_upper_layers_trained(tmp_path):
    def build():
        model = with_lora(llama())
        for name, parameter in model.named_parameters():
            if "layers.0." in name or "layers.1." in name:
                parameter.requires_grad_(False)
        return model

    wanted = lora_steps(build(), 3)
    model = build()
    with streamed(model, tmp_path):
        assert_same(lora_steps(model, 3), wanted)


def test_weights_shared_by_layers_stay_in_memory(tmp_path):
    def build():
        model = llama()
        model.model.layers[3].mlp = model.model.layers[1].mlp
        return with_lora(model)

    wanted = lora_steps(build(), 3)
    model = build()
    with streamed(model, tmp_path) as offloaded:
        shared = model.base_model.model.model.layers[1].mlp.up_proj.base_layer.weight
        assert all(p is not shared for layer in offloaded.layers for p in layer.parameters)
        assert_same(lora_steps(model, 3), wanted)


def test_layers_with_other_names_and_buffers(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    def build():
        torch.manual_seed(0)
        sizes = {"n_embd": 32, "n_layer": 4, "n_head": 2, "vocab_size": 50, "n_positions": 32}
        model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).train()
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("ln_1.bias"))  # trained inside the layers, in memory
        return model

    wanted = lora_steps(build(), 3)
    model = build()
    with streamed(model, tmp_path) as offloaded:
        assert [layer.name for layer in offloaded.layers] == [f"transformer.h.{i}" for i in range(4)]
        assert_same(lora_steps(model, 3), wanted)


class Two(nn.Module):
    """Layers that take and give more than one tensor, by position and by name."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6) / 3)
            self.trained = nn.Parameter(torch.randn(6))

        def forward(self, x, *, other, scale):
            mixed = torch.tanh(x @ self.weight) * self.trained + other["y"] * scale
            return {"x": mixed + x, "y": other["y"] + mixed, "count": 3, "index": x.argmax()}

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Two.Layer() for _ in range(4))
        for layer in self.layers:
            layer.weight.requires_grad_(False)

    def forward(self, x, y):
        for layer in self.layers:
            out = layer(x, other={"y": y}, scale=0.5)
            x, y = out["x"], out["y"]
            assert (out["count"], out["index"].dtype) == (3, torch.int64)
        return (x * y).sum()


def test_several_tensors_in_and_out(tmp_path):
    def grads(model):
        x = torch.arange(12.0).view(2, 6).div(7).requires_grad_()
        y = torch.arange(12.0).view(2, 6).div(5).requires_grad_()
        model(x, y).backward()
        return [x.grad, y.grad, *(p.grad for p in model.parameters() if p.requires_grad)]

    wanted = grads(Two())
    model = Two()
    with streamed(model, tmp_path):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(grads(model), wanted, strict=True))
