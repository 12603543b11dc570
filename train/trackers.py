"""Outside trackers: Weights & Biases, TensorBoard and trackio, each behind the same three calls.

Why not Accelerate's tracker classes: they log on every process, need Accelerate's global state before the
first line, write TensorBoard's settings as a second run, and pass W&B a step that it drops after a resume.
Called directly, each library needs fewer lines than the wrapper's exceptions. They are imported only here,
only when asked for, and none of them may ask a question or end a training.
"""

from __future__ import annotations

import contextlib
import io
import json
import netrc
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from ..recipes.errors import UserError
from .environment import redact

INSTALL = {"wandb": "wandb", "tensorboard": "tensorboard", "trackio": "trackio"}
TRACKERS = tuple(INSTALL)
WANDB_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")  # the default server, before and after its move


class Tracker(Protocol):
    """What each tracker does; `line` says on the screen where its figures go."""

    name: str
    line: str

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Figures of one step."""
        ...

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The end: the summary, then close."""
        ...

    def state(self) -> dict[str, Any]:
        """What a resume needs to continue the same run."""
        ...


class Trackers:
    """All trackers of a run. A failing one is closed and reported once; training goes on without it."""

    def __init__(self, trackers: Sequence[Tracker], warnings: Sequence[str] = ()) -> None:
        self._trackers = list(trackers)
        self._states = {tracker.name: tracker.state() for tracker in trackers}
        self.warnings = list(warnings)

    @property
    def lines(self) -> list[str]:
        """Where the figures go, one line each, for the screen."""
        return [tracker.line for tracker in self._trackers]

    def log(self, figures: Mapping[str, float], step: int) -> list[str]:
        """Log to all; returns one line for each tracker that failed now."""
        return self._each(lambda tracker: tracker.log(figures, step))

    def finish(self, summary: Mapping[str, Any]) -> list[str]:
        """Close all; returns one line for each tracker that failed now."""
        return self._each(lambda tracker: tracker.finish(summary))

    def state_dict(self) -> dict[str, Any]:
        """Run ids by tracker; a tracker that failed keeps its id, so that a resume continues its run."""
        return dict(self._states)

    def _each(self, call: Callable[[Tracker], None]) -> list[str]:
        failed = []
        for tracker in list(self._trackers):
            try:
                call(tracker)
            except Exception as error:  # whatever a network library raises must not end a training
                self._trackers.remove(tracker)
                reason = str(error).strip().splitlines()
                failed.append(
                    f"{tracker.name} stopped taking figures ({type(error).__name__}: "
                    f"{reason[0] if reason else 'no message'}); the run goes on, metrics.jsonl has them all"
                )
        self.warnings += failed
        return failed


def open_trackers(
    names: Sequence[str],
    *,
    folder: Path,
    project: str,
    run_name: str,
    config: Mapping[str, Any],
    state: Mapping[str, Any] | None = None,
    after_step: int = 0,
) -> Trackers:
    """Start the named trackers; on the first process only.

    `config` is the resolved recipe as plain values; secrets in it are hidden. `state` is what
    `Trackers.state_dict` gave before a resume, `after_step` the step that is resumed from.
    Raises UserError when a library is missing or refuses to start.
    """
    state = state or {}
    config = redact(dict(config))
    warnings: list[str] = []
    opened: list[Tracker] = []
    for name in names:
        try:
            match name:
                case "wandb":
                    opened.append(
                        WandbTracker(folder, project, run_name, config, state.get(name), warnings.append)
                    )
                case "tensorboard":
                    opened.append(TensorBoardTracker(folder, run_name, config, after_step))
                case "trackio":
                    opened.append(TrackioTracker(project, run_name, config, state.get(name)))
                case _:
                    raise UserError(
                        f"track.report_to: {name!r} is not a tracker.   Allowed: {', '.join(TRACKERS)}"
                    )
        except ModuleNotFoundError as error:
            raise UserError(
                f"track.report_to: {name} needs a library that is not installed ({error.name}).   "
                f"Type: pip install {INSTALL[name]}"
            ) from None
        except UserError:
            raise
        except Exception as error:  # the user asked for it, so say now that it does not start
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"track.report_to: {name} did not start: {first}\n"
                "  Train without it: track.report_to=[]   (all figures are in metrics.jsonl anyway)"
            ) from error
    return Trackers(opened, warnings)


