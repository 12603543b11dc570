"""A plan on the screen: what it trains, memory by part, the time line, and why."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .offload_writes import size_text
from .plan import Plan
from .refusal import gigabytes

_BAR = 24
_COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "red", "white", "bright_cyan", "bright_green")


def render(plan: Plan) -> RenderableType:
    """The whole plan for `rich.console.Console.print`."""
    parts: list[RenderableType] = [_decisions(plan)]
    for tier in ("device", "host"):
        if plan.memory[tier]:
            parts.append(_memory(plan, tier))
    if not plan.placement.all_on_device:
        parts.append(_placement(plan))
    parts.append(_timeline(plan))
    return Group(*(Padding(part, (0, 0, 1, 0)) for part in parts))


def _decisions(plan: Plan) -> Table:
    share = plan.trained_parameters / max(1, plan.parameters)
    layout = "packed" if plan.packed else "padded"
    micro = f"{plan.micro_rows} rows" if plan.micro_rows else f"{plan.micro_tokens:,} tokens"
    processes = f" on {plan.world_size} processes" if plan.world_size > 1 else ""
    dtype = plan.dtype + (", bfloat16 products" if plan.autocast else "")
    rows = [
        (
            "trains",
            f"{plan.trained_parameters:,} of {plan.parameters:,} parameters ({share:.2%})",
            "",
        ),
        ("device", f"{plan.device}, {plan.machine}", ""),
        ("dtype", dtype, plan.reasons.get("dtype", "")),
        ("rows", layout, plan.reasons.get("packed", "")),
        ("max_length", f"{plan.max_length:,}", plan.reasons.get("max_length", "")),
        ("micro-batch", micro, plan.reasons.get("micro_tokens", "")),
        (
            "step",
            f"{plan.batch_tokens:,} tokens = {plan.accumulation} micro-batch"
            f"{'es' if plan.accumulation > 1 else ''}{processes}",
            plan.reasons.get("batch_tokens", ""),
        ),
        ("learning_rate", f"{plan.learning_rate:.1e}", plan.reasons.get("learning_rate", "")),
        ("weight_decay", f"{plan.weight_decay:g}", plan.reasons.get("weight_decay", "")),
        ("epochs", f"{plan.epochs:.2g}", plan.reasons.get("epochs", "")),
        *(
            (key, "", plan.reasons[key])
            for key in ("pruning", "engine", "filter", "sources", "objective")
            if key in plan.reasons
        ),
        (
            "checkpointing",
            _checkpointing(plan),
            plan.reasons.get("activation_checkpointing", ""),
        ),
        ("snapshots", "in memory" if plan.snapshot_bytes else "off", plan.reasons.get("snapshots", "")),
        ("held out", f"{plan.eval_rows:,} rows", plan.reasons.get("eval_rows", "")),
    ]
    if plan.placement.all_on_device:
        rows += [
            (key, "device", plan.reasons[key])
            for key in ("offload.optimizer", "offload.weights", "offload.activations")
            if key in plan.reasons
        ]
    else:
        rows.append(("disk writes", size_text(plan.disk_writes), plan.reasons.get("disk_writes", "")))
    table = Table("plan for", plan.model, "because", box=box.SIMPLE_HEAD, pad_edge=False)
    for label, value, reason in rows:
        table.add_row(Text(label, style="cyan"), Text(value), Text(reason, style="dim"))
    return table


def _memory(plan: Plan, tier: str) -> Table:
    parts = plan.memory[tier]
    total = parts["total"]
    limit = plan.memory_limits.get(tier, 0)
    table = Table(f"{tier} memory", "", "", box=box.SIMPLE_HEAD, pad_edge=False)
    named = sorted(((size, name) for name, size in parts.items() if name != "total"), reverse=True)
    for (size, name), colour in zip(named, _COLOURS * 2, strict=False):
        bar = "█" * max(1 if size else 0, round(_BAR * size / max(1, total)))
        table.add_row(name, Text(gigabytes(size), justify="right"), Text(bar, style=colour))
    room = f"of {gigabytes(limit)}, {total / limit:.0%}" if limit else ""
    table.add_row(Text("peak", style="bold"), Text(gigabytes(total), style="bold", justify="right"), room)
    return table


def _placement(plan: Plan) -> Table:
    table = Table("lives on", "", "", "because", box=box.SIMPLE_HEAD, pad_edge=False)
    for part, tier, size, why in plan.placement.rows():
        table.add_row(part, tier, Text(size_text(size), justify="right"), Text(why, style="dim"))
    return table


def _timeline(plan: Plan) -> Table:
    table = Table("time", "", "", box=box.SIMPLE_HEAD, pad_edge=False)
    for name, seconds in plan.timeline.items():
        if seconds < 0.05:
            continue
        note = ""
        if name == "training":
            note = (
                f"{plan.steps:,} steps of {plan.step_seconds:.2f} s, {plan.tokens_in_budget:,} tokens "
                f"({plan.epochs:.2f} epochs) at {plan.tokens_per_second:,.0f} tokens/s"
            )
        table.add_row(name, Text(duration(seconds), justify="right"), note)
    money = "" if plan.cost is None else f", {plan.cost:.2f} {plan.currency or ''}".rstrip()
    table.add_row(
        Text("finish", style="bold"),
        Text(duration(plan.finish_seconds), style="bold", justify="right"),
        f"{plan.reasons.get('finish', '')}{money}; writes {size_text(plan.disk_writes or plan.disk_bytes)}",
    )
    return table


def duration(seconds: float) -> str:
    """2 h 05 min, 3 min 20 s, or 4.2 s."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def _checkpointing(plan: Plan) -> str:
    counts = [(plan.recomputed_layers, "layers"), (plan.swapped_layers, "swapped")]
    return ", ".join(f"{count} {what}" for count, what in counts if count) or "off"
