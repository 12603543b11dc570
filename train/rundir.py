"""The run directory: its paths, its small JSON files, and a lock so that only one process trains in it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, Protocol

from ..checkpoint.whole import step_of
from ..recipes.errors import UserError

# What a run writes, and therefore what `clear` may delete. Nothing else in the directory is ever touched.
FILES = (
    "recipe.yaml",
    "resolved.yaml",
    "plan.json",
    "plan-dpo.json",
    "stages.json",
    "legs.json",
    "budget.yaml",
    "paused.json",
    "environment.json",
    "metrics.jsonl",
    "events.jsonl",
    "summary.json",
    "samples.json",
    "report.html",
    "pruned",
    "best",
    "final",
    "final.part",
    "tensorboard",
    "trackio",
    "wandb",
)
CHECKPOINT = "checkpoint-"
_UNFINISHED = re.compile(r"\.[\w.-]+\.tmp\d+|(final|export-\w+)\.part")


class ResolvedText(Protocol):
    """What `recipes.load.Resolved` offers here: the user's text and the resolved one."""

    @property
    def text(self) -> str:
        """The recipe as the user wrote it."""
        ...

    def to_yaml(self) -> str:
        """Every value with its origin as a trailing comment."""
        ...


class RunDir:
    """One run's directory. Creating the object makes the directory; paths are attributes.

    Raises UserError when the path is a file or cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(
                f"output_dir      {self.path} is a file, not a folder.\n"
                "                Choose another one: output_dir=runs/NAME"
            ) from None
        except OSError as error:
            raise UserError(
                f"output_dir      {self.path} cannot be made: {error.strerror}.\n"
                "                Choose a folder that you may write to: output_dir=runs/NAME"
            ) from None
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise UserError(
                f"output_dir      {self.path} is not writable for this user.\n"
                "                Choose a folder that you may write to: output_dir=runs/NAME"
            )
        self.recipe = self.path / "recipe.yaml"
        self.resolved = self.path / "resolved.yaml"
        self.plan = self.path / "plan.json"
        self.stages = self.path / "stages.json"
        self.legs = self.path / "legs.json"
        self.budget = self.path / "budget.yaml"
        self.paused = self.path / "paused.json"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.jsonl"
        self.events = self.path / "events.jsonl"
        self.summary = self.path / "summary.json"
        self.samples = self.path / "samples.json"
        self.report = self.path / "report.html"
        self.best = self.path / "best"
        self.final = self.path / "final"

    @property
    def name(self) -> str:
        """The run's name: the last part of its path."""
        return self.path.resolve().name

    def write_recipe(self, resolved: ResolvedText) -> None:
        """recipe.yaml as the user wrote it, and resolved.yaml with every value and where it came from."""
        write_text(self.recipe, resolved.text)
        write_text(self.resolved, resolved.to_yaml())

    def plan_of(self, stage: str | None) -> Path:
        """plan.json of a run's first stage (None), plan-dpo.json of the stage `dpo`."""
        return self.plan if stage is None else self.path / f"plan-{stage}.json"

    def write_plan(self, plan: Any, stage: str | None = None) -> None:
        """The plan of a stage, see `plan_of`; `plan` is a dataclass or a mapping."""
        write_json(self.plan_of(stage), plan)

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """environment.json; see `environment.describe_environment`."""
        write_json(self.environment, environment)

    def write_samples(self, samples: Mapping[str, Any]) -> None:
        """samples.json: {"before": [{"prompt", "reference", "answer"}], "after": [...]}."""
        write_json(self.samples, samples)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the directory for this process; the lock goes with the process, so a kill leaves none behind.

        Raises UserError naming the process that holds it.
        """
        path = self.path / ".lock"
        try:
            descriptor = open_plain(path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise UserError(
                f"output_dir      {path} cannot be used as the lock of this run: {error.strerror}.\n"
                "                Remove it, or choose another folder: output_dir=runs/NAME"
            ) from None
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(descriptor, 64).decode(errors="replace").strip() or "unknown"
                raise UserError(
                    f"output_dir      {self.path} is in use: process {holder} trains into it.\n"
                    f"                Wait for it, end it with `kill {holder}` (it saves first),\n"
                    "                or choose another folder: output_dir=runs/NAME"
                ) from None
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def holds_run(self) -> bool:
        """True when an earlier start has left something to resume or to refuse here."""
        return self.resolved.exists() or any(self.path.glob(f"{CHECKPOINT}*"))

    def finished_legs(self) -> int:
        """How many of its budgets the run has landed; 0 where it has not finished yet."""
        if not self.summary.is_file():
            return 0
        try:
            return int(json.loads(self.summary.read_text(encoding="utf-8")).get("legs") or 1)
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
            return 1  # a damaged summary is still one of a finished run

    def leftovers(self) -> list[Path]:
        """What a killed process left half-written here: temporary files and folders, by their names."""
        return sorted(path for path in self.path.iterdir() if _UNFINISHED.fullmatch(path.name))

    def remove_leftovers(self) -> list[Path]:
        """Delete the leftovers and return what was deleted. Call it with the lock held."""
        found = self.leftovers()
        for path in found:
            _delete(path)
        return found

    def clear(self) -> None:
        """Delete what an earlier run wrote (`--fresh`) and nothing else. Call with the lock held."""
        steps = [path for path in self.path.glob(f"{CHECKPOINT}*") if step_of(path.name) is not None]
        numbered = [*steps, *self.path.glob("summary-[0-9]*.json")]
        for path in [self.path / name for name in FILES] + numbered:
            _delete(path)
        self.remove_leftovers()

    def model_writer(
        self,
        model: Any,
        tokenizer: Any,
        writable: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
        streamed: Any = None,
    ) -> Callable[[Path], None]:
        """The `copy` of `checkpoint.save`: writes the adapter, or the whole model, and the tokenizer.

        writable: entered while the model is written, `NativeEngine.writable`. streamed: holds weights of the
        model that are not in memory.
        """

        def write(folder: Path) -> None:
            with writable():
                if hasattr(model, "peft_config"):
                    from ..adapters import save_adapter

                    save_adapter(model, folder)
                elif streamed is not None:
                    from ..offload.streamed_saving import save_streamed

                    save_streamed(streamed, folder)
                else:
                    model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

        return write


def write_json(path: Path, value: Any) -> None:
    """A dataclass or JSON-able value as indented JSON, whole or not at all; NaN and infinity become null."""
    plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    text = json.dumps(finite(plain), indent=2, ensure_ascii=False, allow_nan=False, default=str)
    write_text(path, text + "\n")


def write_text(path: Path, text: str) -> None:
    """Written aside, fsynced and renamed, so that a reader or a kill never meets half a file."""
    aside = path.with_name(f".{path.name}.tmp{os.getpid()}")
    aside.unlink(missing_ok=True)  # of a killed process of the same number, or a link laid here by another
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with open(open_plain(aside, flags), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def open_plain(path: Path, flags: int) -> int:
    """A descriptor of a regular file; OSError for a link, and for what would let a reader or writer wait."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no plain file", str(path))
    return descriptor


@contextlib.contextmanager
def kept(path: Path) -> Iterator[str]:
    """The text of a file that a run keeps. UserError when it, or what the block makes of it, is not right."""
    try:
        if not path.is_file():  # reading a pipe would wait for its writer, a device may have no end
            raise ValueError("no plain file")
        yield path.read_text(encoding="utf-8")
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        words = (str(error).splitlines() or [""])[0][:200]
        raise UserError(
            f"{path}: is damaged, or of another version ({type(error).__name__}: {words}).\n"
            "  Copy it back from where the run came from, or start again with --fresh"
        ) from error


def finite(value: Any) -> Any:
    """`value` with NaN and infinities as None, since JSON has no word for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
