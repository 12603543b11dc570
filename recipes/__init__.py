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
from .load import load_recipe
from .model_data import Columns, DataConfig, ModelConfig, Source
from .presets import Preset, copy_preset, list_presets
from .quantities import Bytes, Count, Every, Joules, Money, Price, Seconds
from .resolved import Resolved
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
    "Preset",
    "Price",
    "Recipe",
    "Resolved",
    "RexSchedule",
    "ScheduleConfig",
    "Seconds",
    "ShoestringError",
    "Source",
    "TrackConfig",
    "TrainConfig",
    "UserError",
    "copy_preset",
    "json_schema",
    "list_presets",
    "load_recipe",
]
