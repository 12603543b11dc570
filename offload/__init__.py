"""Training state outside the device: host memory and disk, bit for bit what it is inside."""

from .optimizer import OffloadedOptimizer
from .place import offload_optimizer
from .stored import Stored, in_memory

__all__ = ["OffloadedOptimizer", "Stored", "in_memory", "offload_optimizer"]
