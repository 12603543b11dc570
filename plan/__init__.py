"""The plan: machine, short measurement, memory and time models, every decision before the first step."""

from .early_signals import Judgement, rank_by_early_signals
from .facts import DataFacts, data_facts
from .machine import Machine, probe
from .make import make_plan
from .offload import scratch_folder
from .plan import Plan
from .split import Split, choose_split
from .stages import joined_reasons, largest, largest_phases

__all__ = [
    "DataFacts",
    "Judgement",
    "Machine",
    "Plan",
    "Split",
    "choose_split",
    "data_facts",
    "joined_reasons",
    "largest",
    "largest_phases",
    "make_plan",
    "probe",
    "rank_by_early_signals",
    "scratch_folder",
]
