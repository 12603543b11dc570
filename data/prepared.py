"""From the recipe's data section to tokenised rows: read, normalise, tokenise, mask, split, and keep in a
cache.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..recipes.errors import UserError
from ..recipes.model_data import DataConfig
from .cache import code_version, default_cache_dir, find_damage, key_of, store
from .formats import Messages
from .gather import Gathered, gather
from .report import PERCENTILES, DataReport
from .rows import TokenRows, make_rows, map_rows, write_rows
from .sources import Input, open_source
from .split import held_out

EVAL_PROMPTS = 64
"""So many held-out conversations are kept as messages, for sample answers."""


@dataclass(frozen=True)
class Prepared:
    """Everything that training and evaluation need from the data."""

    train: TokenRows
    eval: TokenRows
    """May be empty: without two different rows nothing can be held out."""
    eval_prompts: list[Messages]
    """Held-out conversations up to their last assistant turn, at most 64, in an order that depends on content
    only.
    """
    eval_references: list[str]
    """The assistant turn that follows each prompt."""
    report: DataReport


def prepare(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    cache_dir: Path | None = None,
    max_length: int | None = None,
    preferences: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Prepared:
    """Prepare the rows, or take them from the cache.

    `seed` decides the held-out split where `data.seed` does not; `max_length` is the limit where
    `data.max_length` is automatic (None: the longest row). `preferences`: the rows are pairs of answers, for
    dpo. `progress` is called with the number of rows read so far, every few thousand rows.

    Raises:
        UserError: a source, a row (with on_bad_row=error) or the whole cannot be trained on.

    """
    started = time.monotonic()
    seed = seed if data.seed is None else data.seed
    limit = data.max_length if data.max_length is not None else max_length
    train = [open_source(source) for source in data.train]
    held = [open_source(source) for source in data.eval] if isinstance(data.eval, list) else []
    folder = (cache_dir or default_cache_dir()) / _key(
        data, tokenizer, seed, limit, train + held, preferences
    )
    notes = []
    if folder.exists():
        damage = find_damage(folder)
        if damage is None:
            return _load(folder, started)
        notes.append(f"the prepared data in {folder} is damaged ({damage}): built again")
    prepared = _build(data, tokenizer, seed, limit, train, held, preferences, progress)
    report = prepared.report
    try:
        store(folder, lambda aside: _write(prepared, aside))
    except OSError as error:
        # Training can go on from memory; only the next start is slower.
        report.notes += notes
        report.notes.append(f"the prepared data could not be kept in {folder}: {error.strerror or error}")
        report.seconds = time.monotonic() - started
        return prepared
    report.notes += notes
    report.cache_path = str(folder)
    report.seconds = time.monotonic() - started
    weights = prepared.train.weights
    return Prepared(
        train=map_rows(folder, "train", weights),
        eval=map_rows(folder, "eval", prepared.eval.weights),
        eval_prompts=prepared.eval_prompts,
        eval_references=prepared.eval_references,
        report=report,
    )


def _key(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    limit: int | None,
    inputs: list[Input],
    preferences: bool,
) -> str:
    # What only decides the batches, or is another stage's, leaves the rows as they are.
    others = {"packing", "num_workers", "max_length", "seed", "preferences"}
    settings = data.model_dump(mode="json", exclude=others)
    return key_of(
        {
            "content": [source.identity() for source in inputs],
            "tokenizer": tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(tokenizer),
            "special": str(tokenizer.special_tokens_map),
            "template": tokenizer.chat_template,
            "settings": settings,
            "seed": seed,
            "limit": limit,
            "preferences": preferences,
            "code": code_version(),
        }
    )


def _build(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    limit: int | None,
    train: list[Input],
    held: list[Input],
    preferences: bool,
    progress: Callable[[int], None] | None,
) -> Prepared:
    report = DataReport(max_length=limit, pairs=preferences)
    rows = gather(
        train,
        data.train,
        data,
        tokenizer,
        role="train",
        seed=seed,
        limit=limit,
        report=report,
        preferences=preferences,
        progress=progress,
    )
    others: Gathered | None = None
    if isinstance(data.eval, list):
        others = gather(
            held,
            data.eval,
            data,
            tokenizer,
            role="eval",
            seed=seed,
            limit=limit,
            report=report,
            preferences=preferences,
            progress=progress,
        )
        mask = np.zeros(len(rows), dtype=np.bool_)
        shared = int(np.isin(others.hash_array(), rows.hash_array()).sum())
        if shared:
            report.notes.append(
                f"{shared:,} of {len(others):,} evaluation rows are also in the training rows"
            )
    else:
        mask = held_out(rows.hash_array(), data.eval, data.eval_rows)
        if not mask.any():
            report.notes.append(
                "nothing is held out: all training rows "
                + ("have the same prompt" if preferences else "are the same")
            )
    weights = tuple(source.weight for source in data.train)
    train_rows = _rows(rows, ~mask, weights)
    eval_rows = (
        _rows(others, np.ones(len(others), np.bool_), (1.0,)) if others else _rows(rows, mask, weights)
    )
    if not train_rows.trained_counts.any():
        raise UserError(
            "data: no token of any row would be trained.   Look at the rows: shoestring check RECIPE"
        )
    prompts, references = (others or rows).samples(EVAL_PROMPTS, None if others else mask)
    _summarise(report, train_rows, eval_rows)
    return Prepared(train_rows, eval_rows, prompts, references, report)


def _rows(
    gathered: Gathered, chosen: np.ndarray[Any, np.dtype[np.bool_]], weights: tuple[float, ...]
) -> TokenRows:
    indices = np.flatnonzero(chosen)
    return make_rows(
        [gathered.tokens[i] for i in indices],
        [gathered.trained[i] for i in indices],
        [gathered.source[i] for i in indices],
        weights,
        [gathered.second[i] for i in indices] if gathered.second else None,
    )


def _summarise(report: DataReport, train: TokenRows, held: TokenRows) -> None:
    report.train_rows, report.eval_rows = len(train), len(held)
    report.train_tokens, report.eval_tokens = len(train.tokens), len(held.tokens)
    report.trained_tokens = int(train.trained_counts.sum())
    report.truncated_rows = sum(source.truncated.count for source in report.sources)
    lengths = np.percentile(train.lengths, PERCENTILES, method="nearest")
    report.length_percentiles = {str(p): int(length) for p, length in zip(PERCENTILES, lengths, strict=True)}


def _write(prepared: Prepared, folder: Path) -> None:
    write_rows(prepared.train, folder, "train")
    write_rows(prepared.eval, folder, "eval")
    rest = {
        "weights": {"train": prepared.train.weights, "eval": prepared.eval.weights},
        "eval_prompts": prepared.eval_prompts,
        "eval_references": prepared.eval_references,
        "report": prepared.report.to_json(),
    }
    (folder / "prepared.json").write_text(json.dumps(rest, default=str), encoding="utf-8")


def _load(folder: Path, started: float) -> Prepared:
    rest = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
    report = DataReport.from_json(rest["report"])
    report.cache_hit, report.cache_path = True, str(folder)
    report.seconds = time.monotonic() - started
    return Prepared(
        train=map_rows(folder, "train", tuple(rest["weights"]["train"])),
        eval=map_rows(folder, "eval", tuple(rest["weights"]["eval"])),
        eval_prompts=rest["eval_prompts"],
        eval_references=rest["eval_references"],
        report=report,
    )
