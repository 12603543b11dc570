"""How `shoestring check` shows the data: what each source gave, what was dropped and why, and rows as they
are trained.
"""

import itertools

import numpy as np
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from .prepared import Prepared
from .report import DataReport
from .rows import TokenRows

MAX_SHOWN_TOKENS = 400
"""Of a run of tokens of one kind; the middle of a longer one is left out."""


def describe(prepared: Prepared, tokenizer: PreTrainedTokenizerBase, samples: int = 3) -> RenderableType:
    """Tables of sources and drops, the share of trained tokens, and some rows token for token."""
    report = prepared.report
    parts: list[RenderableType] = [_sources(report)]
    if any(source.dropped or source.truncated.count for source in report.sources):
        parts.append(_dropped(report))
    parts.append(_totals(report))
    for index in spread(len(prepared.train), samples):
        parts.append(sample_panel(prepared.train, index, tokenizer))
    return Group(*parts)


def spread(count: int, samples: int) -> list[int]:
    """Up to `samples` numbers evenly over range(count), the first included."""
    return sorted({int(number) for number in np.linspace(0, count - 1, min(samples, count))})


def _sources(report: DataReport) -> Table:
    table = Table(title="data", title_justify="left", expand=False)
    for name in ("source", "use", "format"):
        table.add_column(name)
    for name in ("rows", "kept", "tokens", "weight"):
        table.add_column(name, justify="right")
    for source in report.sources:
        found = f"{source.format}\n[dim]{source.why}[/dim]"
        if source.unused_columns:
            found += f"\n[dim]not used: {', '.join(source.unused_columns[:8])}[/dim]"
        table.add_row(
            Text(source.label),
            source.role,
            Text.from_markup(found),
            f"{source.rows_read:,}",
            f"{source.rows_kept:,}",
            f"{source.tokens:,}",
            f"{source.weight:g}",
        )
    return table


def _dropped(report: DataReport) -> Table:
    table = Table(title="rows dropped or cut", title_justify="left", expand=False)
    table.add_column("rows", justify="right")
    table.add_column("why")
    table.add_column("for example")
    for source in report.sources:
        for reason, dropped in source.dropped.items():
            table.add_row(f"{dropped.count:,}", Text(reason), Text(", ".join(dropped.examples[:3])))
        if source.truncated.count:
            cut = source.truncated
            table.add_row(
                f"{cut.count:,}", f"are cut to {report.max_length} tokens", Text(", ".join(cut.examples[:3]))
            )
    return table


def _totals(report: DataReport) -> Text:
    lengths = report.length_percentiles
    text = Text()
    kind = "pairs of answers" if report.pairs else "rows"
    text.append(f"{report.train_rows:,} {kind} to train on, {report.eval_rows:,} held out; ")
    text.append(f"{report.train_tokens:,} tokens, ")
    text.append(f"{report.trained_share:.1%} of them trained", style="bold green")
    text.append("\nlengths in tokens: ")
    text.append(
        ", ".join(f"{_PERCENTILE_NAMES.get(p, p + ' %')} {length:,}" for p, length in lengths.items())
    )
    text.append(f"\n{'from the cache' if report.cache_hit else 'prepared'} in {report.seconds:.1f} s")
    for note in report.notes:
        text.append(f"\n{note}", style="yellow")
    return text


_PERCENTILE_NAMES = {"0": "shortest", "50": "median", "100": "longest"}


def sample_panel(rows: TokenRows, index: int, tokenizer: PreTrainedTokenizerBase) -> Panel:
    """One row: each run of tokens beside a word that says whether it is trained, readable without colours
    too. Of a pair both answers, and the prompt once.
    """
    grid = Table.grid(padding=(0, 1))
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column()
    sequences = rows.sequences(index)
    for (tokens, trained), (word, colour) in zip(
        sequences, _ANSWERS if len(sequences) > 1 else _TRAINED, strict=False
    ):
        edges = [0, *(np.flatnonzero(np.diff(trained.astype(np.int8))) + 1).tolist(), len(tokens)]
        for start, end in itertools.pairwise(edges):
            if word == "rejected" and start == 0:
                continue
            style = f"bold {colour}" if trained[start] else "dim"
            shown = _decode(tokenizer, tokens[start:end].tolist())
            grid.add_row(
                Text(f"{word if trained[start] else 'context'} {end - start}", style=style),
                Text(shown.replace("\n", "⏎\n").rstrip("\n"), style=style),
            )
    count = int(rows.trained_counts[index])
    kind = "pair" if len(sequences) > 1 else "row"
    title = f"{kind} {index + 1:,}: {rows.lengths[index]:,} tokens, {count:,} trained"
    return Panel(grid, title=title, title_align="left")


_TRAINED = (("trained", "green"),)
_ANSWERS = (("chosen", "green"), ("rejected", "red"))


def _decode(tokenizer: PreTrainedTokenizerBase, run: list[int]) -> str:
    half = MAX_SHOWN_TOKENS // 2
    if len(run) <= 2 * half:
        return str(tokenizer.decode(run))
    middle = f" [... {len(run) - 2 * half:,} tokens ...] "
    return f"{tokenizer.decode(run[:half])}{middle}{tokenizer.decode(run[-half:])}"
