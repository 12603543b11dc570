"""What operations keep: by content and stream, within bounds, from any thread, in any mode."""

from __future__ import annotations

import threading

import pytest
import torch
from shoestring.ops.kept import Kept, sent, stream_of
from torch import Tensor

CPU = torch.device("cpu")


def test_what_was_made_is_found_and_the_longest_unused_goes() -> None:
    kept: Kept[Tensor] = Kept(10, Tensor.numel)
    made: list[str] = []

    def find(name: str, count: int = 4) -> Tensor:
        def make() -> Tensor:
            made.append(name)
            return torch.zeros(count)

        return kept.find(name, make)

    first = find("a")
    find("b")
    assert find("a") is first  # and is used later than b now
    find("c")
    assert made == ["a", "b", "c"]
    assert len(kept) == 2
    assert find("a") is first
    find("b")
    assert made == ["a", "b", "c", "b"]
    large = find("large", 100)  # more than all room: it stays while it is the newest
    assert find("large") is large
    assert len(kept) == 1
    find("a")
    assert len(kept) == 1
    assert made[-2:] == ["large", "a"]


def test_what_could_not_be_made_is_not_kept() -> None:
    kept: Kept[Tensor] = Kept(10, Tensor.numel)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="negative"):
            kept.find("a", lambda: torch.zeros(-1))
    assert len(kept) == 0
    assert kept.find("a", lambda: torch.zeros(1)).numel() == 1


def test_what_an_evaluation_has_made_may_be_saved_for_a_backward() -> None:
    kept: Kept[Tensor] = Kept(10, Tensor.numel)
    with torch.inference_mode():
        table = kept.find("a", lambda: sent(torch.ones(2, device="cpu"), CPU))
    assert not table.is_inference()
    x = torch.ones(2, requires_grad=True)
    (x * table).sum().backward()
    assert x.grad is not None


def test_threads_find_the_same() -> None:
    kept: Kept[Tensor] = Kept(50, Tensor.numel)
    wrong: list[object] = []

    def work() -> None:
        for i in range(3000):
            key = i * 7 % 90
            if int(kept.find(key, lambda key=key: torch.full((1,), key))) != key:  # type: ignore[misc]
                wrong.append(key)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(kept) == 50
    assert stream_of(CPU) == 0


def test_many_small_ones_do_not_pile_up() -> None:
    """Keys and objects take memory beside the elements: tables of one gradient each would be 50,000."""
    kept: Kept[Tensor] = Kept(1 << 18, Tensor.numel)
    for i in range(5000):
        kept.find(i, lambda: torch.zeros(1))
    assert len(kept) == 2048
