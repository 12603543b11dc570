"""All rows of some sources, read and tokenised a chunk at a time, with every row that is left out counted."""

import heapq
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ..recipes.errors import UserError
from ..recipes.model_data import DataConfig, Source
from .encode import Encoded, RowEncoder
from .formats import Format, Messages, choose_format, normalise
from .preferences import Pair, choose_pair_format, cut_prompt, encode_pairs, normalise_pair
from .raw import RawRow, RowProblem
from .report import DataReport, SourceReport
from .sources import Input
from .split import content_hash

CHUNK_ROWS = 2000
SAMPLE_ROWS = 200
"""So many rows are looked at to find the format."""
KEPT_CONVERSATIONS = 4096
"""Conversations kept as messages while reading: those with the lowest hashes, from which samples are
taken.
"""


Content = Messages | str | Pair


@dataclass
class Gathered:
    """Rows in the order in which they were read; all lists have one entry a row."""

    tokens: list[NDArray[np.int32]] = field(default_factory=list)
    trained: list[NDArray[np.bool_]] = field(default_factory=list)
    source: list[int] = field(default_factory=list)
    second: list[int] = field(default_factory=list)
    """Of pairs; empty for other rows."""
    hashes: list[int] = field(default_factory=list)
    lowest: list[tuple[int, int, Messages]] = field(default_factory=list)
    """A heap of (-hash, -row, messages)."""

    def __len__(self) -> int:
        return len(self.tokens)

    def hash_array(self) -> NDArray[np.uint64]:
        """[rows]"""
        return np.array(self.hashes, dtype=np.uint64)

    def add(self, encoded: Encoded, content: Content, content_hash: int, source: int) -> None:
        """Append one row."""
        if isinstance(content, Pair):
            content = content.prompt + content.chosen
        if not isinstance(content, str):
            entry = (-content_hash, -len(self), content)
            if len(self.lowest) < KEPT_CONVERSATIONS:
                heapq.heappush(self.lowest, entry)
            elif entry > self.lowest[0]:
                heapq.heapreplace(self.lowest, entry)
        self.tokens.append(encoded.tokens)
        self.trained.append(encoded.trained)
        self.source.append(source)
        if encoded.second is not None:
            self.second.append(encoded.second)
        self.hashes.append(content_hash)

    def samples(self, count: int, mask: NDArray[np.bool_] | None) -> tuple[list[Messages], list[str]]:
        """Prompts and the answers that follow, for rows inside the mask, lowest hash first, no content
        twice.
        """
        prompts: list[Messages] = []
        references: list[str] = []
        last = None
        for negative_hash, negative_row, messages in sorted(
            self.lowest, key=lambda entry: (-entry[0], -entry[1])
        ):
            if (
                negative_hash == last
                or (mask is not None and not mask[-negative_row])
                or len(prompts) == count
            ):
                continue
            last = negative_hash
            prompts.append(messages[:-1])
            references.append(messages[-1]["content"])
        return prompts, references


