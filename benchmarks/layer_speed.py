"""What the fused operations buy on this machine: a whole LoRA training step, and its parts one by one.

A model of SmolLM2-135M's shape with random weights (no download), LoRA r 16 on all linear layers, bf16, rows
of the lengths of GSM8K conversations, a loss on half of the tokens. Plain is transformers + PEFT on the same
rows padded to the longest; ours is one packed sequence. They take turns in one process; medians are printed.
The share is 4 * parameters * tokens/s over the rate of a large bf16 matmul measured between the steps. CPU
seconds are printed too: on a machine that other programs use they are the steadier figure.

    python benchmarks/layer_speed.py [--layers 30] [--rounds 5] [--separate-memory]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch
from peft import LoraConfig, get_peft_model
from shoestring.ops import cross_entropy, keep_freed_memory, mlp, register, rms_norm, use_fused
from shoestring.ops.attention import NAME, packed_attention
from shoestring.ops.attention import reference as plain_attention
from shoestring.ops.lora import Projection, lora_linear
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

LENGTHS = (132, 132, 196, 214, 136, 265, 184, 256, 284)
HIDDEN, WIDE, HEADS, KEY_HEADS, WIDTH, VOCABULARY = 576, 1536, 9, 3, 64, 49152
TOKENS = sum(LENGTHS)
SEGMENTS = (0, *accumulate(LENGTHS))
RATE_SIDE = 4096


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """(wall, processor) seconds of one call."""
    wall, processor = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - processor


def in_turns(functions: Sequence[Callable[[], object]], rounds: int) -> list[tuple[float, float]]:
    """Median (wall, processor) seconds of each function; they take turns, the first round is left out."""
    for function in functions:
        function()
    times = [[timed(function) for function in functions] for _ in range(rounds)]
    return [
        (statistics.median(t[0] for t in column), statistics.median(t[1] for t in column))
        for column in zip(*times, strict=True)
    ]


def build(layers: int) -> nn.Module:
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=WIDE,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    adapted: nn.Module = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    return adapted.train()


def steps(layers: int) -> tuple[Callable[[], object], Callable[[], object], float]:
    """A step of plain PEFT, one of ours on the same rows, and the parameters that the share counts."""
    torch.manual_seed(0)
    plain = build(layers)
    ours = copy.deepcopy(plain)
    print("\n".join(use_fused(ours)))
    register()
    ours.get_base_model().set_attn_implementation(NAME)
    rows = [torch.randint(VOCABULARY, (length,)) for length in LENGTHS]
    packed = torch.cat(rows)[None]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    # the second half of each row is trained; its last position has no next token
    targets = torch.cat([torch.arange(a + (b - a) // 2, b - 1) for a, b in pairwise(SEGMENTS)])
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    labels = padded.masked_fill(mask == 0, -100)
    for row, length in enumerate(LENGTHS):
        labels[row, : length // 2 + 1] = -100

    def step_plain() -> None:
        plain(input_ids=padded, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        plain.zero_grad()

    def step_ours() -> None:
        base = ours.get_base_model()
        states = base.model(
            input_ids=packed, position_ids=positions, segments=SEGMENTS, use_cache=False
        ).last_hidden_state[0]
        loss = cross_entropy.cross_entropy_sum(states[targets], base.lm_head.weight, packed[0, targets + 1])
        (loss / len(targets)).backward()
        ours.zero_grad()

    parameters = sum(p.numel() for name, p in plain.named_parameters() if "lora_" not in name)
    return step_plain, step_ours, parameters


def parts() -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Name -> (plain, ours): forward and backward of one layer's part on the packed tokens."""
    draw = lambda *shape: torch.randn(shape).bfloat16()  # noqa: E731
    x, hidden_gradient = draw(1, TOKENS, HIDDEN).requires_grad_(), draw(1, TOKENS, HIDDEN)
    scale = torch.ones(HIDDEN).bfloat16()

    def projection(out: int, width: int) -> Projection:
        a, b = torch.randn(16, width) / width**0.5, torch.randn(out, 16)
        return Projection(draw(out, width), None, a.requires_grad_(), b.requires_grad_(), 2.0)

    one = projection(HIDDEN, HIDDEN)
    gate, up, down = projection(WIDE, HIDDEN), projection(WIDE, HIDDEN), projection(HIDDEN, WIDE)
    heads = [
        draw(1, TOKENS, count, WIDTH).transpose(1, 2).requires_grad_()
        for count in (HEADS, KEY_HEADS, KEY_HEADS)
    ]
    states, labels = draw(TOKENS // 2, HIDDEN).requires_grad_(), torch.randint(VOCABULARY, (TOKENS // 2,))
    head = draw(VOCABULARY, HIDDEN) / HIDDEN**0.5

    def peft(inputs: Tensor, part: Projection) -> Tensor:
        """PEFT's own order of operations, in the adapter's float32."""
        assert part.a is not None
        assert part.b is not None
        added = inputs.float() @ part.a.t() @ part.b.t() * part.scaling
        return (nn.functional.linear(inputs, part.weight) + added).to(inputs.dtype)

    def both_ways(function: Callable[[], Tensor], leaves: list[Tensor], gradient: Tensor | None) -> None:
        torch.autograd.grad(function(), leaves, gradient)

    def pair(
        plain: Callable[[], Tensor], ours: Callable[[], Tensor], leaves: list[Tensor], gradient: Tensor | None
    ) -> tuple[Callable[[], object], Callable[[], object]]:
        return lambda: both_ways(plain, leaves, gradient), lambda: both_ways(ours, leaves, gradient)

    adapters = [t for p in (gate, up, down) for t in (p.a, p.b) if t is not None]
    assert one.a is not None
    assert one.b is not None
    return {
        "RMSNorm": pair(
            lambda: rms_norm.reference(x, scale, 1e-5),
            lambda: rms_norm.rms_norm(x, scale, 1e-5),
            [x],
            hidden_gradient,
        ),
        "attention": pair(
            lambda: plain_attention(*heads, SEGMENTS, WIDTH**-0.5),
            lambda: packed_attention(*heads, SEGMENTS),
            heads,
            hidden_gradient.view(1, TOKENS, HEADS, WIDTH),
        ),
        "LoRA linear 576x576": pair(
            lambda: peft(x, one), lambda: lora_linear(x, one), [x, one.a, one.b], hidden_gradient
        ),
        "feed-forward block": pair(
            lambda: peft(nn.functional.silu(peft(x, gate)) * peft(x, up), down),
            lambda: mlp.gated_mlp(x, gate, up, down),
            [x, *adapters],
            hidden_gradient,
        ),
        "head and loss": pair(
            lambda: cross_entropy.reference(states, head, labels),
            lambda: cross_entropy.cross_entropy_sum(states, head, labels),
            [states],
            None,
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--separate-memory",
        action="store_true",
        help="leave the C allocator as it is (pages faulted in anew)",
    )
    options = parser.parse_args()
    if not options.separate_memory:
        print("freed memory is kept:", keep_freed_memory())
    step_plain, step_ours, parameters = steps(options.layers)
    square = torch.randn(RATE_SIDE, RATE_SIDE).bfloat16()
    (plain, ours, matmul) = in_turns([step_plain, step_ours, lambda: square @ square], options.rounds)
    operations = 2 * RATE_SIDE**3
    print(
        f"\nmatmul rate {operations / matmul[0] / 1e9:.0f} GFLOP/s, per processor second "
        f"{operations / matmul[1] / 1e9:.0f}; {parameters / 1e6:.1f} M parameters, {TOKENS} tokens a step"
    )
    print(f"{'step':22}{'wall s':>9}{'CPU s':>9}{'tokens/s':>10}{'share':>8}{'CPU share':>11}")
    for name, (wall, processor) in (("plain PEFT, padded", plain), ("shoestring, packed", ours)):
        useful = 4 * parameters * TOKENS / operations
        print(
            f"{name:22}{wall:9.2f}{processor:9.2f}{TOKENS / wall:10.0f}{useful * matmul[0] / wall:8.2f}"
            f"{useful * matmul[1] / processor:11.2f}"
        )
    print(f"ours / plain: {plain[0] / ours[0]:.2f} times the tokens per second")
    print(f"\n{'part, both ways':22}{'plain ms':>10}{'ours ms':>10}{'times':>8}{'in CPU time':>13}")
    for name, functions in parts().items():
        plain, ours = in_turns(functions, 3 * options.rounds)
        print(
            f"{name:22}{plain[0] * 1e3:10.2f}{ours[0] * 1e3:10.2f}{plain[0] / ours[0]:8.2f}"
            f"{plain[1] / ours[1]:13.2f}"
        )


if __name__ == "__main__":
    main()
