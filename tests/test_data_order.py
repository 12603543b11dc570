"""Order, micro-batches, batches and loader: every row once, the same for whoever asks, nothing remembered."""

import pickle
import random
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from shoestring.data.batch import collate
from shoestring.data.loader import training_batches
from shoestring.data.micro_batches import split_rows
from shoestring.data.order import Order, eval_batches, permutation
from shoestring.data.rows import TokenRows, make_rows, map_rows, write_rows
from shoestring.recipes.errors import UserError


def make(
    lengths: list[int], sources: list[int] | None = None, weights: tuple[float, ...] = (1.0,)
) -> TokenRows:
    """Row r's tokens are r, r, r, ...; its second half is trained."""
    tokens = [np.full(length, row, dtype=np.int32) for row, length in enumerate(lengths)]
    trained = [np.arange(length) >= max(1, length // 2) for length in lengths]
    return make_rows(tokens, trained, sources, weights)


def random_lengths(count: int, seed: int = 0, longest: int = 300) -> list[int]:
    chooser = random.Random(seed)
    return [min(longest, 2 + int(chooser.expovariate(1 / 60))) for _ in range(count)]


def rows_of(step: Any) -> list[int]:
    return sorted(row for batch in step.micro_batches for row in batch)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("batch_tokens", [50, 700, 4096, 10**9])
def test_every_row_once_an_epoch(packed: bool, batch_tokens: int) -> None:
    rows = make(random_lengths(321))
    order = Order(rows, seed=3, batch_tokens=batch_tokens, micro_tokens=512, packed=packed)
    for epoch in range(3):
        first = epoch * order.steps_per_epoch
        steps = [order.step(first + k) for k in range(order.steps_per_epoch)]
        assert sorted(row for step in steps for row in rows_of(step)) == list(range(321))
        assert steps[-1].epoch == epoch + 1
        assert all(step.rows for step in steps)
        assert sum(step.tokens for step in steps) == len(rows.tokens)
        assert sum(step.trained_tokens for step in steps) == rows.trained.sum()


def test_steps_have_the_wanted_size() -> None:
    rows = make(random_lengths(5000))
    order = Order(rows, seed=3, batch_tokens=8192, packed=True)
    sizes = [order.step(k).tokens for k in range(order.steps_per_epoch)]
    assert max(sizes) - min(sizes) <= 2 * 300
    assert np.mean(sizes) == pytest.approx(8192, rel=0.02)


def test_rows_per_step_are_exact_and_span_epochs() -> None:
    rows = make(random_lengths(50))
    order = Order(rows, seed=3, batch_rows=16, packed=True)
    assert order.steps_per_epoch == 4
    seen = Counter(row for k in range(25) for row in rows_of(order.step(k)))
    assert set(seen.values()) == {8}  # 25 * 16 = 8 * 50
    assert {order.step(k).rows for k in range(25)} == {16}
    assert order.step(0).epoch == 16 / 50
    assert order.step(24).epoch == 8.0


def test_a_batch_above_the_data_takes_several_epochs() -> None:
    order = Order(make([5, 6, 7]), seed=3, batch_rows=7, packed=True)
    assert Counter(rows_of(order.step(0))).keys() == {0, 1, 2}
    assert order.step(0).epoch == pytest.approx(7 / 3)
    assert order.steps_per_epoch == 1


@pytest.mark.parametrize("size", [{"batch_tokens": 2000}, {"batch_rows": 24}])
def test_any_step_first_equals_the_uninterrupted_order(size: dict[str, int]) -> None:
    rows = make(random_lengths(200))
    whole = Order(rows, seed=5, micro_tokens=600, packed=True, **size)
    steps = [whole.step(k) for k in range(40)]
    for start in (39, 0, 17, 25):
        assert Order(rows, seed=5, micro_tokens=600, packed=True, **size).step(start) == steps[start]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("size", [{"batch_tokens": 2000}, {"batch_rows": 24}])
def test_the_same_rows_for_any_number_of_processes(packed: bool, size: dict[str, int]) -> None:
    rows = make(random_lengths(200))
    orders = {
        world: Order(rows, seed=5, micro_tokens=400, world_size=world, packed=packed, **size)
        for world in (1, 2, 4)
    }
    for index in range(30):
        steps = {world: order.step(index) for world, order in orders.items()}
        for world, step in steps.items():
            assert rows_of(step) == rows_of(steps[1])
            assert (step.tokens, step.trained_tokens, step.epoch) == (
                steps[1].tokens,
                steps[1].trained_tokens,
                steps[1].epoch,
            )
            assert len(step.micro_batches) % world == 0
            assert all(step.micro_batches)


def test_epochs_and_seeds_differ() -> None:
    rows = make(random_lengths(100))
    order = Order(rows, seed=5, batch_rows=100, packed=True)
    first, second = order.step(0), order.step(1)
    other = Order(rows, seed=6, batch_rows=10, packed=True)
    assert rows_of(first) == rows_of(second)
    small = Order(rows, seed=5, batch_rows=10, packed=True)
    assert rows_of(small.step(0)) != rows_of(small.step(10))
    assert rows_of(small.step(0)) != rows_of(other.step(0))


def test_lengths_do_not_order_the_steps() -> None:
    rows = make(sorted(random_lengths(4000)))
    order = Order(rows, seed=5, batch_rows=40, micro_tokens=1000, packed=False)
    means = [order.step(k).tokens / 40 for k in range(100)]
    assert abs(np.corrcoef(np.arange(100), means)[0, 1]) < 0.3
    # As much spread between steps as for rows drawn at random.
    assert np.std(means) == pytest.approx(np.std(rows.lengths) / 40**0.5, rel=0.3)


def test_weights_are_shares_of_an_epoch() -> None:
    lengths = random_lengths(130)
    rows = make(lengths, [0] * 100 + [1] * 10 + [2] * 20, (0.3, 2.0, 1.0))
    order = Order(rows, seed=1, batch_tokens=500, packed=True)
    assert order.rows_per_epoch == 30 + 20 + 20
    total: Counter[int] = Counter()
    for epoch in range(10):
        first = epoch * order.steps_per_epoch
        seen = Counter(r for k in range(order.steps_per_epoch) for r in rows_of(order.step(first + k)))
        assert sum(seen[row] for row in range(100)) == 30
        assert {seen[row] for row in range(100, 110)} == {2}
        assert {seen[row] for row in range(110, 130)} == {1}
        total += seen
    # 30 % of 100 rows in ten epochs: each of them three times.
    assert {total[row] for row in range(100)} == {3}


def test_a_tiny_weight_still_gives_a_row() -> None:
    order = Order(make([5] * 12, [0] * 10 + [1] * 2, (1.0, 0.01)), seed=1, batch_rows=11, packed=True)
    assert order.rows_per_epoch == 11


def test_no_rows() -> None:
    with pytest.raises(UserError, match=r"data.train: there are no rows to train on"):
        Order(make([]), seed=0, batch_rows=1, packed=True)


def test_a_row_longer_than_a_step_leaves_no_step_empty() -> None:
    order = Order(make([10_000, 10, 10, 10, 10]), seed=0, batch_tokens=2500, packed=True)
    steps = [order.step(k) for k in range(order.steps_per_epoch)]
    assert order.steps_per_epoch == 4
    assert all(step.rows for step in steps)
    assert sorted(row for step in steps for row in rows_of(step)) == [0, 1, 2, 3, 4]


def test_a_million_rows_in_a_second() -> None:
    lengths = np.random.default_rng(0).integers(2, 400, 1_000_000)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rows = TokenRows(
        tokens=np.zeros(0, np.int32),
        trained=np.zeros(0, np.bool_),
        offsets=offsets,
        trained_counts=(lengths // 2).astype(np.int32),
        source=np.zeros(1_000_000, np.int32),
    )
    started = time.process_time()
    order = Order(rows, seed=0, batch_tokens=65536, micro_tokens=8192, packed=True)
    step = order.step(12345)
    seconds = time.process_time() - started
    assert step.tokens == pytest.approx(65536, rel=0.02)
    assert seconds < 1.0


def test_the_permutation_never_changes() -> None:
    """A resumed run depends on these numbers: they may not differ between machines or versions."""
    assert permutation(10, 42, 0, 0).tolist() == [9, 8, 7, 2, 3, 6, 1, 5, 0, 4]
    assert sorted(permutation(1000, 42, 1, 7).tolist()) == list(range(1000))


def test_the_longest_step_holds_the_longest_rows() -> None:
    rows = make(random_lengths(500))
    for packed in (True, False):
        order = Order(rows, seed=0, batch_tokens=3000, micro_tokens=1000, world_size=2, packed=packed)
        worst = order.longest_step()
        steps = [order.step(k) for k in range(3 * order.steps_per_epoch)]
        cost = _packed_cost if packed else _padded_cost
        real = max(cost(rows, batch) for step in steps for batch in step.micro_batches)
        assert cost(rows, worst.micro_batches[0]) >= 0.97 * real
        assert cost(rows, worst.micro_batches[0]) <= 1000
        assert len(worst.micro_batches) == 2 * 2
        assert worst.rows == sum(len(batch) for batch in worst.micro_batches)
        if packed:
            assert max(rows.lengths) in rows.lengths[worst.micro_batches[0]]


def test_the_longest_step_is_no_larger_than_a_step() -> None:
    rows = make(random_lengths(500))
    worst = Order(rows, seed=0, batch_rows=16, packed=True).longest_step()
    assert worst.micro_batches == [np.argsort(-rows.lengths, kind="stable")[:16].tolist()]
    worst = Order(rows, seed=0, batch_tokens=1000, micro_tokens=10**6, packed=True).longest_step()
    assert worst.tokens <= 1000 + 300 + 50


def _packed_cost(rows: TokenRows, batch: list[int]) -> int:
    return int(rows.lengths[batch].sum())


def _padded_cost(rows: TokenRows, batch: list[int]) -> int:
    return len(batch) * int(rows.lengths[batch].max())


@pytest.mark.parametrize("seed", range(30))
def test_micro_batches_keep_their_limits(seed: int) -> None:
    chooser = random.Random(seed)
    lengths = [chooser.randint(1, chooser.choice([20, 200, 1500])) for _ in range(chooser.randint(1, 300))]
    tokens, multiple = chooser.choice([64, 1000, 4096]), chooser.choice([1, 2, 3, 8])
    most = chooser.choice([None, 1, 5])
    for packed in (True, False):
        batches = split_rows(lengths, packed=packed, micro_tokens=tokens, micro_rows=most, multiple=multiple)
        assert sorted(k for batch in batches for k in batch) == list(range(len(lengths)))
        assert len(batches) % multiple == 0
        # An empty one only where nothing is left to divide.
        assert all(batches) or all(len(batch) <= 1 for batch in batches)
        for batch in batches:
            sizes = [lengths[k] for k in batch]
            cost = sum(sizes) if packed else len(sizes) * max(sizes, default=0)
            assert cost <= tokens or len(sizes) == 1
            assert most is None or len(sizes) <= most


def test_packing_wastes_little() -> None:
    lengths = random_lengths(2000)
    batches = split_rows(lengths, packed=True, micro_tokens=2048, micro_rows=None)
    assert len(batches) == -(-sum(lengths) // 2048)
    loads = [sum(lengths[k] for k in batch) for batch in batches]
    assert max(loads) - min(loads) <= 100


def test_packing_many_halves_is_quick() -> None:
    started = time.process_time()
    batches = split_rows([600] * 3000, packed=True, micro_tokens=1000, micro_rows=None)
    assert len(batches) == 3000
    assert time.process_time() - started < 0.5


def test_fewer_rows_than_processes() -> None:
    batches = split_rows([5, 9], packed=True, micro_tokens=100, micro_rows=None, multiple=4)
    assert batches == [[1], [0], [], []]
    rows = make([5, 9])
    for packed in (True, False):
        batch = collate(rows, [], packed=packed)
        assert batch.input_ids.shape == (1, 1)
        assert (len(batch.targets), batch.n_tokens, batch.rows) == (0, 0, [])


def test_packed_collate() -> None:
    rows = make_rows(
        [np.array([1, 2, 3], np.int32), np.array([7, 8], np.int32)],
        [
            np.array([True, False, True]),
            np.array([True, True]),
        ],  # a first token never is a target, whatever is said
    )
    batch = collate(rows, [1, 0], packed=True)
    assert batch.input_ids.tolist() == [[7, 8, 1, 2, 3]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2]]
    assert batch.segments == (0, 2, 5)
    assert batch.attention_mask is None
    assert batch.targets.tolist() == [0, 3]
    assert batch.labels.tolist() == [8, 3]
    assert (batch.rows, batch.n_tokens) == ([1, 0], 5)


def test_padded_collate() -> None:
    rows = make_rows(
        [np.array([1, 2, 3], np.int32), np.array([7, 0], np.int32)],
        [np.array([False, False, True]), np.array([False, True])],
    )
    batch = collate(rows, [0, 1], packed=False)
    assert batch.input_ids.tolist() == [[1, 2, 3], [7, 0, 0]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.segments is None
    assert batch.targets.tolist() == [1, 3]
    assert batch.labels.tolist() == [3, 0]  # a real token with the id of the padding is trained
    assert batch.n_tokens == 5
    assert batch.to("cpu").labels.tolist() == [3, 0]


@pytest.mark.parametrize("packed", [True, False])
def test_targets_are_the_trained_tokens(packed: bool) -> None:
    rows = make(random_lengths(60))
    batch = collate(rows, list(range(60)), packed=packed)
    assert len(batch.targets) == int(rows.trained_counts.sum())
    assert torch.equal(batch.input_ids.view(-1)[batch.targets + 1], batch.labels)
    assert torch.equal(
        batch.input_ids.view(-1)[batch.targets], batch.labels
    )  # here all of a row is one token
    assert not (batch.position_ids.view(-1)[batch.targets + 1] == 0).any()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_starts_anywhere_and_draws_nothing(workers: int) -> None:
    rows = make(random_lengths(100))
    order = Order(rows, seed=1, batch_tokens=800, micro_tokens=300, world_size=2, packed=True)
    state = torch.get_rng_state()
    loader = training_batches(
        rows, order, start=7, stop=10, process_index=1, num_processes=2, num_workers=workers
    )
    given = list(loader)
    assert torch.equal(torch.get_rng_state(), state)
    assert [step.index for step, _ in given] == [7, 8, 9]
    for step, batches in given:
        assert step == order.step(step.index)
        assert [batch.rows for batch in batches] == step.micro_batches[1::2]
        for batch in batches:
            assert torch.equal(batch.input_ids, collate(rows, batch.rows, packed=True).input_ids)


def test_the_loader_never_ends_by_itself() -> None:
    rows = make([3, 4, 5])
    order = Order(rows, seed=1, batch_rows=2, packed=False)
    steps = iter(training_batches(rows, order))
    assert [next(steps)[0].index for _ in range(20)] == list(range(20))


def test_evaluation_sees_every_row_once() -> None:
    rows = make(random_lengths(300))
    for packed in (True, False):
        batches = eval_batches(rows, micro_tokens=700, packed=packed)
        assert sorted(row for batch in batches for row in batch) == list(range(300))
    assert eval_batches(make([]), micro_tokens=700, packed=True) == []


def test_rows_on_disk_travel_as_a_path(tmp_path: Any) -> None:
    rows = make(random_lengths(2000), weights=(0.5,))
    write_rows(rows, tmp_path, "train")
    mapped = map_rows(tmp_path, "train", (0.5,))
    sent = pickle.dumps(mapped)
    assert len(sent) < 1000
    again = pickle.loads(sent)
    assert again.weights == (0.5,)
    assert np.array_equal(again.tokens, rows.tokens)
    assert np.array_equal(pickle.loads(pickle.dumps(rows)).offsets, rows.offsets)
