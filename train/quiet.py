"""Silence of libraries on the screen, through their public settings only."""

from __future__ import annotations

import logging
import os
import sys
import warnings

LOGGERS = (
    "transformers", "datasets", "huggingface_hub", "accelerate", "peft", "torch", "bitsandbytes", "httpx",
    "httpcore", "urllib3", "filelock", "fsspec", "matplotlib", "wandb", "trackio", "tensorboard", "absl",
)  # fmt: skip

# (beginning of the message, module): each has been read and says nothing that a user could act on.
HARMLESS = (
    (r"The pynvml package is deprecated", ""),
    (r"Can't initialize NVML", ""),
    (r"'pin_memory' argument is set as true but no accelerator", ""),
    (r"torch\.utils\.checkpoint: the use_reentrant parameter", ""),
    (r"`torch\.jit\.script` is deprecated", ""),
    (r".*os\.fork\(\) was called.*", ""),  # data workers fork before any thread holds a lock that they need
    (r"Unable to import Triton", ""),
    (r"`gradient_checkpointing_enable` is deprecated", ""),  # its new name is not in all versions allowed
    (r"bitsandbytes::.*an autograd kernel was not registered", ""),  # frozen 4-bit weights get no gradient
    (r"No device id is provided via `init_process_group`", ""),
)


def quiet_libraries() -> None:
    """Nothing at INFO, no bars but ours, no known harmless warnings; what a user has set himself stays.

    Call it once, before the heavy imports if possible: variables that libraries read while they are imported
    are then in time. It also works afterwards. Bars of downloads stay where a terminal shows them: three
    silent minutes look like a crash.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "warning")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("DATASETS_VERBOSITY", "warning")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "true"
    )  # set either way, it stops the warning after a fork
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if logger.level < logging.WARNING:  # also 0, not set
            logger.setLevel(logging.WARNING)
    # It warns, at import, of an optional kernel from the hub that it does without.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    for message, module in HARMLESS:
        warnings.filterwarnings("ignore", message=message, module=module)
    _quiet_imported()


def _quiet_imported() -> None:
    """The same for libraries that were imported before: they have read their variables already."""
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call] # has no annotations
    if "datasets" in sys.modules:
        import datasets

        datasets.disable_progress_bars()
    if "huggingface_hub" in sys.modules and not sys.stderr.isatty():
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()


def choose_deepspeed_device(device: str) -> None:
    """Spare DeepSpeed, where transformers asks it, from looking for a GPU and telling stdout of none."""
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
