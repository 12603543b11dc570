"""Structured pruning of decoder models: what goes, by which criterion, and files that plain tools load."""

from .amounts import Amounts, amounts_for
from .anatomy import Anatomy, Block, read_anatomy
from .calibrate import calibrate
from .cut import Cut, Scores, everything, keep_counts, keep_uniform
from .foldgpt import learn_gates, share_blocks
from .pad import pad
from .prune import Method, Pruned, prune, refit_all
from .remove import mask, remove
from .save import save_pruned
from .statistics import BlockStats, Channels

__all__ = [
    "Amounts",
    "Anatomy",
    "Block",
    "BlockStats",
    "Channels",
    "Cut",
    "Method",
    "Pruned",
    "Scores",
    "amounts_for",
    "calibrate",
    "everything",
    "keep_counts",
    "keep_uniform",
    "learn_gates",
    "mask",
    "pad",
    "prune",
    "read_anatomy",
    "refit_all",
    "remove",
    "save_pruned",
    "share_blocks",
]
