"""Parity against arithmetic on Python's integers; pieces cut and joined."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from shoestring.checkpoint.errors import BrokenCheckpoint
from shoestring.checkpoint.parity import block_held_by, fold, rebuild, stripe_bytes
from shoestring.checkpoint.pieces import JoinedTensor, Part, share_of


def stripes_of(data: list[bytes], length: int) -> list[bytes]:
    """Byte by byte: the stripe of each process is the exclusive or of one block of each other one."""
    ranks = len(data)
    padded = [each + bytes(length * (ranks - 1) - len(each)) for each in data]
    stripes = []
    for holder in range(ranks):
        stripe = bytearray(length)
        for rank in range(ranks):
            if rank != holder:
                block = block_held_by(holder, rank)
                for i in range(length):
                    stripe[i] ^= padded[rank][block * length + i]
        stripes.append(bytes(stripe))
    return stripes


@pytest.mark.parametrize("ranks", [2, 3, 4, 7])
def test_any_one_is_computed_from_the_others(ranks: int) -> None:
    draw = random.Random(ranks)
    data = [draw.randbytes(draw.randint(0, 500)) for _ in range(ranks)]
    length = stripe_bytes(max(map(len, data)), ranks)
    stripes = stripes_of(data, length)
    for lost in range(ranks):
        kept = [rank for rank in range(ranks) if rank != lost]
        found = rebuild(
            lost,
            len(data[lost]),
            {rank: [(0, np.frombuffer(data[rank], np.uint8))] for rank in kept},
            {rank: np.frombuffer(stripes[rank], np.uint8) for rank in kept},
        )
        assert found.tobytes() == data[lost]


def test_every_block_has_another_holder() -> None:
    for ranks in range(2, 9):
        for rank in range(ranks):
            blocks = [block_held_by(holder, rank) for holder in range(ranks) if holder != rank]
            assert sorted(blocks) == list(range(ranks - 1))
    with pytest.raises(ValueError, match="no process"):
        block_held_by(1, 1)


def test_bytes_in_runs_count_as_if_zeros_were_between() -> None:
    into = np.zeros(10, np.uint8)
    runs = [(2, np.array([1, 2, 3], np.uint8)), (7, np.array([4, 5, 6, 7, 8, 9], np.uint8))]
    fold(into, runs, 3)  # bytes 3 to 12
    assert into.tolist() == [2, 3, 0, 0, 4, 5, 6, 7, 8, 9]
    fold(into, runs, 3)
    assert not into.any()


def test_parity_of_other_sizes_is_refused() -> None:
    run = [(0, np.zeros(64, np.uint8))]
    stripes = {1: np.zeros(64, np.uint8), 2: np.zeros(128, np.uint8)}
    with pytest.raises(ValueError, match="not of one snapshot"):
        rebuild(0, 64, {1: run, 2: run}, stripes)
    with pytest.raises(ValueError, match="are needed"):
        rebuild(0, 64, {1: run}, stripes)
    with pytest.raises(ValueError, match="not of one snapshot"):
        rebuild(0, 500, {1: run, 2: run}, {1: stripes[1], 2: stripes[1]})


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_what_all_hold_alike_is_cut_into_equal_shares(ranks: int) -> None:
    torch.manual_seed(0)
    files = {
        "trained": {
            "a": torch.randn(700, 321),
            "b": torch.randn(3, 5).bfloat16(),
            "empty": torch.zeros(0, 4),
        },
        "optimizer": {
            "a/step": torch.tensor(3.0),
            "a/exp_avg": torch.randn(700, 321),
            "turned": torch.randn(300, 200).t(),
            "small": torch.arange(7, dtype=torch.int8),
        },
    }
    shares = [share_of(files, rank, ranks) for rank in range(ranks)]
    for file, tensors in files.items():
        for name, tensor in tensors.items():
            parts = [Part(s[file][name].data, s[file][name].first) for s in shares if name in s[file]]
            joined = JoinedTensor(name, tensor.shape, parts)
            assert torch.equal(joined.read(0, tensor.numel()).view(tensor.shape), tensor), name
            assert joined.dtype == tensor.dtype
            if tensor.numel() > 20:
                assert torch.equal(joined.read(5, 12), tensor.reshape(-1)[5:17])
    sizes = [sum(p.data.nbytes for named in share.values() for p in named.values()) for share in shares]
    assert max(sizes) - min(sizes) < 2 * 300 * 200 * 4


def test_pieces_that_make_no_whole_are_refused() -> None:
    part = Part(torch.arange(4), 0)
    for parts in ([part], [part, Part(torch.arange(4), 5)], [part, Part(torch.arange(5), 3)]):
        with pytest.raises(BrokenCheckpoint):
            JoinedTensor("w", (8,), parts)
    with pytest.raises(BrokenCheckpoint, match="fit together at element 4"):
        JoinedTensor("w", (8,), [part, Part(torch.arange(4.0), 4)])
    assert JoinedTensor("w", (8,), [part, Part(torch.arange(4), 4)]).shape == (8,)
