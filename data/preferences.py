"""Pairs of answers to one prompt: from a row's columns to one row of tokens.

A pair is written as two conversations, prompt with chosen and prompt with rejected answer, one after the
other in one row. Only the answers are scored.

Columns `chosen` and `rejected` hold an answer (text, or a list of messages that begins with the assistant)
to the column `prompt` (text or a list of messages), or whole conversations: their common beginning is the
prompt then, and a column `prompt` beside them, which many files have, says nothing new.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..recipes.errors import UserError
from ..recipes.model_data import Columns, DataFormat
from .encode import Encoded, RowEncoder
from .formats import Format, Messages, check_columns, columns_of, messages_of, text_of, usual_columns
from .raw import RowProblem

_PARTS = {"prompt", "chosen", "rejected", "system"}
_EXAMPLE = "data.columns={prompt: ..., chosen: ..., rejected: ...}"


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt. `prompt` ends where the assistant begins."""

    prompt: Messages
    chosen: Messages
    rejected: Messages

    def conversations(self) -> tuple[Messages, Messages]:
        """Both in full; the prompt's own assistant turns carry no loss."""
        prompt = [m | {"weight": 0} if m["role"] == "assistant" else m for m in self.prompt]
        return prompt + self.chosen, prompt + self.rejected


def choose_pair_format(
    sample: Sequence[Mapping[str, Any]], *, format: DataFormat | None, columns: Columns | None, label: str
) -> Format:
    """Which columns of a source hold the pairs: those that the recipe names, or the usual ones.

    Raises:
        UserError: another format is asked for, or a column does not exist; the columns that do are listed.

    """
    if format not in (None, "preference"):
        raise UserError(
            f"{label}  data.format={format} holds no pairs of answers, which dpo trains on.\n"
            "  data.format=preference, or leave it out; or objective=sft"
        )
    present = columns_of(sample)
    named = {part: name for part, name in columns.model_dump().items() if name} if columns else {}
    if odd := sorted(named.keys() - _PARTS):
        raise UserError(
            f"{label}  data.columns names {', '.join(odd)}, which a pair of answers does not have.\n"
            f"  {_EXAMPLE}; to train on single answers: objective=sft"
        )
    found = usual_columns("preference", present) | named
    both = (found["chosen"], found["rejected"])
    if not named and not set(both) <= set(present):
        shown = ", ".join(repr(name[:40]) for name in present[:12]) or "none"
        raise UserError(
            f"{label}  has the columns {shown}; dpo trains on pairs of answers: chosen and rejected.\n"
            f"  Name yours: {_EXAMPLE}; to train on single answers: objective=sft"
        )
    count = sum(all(row.get(name) is not None for name in both) for row in sample)
    why = f"`{both[0]}` and `{both[1]}` in {count} of the first {len(sample)} rows"
    chosen = Format("preference", found, "data.columns says so" if named else why)
    check_columns(chosen, present, label, _EXAMPLE.removeprefix("data.columns="))
    return chosen


def normalise_pair(row: Any, format: Format) -> Pair:
    """One row as a pair.

    Raises:
        RowProblem: with the reason that the row is counted under.

    """
    if not isinstance(row, Mapping):
        raise RowProblem("are not objects with columns", f"{type(row).__name__}")
    columns = format.columns
    chosen, rejected = (_side(row, columns[part]) for part in ("chosen", "rejected"))
    whole = [side[0]["role"] != "assistant" for side in (chosen, rejected)]
    if whole[0] != whole[1]:
        raise RowProblem("have a whole conversation on one side and an answer on the other")
    if all(whole):
        prompt, chosen, rejected = _common_beginning(chosen, rejected)
    else:
        prompt = _prompt(row, columns)
    system = row.get(columns["system"]) if "system" in columns else None
    if isinstance(system, str) and system.strip() and prompt[0]["role"] != "system":
        prompt.insert(0, {"role": "system", "content": system})
    if chosen == rejected:
        raise RowProblem(f"have the same `{columns['chosen']}` and `{columns['rejected']}`")
    return Pair(prompt, chosen, rejected)


