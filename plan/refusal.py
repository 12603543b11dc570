"""What a person reads when a run does not fit: needed and available, by part, and what to change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..recipes.errors import BudgetError, in_columns
from .memory import Footprint, Parts

MAX_LINES = 4


@dataclass(frozen=True)
class Change:
    """A change of the recipe, planned anew. slower: share of time per token added; negative is quicker.

    same: whether the very same thing is trained, as where only state is moved.
    """

    text: str
    needed: int
    slower: float
    fits: bool
    same: bool = False


@dataclass(frozen=True)
class Shortage:
    """The tier that overflows: "GPU" or "host", what it needs by part and what there is."""

    tier: str
    parts: Parts
    limit: int
    source: str

    @property
    def needed(self) -> int:
        """Bytes needed."""
        return sum(self.parts.values())


def shortage_of(
    needed: Footprint, *, host: int, device: int, host_source: str, device_source: str
) -> Shortage:
    """Which limit is broken, the device's first."""
    if device and needed.device_total > device:
        return Shortage("GPU", needed.device, device, device_source)
    return Shortage("host", needed.host, host, host_source)


def does_not_fit(shortage: Shortage, changes: Sequence[Change], together: Change | None) -> BudgetError:
    """The refusal. `changes` in order of preference; `together`: several, when none alone is enough."""
    rows = [
        (
            "does not fit",
            f"needs {gigabytes(shortage.needed)} of {gigabytes(shortage.limit)} {shortage.tier} memory "
            f"({shortage.source}): {parts_text(shortage.parts)}",
        )
    ]
    enough = sorted((c for c in changes if c.fits), key=lambda c: c.slower)
    if enough:
        shown = enough[: MAX_LINES - 1]
        if not any(change.same for change in shown):
            shown += [change for change in enough if change.same][:1]
        rows.append(("", f"cheapest change: {_line(shown[0])}"))
        rows += [("", f"or: {_line(change)}") for change in shown[1:]]
    elif together is not None and together.fits:
        rows.append(("", f"no single change is enough; together: {_line(together)}"))
    else:
        smallest = min([*changes, *([together] if together else [])], key=lambda c: c.needed, default=None)
        if smallest is not None:
            rows.append(("", f"not even: {_line(smallest)}"))
        rows.append(("", "Take a smaller model (model.model_name_or_path), or a machine with more memory."))
    return BudgetError(in_columns(rows))


def disk_too_small(
    needed: int,
    free: int,
    *,
    checkpoint: int,
    kept: int,
    final: int,
    stored: int,
    folder: str,
    scratch: int = 0,
) -> BudgetError:
    """The refusal of a run whose files do not fit the disk.

    stored: logits of a teacher. scratch: files of offload.
    """
    logits = f", the teacher's logits {gigabytes(stored)}" if stored else ""
    logits += f", scratch files {gigabytes(scratch)}" if scratch else ""
    fewer = "a smaller objective.top_k, " if stored else ""
    fewer += "offload.disk_path on another disk, " if scratch else ""
    return BudgetError(
        in_columns(
            [
                (
                    "does not fit",
                    f"needs {gigabytes(needed)} of {gigabytes(free)} disk at {folder}: {kept} checkpoints of "
                    f"{gigabytes(checkpoint)}, final model {gigabytes(final)}{logits}",
                ),
                (
                    "",
                    f"cheapest change: {fewer}checkpoint.keep=1, export.final=adapter, or output_dir on "
                    "another disk",
                ),
            ]
        )
    )


def gigabytes(size: float) -> str:
    """12.3 GB, or 0.45 GB below one, and kB where GB would say zero."""
    if 0 < size < 5e6:
        return f"{size / 1e3:.0f} kB"
    return f"{size / 1e9:.1f} GB" if size >= 9.95e9 else f"{size / 1e9:.2f} GB"


def parts_text(parts: Parts) -> str:
    """Parts from large to small, in GB; those below a hundredth of the whole are left out."""
    total = sum(parts.values())
    shown = sorted(((size, name) for name, size in parts.items() if size > total / 100), reverse=True)
    return ", ".join(f"{name} {gigabytes(size).removesuffix(' GB')}" for size, name in shown)


def _line(change: Change) -> str:
    speed = "as quick" if abs(change.slower) < 0.015 else f"{abs(change.slower):.0%} "
    if abs(change.slower) >= 0.015:
        speed += "slower" if change.slower > 0 else "quicker"
    return f"{change.text}  -> {gigabytes(change.needed)}, {speed}"
