"""The teacher of distillation: another model, run in every step, or run once and kept on disk.

`online` holds the teacher beside the student and runs it on each batch. `stored` runs it once over all rows,
keeps the top_k likeliest tokens of each trained position (`teacher_store.py`), and lets it go: later runs
with the same rows do not load it at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..data import Batch, TokenRows, collate
from ..models import ModelFacts, load_model, read_facts, use_packed_attention
from ..models.source import KEY
from ..ops import TopTokens, top_tokens
from ..ops.autocast import computing_dtype
from ..ops.distillation import TeacherPart
from ..recipes import DistillObjective, ModelConfig
from ..recipes.errors import UserError
from .supervised import base_model, head_is_plain, trained_hidden, trained_logits
from .teacher_store import Store, fill, open_store


class Teacher(Protocol):
    """What the loss needs of a teacher."""

    def collate(self, rows: TokenRows, indices: Sequence[int], *, packed: bool) -> Batch:
        """A batch of the rows, with what `at` needs of them."""

    def at(self, batch: Batch) -> TeacherPart:
        """Of a slice of the batch's targets: the teacher's logits, or its likeliest tokens."""


class OnlineTeacher:
    """A frozen model that is asked in every step."""

    def __init__(self, model: nn.Module, *, top_k: int | None, temperature: float) -> None:
        """`model` on the student's device; it is made to stay as it is."""
        self.model = model.requires_grad_(False).eval()
        self._top_k, self._temperature = top_k, temperature
        self._plain = head_is_plain(model)

    def collate(self, rows: TokenRows, indices: Sequence[int], *, packed: bool) -> Batch:
        """A batch as for any text."""
        return collate(rows, indices, packed=packed)

    @torch.no_grad()
    def at(self, batch: Batch) -> TeacherPart:
        """Runs the backbone now; a plain head scores only the slices that are asked for."""
        if self._plain:
            score = _linear_head(self.model, trained_hidden(self.model, batch))
        else:
            score = trained_logits(self.model, batch).__getitem__

        def part(chosen: slice) -> Tensor | TopTokens:
            logits = score(chosen)
            return logits if self._top_k is None else top_tokens(logits, self._top_k, self._temperature)

        return part


def _linear_head(model: nn.Module, hidden: Tensor) -> Callable[[slice], Tensor]:
    """Logits of a slice of the positions, in the type that holds where the backbone ran."""
    head = base_model(model).get_output_embeddings()
    dtype = computing_dtype(hidden)
    rows, weight = hidden.to(dtype), head.weight.to(dtype)

    def logits(chosen: slice) -> Tensor:
        scores: Tensor = rows[chosen] @ weight.t()
        return scores if head.bias is None else scores + head.bias

    return logits


class StoredTeacher:
    """Answers from the files; the model is not in memory."""

    def __init__(self, store: Store) -> None:
        self.store = store

    @cached_property
    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {name: self.store.map(name) for name in ("indices", "log_probs", "log_rest")}

    def __getstate__(self) -> dict[str, Any]:
        """Maps are opened anew in another process."""
        return {"store": self.store}

    def collate(self, rows: TokenRows, indices: Sequence[int], *, packed: bool) -> Batch:
        """A batch of the rows, with the teacher's tokens for its targets."""
        batch = collate(rows, indices, packed=packed)
        pieces = {name: [array[:0]] for name, array in self._arrays.items()}
        for index in indices:
            start = int(self.store.starts[self.store.place(*rows.row(index))])
            stop = start + int(rows.trained_counts[index])
            for name, array in self._arrays.items():
                pieces[name].append(array[start:stop])
        whole = {name: np.concatenate(parts) for name, parts in pieces.items()}
        batch.extra["teacher_indices"] = torch.from_numpy(whole["indices"].astype(np.int64))
        batch.extra["teacher_log_probs"] = torch.from_numpy(whole["log_probs"].astype(np.float32))
        batch.extra["teacher_log_rest"] = torch.from_numpy(whole["log_rest"].astype(np.float32))
        return batch

    def at(self, batch: Batch) -> TeacherPart:
        """What `collate` put into the batch, with probabilities that sum to one: float16 has rounded them."""
        log_probs, log_rest = batch.extra["teacher_log_probs"], batch.extra["teacher_log_rest"]
        total = torch.cat([log_probs, log_rest[:, None]], dim=1).logsumexp(dim=1)
        return TopTokens(
            batch.extra["teacher_indices"], log_probs - total[:, None], log_rest - total
        ).__getitem__


def open_teacher(
    config: DistillObjective,
    student: ModelFacts,
    model: ModelConfig,
    rows: Sequence[TokenRows],
    *,
    device: torch.device,
    dtype: torch.dtype,
    packed: bool,
    micro_tokens: int,
    cache_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> OnlineTeacher | StoredTeacher:
    """The teacher of a recipe, ready to be asked about `rows` (training and held-out rows).

    student, model: the facts and the recipe's section of the student. For stored logits the teacher runs
    over what is not on disk yet, in micro-batches of `micro_tokens`, and is freed; progress(done, all) counts
    rows.

    Raises:
        UserError: the teacher is not found, has another vocabulary, or there is no room for its logits.

    """
    given = ModelConfig(model_name_or_path=config.teacher, trust_remote_code=model.trust_remote_code)
    try:
        facts = read_facts(given)
    except UserError as error:
        raise UserError(str(error).replace(KEY, "objective.teacher")) from error
    _check(config, facts, student)

    def load() -> nn.Module:
        loaded = load_model(facts, given, device=device, dtype=dtype)
        if packed:
            _pack(config, loaded)
        return loaded

    if config.teacher_logits == "online":
        return OnlineTeacher(load(), top_k=config.top_k, temperature=config.temperature)
    if config.top_k is None:
        raise UserError(
            "objective.teacher_logits: stored needs objective.top_k, since all logits of all positions do "
            "not fit on disk.\n  objective.top_k=64, or objective.teacher_logits=online"
        )
    store = open_store(
        rows,
        teacher=f"{facts.fingerprint} {dtype}",
        vocabulary=facts.vocab_size,
        top_k=config.top_k,
        temperature=config.temperature,
        cache_dir=cache_dir,
    )
    if store.missing():
        asked = OnlineTeacher(load(), top_k=config.top_k, temperature=config.temperature)
        fill(store, asked, device=device, packed=packed, micro_tokens=micro_tokens, progress=progress)
    return StoredTeacher(store)


def _check(config: DistillObjective, teacher: ModelFacts, student: ModelFacts) -> None:
    if teacher.vocab_size != student.vocab_size:
        raise UserError(
            f"objective.teacher: {config.teacher} has {teacher.vocab_size:,} tokens in its vocabulary, and "
            f"the student {student.source} has {student.vocab_size:,}; they must be the same.\n"
            "  Choose a teacher of the student's family, or objective=sft on the teacher's answers"
        )
    if config.top_k is not None and config.top_k > teacher.vocab_size:
        raise UserError(
            f"objective.top_k: {config.top_k} is more than the {teacher.vocab_size:,} tokens of the "
            "vocabulary.\n  Leave it out to compare all tokens, or objective.top_k=64"
        )


def _pack(config: DistillObjective, model: Any) -> None:
    if not use_packed_attention(model):
        raise UserError(
            f"objective.teacher: {config.teacher} cannot take several rows in one sequence, as the student "
            "does.\n  data.packing=false"
        )
