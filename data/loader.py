"""The training loader: for each step the micro-batches of this process, from any step on."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from .collate import Batch, collate
from .order import Order, Step
from .rows import TokenRows

StepBatches = tuple[int, Step, list[Batch]]


class StepDataset(Dataset[StepBatches]):
    """Step number -> (number, step, this rank's micro-batches)."""

    def __init__(self, rows: TokenRows, order: Order, *, packed: bool, rank: int, world_size: int) -> None:
        self._rows = rows
        self._order = order
        self._packed = packed
        self._rank = rank
        self._world_size = world_size

    def __getitem__(self, index: int) -> StepBatches:
        """Build one step."""
        step = self._order.step(index)
        mine = step.micro_batches[self._rank :: self._world_size]
        return index, step, [collate(self._rows, batch, packed=self._packed) for batch in mine]


class _From(Sampler[int]):
    """start, start + 1, ... up to `stop`, or for ever."""

    def __init__(self, start: int, stop: int | None) -> None:
        self._start = start
        self._stop = stop

    def __iter__(self) -> Iterator[int]:
        index = self._start
        while self._stop is None or index < self._stop:
            yield index
            index += 1


def make_loader(
    rows: TokenRows,
    order: Order,
    *,
    packed: bool,
    start: int = 0,
    stop: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[Any]:
    """A DataLoader that yields (step number, Step, [Batch, ...]) from step `start` on, in order.

    Nothing is random in it: it has a generator of its own, so the global one, which dropout draws from, is
    the same with any number of workers, and after a resume.
    """
    generator = torch.Generator()
    generator.manual_seed(0)
    return DataLoader(
        StepDataset(rows, order, packed=packed, rank=rank, world_size=world_size),
        batch_size=None,
        sampler=_From(start, stop),
        num_workers=num_workers,
        generator=generator,
        pin_memory=pin_memory,
        worker_init_fn=_one_thread if num_workers else None,
    )


def _one_thread(_worker: int) -> None:
    torch.set_num_threads(1)
