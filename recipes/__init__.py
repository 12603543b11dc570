"""What the user writes: the recipe's schema, loading, overrides, presets, and the errors of all rooms.

Plain values: imports nothing else of shoestring, and no torch.
"""

from .choices import (
    AdamW,
    AdamW8bit,
    AdapterConfig,
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    Lion8bit,
    LoraAdapter,
    ObjectiveConfig,
    OptimizerConfig,
    PagedAdamW8bit,
    PolynomialSchedule,
    RexSchedule,
    ScheduleConfig,
)
from .errors import BudgetError, DivergedError, ShoestringError, UserError
from .model_data import Columns, DataConfig, ModelConfig, Source
from .quantities import Bytes, Count, Every, Joules, Money, Price, Seconds
from .running import BudgetConfig, CheckpointConfig, EvalConfig, ExportConfig, TrackConfig, TrainConfig
from .schema import Recipe, json_schema

__all__ = [
    "AdamW",
    "AdamW8bit",
    "AdapterConfig",
    "BudgetConfig",
    "BudgetError",
    "Bytes",
    "CheckpointConfig",
    "Columns",
    "ConstantSchedule",
    "CosineSchedule",
    "Count",
    "DataConfig",
    "DivergedError",
    "EvalConfig",
    "Every",
    "ExportConfig",
    "Joules",
    "LinearSchedule",
    "Lion8bit",
    "LoraAdapter",
    "ModelConfig",
    "Money",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PagedAdamW8bit",
    "PolynomialSchedule",
    "Price",
    "Recipe",
    "RexSchedule",
    "ScheduleConfig",
    "Seconds",
    "ShoestringError",
    "Source",
    "TrackConfig",
    "TrainConfig",
    "UserError",
    "json_schema",
]
