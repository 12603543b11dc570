"""Layers that keep, compute again or swap their activations give the plain model's gradients, bit for bit."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from activation_models import LAYERS, LateLink, batch, gradients, llama, loss_of, same_bits, with_lora
from shoestring.offload.activation_model import ActivationChoice
from shoestring.offload.activations import apply_activations, decoder_layers
from shoestring.offload.pool import HostPool
from shoestring.offload.swap import PlainLink
from shoestring.optimizers.elementwise import AdamW
from shoestring.optimizers.in_backward import step_in_backward

CHOICES = {
    "keep": ("keep",) * LAYERS,
    "recompute": ("recompute",) * LAYERS,
    "swap": ("swap",) * LAYERS,
    "mixed": ("swap", "recompute", "swap", "keep"),
    "mixed late": ("recompute", "keep", "recompute", "swap"),
}
MODELS: dict[str, Any] = {
    "whole": lambda dtype: llama(dtype=dtype),
    "plain modules": lambda dtype: llama(dtype=dtype, fused=False),
    "attention dropout": lambda dtype: llama(dtype=dtype, attention_dropout=0.3, fused=False),
    "tied": lambda dtype: llama(dtype=dtype, tie_word_embeddings=True),
    "lora": lambda dtype: with_lora(dtype=dtype),
    "lora dropout": lambda dtype: with_lora(dtype=dtype, dropout=0.3),
    "lora by PEFT": lambda dtype: with_lora(dtype=dtype, fused=False),
    "packed": lambda dtype: llama(dtype=dtype, packed=True),
    "packed lora": lambda dtype: with_lora(dtype=dtype, packed=True),
}


def choice(name: str, share: float = 1.0) -> ActivationChoice:
    return ActivationChoice(CHOICES[name], share)


def pool() -> HostPool:
    return HostPool(8 << 20)


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_the_same_bits(kind: str, dtype: torch.dtype, late: bool) -> None:
    model = MODELS[kind](dtype)
    inputs = batch(packed=kind.startswith("packed"))
    plain = gradients(model, inputs)
    for name in CHOICES:
        host = pool()
        link = LateLink() if late else PlainLink()
        with apply_activations(model, choice(name), pool=host, link=link, smallest=1):
            assert same_bits(gradients(model, inputs), plain), name
        assert host.used == 0
        assert (host.peak > 0) == ("swap" in CHOICES[name])
    assert same_bits(gradients(model, inputs), plain)


@pytest.mark.parametrize("name", ["swap", "mixed"])
def test_gradients_accumulate_over_batches_of_other_lengths(name: str) -> None:
    model, host = with_lora(packed=True, dropout=0.3), pool()
    batches = [batch(length, packed=True, seed=length) for length in (24, 9, 31)]
    plain = gradients(model, *batches)
    with apply_activations(model, choice(name), pool=host, link=LateLink(), smallest=1):
        assert same_bits(gradients(model, *batches), plain)


def test_two_graphs_at_once_and_a_graph_run_twice() -> None:
    model, host = llama(), pool()
    one, two = batch(24), batch(15, seed=1)

    def both() -> list[torch.Tensor]:
        model.zero_grad(set_to_none=True)
        loss = loss_of(model, one) * 3 - loss_of(model, two)
        loss.backward(retain_graph=True)
        loss.backward()
        return [p.grad for p in model.parameters()]

    plain = both()
    for name in ("swap", "mixed", "mixed late"):
        with apply_activations(model, choice(name), pool=host, link=LateLink(), smallest=1):
            assert same_bits(both(), plain), name
        assert host.used == 0


def test_autocast_is_obeyed() -> None:
    model, host = llama(), pool()

    def run() -> list[torch.Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return gradients(model, batch())

    plain = run()
    for name in ("recompute", "swap", "mixed"):
        with apply_activations(model, choice(name), pool=host, smallest=1):
            assert same_bits(run(), plain), name


@pytest.mark.parametrize(
    ("name", "share"), [("recompute", 1.0), ("swap", 1.0), ("mixed", 1.0), ("swap", 0.0), ("swap", 0.5)]
)
def test_weights_may_step_inside_the_backward_pass(name: str, share: float) -> None:
    def train(name: str) -> list[torch.Tensor]:
        model = llama(tie_word_embeddings=True)
        optimizer = AdamW(model.named_parameters(), lr=1e-2)
        with apply_activations(model, choice(name, share), pool=pool(), link=LateLink(), smallest=1):
            for step in range(3):
                loss = loss_of(model, batch(seed=step))
                with step_in_backward(optimizer, max_grad_norm=1.0) as done:
                    loss.backward()
                assert done.stepped == sum(1 for _ in model.parameters())
        return [p.detach() for p in model.parameters()]

    assert same_bits(train(name), train("keep"))


# A share of the tokens


@pytest.mark.parametrize("name", ["keep", "swap", "mixed"])
@pytest.mark.parametrize("build", [llama, with_lora], ids=["whole", "lora"])
def test_a_token_share_is_the_same_function(name: str, build: Any) -> None:
    model, inputs = build(dtype=torch.float64), batch(23)
    plain = gradients(model, inputs)
    for share in (0.0, 0.5, 0.9, 1.0):
        with apply_activations(model, choice(name, share), pool=pool(), smallest=1):
            parts = gradients(model, inputs)
        for ours, whole in zip(parts, plain, strict=True):
            if share in (0.0, 1.0):
                assert torch.equal(ours, whole)
            torch.testing.assert_close(ours, whole, rtol=1e-9, atol=1e-9 * float(whole.abs().max()))


def test_a_block_that_mixes_tokens_is_refused() -> None:
    model = llama(fused=False)
    layer = decoder_layers(model)[2]

    class Shifted(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.cumsum(dim=1)

    layer.mlp = Shifted()
    with pytest.raises(ValueError, match="Shifted of LlamaDecoderLayer mixes tokens: token_share must be 1"):
        apply_activations(model, choice("keep", 0.5))
    layer.mlp.forward = lambda x: (x, x)
    with pytest.raises(ValueError, match="gives more than tokens"):
        apply_activations(model, choice("keep", 0.5))
    del layer.mlp
    with pytest.raises(ValueError, match="has no block called mlp, feed_forward, ffn"):
        apply_activations(model, choice("keep", 0.5))
    assert not any("forward" in part.__dict__ for part in model.modules())


# Errors


@pytest.mark.parametrize("name", ["recompute", "swap", "mixed"])
def test_an_error_inside_backward_leaves_nothing_behind(name: str) -> None:
    model, host, inputs = llama(), pool(), batch()
    plain = gradients(model, inputs)

    def fail(_: torch.Tensor) -> None:
        raise ArithmeticError("no")

    weight = model.model.layers[1].mlp.down_proj.weight
    gc.disable()
    try:
        with apply_activations(model, choice(name), pool=host, link=LateLink(), smallest=1):
            hook = weight.register_hook(fail)
            with pytest.raises(ArithmeticError):
                gradients(model, inputs)
            hook.remove()
            assert host.used == 0
            assert same_bits(gradients(model, inputs), plain)
            loss = loss_of(model, inputs)
            assert (host.used > 0) == (name != "recompute")
            del loss  # dropped without a backward pass
            assert host.used == 0
    finally:
        gc.enable()


def test_an_error_inside_forward_leaves_nothing_behind() -> None:
    model, host, inputs = llama(), pool(), batch()
    plain = gradients(model, inputs)
    with apply_activations(model, choice("swap"), pool=host, link=LateLink(), smallest=1):
        hook = model.model.layers[2].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            gradients(model, inputs)
        hook.remove()
        assert host.used == 0
        assert same_bits(gradients(model, inputs), plain)


def test_a_weight_changed_between_forward_and_backward_is_noticed() -> None:
    model = llama()
    with apply_activations(model, choice("swap"), pool=pool(), smallest=1):
        loss = loss_of(model, batch())
        with torch.no_grad():
            model.model.layers[2].self_attn.o_proj.weight.mul_(2)
        with pytest.raises(RuntimeError, match=r"shape \(32, 32\) that the backward pass needs was changed"):
            loss.backward()


def test_a_full_pool_leaves_tensors_where_they_are() -> None:
    model, host, inputs = llama(), HostPool(40 << 10), batch()
    plain = gradients(model, inputs)
    with apply_activations(model, choice("swap"), pool=host, link=LateLink(), smallest=1):
        assert same_bits(gradients(model, inputs), plain)
    assert host.refused > 0
    assert host.peak > 20 << 10


@pytest.mark.parametrize("mistake", ["buffers given back too early", "copies not waited for"])
def test_these_tests_would_notice(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = llama(), batch()
    plain = gradients(model, inputs)
    host, link = pool(), LateLink()
    if mistake == "copies not waited for":
        monkeypatch.setattr(link, "wait", lambda ticket: None)
    else:
        take = host.take

        def hasty(nbytes: int) -> torch.Tensor | None:
            buffer = take(nbytes)
            assert buffer is not None
            HostPool.give(host, buffer)
            return buffer

        monkeypatch.setattr(host, "take", hasty)
        monkeypatch.setattr(host, "give", lambda buffer: None)
    with apply_activations(model, choice("swap"), pool=host, link=link, smallest=1):
        assert not same_bits(gradients(model, inputs), plain)


# What is applied, and taken away


def test_without_gradients_layers_run_as_ever() -> None:
    model, host, inputs = llama(packed=True), pool(), batch(packed=True)
    model.eval()
    ids = inputs["input_ids"]
    with torch.no_grad():
        logits, text = model(**inputs).logits, model.generate(ids, max_new_tokens=4, do_sample=False)
        with apply_activations(model, choice("mixed", 0.5), pool=host, smallest=1):
            assert torch.equal(model(**inputs).logits, logits)
            assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), text)
    assert host.peak == 0


def test_a_cache_would_be_filled_twice() -> None:
    model, inputs = llama(), batch()
    handle = apply_activations(model, choice("recompute"))
    with pytest.raises(ValueError, match="call the model with use_cache=False"):
        model(**{**inputs, "use_cache": True})
    handle.remove()
    model(**{**inputs, "use_cache": True})


def test_removing_leaves_no_trace() -> None:
    model = with_lora()
    names = [name for name, _ in model.named_parameters()]
    own = decoder_layers(model)[1].forward
    decoder_layers(model)[0].forward = own  # an instance's own, as accelerate makes
    handle = apply_activations(model, choice("mixed", 0.5), pool=pool())
    assert handle.line == (
        "activations of 4 layers: 1 kept, 1 computed again, 2 swapped to host memory, "
        "feed-forward blocks for 50% of the tokens"
    )
    assert [name for name, _ in model.named_parameters()] == names
    handle.remove()
    handle.remove()
    assert decoder_layers(model)[0].__dict__.pop("forward") is own
    assert not any("forward" in part.__dict__ for part in model.modules())


def test_a_copy_of_the_model_is_a_model_of_its_own() -> None:
    model, inputs = llama(), batch()
    apply_activations(model, choice("recompute"))
    plain = gradients(model, inputs)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert same_bits(gradients(twin, inputs), plain)


def test_a_model_goes_with_its_last_reference() -> None:
    model = llama(fused=False)
    apply_activations(model, choice("mixed", 0.5), pool=pool())
    gone = weakref.ref(decoder_layers(model)[0])
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_what_cannot_be_applied_is_refused() -> None:
    model = llama()
    with pytest.raises(ValueError, match="the choice is for 3 layers, the model has 4"):
        apply_activations(model, ActivationChoice(("keep",) * 3))
    with pytest.raises(ValueError, match="swapped layers need a pool"):
        apply_activations(model, choice("swap"))
    handle = apply_activations(model, choice("recompute"))
    with pytest.raises(ValueError, match="applied already"):
        apply_activations(model, choice("keep"))
    handle.remove()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        apply_activations(model, choice("keep"))
    model.gradient_checkpointing_disable()
    model.model.layers = torch.nn.ModuleList(list(model.model.layers)[:3])
    with pytest.raises(ValueError, match="LlamaModel has 0 lists of 4 layers, not one"):
        apply_activations(model, choice("keep"))
    with pytest.raises(ValueError, match="unknown fate 'drop' of a layer"):
        ActivationChoice(("drop",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"token_share is 1\.5"):
        ActivationChoice(("keep",), 1.5)
