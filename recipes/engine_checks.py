"""Checks between the engine and the keys that it needs or excludes.

Most refusals here are of what DeepSpeed would accept and then not do: it trains on in host memory where a
disk was asked for, or leaves out a key that its stage does not read, and says nothing.
"""

from typing import TYPE_CHECKING

from .engine import AioConfig, DeepSpeedConfig, NativeEngineConfig
from .engine_zenflow import zenflow_problems
from .objectives import SftThenDpoObjective
from .offload import OffloadConfig
from .optimizers import AdamW
from .problem import Problem

if TYPE_CHECKING:
    from .schema import Recipe

_MATRICES = frozenset(
    {"apollo", "apollo_mini", "q_apollo", "galore", "natural_galore", "frugal", "cosmos", "muon", "soap"}
)
_BUFFERS = 4
"""A sub-group on its way between disk and optimizer: weight, gradient and two moments."""


def engine_problems(recipe: "Recipe") -> list[Problem]:
    """All disagreements of the engine with itself and with the rest of the recipe."""
    engine = recipe.engine
    if isinstance(engine, NativeEngineConfig):
        return []
    found = [*_optimizer(recipe), *_others(recipe)]
    if isinstance(engine, DeepSpeedConfig):
        found += [*_tiers(engine), *_disk(engine), *_stage_3(engine), *zenflow_problems(recipe)]
    return found


def _optimizer(recipe: "Recipe") -> list[Problem]:
    engine, optimizer = recipe.engine.name, recipe.optimizer
    name = optimizer.name
    found = []
    if not isinstance(optimizer, AdamW):
        why = "is a rule for whole matrices" if name in _MATRICES else "keeps its state for whole tensors"
        found.append(
            Problem(
                "optimizer.name",
                f"optimizer.name={name} {why}, and engine={engine} steps shards of them; allowed: adamw.   "
                "Set optimizer=adamw, or engine=native, where offload.optimizer=disk spares as much memory",
                ("engine.name",),
            )
        )
        return found
    given = [
        f"optimizer.{key}={shown}"
        for key, shown, differs in (
            ("state_bits", str(optimizer.state_bits), optimizer.state_bits != 32),
            ("weights", optimizer.weights, optimizer.weights in ("kahan", "plain")),
            ("step_in_backward", "true", optimizer.step_in_backward),
        )
        if differs
    ]
    found += [
        Problem(
            text.partition("=")[0],
            f"{text} is for engine=native: engine={engine} steps float32 weights with float32 moments, after "
            f"the backward pass.   Leave {text.partition('=')[0]} out, or set engine=native",
            ("engine.name",),
        )
        for text in given
    ]
    return found


def _others(recipe: "Recipe") -> list[Problem]:
    engine = recipe.engine
    name = engine.name
    shards_weights = not isinstance(engine, DeepSpeedConfig) or engine.zero_stage == 3
    where = "engine=fsdp2" if name == "fsdp2" else "engine.zero_stage=3"
    instead = "engine=deepspeed (zero_stage 2)" if name == "fsdp2" else "engine.zero_stage=2"
    found = []
    if recipe.train.wta_crs_ratio is not None:
        found.append(
            Problem(
                "train.wta_crs_ratio",
                f"train.wta_crs_ratio={recipe.train.wta_crs_ratio} computes the weights' gradients itself, "
                f"and engine={name} collects them from hooks of its own.   Set train.wta_crs_ratio=null, or "
                "engine=native",
                ("engine.name",),
            )
        )
    if recipe.offload != OffloadConfig():
        own = (
            "engine.cpu_offload"
            if name == "fsdp2"
            else "engine.offload_optimizer, engine.offload_param and engine.nvme_path"
        )
        found.append(
            Problem(
                "offload",
                f"the section offload is for engine=native, and engine={name} would not read it.   Use "
                f"{own}, or set engine=native",
                ("engine.name",),
            )
        )
    if shards_weights and recipe.model.load_in_4bit:
        found.append(
            Problem(
                "model.load_in_4bit",
                f"model.load_in_4bit=true packs weights that {where} cannot cut.   Set {instead}, or "
                "model.load_in_4bit=false",
                ("engine.name",),
            )
        )
    if shards_weights and isinstance(recipe.objective, SftThenDpoObjective):
        found.append(
            Problem(
                "objective.name",
                f"objective=sft_then_dpo copies the model between its stages, and {where} has it in shards "
                f"then.   Set {instead}, or run objective=sft and objective=dpo one after the other",
                ("engine.name",),
            )
        )
    return found


