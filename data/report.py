"""What was read, kept and dropped: counted while the rows are prepared, printed by `shoestring check` and a
run.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .raw import RowProblem

EXAMPLES = 5
PERCENTILES = (0, 25, 50, 75, 90, 99, 100)


@dataclass
class Dropped:
    """Rows left out for one reason."""

    count: int = 0
    examples: list[str] = field(default_factory=list)
    """Places of the first few, with what is particular to each."""

    def add(self, where: str, detail: str = "") -> None:
        """Count one row."""
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"{where} ({detail})" if detail else where)


@dataclass
class SourceReport:
    """One source."""

    label: str
    role: str
    """`train` or `eval`."""
    weight: float = 1.0
    format: str = ""
    why: str = ""
    unused_columns: list[str] = field(default_factory=list)
    rows_read: int = 0
    rows_kept: int = 0
    tokens: int = 0
    truncated: Dropped = field(default_factory=Dropped)
    dropped: dict[str, Dropped] = field(default_factory=dict)
    """Reason -> rows."""

    def drop(self, where: str, problem: RowProblem) -> None:
        """Count a row that is left out."""
        self.dropped.setdefault(problem.reason, Dropped()).add(where, problem.detail)

    @property
    def rows_dropped(self) -> int:
        """Rows left out, for whatever reason."""
        return sum(dropped.count for dropped in self.dropped.values())


@dataclass
class DataReport:
    """All sources, and what they became. JSON-able with `to_json`."""

    sources: list[SourceReport] = field(default_factory=list)
    train_rows: int = 0
    eval_rows: int = 0
    train_tokens: int = 0
    eval_tokens: int = 0
    trained_tokens: int = 0
    """Targets of the loss among `train_tokens`."""
    length_percentiles: dict[str, int] = field(default_factory=dict)
    """Of the training rows, in tokens: "50" is the median."""
    max_length: int | None = None
    truncated_rows: int = 0
    pairs: bool = False
    """Whether each row is a pair of answers to one prompt."""
    notes: list[str] = field(default_factory=list)
    """Sentences to print once."""
    cache_hit: bool = False
    cache_path: str | None = None
    seconds: float = 0.0

    @property
    def trained_share(self) -> float:
        """Share of the training tokens that the loss looks at."""
        return self.trained_tokens / self.train_tokens if self.train_tokens else 0.0

    @property
    def rows_read(self) -> int:
        """Rows read from all sources."""
        return sum(source.rows_read for source in self.sources)

    @property
    def rows_dropped(self) -> int:
        """Rows left out of all sources."""
        return sum(source.rows_dropped for source in self.sources)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "DataReport":
        """Back from `to_json`."""
        sources = [
            SourceReport(
                **{
                    **source,
                    "truncated": Dropped(**source["truncated"]),
                    "dropped": {reason: Dropped(**dropped) for reason, dropped in source["dropped"].items()},
                }
            )
            for source in value["sources"]
        ]
        return cls(**{**value, "sources": sources})

    def lines(self) -> list[str]:
        """What a run prints: one line a source, then drops and notes."""
        lines = []
        for source in self.sources:
            weight = f", weight {source.weight:g}" if source.weight != 1 else ""
            lines.append(
                f"{source.role}  {source.label}: {source.rows_kept:,} of {source.rows_read:,} rows{weight}, "
                f"format {source.format} ({source.why})"
            )
            for reason, dropped in source.dropped.items():
                examples = ", ".join(dropped.examples[:3])
                lines.append(f"  {dropped.count:,} of {source.rows_read:,} rows {reason}: {examples}")
            if source.truncated.count:
                where = ", at the start of their prompts" if self.pairs else ""
                lines.append(f"  {source.truncated.count:,} rows cut to {self.max_length} tokens{where}")
        kind = "pairs" if self.pairs else "rows"
        lines.append(
            f"{self.train_rows:,} {kind} to train on, {self.train_tokens:,} tokens, {self.trained_share:.0%} "
            f"of them trained; {self.eval_rows:,} rows held out"
            + ("; from the cache" if self.cache_hit else "")
        )
        return lines + self.notes
