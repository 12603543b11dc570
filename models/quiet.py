"""Silence for the libraries while a model loads: no progress bars, no notes that a user cannot act on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Turn transformers' bars and its log below ERROR off, by its public switches, and put them back after.

    The gguf loader's own bar cannot be turned off that way; the fast loader here does not use it.
    """
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging  # its functions carry no types
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