def _tiers(engine: DeepSpeedConfig) -> list[Problem]:
    stage, optimizer, param = engine.zero_stage, engine.offload_optimizer, engine.offload_param
    found = []
    if optimizer == "nvme" and stage < 3:
        found.append(
            Problem(
                "engine.offload_optimizer",
                f"engine.offload_optimizer=nvme needs engine.zero_stage=3: at stage {stage} DeepSpeed trains "
                "on in host memory and writes nothing to the disk.   Set engine.zero_stage=3, or "
                "engine.offload_optimizer=cpu",
                ("engine.zero_stage",),
            )
        )
    if optimizer == "cpu" and stage == 0:
        found.append(
            Problem(
                "engine.offload_optimizer",
                "engine.offload_optimizer=cpu does nothing at engine.zero_stage=0.   Set engine.zero_stage=1 "
                "(or 2, 3), or engine.offload_optimizer=none",
                ("engine.zero_stage",),
            )
        )
    if param != "none" and stage < 3:
        found.append(
            Problem(
                "engine.offload_param",
                f"engine.offload_param={param} does nothing at engine.zero_stage={stage}, where every "
                "process has all weights.   Set engine.zero_stage=3, or engine.offload_param=none",
                ("engine.zero_stage",),
            )
        )
    return found


def _disk(engine: DeepSpeedConfig) -> list[Problem]:
    found = []
    if engine.offload_optimizer == "nvme" and engine.nvme_path is None:
        found.append(
            Problem(
                "engine.offload_optimizer",
                "engine.offload_optimizer=nvme needs engine.nvme_path, a folder on that disk.   For example "
                "engine.nvme_path=/local_nvme",
            )
        )
    if engine.offload_optimizer != "nvme":
        unread = [
            *(["buffer_count"] if engine.buffer_count != _BUFFERS else []),
            *(["pipeline_read"] if engine.pipeline_read else []),
            *(["pipeline_write"] if engine.pipeline_write else []),
            *(["nvme_path"] if engine.nvme_path is not None else []),
            *(["aio"] if engine.aio != AioConfig() else []),
        ]
        found += [
            Problem(
                f"engine.{key}",
                f"engine.{key} is for engine.offload_optimizer=nvme, which is "
                f"{engine.offload_optimizer}.   Leave engine.{key} out, or set engine.offload_optimizer=nvme",
                ("engine.offload_optimizer",),
            )
            for key in unread
        ]
        return found
    needed = _BUFFERS * (1 + engine.pipeline_read + engine.pipeline_write)
    if engine.buffer_count < needed:
        found.append(
            Problem(
                "engine.buffer_count",
                f"engine.buffer_count={engine.buffer_count} is too few to read or write beside the step: "
                f"each sub-group on its way takes {_BUFFERS}.   Set engine.buffer_count={needed}, or leave "
                "engine.pipeline_read and engine.pipeline_write out",
                ("engine.pipeline_read", "engine.pipeline_write"),
            )
        )
    return found


def _stage_3(engine: DeepSpeedConfig) -> list[Problem]:
    if engine.zero_stage == 3:
        return []
    defaults = DeepSpeedConfig()
    keys = ("sub_group_size", "zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_gradients")
    return [
        Problem(
            f"engine.{key}",
            f"engine.{key} does nothing at engine.zero_stage={engine.zero_stage}.   Set engine.zero_stage=3, "
            f"or leave engine.{key} out",
            ("engine.zero_stage",),
        )
        for key in keys
        if getattr(engine, key) != getattr(defaults, key)
    ]
