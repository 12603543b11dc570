"""environment.json: the software and hardware of a run, without anything secret."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

LIBRARIES = (
    "shoestring", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "tokenizers",
    "bitsandbytes", "triton", "deepspeed", "pydantic", "numpy", "gguf", "wandb", "tensorboard", "trackio",
)  # fmt: skip

# Only these variables are recorded: they change results or speed, and none of them is a secret.
VARIABLES = (
    "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU", "CI", "CUDA_VISIBLE_DEVICES",
    "CUBLAS_WORKSPACE_CONFIG",
    "HF_DATASETS_OFFLINE", "HF_HOME", "HF_HUB_OFFLINE", "KMP_AFFINITY", "MKL_NUM_THREADS", "OMP_NUM_THREADS",
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TOKENIZERS_PARALLELISM", "TRANSFORMERS_OFFLINE",
    "WANDB_MODE", "WORLD_SIZE",
)  # fmt: skip

SECRET_NAME = re.compile(
    r"(api[_-]?key|access[_-]?key|private[_-]?key|auth|secret|password|passwd|credentials?|token)$",
    re.IGNORECASE,
)
# A tokenizer's special tokens are words, not credentials.
PUBLIC_NAME = re.compile(r"(^|[._-])(bos|eos|pad|unk|sep|cls|mask|image|end_of_turn)_token$", re.IGNORECASE)
SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|AKIA[A-Z0-9]{12,})"
)
URL_LOGIN = re.compile(r"(?<=://)[^/\s@]+@")
URL_QUERY = re.compile(
    r"(?<=[?&])((?:[\w-]*(?:token|key|secret|signature|sig|password))=)[^&\s]+", re.IGNORECASE
)
HIDDEN = "***"


def describe_environment(arguments: Sequence[str] | None = None, *, device: str = "cpu") -> dict[str, Any]:
    """Versions, hardware, git commit and command line as JSON-able values.

    `arguments` is the command line (default: this process's own), recorded with secrets hidden. `device` is
    torch's name of the device; a GPU's name is asked only when it starts with "cuda".
    """
    memory = psutil.virtual_memory().total
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": redact_command(sys.argv if arguments is None else arguments),
        "git": _git(Path.cwd()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": _versions(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory,
        "devices": _gpus() if device.startswith("cuda") else [],
        "variables": {name: redact_text(os.environ[name]) for name in VARIABLES if name in os.environ},
    }


def redact(value: Any, name: str = "") -> Any:
    """`value` with whatever looks like a secret hidden: by its key's name, or by its shape in any text."""
    if isinstance(value, Mapping):
        return {key: redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item, name) for item in value]
    if value is not None and _is_secret(name) and not isinstance(value, bool):
        return HIDDEN
    return redact_text(value) if isinstance(value, str) else value


def redact_text(text: str) -> str:
    """Known shapes of credentials inside a text become ***."""
    text = URL_LOGIN.sub(HIDDEN + "@", SECRET_VALUE.sub(HIDDEN, text))
    return URL_QUERY.sub(rf"\1{HIDDEN}", text)


def redact_command(arguments: Sequence[str]) -> str:
    """A command line, quoted for a shell, with the values of secret-looking options and overrides hidden."""
    shown: list[str] = []
    hide_next = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if hide_next and not argument.startswith("-"):
            shown.append(HIDDEN)
        elif equals and _is_secret(name):
            shown.append(f"{name}={HIDDEN}")
        else:
            shown.append(redact_text(argument))
        hide_next = argument.startswith("-") and not equals and _is_secret(argument)
    return " ".join(word if HIDDEN in word else shlex.quote(word) for word in shown)


def _is_secret(name: str) -> bool:
    return bool(SECRET_NAME.search(name)) and not PUBLIC_NAME.search(name)


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: platform knows the family at least
    return platform.processor() or platform.machine()


def _gpus() -> list[dict[str, Any]]:
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append({"name": properties.name, "memory_bytes": properties.total_memory})
    return found


def _git(folder: Path) -> dict[str, Any] | None:
    """Commit of the folder that the command was started in, and whether it has uncommitted changes."""

    def ask(*command: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=5, check=True
        ).stdout.strip()

    try:
        return {
            "commit": ask("rev-parse", "HEAD"),
            "dirty": bool(ask("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None  # no git, or no repository here
