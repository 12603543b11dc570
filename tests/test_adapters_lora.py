"""Every start and option of LoRA: the model begins where it should, and merges into what was trained."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from shoestring.adapters import attach, merge_in_place, trainable_parameters
from shoestring.models.facts import build_skeleton
from shoestring.recipes.choices import LoraAdapter
from shoestring.recipes.errors import UserError
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

IDS = torch.arange(48).reshape(2, 24) % 96


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small are many times slower when several threads share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(**changes: Any) -> LlamaConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    return LlamaConfig(**{**sizes, **heads, **changes})


def facts(of: Any) -> Any:
    skeleton = build_skeleton(of)
    return SimpleNamespace(
        source="org/small",
        parameters=sum(parameter.numel() for parameter in skeleton.parameters()),
        tied=bool(of.tie_word_embeddings),
        skeleton=lambda: build_skeleton(of),
    )


def model(of: LlamaConfig, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(of).to(dtype).eval()


def batches() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}] * 2


def trained(wrapped: Any, scale: float = 0.05) -> Any:
    """The adapter after some imagined training."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)
    return wrapped.eval()


@torch.no_grad()
def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "olora": {"init_lora_weights": "olora"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter": {"init_lora_weights": "pissa_niter_8"},
    "eva": {"init_lora_weights": "eva"},
    "dora_pissa": {"use_dora": True, "init_lora_weights": "pissa"},
    "dora_eva": {"use_dora": True, "init_lora_weights": "eva"},
    "patterns": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {r"layers\.1\..*v_proj": 64}},
    "layers": {"layers_to_transform": [1]},
    "list": {"target_modules": ["q_proj", "down_proj"]},
    "expression": {"target_modules": r".*self_attn\.[qv]_proj"},
    "excluded": {"exclude_modules": ["lm_head", "layers.0.self_attn.q_proj"]},
    "saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "saved_norm": {"modules_to_save": ["norm"]},
    "dropout": {"lora_dropout": 0.1},
    "bias": {"bias": "all"},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", OPTIONS)
def test_starts_at_the_base_and_merges_to_the_trained(name: str, tied: bool) -> None:
    of = config(tie_word_embeddings=tied, attention_bias=name == "bias")
    base = model(of)
    before = base(IDS).logits.detach()
    adapter = LoraAdapter(r=8, **OPTIONS[name])
    wrapped: Any = attach(base, adapter, facts(of), seed=3, batches=batches()).eval()
    assert relative(wrapped(IDS).logits, before) < 5e-6
    counted = sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)
    if "eva" not in name:
        assert trainable_parameters(adapter, facts(of)) == counted
    trained(wrapped)
    after = wrapped(IDS).logits.detach()
    assert relative(after, before) > 0.05
    merged = merge_in_place(wrapped)
    assert type(merged) is LlamaForCausalLM
    assert set(merged.state_dict()) == set(model(of).state_dict())
    assert relative(merged(IDS).logits, after) < 1e-5
    assert merged.config.tie_word_embeddings is tied


def test_trained_weights_are_float32_on_a_bfloat16_base() -> None:
    of = config()
    wrapped = attach(model(of, torch.bfloat16), LoraAdapter(modules_to_save=["norm"]), facts(of), seed=0)
    kinds = {(parameter.requires_grad, parameter.dtype) for parameter in wrapped.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    assert wrapped.training
    merged = merge_in_place(wrapped)
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}


def test_the_merge_rounds_once() -> None:
    """float32 sum, then bfloat16: adding a rounded update to a rounded weight is further away."""
    of = config()
    wrapped: Any = trained(attach(model(of, torch.bfloat16), LoraAdapter(r=8), facts(of), seed=0))
    layer = wrapped.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    exact = layer.base_layer.weight.detach().double() + layer.get_delta_weight("default").double()
    merged = merge_in_place(wrapped).model.layers[0].self_attn.q_proj.weight
    assert torch.equal(merged, exact.to(torch.bfloat16))


