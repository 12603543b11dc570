"""The plan: machine, short measurement, memory and time models, every decision before the first step."""

from .facts import DataFacts, data_facts
from .machine import Machine, probe
from .make import make_plan
from .plan import Plan

__all__ = ["DataFacts", "Machine", "Plan", "data_facts", "make_plan", "probe"]