class WandbTracker:
    """Weights & Biases. Online only with a key and unless WANDB_MODE says otherwise; it never prompts."""

    name = "wandb"

    def __init__(
        self,
        folder: Path,
        project: str,
        run_name: str,
        config: Mapping[str, Any],
        state: Mapping[str, Any] | None,
        warn: Callable[[str], None],
    ) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")  # settings come too late for what the login prints
        import wandb

        identity = (state or {}).get("id") or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        mode = wandb_mode()

        def begin(mode: str) -> Any:
            return wandb.init(
                project=project,
                name=run_name,
                id=identity,
                resume="allow"
                if mode == "online"
                else None,  # offline runs of one id are joined by `wandb sync`
                dir=os.environ.get("WANDB_DIR") or str(folder),
                config=dict(config),
                mode=mode,
                settings=wandb.Settings(silent=True, console="off", init_timeout=15),
            )

        try:
            self._run = begin(mode)
        except Exception as error:
            if mode != "online":
                raise
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            warn(f"W&B cannot be reached ({first}); logging offline")
            mode = "offline"
            wandb.teardown()  # its service still holds the id of the run that did not start
            self._run = begin(mode)
        # Our own step as the axis: W&B's would refuse the steps that are made again after a resume.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._id = str(self._run.id)
        if mode == "online":
            self.line = f"W&B: {self._run.url}"
        elif mode == "disabled":
            self.line = "W&B: disabled by WANDB_MODE"
        else:
            self.line = f"W&B: offline; send it later with: wandb sync {Path(self._run.dir).parent}"

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Figures of one step."""
        self._run.log({**figures, "step": step})

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The summary as the run's summary, then close."""
        self._run.summary.update({key: value for key, value in summary.items() if value is not None})
        self._run.finish()

    def state(self) -> dict[str, Any]:
        """The run id."""
        return {"id": self._id}


def wandb_mode() -> str:
    """WANDB_MODE if set, else "online" with a key in the environment or .netrc, else "offline"."""
    told = os.environ.get("WANDB_MODE", "").strip().lower()
    if told:
        return {"dryrun": "offline", "run": "online"}.get(told, told)
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return "online"
    told = urlsplit(os.environ.get("WANDB_BASE_URL", "")).netloc
    hosts = (told,) if told else WANDB_HOSTS
    candidates = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    for candidate in filter(None, candidates):
        try:
            keys = netrc.netrc(Path(candidate).expanduser())
            if any(keys.authenticators(host) for host in hosts):
                return "online"
        except (OSError, netrc.NetrcParseError):
            continue  # no such file, or not readable: no key there
    return "offline"


class TensorBoardTracker:
    """TensorBoard event files in RUN/tensorboard."""

    name = "tensorboard"

    def __init__(self, folder: Path, run_name: str, config: Mapping[str, Any], after_step: int) -> None:
        import tensorboard  # noqa: F401 - torch's writer would raise a longer text
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "tensorboard"
        # purge_step hides the steps that a killed process logged after its last checkpoint.
        self._writer: Any = SummaryWriter(str(path), purge_step=after_step + 1 if after_step else None)
        text = json.dumps(config, indent=2, default=str)
        self._writer.add_text(f"recipe/{run_name}", f"```json\n{text}\n```", global_step=after_step)
        self._writer.flush()
        self.line = f"TensorBoard: tensorboard --logdir {path}"

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Figures of one step."""
        for key, value in figures.items():
            self._writer.add_scalar(key, value, global_step=step)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The summary as text, then close."""
        text = json.dumps(dict(summary), indent=2, default=str)
        self._writer.add_text("summary", f"```json\n{text}\n```", global_step=summary.get("steps") or 0)
        self._writer.close()

    def state(self) -> dict[str, Any]:
        """Nothing: the folder is the run."""
        return {}


class TrackioTracker:
    """trackio, local unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL say otherwise."""

    name = "trackio"

    def __init__(
        self, project: str, run_name: str, config: Mapping[str, Any], state: Mapping[str, Any] | None
    ) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a page of instructions
            import trackio

            self._run = trackio.init(
                project=project,
                name=(state or {}).get("name") or run_name,
                config=dict(config),
                resume="allow" if state else "never",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        self._name = str(self._run.name)
        self.line = f"trackio: trackio show --project {project}"

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Figures of one step."""
        self._run.log(dict(figures), step=step)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The summary's figures as a last line, then close."""
        figures = {
            f"summary/{key}": value for key, value in summary.items() if isinstance(value, int | float)
        }
        if figures:
            self._run.log(figures)
        with contextlib.redirect_stdout(io.StringIO()):
            import trackio

            trackio.finish()  # not the run's own: this one also takes it off trackio's list for the exit

    def state(self) -> dict[str, Any]:
        """The run's name, which is trackio's identity."""
        return {"name": self._name}