def _side(row: Mapping[str, Any], column: str) -> Messages:
    value = row.get(column)
    if value is None:
        raise RowProblem(f"have no `{column}`")
    if not isinstance(value, list):
        return [{"role": "assistant", "content": text_of(row, column)}]
    messages = messages_of(value, column)
    while messages and messages[-1]["role"] != "assistant":  # they carry no loss
        messages.pop()
    if not messages:
        raise RowProblem(f"have no assistant turn in `{column}`")
    return messages


def _prompt(row: Mapping[str, Any], columns: Mapping[str, str]) -> Messages:
    if "prompt" not in columns:
        raise RowProblem("have answers and no prompt before them")
    column = columns["prompt"]
    value = row.get(column)
    if not isinstance(value, list):
        return [{"role": "user", "content": text_of(row, column)}]
    messages = messages_of(value, column)
    if not messages or messages[-1]["role"] == "assistant":
        raise RowProblem(f"have a `{column}` that does not end before the assistant's turn")
    return messages


def _common_beginning(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """(prompt, chosen answer, rejected answer) of two whole conversations."""
    shorter = min(len(chosen), len(rejected)) - 1
    same = next((k for k in range(shorter) if chosen[k] != rejected[k]), shorter)
    if not same or any(side[same]["role"] != "assistant" for side in (chosen, rejected)):
        raise RowProblem("have prompts that differ")
    return chosen[:same], chosen[same:], rejected[same:]


def encode_pairs(encoder: RowEncoder, pairs: Sequence[Pair]) -> list[Encoded | RowProblem]:
    """Tokens and mask of each pair, with `second` where the rejected conversation starts."""
    conversations = [conversation for pair in pairs for conversation in pair.conversations()]
    encoded = encoder.encode(conversations)
    return [_join(*encoded[k : k + 2]) for k in range(0, len(encoded), 2)]


def _join(chosen: Encoded | RowProblem, rejected: Encoded | RowProblem) -> Encoded | RowProblem:
    for side in (chosen, rejected):
        if isinstance(side, RowProblem):
            return side
        if not side.trained.any():
            return RowProblem("have an answer without a token")
    assert isinstance(chosen, Encoded)
    assert isinstance(rejected, Encoded)
    if np.array_equal(chosen.tokens, rejected.tokens):
        return RowProblem("have a chosen and a rejected answer of the same tokens")
    return Encoded(
        np.concatenate([chosen.tokens, rejected.tokens]),
        np.concatenate([chosen.trained, rejected.trained]),
        second=len(chosen.tokens),
    )


def cut_prompt(pair: Encoded, limit: int, bos: int | None) -> Encoded | None:
    """The pair with at most `limit` tokens in each conversation: whole answers, the prompt cut at the left.

    Both conversations keep the same end of the prompt. A token that begins every text (`bos`) stays. None
    when the longer answer leaves no room for a token of the prompt.
    """
    assert pair.second is not None
    sides = [
        (pair.tokens[part], pair.trained[part]) for part in (slice(pair.second), slice(pair.second, None))
    ]
    prompts = [int(np.argmax(trained)) for _, trained in sides]
    room = limit - max(len(tokens) - prompt for (tokens, _), prompt in zip(sides, prompts, strict=True))
    if room < 1:
        return None
    kept: list[tuple[Any, Any]] = []
    for (tokens, trained), prompt in zip(sides, prompts, strict=True):
        first = int(tokens[0] == bos and room > 1)
        gone = slice(first, max(first, prompt - room + first))
        kept.append((np.delete(tokens, gone), np.delete(trained, gone)))
    return Encoded(
        np.concatenate([tokens for tokens, _ in kept]),
        np.concatenate([trained for _, trained in kept]),
        second=len(kept[0][0]),
    )
