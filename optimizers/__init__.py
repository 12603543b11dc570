"""Building the optimizer, its groups, its rate, its state's bytes, and gradient clipping."""

from .build import build_optimizer, set_rate
from .clip import clip_by_global_norm
from .groups import parameter_groups
from .state_bytes import state_bytes

__all__ = ["build_optimizer", "clip_by_global_norm", "parameter_groups", "set_rate", "state_bytes"]
