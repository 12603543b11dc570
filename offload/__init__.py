"""Training state outside the device: host memory and disk, bit for bit what it is inside."""

from .optimizer import OffloadedOptimizer
from .place import offload_optimizer
from .stored import Stored

__all__ = ["OffloadedOptimizer", "Stored", "offload_optimizer"]
