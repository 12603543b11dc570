"""Structured pruning of decoder models: what goes, by which criterion, and files that plain tools load."""

from .amounts import Amounts, amounts_for
from .anatomy import Anatomy, Block, read_anatomy
from .asked import Method, RatioOf, Widths
from .calibrate import calibrate
from .cut import Cut, Scores, Values, everything, keep_counts, keep_uniform
from .foldgpt import learn_gates, share_blocks
from .head_amounts import HeadAmounts, head_amounts_for
from .latency import Latency, Times, amounts_for_latency, measure_times
from .pad import pad
from .per_layer import load_pruned
from .prune import Pruned, prune, refit_all
from .remove import mask, remove
from .save import Form, save_pruned
from .statistics import BlockStats, Channels
from .steps import cut_from_json, cut_to_json, followed_by, ramp

__all__ = [
    "Amounts",
    "Anatomy",
    "Block",
    "BlockStats",
    "Channels",
    "Cut",
    "Form",
    "HeadAmounts",
    "Latency",
    "Method",
    "Pruned",
    "RatioOf",
    "Scores",
    "Times",
    "Values",
    "Widths",
    "amounts_for",
    "amounts_for_latency",
    "calibrate",
    "cut_from_json",
    "cut_to_json",
    "everything",
    "followed_by",
    "head_amounts_for",
    "keep_counts",
    "keep_uniform",
    "learn_gates",
    "load_pruned",
    "mask",
    "measure_times",
    "pad",
    "prune",
    "ramp",
    "read_anatomy",
    "refit_all",
    "remove",
    "save_pruned",
    "share_blocks",
]
