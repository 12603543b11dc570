"""The training loader: for each step the micro-batches of this process, from any step on."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from .batch import Batch, collate
from .order import Order, Step
from .rows import TokenRows

StepBatches = tuple[Step, list[Batch]]


class StepDataset(Dataset[StepBatches]):
    """Step number -> the step and this process's micro-batches."""

    def __init__(
        self,
        rows: TokenRows,
        order: Order,
        *,
        process_index: int = 0,
        num_processes: int = 1,
        collate: Callable[..., Batch] = collate,
    ) -> None:
        self._rows = rows
        self._order = order
        self._process_index = process_index
        self._num_processes = num_processes
        self._collate = collate

    def __getitem__(self, index: int) -> StepBatches:
        """Build one step."""
        step = self._order.step(index)
        mine = step.micro_batches[self._process_index :: self._num_processes]
        return step, [self._collate(self._rows, batch, packed=self._order.packed) for batch in mine]


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


def training_batches(
    rows: TokenRows,
    order: Order,
    *,
    start: int = 0,
    stop: int | None = None,
    process_index: int = 0,
    num_processes: int = 1,
    num_workers: int = 0,
    collate: Callable[..., Batch] = collate,
    pin_memory: bool = False,
) -> DataLoader[Any]:
    """A DataLoader that yields (Step, [Batch, ...]) from step `start` on, in order; without `stop` it never
    ends.

    Nothing is random in it: it has a generator of its own, so the global one, which dropout draws from, is
    the same with any number of workers, and after a resume.
    """
    generator = torch.Generator()
    generator.manual_seed(0)
    return DataLoader(
        StepDataset(rows, order, process_index=process_index, num_processes=num_processes, collate=collate),
        batch_size=None,
        sampler=_From(start, stop),
        num_workers=num_workers,
        generator=generator,
        pin_memory=pin_memory,
        worker_init_fn=_one_thread if num_workers else None,
    )


def _one_thread(_worker: int) -> None:
    torch.set_num_threads(1)
