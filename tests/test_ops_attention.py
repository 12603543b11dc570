"""Packed attention: against a float64 formula, through transformers models, and its refusals."""

import pytest
import torch
from shoestring.ops.attention import (
    NAME,
    attention_forward,
    packed_attention,
    plain_attention,
    reference,
    register,
    segments_of,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

CASES = [
    ((0, 5, 12, 13), None),
    ((0, 1), None),
    ((0, 330, 1000), None),
    ((0, 330, 1000), 50),
    ((0, 30, 40), 7),
]


def formula(
    query: Tensor, key: Tensor, value: Tensor, segments: tuple[int, ...], window: int | None
) -> Tensor:
    """One [T, T] mask and plain matmuls."""
    length = query.shape[2]
    row = torch.zeros(length, dtype=torch.long)
    for boundary in segments[1:-1]:
        row[boundary:] += 1
    index = torch.arange(length)
    allowed = (row[:, None] == row[None]) & (index[:, None] >= index[None])
    if window is not None:
        allowed &= index[:, None] - index[None] < window
    return plain_attention(query, key, value, allowed, 0.3, None, 0.0).transpose(1, 2)


def inputs(length: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(length)
    shapes = [(1, length, heads, 16) for heads in (6, 2, 2)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


def outputs_and_gradients(function, tensors: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    output = function(*(leaf.transpose(1, 2) for leaf in leaves))
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)
    (output.double() * weights).sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def error(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize(("segments", "window"), CASES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float64, 1e-6)]
)
def test_output_and_gradients_match_float64(segments, window, dtype, tolerance) -> None:
    tensors = inputs(segments[-1], dtype)
    ours = outputs_and_gradients(
        lambda q, k, v: packed_attention(q, k, v, segments, scaling=0.3, sliding_window=window), tensors
    )
    exact = outputs_and_gradients(
        lambda q, k, v: formula(q, k, v, segments, window), [tensor.double() for tensor in tensors]
    )
    if segments[-1] == 1:  # a single token attends to itself alone: no gradient to query and key
        assert ours[1].abs().max() <= 1e-6
        assert ours[2].abs().max() <= 1e-6
        ours, exact = [ours[0], ours[3]], [exact[0], exact[3]]
    for value, expected in zip(ours, exact, strict=True):
        assert value.dtype in (dtype, torch.float32, torch.float64)
        assert error(value, expected) < tolerance


def test_reference_matches_the_formula_with_a_window() -> None:
    tensors = [tensor.transpose(1, 2) for tensor in inputs(40, torch.float64)]
    ours = reference(*tensors, (0, 30, 40), 0.3, 7)
    assert error(ours, formula(*tensors, (0, 30, 40), 7)) < 1e-6


def test_softcap_keeps_rows_apart() -> None:
    query, key, value = (tensor.transpose(1, 2) for tensor in inputs(12, torch.float32))
    both = packed_attention(query, key, value, (0, 5, 12), softcap=2.0)
    alone = packed_attention(query[:, :, 5:], key[:, :, 5:], value[:, :, 5:], (0, 7), softcap=2.0)
    torch.testing.assert_close(both[:, 5:], alone)
    without = packed_attention(query, key, value, (0, 5, 12))
    assert (both - without).abs().max() > 1e-3


def test_same_input_gives_the_same_bits() -> None:
    tensors = inputs(700, torch.bfloat16)
    runs = [
        outputs_and_gradients(lambda q, k, v: packed_attention(q, k, v, (0, 300, 700)), tensors)
        for _ in range(2)
    ]
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_dropout_drops() -> None:
    query, key, value = (tensor.transpose(1, 2) for tensor in inputs(12, torch.float32))
    kept = packed_attention(query, key, value, (0, 5, 12))
    dropped = packed_attention(query, key, value, (0, 5, 12), dropout=0.5)
    assert (kept - dropped).abs().max() > 1e-3


def tiny(config_class=LlamaConfig, **options):
    register()
    torch.manual_seed(0)
    config = config_class(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        **options,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("config_class", [LlamaConfig, MistralConfig])
@pytest.mark.parametrize("named", ["segments", "positions"])
def test_a_packed_model_equals_its_rows_alone(config_class, named) -> None:
    model = tiny(config_class, **({"sliding_window": 4} if config_class is MistralConfig else {}))
    rows = [torch.randint(50, (1, length)) for length in (7, 11, 1)]
    alone = torch.cat([model(input_ids=row, use_cache=False).logits for row in rows], dim=1)
    model.set_attn_implementation(NAME)
    extra = {"segments": (0, 7, 18, 19)} if named == "segments" else {}
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    packed = model(input_ids=torch.cat(rows, dim=1), position_ids=positions, use_cache=False, **extra).logits
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    model = tiny().train()
    model.set_attn_implementation(NAME)
    ids = torch.randint(50, (1, 18))
    positions = torch.cat([torch.arange(7), torch.arange(11)])[None]
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(
            input_ids=ids, position_ids=positions, segments=(0, 7, 18), use_cache=False
        ).logits.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_padding_and_generation_go_the_usual_way() -> None:
    model = tiny()
    ids = torch.randint(50, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    expected = model(input_ids=ids, attention_mask=mask).logits
    text = model.generate(ids[:1], max_new_tokens=5, do_sample=False)
    model.set_attn_implementation(NAME)
    logits = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)
    assert torch.equal(model.generate(ids[:1], max_new_tokens=5, do_sample=False), text)


def test_segments_of_positions() -> None:
    assert segments_of(torch.tensor([[0, 1, 2, 0, 1]]), 1) == (0, 3, 5)
    assert segments_of(torch.tensor([[5, 6, 0, 1]]), 1) == (0, 2, 4)
    assert segments_of(torch.arange(4)[None], 1) is None
    assert segments_of(None, 1) is None


@pytest.mark.parametrize(
    ("segments", "text"),
    [
        ((0, 5), "segments end at 5, the sequence has 12 tokens"),
        ((0, 8, 6, 12), "boundaries that rise from 0"),
        ((1, 12), "boundaries that rise from 0"),
    ],
)
def test_wrong_segments_are_refused(segments, text) -> None:
    query, key, value = (tensor.transpose(1, 2) for tensor in inputs(12, torch.float32))
    with pytest.raises(ValueError, match=text):
        attention_forward(torch.nn.Module(), query, key, value, None, segments=segments)


def test_what_it_does_not_know_is_refused() -> None:
    query, key, value = (tensor.transpose(1, 2) for tensor in inputs(12, torch.float32))
    with pytest.raises(NotImplementedError, match="does not know s_aux"):
        attention_forward(torch.nn.Module(), query, key, value, None, s_aux=torch.zeros(6))
    mask = torch.ones(1, 1, 12, 12, dtype=torch.bool)
    with pytest.raises(ValueError, match="packed rows have no mask"):
        attention_forward(torch.nn.Module(), query, key, value, mask, segments=(0, 12))
