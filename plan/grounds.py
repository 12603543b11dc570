"""Everything about one recipe on one machine that the search for what fits stands on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from ..models.facts import ModelFacts
from ..recipes import Recipe
from ..recipes.offload import Tier
from . import defaults
from .facts import DataFacts
from .fit import Candidate, candidates
from .fit import Limits as MemoryLimits
from .layout import Layout, choose_layout
from .machine import Machine
from .measurement import Measurement, Setting, mixed
from .memory import Sizes
from .objectives import Extra, Work, extra_of
from .offload import move_state, scratch_folder, tier_of_weights, tiers_to_try
from .precision import Precision, choose_precision
from .seconds import optimizer_seconds, streaming_seconds
from .sizes import accumulates, count_sizes, state_dtype, steps_in_backward
from .swapping import Swap, swap_cost, when_to_swap
from .trained import Trained, find_trained

if TYPE_CHECKING:
    from ..offload.rates import DiskRates

MeasureCopy = Callable[[Recipe, ModelFacts, torch.device, Setting], Measurement]


@dataclass(frozen=True)
class Surroundings:
    """What does not change when the recipe does. libraries: bytes resident before the model is loaded.

    teacher: facts of the model that `objective: distill` names.
    """

    machine: Machine
    facts: ModelFacts
    data: DataFacts
    world_size: int
    libraries: int
    limits: MemoryLimits
    measure: MeasureCopy
    can_pack: bool
    teacher: ModelFacts | None = None


class Grounds:
    """A recipe with its layout, precision, trained tensors and sizes, and measurements made when needed."""

    def __init__(self, recipe: Recipe, around: Surroundings, max_length: int | None = None) -> None:
        """`max_length` cuts rows shorter than the recipe and the model do. UserError as in choose_layout."""
        self.recipe = recipe
        self.around = around
        if max_length is not None:
            recipe = recipe.model_copy(
                update={"data": recipe.data.model_copy(update={"max_length": max_length})}
            )
        self.layout: Layout = choose_layout(
            recipe, around.data, max_positions=around.facts.max_positions, can_pack=around.can_pack
        )
        self.data = around.data.clipped(self.layout.max_length)
        self.device = torch.device(around.machine.device)
        self._measured: dict[bool, Measurement] = {}
        self._sizes: dict[Tier, Sizes] = {}

    @cached_property
    def precision(self) -> Precision:
        """Types of weights and arithmetic."""
        return choose_precision(self.recipe, self.device)

    @cached_property
    def trained(self) -> Trained:
        """Which tensors are trained."""
        return find_trained(self.recipe, self.around.facts)

    @cached_property
    def sizes(self) -> Sizes:
        """Bytes that do not depend on the batch, with the optimizer's state on the device."""
        return count_sizes(
            self.recipe,
            self.around.facts,
            self.trained,
            self.precision,
            libraries=self.around.libraries,
            extra=self.extra,
            weights_tier=self.weights_tier,
            world_size=self.around.world_size,
            accelerated=self.device.type != "cpu",
        )

    @cached_property
    def weights_tier(self) -> Tier:
        """Where the layers' weights are. UserError: they cannot be streamed from the tier given."""
        return tier_of_weights(self.recipe, self.device.type)

    def sizes_on(self, tier: Tier) -> Sizes:
        """`sizes` with the optimizer's state on `tier`."""
        if tier not in self._sizes:
            moved = move_state(
                tier,
                self.recipe.optimizer,
                self.trained.slots,
                state_dtype(self.trained, self.precision),
                self.recipe.offload,
                accelerated=self.device.type != "cpu",
                same_way=steps_in_backward(self.recipe),
            )
            self._sizes[tier] = replace(self.sizes, moved=moved)
        return self._sizes[tier]

    @cached_property
    def tiers(self) -> tuple[Tier, ...]:
        """Tiers of the optimizer's state to try in order. UserError: one was given that it cannot go to."""
        return tiers_to_try(self.recipe, self.device.type, lambda: self.sizes_on("disk"))

    @cached_property
    def disk_rates(self) -> DiskRates:
        """Of the disk that the optimizer's state would go to; each process of this machine has its share."""
        rates = self.around.machine.disk_rates(scratch_folder(self.recipe))
        share = 1.0 / self.around.world_size
        return replace(rates, read=rates.read * share, write=rates.write * share, mixed=rates.mixed * share)

    def update_seconds(self, tier: Tier) -> float:
        """Seconds of a step of the optimizer whose state is on `tier`."""
        disk = self.disk_rates if tier == "disk" else None
        rates, accelerated = self.around.machine.rates, self.device.type != "cpu"
        return optimizer_seconds(self.sizes_on(tier), rates, disk, accelerated=accelerated)

    @cached_property
    def extra(self) -> Extra:
        """What the objective adds to supervised fine-tuning."""
        return extra_of(self.recipe, self.around.facts, self.around.teacher, self.precision.dtype.itemsize)

    def work(self, recomputed: int) -> Work:
        """Seconds and bytes of a micro-batch with so many layers computed again, by the measurement."""
        layers = self.around.facts.layers
        if recomputed in (0, layers):
            measured = self.measured(recomputed > 0)
        else:
            measured = mixed(self.measured(False), self.measured(True), recomputed / layers)
        return Work(measured, layers, self.extra, self._streaming)

    def work_of(self, chosen: Candidate) -> Work:
        """The same of a way to run, with what swapping adds."""
        if not chosen.swapped:
            return self.work(chosen.recomputed)
        plain, micro = self.work(0), chosen.micro_tokens
        seconds = plain.train_seconds(micro, micro * self.data.trained_share)
        return replace(plain, swapping=chosen.seconds_per_token - seconds / micro)

    @cached_property
    def _streaming(self) -> tuple[float, float]:
        """Seconds for the layers' weights to come once, and to come twice and go back where trained."""
        if self.weights_tier == "device":
            return 0.0, 0.0
        disk = self.disk_rates if self.weights_tier == "disk" else None
        return streaming_seconds(self.sizes.streamed, disk, trained=self.recipe.adapter is None)

    def measured(self, checkpointing: bool) -> Measurement:
        """The measurement with or without activation checkpointing; made once."""
        if checkpointing not in self._measured:
            setting = Setting(
                precision=self.precision,
                packed=self.layout.packed,
                checkpointing=checkpointing,
                tokens=self._lengths_to_measure(),
                row_length=max(8, round(self.data.typical_length)),
                trained_share=self.data.trained_share,
            )
            self._measured[checkpointing] = self.around.measure(
                self.recipe, self.around.facts, self.device, setting
            )
        return self._measured[checkpointing]

    @property
    def watts(self) -> float:
        """What the processors of this run are taken to draw."""
        one = (
            defaults.WATTS_CPU if self.device.type == "cpu" else defaults.WATTS_CUDA * self.around.world_size
        )
        return one

    @property
    def teacher_tokens(self) -> int:
        """Tokens that a teacher sees before training: all rows once; 0 where it runs in the steps."""
        teacher = self.extra.teacher
        if teacher is None or not teacher.stored:
            return 0
        return int(self.data.lengths.sum()) + self.data.eval_tokens

    @property
    def stored_bytes(self) -> int:
        """Bytes on disk of what the teacher said in that pass, at the trained positions of all rows."""
        teacher = self.extra.teacher
        if teacher is None or not teacher.stored:
            return 0
        targets = int(self.data.trained.sum()) + int(self.data.eval_trained.sum())
        return targets * teacher.bytes_per_target

    @property
    def micro_rows(self) -> int | None:
        """Rows of a micro-batch where the recipe says so."""
        return self.recipe.train.per_device_train_batch_size

    def find(
        self, recomputed: int, micro_tokens: int | None = None, tier: Tier = "device", swapped: int = 0
    ) -> list[Candidate]:
        """All micro-batch sizes worth a thought, or the one given, with footprint and speed."""
        fixed = self.micro_rows is not None
        auto = self._micro_sizes() if micro_tokens is None else [micro_tokens]
        return candidates(
            device=self.around.machine.device,
            sizes=self.sizes_on(tier),
            work_of=self.work,
            micro_tokens=[self._worst_of_rows()] if fixed else auto,
            longest=self.data.longest if self.layout.packed else self.data.padded_row,
            recomputed=recomputed,
            trained_share=self.data.trained_share,
            dense_share=self.data.dense_share,
            always_whole=fixed,
            swapped=swapped,
            swap=self._swap,
        )

    @property
    def swaps(self) -> Literal["never", "auto", "always"]:
        """Whether activations may go to host memory."""
        link = self.around.machine.rates.host_link if self.device.type != "cpu" else 0.0
        return when_to_swap(self.recipe, self.device.type, self.weights_tier, link)

    def _swap(self, recomputed: int, swapped: int, micro: int, worst: int) -> Swap:
        return swap_cost(
            self.measured(False),
            self.measured(True),
            layers=self.around.facts.layers,
            recomputed=recomputed,
            swapped=swapped,
            micro=micro,
            worst=worst,
            link=self.around.machine.rates.host_link,
        )

    @property
    def wanted_checkpointing(self) -> bool | None:
        """The recipe's word, None where the plan may choose. Sampled rows leave nothing to compute again.

        A layer whose weights are streamed is always computed again, with them.
        """
        if self.weights_tier != "device":
            return True
        train = self.recipe.train
        return train.activation_checkpointing if train.wta_crs_ratio is None else False

    def _worst_of_rows(self) -> int:
        rows = self.micro_rows or 1
        if self.layout.packed:
            return int(np.sort(self.data.lengths)[-rows:].sum())
        return rows * self.data.padded_row

    def _micro_sizes(self) -> list[int]:
        train = self.recipe.train
        if train.batch_tokens is not None and train.gradient_accumulation_steps is not None:
            return [ceil(train.batch_tokens / (train.gradient_accumulation_steps * self.around.world_size))]
        if train.batch_tokens is not None and not accumulates(self.recipe):
            # one micro-batch a step, which may be a row larger than asked for
            return [train.batch_tokens + self.data.longest]
        sizes = defaults.MICRO_TOKENS_CPU if self.device.type == "cpu" else defaults.MICRO_TOKENS_CUDA
        most = train.batch_tokens or self.data.tokens
        return [size for size in sizes if size < most] or [max(most, 1)]

    def _lengths_to_measure(self) -> tuple[int, int]:
        """Two lengths: the longer near the usual micro-batch, both bounded by what a moment can compute."""
        facts = self.around.facts
        per_layer = (facts.parameters - facts.embedding_parameters) / facts.layers
        # Three layers in all (a copy of one and one of two), four passes over them, 6 operations a weight.
        affordable = (
            defaults.MEASURE_SECONDS * 0.4 * self.around.machine.matmul_flops / (6 * 3 * 4 * per_layer)
        )
        wanted = defaults.MEASURE_TOKENS_CPU if self.device.type == "cpu" else defaults.MEASURE_TOKENS_CUDA
        longer = int(min(wanted, max(128, affordable))) // 64 * 64
        return longer // 3, longer
