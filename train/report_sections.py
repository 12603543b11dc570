"""The upper part of a report: headline figures, curves, samples, memory by part, where the time went."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .figures import bytes_text, count_text, duration_text, energy_text, number_text, share_text
from .report_charts import Series, legend, line_chart, plain_bar, smooth, stacked_bar
from .report_data import RunData
from .report_html import Html, el, join, section, swatch, table

TIERS = ("device", "host")
CHARTS = (
    # title, field of metrics.jsonl, how it is written, smoothed
    ("Learning rate", "learning_rate", "number", False),
    ("Progress through the budget", "progress", "share", False),
    ("Throughput, tokens per second", "tokens_per_second", "count", True),
    ("Gradient norm", "grad_norm", "number", True),
)


def header(runs: Sequence[RunData]) -> Html:
    """Name, state, and one line on what was trained."""
    if len(runs) > 1:
        names = " · ".join(run.name for run in runs)
        return el("header", el("h1", f"{len(runs)} runs side by side"), el("p", names))
    run = runs[0]
    kind, line = run.state
    about = " · ".join(part for part in (run.model, _trained(run), run.device, run.started) if part)
    return el("header", el("h1", run.name), el("span", line, cls=f"badge {kind}"), el("p", about))


def warnings(runs: Sequence[RunData]) -> Html:
    """Each warning once."""
    texts = dict.fromkeys(
        (f"{run.name}: " if len(runs) > 1 else "")
        + str(event.get("text") or event.get("message") or "warning")
        for run in runs
        for event in run.warnings
    )
    return join(el("div", text, cls="warning") for text in texts)


def headline(run: RunData) -> Html:
    """The figures that one looks at first."""
    cards = []
    if run.figure("eval_loss") is not None:
        cards.append(_loss_card(run.figure("eval_loss_before"), run.figure("eval_loss")))
    elif run.figure("train_loss") is not None:
        cards.append(_card("training loss", number_text(run.figure("train_loss")), "of the last step"))
    cards.append(_card("time", duration_text(run.figure("seconds")), _of_budget(run)))
    steps = run.figure("steps")
    cards.append(
        _card("tokens", count_text(run.figure("tokens")), f"in {count_text(steps)} steps" if steps else "")
    )
    rate = run.figure("tokens_per_second")
    if rate:
        cards.append(_card("speed", f"{count_text(rate)}/s", "tokens while training"))
    for tier in TIERS:
        peak, predicted = run.figure(f"peak_{tier}_bytes"), run.figure(f"predicted_{tier}_bytes")
        if peak:
            beside = f"peak, predicted {bytes_text(predicted)}" if predicted else "peak"
            cards.append(_card(f"{tier} memory", bytes_text(peak), beside))
    if run.figure("energy_joules") is not None:
        source = run.figure("energy_source") or "measured"
        cards.append(_card("energy", energy_text(run.figure("energy_joules")), source))
    if run.figure("cost") is not None:
        cards.append(_card("cost", f"{run.figure('cost'):.2f}", "by the price given"))
    return el("div", *cards, cls="cards")


def comparison(runs: Sequence[RunData]) -> Html:
    """One row a run; the best held-out loss is marked."""
    columns: list[tuple[str, Callable[[RunData], str]]] = [
        ("held-out loss", lambda run: number_text(run.figure("eval_loss"))),
        ("before", lambda run: number_text(run.figure("eval_loss_before"))),
        ("time", lambda run: duration_text(run.figure("seconds"))),
        ("tokens", lambda run: count_text(run.figure("tokens"))),
        ("tokens/s", lambda run: count_text(run.figure("tokens_per_second"))),
        ("device peak", lambda run: bytes_text(run.figure("peak_device_bytes"))),
        ("host peak", lambda run: bytes_text(run.figure("peak_host_bytes"))),
        ("energy", lambda run: energy_text(run.figure("energy_joules"))),
        ("cost", lambda run: number_text(run.figure("cost"))),
        ("state", lambda run: run.state[1]),
    ]
    losses = [run.figure("eval_loss") for run in runs]
    best = min((loss for loss in losses if loss is not None), default=None)
    cells = [[write(run) for _, write in columns] for run in runs]
    shown = [index for index in range(len(columns)) if any(row[index] != "–" for row in cells)]
    rows = []
    for number, (run, row) in enumerate(zip(runs, cells, strict=True)):
        won = best is not None and losses[number] == best
        figures = [el("td", row[at], cls="figure best" if won and at == 0 else "figure") for at in shown]
        rows.append([join([swatch(number), run.name]), *figures])
    return el("div", table(rows, ["run", *(columns[at][0] for at in shown)]), cls="panel scroll")


def curves(runs: Sequence[RunData]) -> Html:
    """All charts, over wall-clock time."""
    several = len(runs) > 1
    marks = [] if several else runs[0].marks
    charts = [line_chart("Loss", _loss_series(runs), wide=True, note="over wall-clock time", marks=marks)]
    for title, key, kind, smoothed in CHARTS:
        shown = _series(runs, key, smoothed)
        charts.append(line_chart(title, shown, kind=kind, zero=True, marks=marks))
    memory = [
        Series(
            f"{run.name}, {tier}" if several else tier,
            *_points(run, f"{tier}_bytes"),
            number if several else 4 * place,
        )
        for number, run in enumerate(runs)
        for place, tier in enumerate(TIERS)
    ]
    charts.append(line_chart("Memory", memory, kind="bytes", zero=True))
    charts.append(line_chart("Power", _series(runs, "watts", True), kind="watts", zero=True))
    return section("Curves", [chart for chart in charts if chart], cls="charts") if any(charts) else Html()


def samples(runs: Sequence[RunData]) -> Html:
    """Answers before, and after in each run, under their prompt."""
    count = max((len(run.samples.get(side) or []) for run in runs for side in ("before", "after")), default=0)
    panels = []
    for index in range(count):
        columns = [("before", _sample(runs[0], "before", index))]
        for run in runs:
            columns.append((f"after, {run.name}" if len(runs) > 1 else "after", _sample(run, "after", index)))
        known: Mapping[str, Any] = next((sample for _, sample in columns if sample), {})
        answers = [el("div", el("h4", name), _answer(sample)) for name, sample in columns if sample]
        asked = [el("h4", "asked"), el("p", str(known.get("prompt", "")))]
        if known.get("reference"):
            asked += [el("h4", "the answer in the data"), el("p", str(known["reference"]))]
        panels.append(
            el("div", el("div", *asked, cls="prompt"), el("div", *answers, cls="answers"), cls="panel sample")
        )
    return section("Sample answers", panels)


def memory(runs: Sequence[RunData]) -> Html:
    """Predicted parts as a stacked bar above the measured peak, for each tier."""
    panels = []
    for tier in TIERS:
        for run in runs:
            parts, peak = run.memory_parts(tier), run.figure(f"peak_{tier}_bytes") or 0.0
            if not parts and not peak:
                continue
            predicted = sum(parts.values())
            whole = max(predicted, peak)
            rows: list[Html] = []
            if parts:
                bar = stacked_bar(parts, bytes_text, whole)
                rows += [el("span", "predicted"), bar, el("b", bytes_text(predicted))]
            if peak:
                off = f" ({100 * (peak - predicted) / predicted:+.0f} %)" if predicted else ""
                bar = plain_bar(peak / whole, "--c:var(--soft)")
                rows += [el("span", "measured peak"), bar, el("b", bytes_text(peak) + off)]
            limit = run.memory_limit(tier)
            title = f"{tier} memory" + (f", {run.name}" if len(runs) > 1 else "")
            title += f", {bytes_text(limit)} available" if limit else ""
            keys = legend(parts, bytes_text) if parts else Html()
            panels.append(el("div", el("h3", title), el("div", *rows, cls="rows"), keys, cls="panel"))
    return section("Memory by part", panels)


def time_spent(runs: Sequence[RunData]) -> Html:
    """Where the time went, and what of each budget was used."""
    panels = []
    for run in runs:
        title = [el("h3", run.name)] if len(runs) > 1 else []
        spent = run.time_by_kind
        if spent:
            bar = stacked_bar(spent, duration_text)
            panels.append(el("div", *title, bar, legend(spent, duration_text), cls="panel"))
        used = (run.summary.get("budget") or {}) if run.finished else {}
        rows = join(_budget_row(name, limit) for name, limit in used.items())
        if rows:
            panels.append(el("div", el("h3", "Budget used"), el("div", rows, cls="rows"), cls="panel"))
    return section("Where the time went", panels)


def _loss_series(runs: Sequence[RunData]) -> list[Series]:
    found = []
    for number, run in enumerate(runs):
        xs, ys = _points(run, "loss")
        held = [point["seconds"] for point in run.evals], [point["loss"] for point in run.evals]
        if len(runs) > 1:
            found.append(Series(run.name, xs, smooth(ys), number))
            found.append(Series(f"{run.name}, held out", *held, number, "dots"))
        else:
            found.append(Series("each step", xs, ys, 0, "raw"))
            found.append(Series("training, smoothed", xs, smooth(ys), 0))
            found.append(Series("held out", *held, 1, "dots"))
    return found


def _series(runs: Sequence[RunData], key: str, smoothed: bool) -> list[Series]:
    found = []
    for number, run in enumerate(runs):
        xs, ys = _points(run, key)
        if smoothed and len(runs) == 1:
            found.append(Series("each step", xs, ys, number, "raw"))
        name = run.name if len(runs) > 1 else "smoothed" if smoothed else key.replace("_", " ")
        found.append(Series(name, xs, smooth(ys) if smoothed else ys, number))
    return found


def _points(run: RunData, key: str) -> tuple[list[float], list[float]]:
    rows = [
        (record["seconds"], record[key])
        for record in run.metrics
        if isinstance(record.get(key), int | float) and isinstance(record.get("seconds"), int | float)
    ]
    return [x for x, _ in rows], [y for _, y in rows]


def _trained(run: RunData) -> str:
    trained, total = run.plan.get("trained_parameters"), run.plan.get("parameters")
    if not trained or not total:
        return ""
    return f"{count_text(trained)} of {count_text(total)} parameters trained ({share_text(trained / total)})"


def _card(label: str, figure: str, note: str) -> Html:
    return el("div", el("span", label), el("b", figure), el("small", note), cls="card")


def _loss_card(before: float | None, after: float) -> Html:
    parts = [number_text(after)]
    notes = []
    if before:
        parts = [number_text(before), el("span", "→", cls="arrow"), *parts]
        share = (after - before) / before
        notes = [el("small", f"{100 * share:+.0f} %", cls="down" if share <= 0 else "up")]
    return el("div", el("span", "held-out loss"), el("b", *parts), *notes, cls="card first")


def _of_budget(run: RunData) -> str:
    for name, limit in ((run.summary.get("budget") or {}) if run.finished else {}).items():
        if name in ("time", "seconds") and limit.get("given"):
            return f"of {duration_text(limit['given'])} ({100 * limit['used'] / limit['given']:.1f} %)"
    progress = run.figure("final_progress")
    return f"{share_text(progress)} of the budget" if progress is not None else ""


def _budget_row(name: str, limit: Mapping[str, Any]) -> Html:
    given, used = limit.get("given"), limit.get("used")
    if not isinstance(given, int | float) or not isinstance(used, int | float) or not given:
        return Html()
    write: Callable[[float], str] = {
        "time": duration_text, "seconds": duration_text, "energy": energy_text, "joules": energy_text,
        "tokens": count_text, "steps": count_text,
    }.get(name, number_text)  # fmt: skip
    bar = plain_bar(used / given, "--c:var(--c0)", "bar thin")
    return join([el("span", name), bar, el("b", f"{write(used)} of {write(given)}")])


def _sample(run: RunData, side: str, index: int) -> Mapping[str, Any] | None:
    rows = run.samples.get(side) or []
    return rows[index] if index < len(rows) and isinstance(rows[index], dict) else None


def _answer(sample: Mapping[str, Any]) -> Html:
    text = str(sample.get("answer") or "").strip()
    return el("p", text) if text else el("p", "(no text)", cls="empty")
