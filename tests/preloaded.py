"""What the server of processes (`forked.py`) has imported before it forks."""

# ruff: noqa: F401
import os
import tempfile
from pathlib import Path

os.environ.pop("PYTHONPATH", None)  # it was for finding this file

import accelerate
import hf_trainer
import keeper_processes
import measured_rates
import shard_processes
import shoestring.train.cli
import shoestring.train.inspect
import shoestring.train.run
import shoestring.train.sweep
import test_checkpoint_kill
import test_keeper_kill
import test_offload_shadow_kills
import test_snapshot_hf
import transformers.trainer

measured_rates.keep_in_this_process()
measured_rates.rates_once("cpu", Path(tempfile.gettempdir()))