def test_the_same_seed_gives_the_same_adapter_whatever_came_before() -> None:
    of = config()

    def weights(seed: int, draw: int) -> list[torch.Tensor]:
        base = model(of)
        torch.rand(draw)
        wrapped = attach(base, LoraAdapter(r=4), facts(of), seed=seed)
        return [parameter for name, parameter in wrapped.named_parameters() if "lora_A" in name]

    first, again, other = weights(1, 1), weights(1, 100), weights(2, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_attaching_leaves_the_global_generator_alone() -> None:
    of = config()
    base = model(of)
    torch.manual_seed(9)
    expected = torch.rand(2)
    torch.manual_seed(9)
    attach(base, LoraAdapter(init_lora_weights="orthogonal"), facts(of), seed=1)
    assert torch.equal(torch.rand(2), expected)


def test_without_an_adapter_everything_is_trained() -> None:
    of = config(tie_word_embeddings=True)
    base = model(of).requires_grad_(False)
    whole = attach(base, None, facts(of), seed=0)
    assert whole is base
    assert whole.training
    assert sum(parameter.numel() for parameter in whole.parameters() if parameter.requires_grad) == (
        trainable_parameters(None, facts(of))
    )
    assert merge_in_place(whole) is base


def test_eva_moves_ranks_and_keeps_their_sum() -> None:
    of = config()
    wrapped: Any = attach(
        model(of), LoraAdapter(r=4, init_lora_weights="eva"), facts(of), seed=0, batches=batches()
    )
    ranks = [module.r["default"] for module in wrapped.modules() if hasattr(module, "lora_A")]
    assert sum(ranks) <= 4 * 14
    assert len(set(ranks)) > 1


def test_the_scale_follows_the_recipe() -> None:
    of = config()

    def scale(**keys: Any) -> float:
        wrapped: Any = attach(model(of), LoraAdapter(**keys), facts(of), seed=0)
        return float(
            next(module.scaling["default"] for module in wrapped.modules() if hasattr(module, "lora_A"))
        )

    assert scale(r=8, lora_alpha=32) == 4
    assert scale(r=16, lora_alpha=8, use_rslora=True) == 2


def test_gpt2_layers_are_found_and_counted() -> None:
    of = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64)
    from transformers import GPT2LMHeadModel

    adapter = LoraAdapter(r=4)
    base = GPT2LMHeadModel(of).eval()
    before = base(IDS % 64).logits.detach()
    wrapped: Any = attach(base, adapter, facts(of), seed=0).eval()
    assert relative(wrapped(IDS % 64).logits, before) == 0
    counted = sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)
    assert counted == trainable_parameters(adapter, facts(of))
    trained(wrapped)
    after = wrapped(IDS % 64).logits.detach()
    assert relative(merge_in_place(wrapped)(IDS % 64).logits, after) < 1e-5


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "typo": (
        {"target_modules": ["q_porj"]},
        "'q_porj' matches no module of the model.   Did you mean q_proj",
    ),
    "one_of_two": ({"target_modules": ["q_proj", "w1"]}, "'w1' matches no module of the model."),
    "no_linear": ({"target_modules": ["self_attn"]}, "self_attn is no linear layer, so LoRA cannot wrap it"),
    "expression": (
        {"target_modules": "q_proj|v_proj"},
        "Did you mean a list?  target_modules: [q_proj, v_proj",
    ),
    "too_wide": (
        {"target_modules": r".*self_attn.*"},
        "also matches model.layers.0.self_attn, which is no linear",
    ),
    "broken": ({"target_modules": "(q_proj"}, "'(q_proj' is not a regular expression"),
    "excluded": ({"exclude_modules": ["mpl"]}, "adapter.exclude_modules: 'mpl' matches no module"),
    "nothing_left": (
        {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
        "leave no module to adapt",
    ),
    "saved": ({"modules_to_save": ["embed_token"]}, "Did you mean embed_tokens"),
    "layer": ({"layers_to_transform": [1, 2]}, "there is no layer 2; the model has 2, numbered from 0 to 1"),
    "layer_expression": (
        {"layers_to_transform": [1], "target_modules": ".*q_proj"},
        "adapter.layers_to_transform and a regular expression in adapter.target_modules exclude each other",
    ),
    "rank": ({"rank_pattern": {"q_prjo": 4}}, "adapter.rank_pattern: 'q_prjo' matches no module"),
    "alpha": ({"alpha_pattern": {"layers.7.*": 4}}, "adapter.alpha_pattern: 'layers.7.*' matches no module"),
    "rank_target": (
        {"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 4}},
        "adapter.rank_pattern: 'v_proj' matches no module",
    ),
    "odd": ({"r": 5, "init_lora_weights": "orthogonal"}, "needs even ranks, 5 is odd.   adapter.r=6"),
    "loftq_dora": ({"init_lora_weights": "loftq", "use_dora": True}, "exclude each other"),
    "eva_short": (
        {"r": 64, "init_lora_weights": "eva"},
        "needs more than 128 tokens (eva_rho * r) in each batch",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(name: str) -> None:
    keys, said = REFUSED[name]
    of = config()
    with pytest.raises(UserError) as caught:
        attach(model(of), LoraAdapter(**keys), facts(of), seed=0, batches=batches())
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 6


def test_eva_without_batches() -> None:
    of = config()
    with pytest.raises(UserError, match="eva looks at training rows first, and there are none"):
        attach(model(of), LoraAdapter(init_lora_weights="eva"), facts(of), seed=0)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_lora_on_tied_embeddings_is_refused(target: str) -> None:
    of = config(tie_word_embeddings=True)
    with pytest.raises(UserError, match=rf"{target} shares its matrix with the other embedding"):
        attach(model(of), LoraAdapter(target_modules=["q_proj", target]), facts(of), seed=0)


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"]])
def test_one_end_of_tied_embeddings_stays_tied(saved: list[str]) -> None:
    of = config(tie_word_embeddings=True)
    wrapped: Any = trained(attach(model(of), LoraAdapter(modules_to_save=saved), facts(of), seed=0))
    after = wrapped(IDS).logits.detach()
    merged = merge_in_place(wrapped)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert relative(merged(IDS).logits, after) < 1e-5


def test_reentrant_checkpointing_gets_gradients() -> None:
    of = config()
    wrapped: Any = attach(model(of), LoraAdapter(), facts(of), seed=0, checkpointing="reentrant")
    wrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    wrapped(IDS).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in wrapped.parameters() if parameter.requires_grad)
