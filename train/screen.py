"""What a person sees while a run goes: what will happen, a live bar, and what came out.

On a terminal a bar with two lines; elsewhere (a pipe, CI, NO_COLOR) plain lines, one about every 5 % of the
budget or 30 seconds. Text of models and data is shown as text: neither markup nor control codes in it act.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from .figures import bytes_text, clock_text, count_text, duration_text, energy_text, number_text, share_text
from .quiet import quiet_libraries as quiet_libraries

PLAIN_SHARE = 0.05
PLAIN_SECONDS = 30.0
CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Headline:
    """What will happen, said before anything is spent."""

    model: str
    trained_parameters: int
    parameters: int
    data: str  # for example "812 rows, 154 k tokens, 61 % trained"
    budget: str  # for example "3 min" or "20 USD at 2.49 USD/h"
    tokens: int | None  # tokens the budget buys
    finish_seconds: float | None  # until the last file is written
    device: str
    memory: Mapping[str, tuple[float, float | None]]  # "host" -> (predicted bytes, limit in bytes)
    output_dir: str
    more: Sequence[tuple[str, str]] = ()

    def rows(self) -> list[tuple[str, str]]:
        """(label, text) for the block above the bar."""
        share = self.trained_parameters / self.parameters if self.parameters else 0.0
        finish = "" if self.finish_seconds is None else f", finishes about {clock_text(self.finish_seconds)}"
        tokens = "" if self.tokens is None else f" buys about {count_text(self.tokens)} tokens"
        memory = ", ".join(
            f"{tier} {bytes_text(need)}" + (f" of {bytes_text(limit)}" if limit else "")
            for tier, (need, limit) in self.memory.items()
        )
        parameters = f"{count_text(self.trained_parameters)} of {count_text(self.parameters)} parameters"
        return [
            ("model", self.model),
            ("trains", f"{parameters} ({share_text(share)})"),
            ("data", self.data),
            ("budget", f"{self.budget}{tokens}{finish}"),
            ("device", self.device),
            ("memory", f"{memory} predicted"),
            *self.more,
            ("writes to", self.output_dir),
        ]


class Screen:
    """All output of a training run. With `active` False (every process but the first) it says nothing.

    Order of calls: `start` once, `status` for what takes long before and after the steps, `step` after each
    step, `note` and `warn` at any time, `finish` once. `close` ends the live part early (an error, a signal)
    and may be called twice.
    """

    def __init__(
        self, console: Console | None = None, *, active: bool = True, plain: bool | None = None
    ) -> None:
        self.console = console or Console(highlight=False)
        self.active = active
        if plain is None:
            plain = not self.console.is_terminal or bool(os.environ.get("CI") or os.environ.get("NO_COLOR"))
        self.plain = plain
        self._live: Live | None = None
        self._said: set[str] = set()
        self._loss: float | None = None
        self._line_at: tuple[int, float] = (-1, -math.inf)  # twentieths done and time of the last plain line
        self._status = ""
        self._record: dict[str, Any] = {}

    def start(self, plan: Headline | Sequence[tuple[str, str]], title: str = "shoestring") -> None:
        """The block that says what will happen: a Headline, or (label, text) rows."""
        rows = plan.rows() if isinstance(plan, Headline) else list(plan)
        if not self.active:
            return
        if self.plain:
            width = max((len(label) for label, _ in rows), default=0)
            self._print(title, *(f"  {label:<{width}}  {clean(text)}" for label, text in rows))
            return
        table = Table.grid(padding=(0, 2))
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for label, text in rows:
            table.add_row(label, Text(clean(text)))
        self.console.print(Text(title, style="bold"), Padding(table, (0, 0, 1, 2)))

    def status(self, text: str) -> None:
        """What is going on now, where no step counts yet: loading, the first evaluation, exporting."""
        if not self.active:
            return
        self._status = clean(text)
        if self.plain:
            self._print(f"{self._status} ...")
        else:
            self._show(at_once=True)

    def step(self, record: Mapping[str, Any]) -> None:
        """A step is done. Uses of `record`: progress, step, loss, learning_rate, tokens_per_second,
        host_bytes, device_bytes, watts, and finish_in (seconds until the run has landed).

        The loss shown is an exponential mean of about twenty steps.
        """
        if not self.active:
            return
        self._status = ""
        self._record = dict(record)
        loss = record.get("loss")
        if loss is not None:
            self._loss = loss if self._loss is None else 0.9 * self._loss + 0.1 * loss
        if not self.plain:
            self._show()
            return
        progress, now = float(record.get("progress") or 0.0), time.monotonic()
        last_share, last_time = self._line_at
        share = math.floor(progress / PLAIN_SHARE + 1e-6)  # 0.15 must count as three times 0.05
        if share > last_share or now - last_time >= PLAIN_SECONDS:
            self._line_at = (share, now)
            left, finish = self._finish()
            ending = [f"{left} left, ends {finish}"] if left else []
            self._print("  ".join([f"{progress:4.0%}", *self._figures(), *ending]))

    def note(self, text: str) -> None:
        """One line of news, above the bar."""
        if self.active:
            self._print(clean(text))

    def warn(self, text: str) -> None:
        """One warning; the same text is said once."""
        if not self.active or text in self._said:
            return
        self._said.add(text)
        if self.plain:
            self._print(f"warning: {clean(text)}")
        else:
            self.console.print(Text.assemble(("warning ", "bold yellow"), clean(text)))

    def finish(
        self,
        summary: Any,
        samples: Mapping[str, Sequence[Mapping[str, str]]] | None = None,
        *,
        report: Path | None = None,
    ) -> None:
        """The result: held-out loss before and after, sample answers side by side, and where everything lies.

        `summary` is a Summary or a mapping with its fields; `samples` has the layout of samples.json.
        """
        self.close()
        if not self.active:
            return
        figures: Mapping[str, Any] = summary if isinstance(summary, Mapping) else vars(summary)
        pairs = sample_pairs(samples or {})[:3]
        if self.plain:
            for pair in pairs:
                for label, key in (("asked", "prompt"), ("before", "before"), ("after", "after")):
                    self._print(f"  {label:<7} " + _short(pair[key]).replace("\n", "\n" + " " * 10))
                self._print("")
            self._print(*(f"{label:<14} {text}" for label, text in result_rows(figures, report)))
            return
        if pairs:
            self.console.print(_sample_table(pairs))
        table = Table.grid(padding=(0, 2))
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for label, text in result_rows(figures, report):
            table.add_row(label, Text(text, style="bold" if label == "held-out loss" else ""))
        self.console.print(Rule("done", style="green", align="left"), Padding(table, (0, 0, 0, 2)))

    def close(self) -> None:
        """End the live bar; nothing is lost above it."""
        if self._live is not None:
            self._live.update(Text(""), refresh=True)
            self._live.stop()
            self._live = None

    def _print(self, *lines: str) -> None:
        for line in lines:
            self.console.print(Text(line), soft_wrap=True)

    def _show(self, at_once: bool = False) -> None:
        if self._live is None:
            self._live = Live(console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        self._live.update(self._bar(), refresh=at_once)

    def _bar(self) -> Any:
        if not self._record:
            return Spinner("dots", Text(self._status))
        progress = float(self._record.get("progress") or 0.0)
        left, finish = self._finish()
        top = Table.grid(padding=(0, 1))
        top.add_row(
            ProgressBar(total=1.0, completed=progress, width=min(40, max(10, self.console.width - 42))),
            Text(f"{progress:4.0%}", style="bold"),
            Text(f"{left} left, ends {finish}" if left else ""),
        )
        figures = Text("  ".join(self._figures()), style="dim", no_wrap=True, overflow="ellipsis")
        status = [Spinner("dots", Text(self._status))] if self._status else []
        return Group(top, figures, *status)

    def _figures(self) -> list[str]:
        record = self._record
        shown = [f"step {record.get('step', '–')}"]
        if self._loss is not None:
            shown.append(f"loss {self._loss:.3f}")
        if record.get("learning_rate") is not None:
            shown.append(f"rate {number_text(record['learning_rate'])}")
        if record.get("tokens_per_second") is not None:
            shown.append(f"{count_text(record['tokens_per_second'])} tok/s")
        memory = [bytes_text(record[key]) for key in ("device_bytes", "host_bytes") if record.get(key)]
        if memory:
            shown.append(" + ".join(memory))
        if record.get("watts") is not None:
            shown.append(f"{record['watts']:.0f} W")
        return shown

    def _finish(self) -> tuple[str, str]:
        seconds = self._record.get("finish_in")
        return (
            ("", "") if seconds is None else (duration_text(max(0.0, seconds)), clock_text(max(0.0, seconds)))
        )


def result_rows(figures: Mapping[str, Any], report: Path | None) -> list[tuple[str, str]]:
    """(label, text) of the final block, from summary.json's fields; what was not measured is left out."""
    rows = []
    before, after = figures.get("eval_loss_before"), figures.get("eval_loss")
    if after is not None:
        rows.append(
            ("held-out loss", f"{before:.4f} -> {after:.4f}" if before is not None else f"{after:.4f}")
        )
    used = []
    if figures.get("tokens") is not None:
        used.append(f"{count_text(figures['tokens'])} tokens in {count_text(figures.get('steps'))} steps")
    if figures.get("seconds") is not None:
        used.append(duration_text(figures["seconds"]))
    if figures.get("energy_joules") is not None:
        used.append(energy_text(figures["energy_joules"]))
    if figures.get("cost") is not None:
        used.append(f"cost {figures['cost']:.2f}")
    if used:
        rows.append(("used", ", ".join(used)))
    for tier in ("device", "host"):
        peak, predicted = figures.get(f"peak_{tier}_bytes"), figures.get(f"predicted_{tier}_bytes")
        if peak:
            beside = f" (predicted {bytes_text(predicted)})" if predicted else ""
            rows.append((f"{tier} memory", f"{bytes_text(peak)}{beside}"))
    if figures.get("stop_reason"):
        rows.append(("stopped by", str(figures["stop_reason"])))
    if report is not None:
        rows.append(("report", str(report)))
    if figures.get("final_path"):
        rows.append(("model", str(figures["final_path"])))
    return rows


