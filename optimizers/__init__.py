"""Memory-light optimizers, the libraries' beside them, and what builds, groups, clips and counts them."""

from .accounting import gradient_elements, state_bytes, update_cost
from .adalomo import AdaLOMO
from .apollo import APOLLO, APOLLOMini
from .badam import BAdam
from .build import build_optimizer, set_rate, takes_matrices
from .clip import clip_by_global_norm, clip_for_step
from .cosmos import COSMOS
from .cost import Cost
from .elementwise import AdamW, Lion
from .frugal import FRUGAL
from .galore import GaLore
from .groups import parameter_groups
from .in_backward import step_in_backward
from .lomo import LOMO
from .muon import Muon
from .natural_galore import NaturalGaLore
from .q_apollo import QAPOLLO
from .rates import rate_over_adamw
from .roles import Slot, share_line, slots
from .soap import SOAP

__all__ = [
    "APOLLO",
    "COSMOS",
    "FRUGAL",
    "LOMO",
    "QAPOLLO",
    "SOAP",
    "APOLLOMini",
    "AdaLOMO",
    "AdamW",
    "BAdam",
    "Cost",
    "GaLore",
    "Lion",
    "Muon",
    "NaturalGaLore",
    "Slot",
    "build_optimizer",
    "clip_by_global_norm",
    "clip_for_step",
    "gradient_elements",
    "parameter_groups",
    "rate_over_adamw",
    "set_rate",
    "share_line",
    "slots",
    "state_bytes",
    "step_in_backward",
    "takes_matrices",
    "update_cost",
]
