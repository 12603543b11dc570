"""What a report knows about a run: the files of its directory, read without any of our other code's help."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..recipes.errors import UserError
from ..recipes.yaml_text import parse
from .tracking import read_jsonl

MOST_METRICS = 4000  # more records than pixels only cost time
BUDGETS = ("time", "cost", "energy", "tokens", "steps", "epochs")
KINDS = ("load", "data", "teacher", "train", "eval", "samples", "save", "export", "report", "other")


@dataclass
class RunData:
    """One run as its files tell it. What is missing is empty; an unfinished run has figures so far."""

    path: Path
    metrics: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, Any] = field(default_factory=dict)
    legs: list[dict[str, Any]] = field(default_factory=list)
    """Extensions, from legs.json."""
    landed: list[dict[str, Any]] = field(default_factory=list)
    """Summaries of the legs that an extension followed."""
    resolved: str = ""

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.path.resolve().name

    @property
    def model(self) -> str:
        """The base model as the recipe names it."""
        return str(self.recipe.get("model.model_name_or_path") or self.recipe.get("model") or "")

    @property
    def device(self) -> str:
        """The GPUs, or the CPU and its cores, by name."""
        devices = self.environment.get("devices") or []
        names = [str(device.get("name")) for device in devices if isinstance(device, Mapping)]
        if names:
            return f"{len(names)} × {names[0]}" if len(names) > 1 else names[0]
        cpu, cores = self.environment.get("cpu"), self.environment.get("cores")
        return f"{cpu}, {cores} cores" if cpu and cores else str(cpu or "")

    @property
    def started(self) -> str:
        """Date and time of the start."""
        return str(self.environment.get("started") or "")[:16].replace("T", " ")

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """resolved.yaml as flat dotted keys."""
        try:
            loaded = parse(self.resolved, "resolved.yaml").values
        except UserError:
            return {}
        return flat(loaded) if isinstance(loaded, dict) else {}

    @cached_property
    def state(self) -> tuple[str, str]:
        """("done" | "stopped" | "diverged" | "running", one line for the reader)."""
        marks = [
            event for event in self.events if event.get("event") in ("start", "resume", "stop", "diverged")
        ]
        last = marks[-1] if marks else {}
        if last.get("event") == "diverged":
            return "diverged", f"diverged at step {last.get('step')}: {last.get('where') or 'not finite'}"
        reopened = last.get("event") in ("start", "resume") and any(
            mark.get("event") == "stop" for mark in marks
        )
        reason = last.get("reason") or last.get("stop_reason") or self.summary.get("stop_reason")
        if self.summary and not reopened:
            if reason in BUDGETS:
                return "done", f"done, {reason} budget used"
            return "done", f"done: {reason}" if reason else "done"
        if last.get("event") == "stop":
            return "stopped", f"stopped: {reason}" if reason else "stopped"
        return "running", "not finished when this was written"

    @property
    def finished(self) -> bool:
        """True when summary.json belongs to the last start."""
        return self.state[0] == "done"

    @cached_property
    def evals(self) -> list[dict[str, Any]]:
        """Held-out evaluations in order, without those of steps that a resume made again."""
        found: list[dict[str, Any]] = []
        first = next((event.get("stage") for event in self.events if event.get("event") == "eval"), None)
        for event in self.events:
            if event.get("event") == "eval" and event.get("stage") != first:
                continue  # another loss
            step = event.get("step") or 0
            if event.get("event") == "resume":
                found = [point for point in found if point["step"] <= step]
            loss = event.get("loss", event.get("eval_loss"))
            if event.get("event") == "eval" and isinstance(loss, int | float):
                found = [point for point in found if point["step"] != step]
                found.append({"step": step, "seconds": event.get("seconds") or 0.0, "loss": loss})
        return found

    def figure(self, name: str) -> Any:
        """A figure of summary.json, or what the logs say about it so far; None when nothing does."""
        if self.finished and self.summary.get(name) is not None:
            return self.summary[name]
        last = self.metrics[-1] if self.metrics else {}
        match name:
            case "seconds":
                return max(
                    (record.get("seconds") or 0.0 for record in (*self.events[-1:], last)), default=None
                )
            case "steps":
                return last.get("step")
            case "tokens":
                return last.get("tokens")
            case "final_progress":
                return last.get("progress")
            case "eval_loss_before":
                return self.evals[0]["loss"] if self.evals and self.evals[0]["step"] == 0 else None
            case "eval_loss":
                return self.evals[-1]["loss"] if self.evals else None
            case "train_loss":
                return last.get("loss")
            case "peak_host_bytes" | "peak_device_bytes":
                key = name.removeprefix("peak_")
                return max((record[key] for record in self.metrics if record.get(key)), default=None)
            case "predicted_host_bytes" | "predicted_device_bytes":
                tier = name.removeprefix("predicted_").removesuffix("_bytes")
                return sum(self.memory_parts(tier).values()) or None
            case "tokens_per_second":
                training = self.time_by_kind.get("train") or 0.0
                return last["tokens"] / training if training and last.get("tokens") else None
        return None

    def memory_parts(self, tier: str) -> dict[str, float]:
        """The plan's predicted bytes of a tier ("host", "device") by part, without the total."""
        parts = (self.plan.get("memory") or {}).get(tier) or {}
        return {
            name: float(size)
            for name, size in parts.items()
            if name not in ("total", "limit", "available") and isinstance(size, int | float) and size > 0
        }

    def memory_limit(self, tier: str) -> float | None:
        """Bytes of a tier that the plan could use."""
        limit = (self.plan.get("memory_limits") or {}).get(tier)
        return float(limit) if isinstance(limit, int | float) and limit > 0 else None

    @cached_property
    def time_by_kind(self) -> dict[str, float]:
        """Seconds by what they went into.

        Timed events count as they say. Training is the sum over log lines of tokens since the line before
        divided by the tokens per second of that line. What neither explains is "other".
        """
        spent = dict.fromkeys(KINDS, 0.0)
        for event in self.events:
            kind, duration = event.get("kind"), event.get("duration")
            if kind in spent and isinstance(duration, int | float):
                spent[kind] += duration
        total = self.figure("seconds") if not self.finished else self.summary.get("seconds")
        if not spent["train"]:
            before = 0
            for record in self.metrics:
                rate, tokens = record.get("tokens_per_second"), record.get("tokens")
                if rate and tokens:
                    spent["train"] += max(0, tokens - before) / rate
                    before = tokens
        if total:
            others = sum(spent.values()) - spent["train"]
            spent["train"] = min(spent["train"], max(0.0, total - others))
            spent["other"] = max(0.0, total - sum(spent.values()))
        return {kind: seconds for kind, seconds in spent.items() if seconds >= 0.05}

    @property
    def marks(self) -> list[tuple[float, str]]:
        """(seconds, word) where an extension or a stage began."""
        found = []
        for event in self.events:
            if event.get("event") == "extend":
                found.append((float(event.get("seconds") or 0.0), str(event.get("rule"))))
            elif event.get("event") == "stage":
                found.append((float(event.get("seconds") or 0.0), str(event.get("text")).split(" ")[0]))
        return found

    @property
    def stage_evals(self) -> dict[str, list[dict[str, Any]]]:
        """Evaluations of the stages after the first, by stage: all metrics, with step and seconds."""
        first = next((e.get("stage") for e in self.events if e.get("event") == "eval"), None)
        found: dict[str, list[dict[str, Any]]] = {}
        for event in self.events:
            if event.get("event") == "eval" and event.get("stage") not in (None, first):
                found.setdefault(str(event["stage"]), []).append(event)
        return found

    @property
    def warnings(self) -> list[dict[str, Any]]:
        """Warning events."""
        return [event for event in self.events if event.get("event") == "warning"]


