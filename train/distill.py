"""Distillation: learning from a teacher's distribution over the next token (arXiv:1503.02531, section 2).

    loss = alpha T^2 KL(teacher || student, both at temperature T) + (1 - alpha) cross entropy of the data

summed over the trained positions. Where the teacher's distribution comes from is `teacher.py`'s affair.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..data import Batch
from ..ops import distillation_sums
from .supervised import base_model, head_is_plain, trained_hidden, trained_logits

if TYPE_CHECKING:
    from ..recipes import DistillObjective
    from .teacher import Teacher


def distillation_loss(
    model: nn.Module, config: DistillObjective, teacher: Teacher
) -> Callable[[nn.Module, Batch], tuple[Tensor, dict[str, Tensor]]]:
    """The loss of a batch, its sum over trained positions, and the sums of its two terms without weights."""
    plain = head_is_plain(model)

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        target = teacher.at(batch)
        head = base_model(model).get_output_embeddings() if plain else None
        total, divergence, cross_entropy = distillation_sums(
            trained_logits(model, batch) if head is None else trained_hidden(model, batch),
            None if head is None else head.weight,
            batch.labels,
            target,
            alpha=config.alpha,
            temperature=config.temperature,
            bias=None if head is None else head.bias,
        )
        return total, {"kl": divergence, "cross_entropy": cross_entropy}

    return loss


def distillation_metrics(
    loss_sum: float, trained_tokens: int, *, kl: float = 0.0, cross_entropy: float = 0.0
) -> dict[str, float]:
    """Means per trained token in nats: the loss, the divergence from the teacher, the data's cross entropy.

    `perplexity` is that of the data.
    """
    count = max(trained_tokens, 1)
    hard = cross_entropy / count
    return {
        "loss": loss_sum / count,
        "kl": kl / count,
        "cross_entropy": hard,
        "perplexity": math.exp(min(hard, 700.0)),
    }
