"""The rates of the machine, measured once a process: each time takes half a second of processor time."""

from __future__ import annotations

import os
from pathlib import Path

import shoestring.plan.machine
import torch
from shoestring.plan.limits import existing_parent
from shoestring.plan.rates import Rates, measure_rates

_found: dict[tuple[object, ...], Rates] = {}


def rates_once(device: str, output_dir: Path) -> Rates:
    """As `measure_rates`; what it has found for the same device, disk and number of threads is kept."""
    folder = existing_parent(output_dir)
    key = (device, folder.stat().st_dev, os.access(folder, os.W_OK), torch.get_num_threads())
    if key not in _found:
        _found[key] = measure_rates(device, output_dir)
    return _found[key]


def keep_in_this_process() -> None:
    """For processes that are not there to measure the machine, and for all that are forked from them."""
    shoestring.plan.machine.measure_rates = rates_once