def sample_pairs(samples: Mapping[str, Sequence[Mapping[str, str]]]) -> list[dict[str, str]]:
    """samples.json as rows of prompt, before, after; either side may be missing."""
    before, after = list(samples.get("before", ())), list(samples.get("after", ()))
    pairs = []
    for index in range(max(len(before), len(after))):
        first = before[index] if index < len(before) else {}
        second = after[index] if index < len(after) else {}
        prompt = first.get("prompt") or second.get("prompt") or ""
        pairs.append(
            {
                "prompt": clean(prompt),
                "before": clean(first.get("answer", "")),
                "after": clean(second.get("answer", "")),
            }
        )
    return pairs


def clean(text: str) -> str:
    """`text` without terminal control codes: a model must not move the cursor."""
    return CONTROL.sub("", text)


def _sample_table(pairs: Sequence[Mapping[str, str]]) -> Table:
    table = Table(
        title="sample answers", title_justify="left", title_style="bold", show_lines=True, expand=True
    )
    for name, ratio in (("asked", 2), ("before", 3), ("after", 3)):
        table.add_column(name, ratio=ratio, overflow="fold", header_style="cyan")
    for pair in pairs:
        table.add_row(Text(_short(pair["prompt"])), Text(_short(pair["before"])), Text(_short(pair["after"])))
    return table


def _short(text: str, most: int = 400) -> str:
    return text if len(text) <= most else text[: most - 2].rstrip() + " …"