def read_run(path: Path) -> RunData:
    """The run in `path`. Raises UserError when there is nothing of a run in it."""
    path = Path(path)
    run = RunData(
        path=path,
        metrics=read_jsonl(path / "metrics.jsonl", at_most=MOST_METRICS),
        events=read_jsonl(path / "events.jsonl"),
        summary=_object(path / "summary.json"),
        plan=_object(path / "plan.json"),
        environment=_object(path / "environment.json"),
        samples=_object(path / "samples.json"),
        legs=_list(path / "legs.json"),
        landed=[_object(file) for file in sorted(path.glob("summary-[0-9]*.json"))],
        resolved=_text(path / "resolved.yaml"),
    )
    if not (run.metrics or run.events or run.summary or run.plan):
        raise UserError(
            f"{path} holds no run: there is no metrics.jsonl, events.jsonl, summary.json or plan.json.\n"
            "  Give the directory that `shoestring train` wrote to, for example runs/NAME."
        )
    return run


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    found: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            found |= flat(item, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = item
    return found


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _list(path: Path) -> list[dict[str, Any]]:
    """A JSON list of objects; a missing or torn file is an empty one."""
    try:
        value = json.loads(_text(path) or "[]")
    except (ValueError, RecursionError):
        return []
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; a missing or torn file is an empty one: a killed run has a report, too."""
    try:
        value = json.loads(_text(path) or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