def gather(
    inputs: Sequence[Input],
    sources: Sequence[Source],
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    role: str,
    seed: int,
    limit: int | None,
    report: DataReport,
    preferences: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Gathered:
    """Read and tokenise the sources, as pairs with `preferences`; each adds its SourceReport to
    `report.sources`.

    Raises:
        UserError: bad rows with data.on_bad_row=error, long rows with data.on_long_row=error, no rows at all.

    """
    gathered = Gathered()
    # What stands before both answers has the same probability in both: only the answers can be compared.
    encoder = RowEncoder(tokenizer, assistant_only_loss=data.assistant_only_loss or preferences)
    for number, (given, source) in enumerate(zip(inputs, sources, strict=True)):
        counts = SourceReport(given.label, role, source.weight)
        report.sources.append(counts)
        reading = _Reading(
            data, seed, limit, encoder, counts, gathered, number, preferences, tokenizer.bos_token_id
        )
        for _ in reading.read(given, source):
            if progress is not None:
                progress(report.rows_read)
    if encoder.eos_added:
        report.notes.append(
            f"the chat template puts no special token behind the last turn: {tokenizer.eos_token} is added "
            f"({encoder.eos_added:,} rows)"
        )
    return gathered


@dataclass
class _Reading:
    """One source while it is read."""

    data: DataConfig
    seed: int
    limit: int | None
    encoder: RowEncoder
    counts: SourceReport
    gathered: Gathered
    number: int
    preferences: bool
    bos: int | None
    longest: tuple[int, str] = (0, "")
    too_long: int = 0

    def read(self, given: Input, source: Source) -> Iterator[None]:
        """Take all rows of the source, and yield after every chunk of them."""
        rows = given.rows()
        first = list(itertools.islice(rows, SAMPLE_ROWS))
        if not first:
            raise UserError(f"{given.label}  has no rows: the file is empty")
        sample = [row.value for row in first if row.problem is None and isinstance(row.value, Mapping)]
        chosen = self._format(sample, source, given.label) if sample else None
        for chunk in _chunks(itertools.chain(first, rows)):
            self._take(chunk, chosen)
            yield
        self._complain(given.label)

    def _format(self, sample: list[Mapping[str, Any]], source: Source, label: str) -> Format:
        choose = choose_pair_format if self.preferences else choose_format
        chosen = choose(
            sample,
            format=source.format or self.data.format,
            columns=source.columns or self.data.columns,
            label=label,
        )
        self.counts.format, self.counts.why = chosen.name, chosen.why
        used = set(chosen.columns.values())
        self.counts.unused_columns = sorted({str(key) for row in sample for key in row} - used)
        return chosen

    def _take(self, chunk: Sequence[RawRow], chosen: Format | None) -> None:
        contents: list[Content] = []
        places: list[str] = []
        for row in chunk:
            self.counts.rows_read += 1
            try:
                if row.problem is not None:
                    raise row.problem
                if chosen is None:
                    raise RowProblem("are not objects with columns", type(row.value).__name__)
                content = self._content(row.value, chosen)
            except RowProblem as problem:
                self.counts.drop(row.where, problem)
                continue
            contents.append(content)
            places.append(row.where)
        if self.counts.dropped and self.data.on_bad_row == "error":
            return  # the run will not start: only the rest of the bad rows is still to be counted
        for content, where, encoded in zip(contents, places, self._encode(contents), strict=True):
            self._keep(content, where, encoded)

    def _content(self, value: Any, chosen: Format) -> Content:
        content = normalise_pair(value, chosen) if self.preferences else normalise(value, chosen)
        if self.data.system_prompt and not isinstance(content, str):
            messages = content.prompt if isinstance(content, Pair) else content
            if messages[0]["role"] != "system":
                messages.insert(0, {"role": "system", "content": self.data.system_prompt})
        return content

    def _encode(self, contents: list[Content]) -> list[Encoded | RowProblem]:
        if self.preferences:
            return encode_pairs(self.encoder, [content for content in contents if isinstance(content, Pair)])
        return self.encoder.encode([content for content in contents if not isinstance(content, Pair)])

    def _cut(self, encoded: Encoded, limit: int) -> Encoded | RowProblem:
        """The row within the limit: its end is cut off, or of a pair the beginning of its prompt."""
        detail = f"{encoded.longest} tokens"
        if encoded.second is not None:
            return cut_prompt(encoded, limit, self.bos) or RowProblem(_no_room(limit), detail)
        cut = Encoded(encoded.tokens[:limit].copy(), encoded.trained[:limit].copy())
        return cut if cut.trained.any() else RowProblem(_nothing_left(limit), detail)

    def _keep(self, content: Content, where: str, encoded: Encoded | RowProblem) -> None:
        if isinstance(encoded, RowProblem):
            self.counts.drop(where, encoded)
            return
        length = encoded.longest
        if self.limit is not None and length > self.limit:
            if length > self.longest[0]:
                self.longest = length, where
            self.too_long += 1
            if self.data.on_long_row != "truncate":
                if self.data.on_long_row == "skip":
                    self.counts.drop(where, RowProblem(f"are longer than {self.limit} tokens", f"{length}"))
                return
            encoded = self._cut(encoded, self.limit)
            if isinstance(encoded, RowProblem):
                self.counts.drop(where, encoded)
                return
            self.counts.truncated.add(where, f"{length} tokens")
        if not encoded.trained.any():
            self.counts.drop(where, RowProblem("have no trained token"))
            return
        self.counts.rows_kept += 1
        self.counts.tokens += len(encoded.tokens)
        # By their prompt, so that no prompt is both trained on and held out.
        identity = content.prompt if isinstance(content, Pair) else content
        self.gathered.add(encoded, content, content_hash(identity, self.seed), self.number)

    def _complain(self, label: str) -> None:
        counts = self.counts
        if self.too_long and self.data.on_long_row == "error":
            raise UserError(
                f"{label}  {self.too_long:,} of {counts.rows_read:,} rows are longer than data.max_length="
                f"{self.limit} (longest {self.longest[0]:,}: {self.longest[1]}).\n"
                f"  data.max_length={self.longest[0]}, or data.on_long_row=truncate, or skip"
            )
        limit = self.limit or 0
        expected = f"are longer than {limit} tokens", _nothing_left(limit), _no_room(limit)
        bad = {reason: dropped for reason, dropped in counts.dropped.items() if reason not in expected}
        if not counts.rows_kept and not (bad and self.data.on_bad_row == "error"):
            reasons = "; ".join(f"{dropped.count:,} {reason}" for reason, dropped in counts.dropped.items())
            advice = (
                "  raise data.max_length"
                if counts.dropped.keys() <= set(expected)
                else "  shoestring check RECIPE"
            )
            raise UserError(f"{label}  none of {counts.rows_read:,} rows can be used: {reasons}.\n{advice}")
        if bad and self.data.on_bad_row == "error":
            first = list(bad.items())[:3]
            lines = [
                f"{label}  {dropped.count:,} of {counts.rows_read:,} rows {reason}: "
                + ", ".join(dropped.examples[:3])
                + (", ..." if dropped.count > 3 else "")
                for reason, dropped in first
            ]
            more = f"  ({len(bad) - 3} more reasons)" if len(bad) > 3 else ""
            raise UserError("\n".join(lines) + f"\n  Skip them with data.on_bad_row=skip{more}")


def _nothing_left(limit: int) -> str:
    return f"have no trained token within the first {limit}"


def _no_room(limit: int) -> str:
    return f"have answers that leave no room for a prompt within {limit} tokens"


def _chunks(rows: Iterator[RawRow]) -> Iterator[list[RawRow]]:
    while chunk := list(itertools.islice(rows, CHUNK_ROWS)):
        yield chunk
