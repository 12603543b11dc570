"""Files that hold any widths: a config that lists them, and modeling_pruned.py beside the weights.

transformers loads such a folder with `trust_remote_code=True` and refuses it without. `load_pruned` reads the
same folder with this package's own modeling_pruned.py: of the folder it takes numbers, never code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..recipes.errors import UserError
from .anatomy import ATTENTION as PROJECTIONS
from .anatomy import FAMILIES, MLP, Anatomy, Block
from .forms import groups_to_declare

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CODE = "modeling_pruned.py"
PREFIX = "pruned_"
# What a config could ask a loader to fetch, run or replace.
_NOT_OURS = ("auto_map", "attn_implementation", "_attn_implementation", "quantization_config",
             "fusion_config", "transformers_weights", "dtype", "torch_dtype")  # fmt: skip
_MOST_LAYERS = 10_000
_WIDEST_HEAD = 65_536  # no weight has to be as wide where heads are narrow, but rotations are


def save_per_layer(anatomy: Anatomy, folder: Path) -> str:
    """Write weights, config, generation config and the code that reads them; the model type."""
    model: Any = anatomy.model
    config_class, model_class = _classes(anatomy.family)
    widths = [_entry(block) for block in anatomy.blocks]
    values = {**stock_values(model.config), "layer_widths": widths}
    values["num_key_value_heads"] = groups = groups_to_declare(anatomy)
    values["num_attention_heads"] = groups * anatomy.blocks[0].heads_per_group
    config = config_class.from_dict(values)
    module = Path(CODE).stem
    config.auto_map = {
        "AutoConfig": f"{module}.{config_class.__name__}",
        "AutoModelForCausalLM": f"{module}.{model_class.__name__}",
    }
    config.dtype = model.dtype
    with torch.device("meta"):
        target = model_class(config)
    target.load_state_dict(model.state_dict(), strict=True, assign=True)
    target.tie_weights()
    target.generation_config = model.generation_config
    target.save_pretrained(folder)
    code = Path(__file__).with_name(CODE).read_text(encoding="utf-8")
    (Path(folder) / CODE).write_text(code, encoding="utf-8")
    return PREFIX + anatomy.family


def load_pruned(
    folder: Path, *, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> PreTrainedModel:
    """The model of a folder that `save_pruned` wrote with form per_layer, in evaluation mode.

    Nothing in the folder is run. `dtype` is by default that of the file.

    Raises:
        UserError: no such folder, or a file in it that is not what was written.
    """
    from transformers import GenerationConfig

    folder = Path(folder)
    raw = _json(folder, "config.json")
    family = str(raw.get("model_type", "")).removeprefix(PREFIX)
    if raw.get("model_type") != PREFIX + family or family not in FAMILIES:
        raise UserError(
            f"pruning: {folder} has the model type {raw.get('model_type')!r}, not one of form per_layer: "
            f"{', '.join(PREFIX + each for each in FAMILIES)}.\n"
            "  Other folders are loaded by transformers: AutoModelForCausalLM.from_pretrained."
        )
    config_class, model_class = _classes(family)
    given = {key: value for key, value in raw.items() if key not in _NOT_OURS}
    try:
        config = config_class.from_dict(given)
        _check_widths(config)
        with torch.device("meta"):
            shell = model_class(config)
    except Exception as error:  # a config can be wrong in as many ways as its class has uses for it
        raise UserError(f"pruning: {folder / 'config.json'} is not what was written: {error}") from None
    state = _weights(folder)
    _check_shapes(shell, state, folder)
    kind = dtype or next(iter(state.values())).dtype
    model: Any = model_class.from_pretrained(None, config=config, state_dict=state, dtype=kind)
    name = "generation_config.json"
    if (folder / name).is_file():
        values = _json(folder, name)
        try:
            model.generation_config = GenerationConfig.from_dict(values)
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"pruning: {folder / name} is not what was written: {error}") from None
    loaded: PreTrainedModel = model.to(device or torch.device("cpu")).eval()
    return loaded


def stock(kind: type) -> Any:
    """The class of transformers that one of modeling_pruned.py is made from; any other class itself."""
    return next(each for each in kind.__mro__ if not each.__module__.endswith(Path(CODE).stem))


def stock_values(config: Any) -> dict[str, Any]:
    """What a config holds beside what belongs to the pruned form."""
    values = config.to_dict()
    for name in ("layer_widths", "auto_map", "architectures", "model_type"):
        values.pop(name, None)
    return dict(values)


def _classes(family: str) -> tuple[Any, Any]:
    """Config and model class of a family; these imports take their time."""
    from . import modeling_pruned as ours

    pairs: dict[str, tuple[Any, Any]] = {
        "llama": (ours.PrunedLlamaConfig, ours.PrunedLlamaForCausalLM),
        "mistral": (ours.PrunedMistralConfig, ours.PrunedMistralForCausalLM),
        "qwen2": (ours.PrunedQwen2Config, ours.PrunedQwen2ForCausalLM),
        "qwen3": (ours.PrunedQwen3Config, ours.PrunedQwen3ForCausalLM),
        "gemma": (ours.PrunedGemmaConfig, ours.PrunedGemmaForCausalLM),
        "gemma2": (ours.PrunedGemma2Config, ours.PrunedGemma2ForCausalLM),
        "gemma3_text": (ours.PrunedGemma3TextConfig, ours.PrunedGemma3ForCausalLM),
    }
    return pairs[family]


def _entry(block: Block) -> dict[str, Any]:
    """One layer's entry in `layer_widths`."""
    attention, mlp = block.layer.self_attn, block.layer.mlp
    named = [(mlp, name) for name in MLP] + [(attention, name) for name in PROJECTIONS]
    return {
        "neurons": block.neurons,
        "groups": block.groups,
        "value_width": block.value_dim,
        "rotary_pairs": None if block.pairs is None else [list(pairs) for pairs in block.pairs],
        "biases": [name for home, name in named if getattr(home, name).bias is not None],
    }


def _check_widths(config: Any) -> None:
    """Refuse numbers in `layer_widths` that were not written here, before anything is built from them."""
    layers = config.layer_widths
    if not isinstance(layers, list) or not 0 < len(layers) <= _MOST_LAYERS:
        raise ValueError(f"layer_widths is not a list of 1 to {_MOST_LAYERS:,} layers")
    if len(layers) != config.num_hidden_layers:
        raise ValueError(
            f"layer_widths has {len(layers)} layers, num_hidden_layers is {config.num_hidden_layers}"
        )
    if not 0 < config.head_dim <= _WIDEST_HEAD:
        raise ValueError(f"head_dim is {config.head_dim}; allowed is 1 to {_WIDEST_HEAD:,}")
    most = {
        "neurons": config.intermediate_size,
        "groups": config.num_key_value_heads,
        "value_width": config.head_dim,
    }
    for index, entry in enumerate(layers):
        for name, limit in most.items():
            if type(entry[name]) is not int or not 1 <= entry[name] <= limit:
                raise ValueError(f"layer {index} has {name} {entry[name]!r}; allowed is 1 to {limit}")
        if not set(entry["biases"]) <= {*MLP, *PROJECTIONS}:
            raise ValueError(f"layer {index} has biases {entry['biases']!r}")
        _check_pairs(index, entry["rotary_pairs"], entry["groups"], config.head_dim // 2)


def _check_pairs(index: int, pairs: Any, groups: int, most: int) -> None:
    if pairs is None:
        return
    if len(pairs) != groups or len({len(each) for each in pairs}) != 1 or not pairs[0]:
        raise ValueError(
            f"layer {index} has rotary_pairs of {len(pairs)} heads; {groups} equal lists are needed"
        )
    for each in pairs:
        if any(type(pair) is not int or not 0 <= pair < most for pair in each) or len({*each}) != len(each):
            raise ValueError(f"layer {index} has rotary_pairs beyond 0 to {most - 1}, or twice")


def _check_shapes(shell: Any, state: dict[str, Tensor], folder: Path) -> None:
    wanted = {name: tuple(value.shape) for name, value in shell.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    tied = set(shell.all_tied_weights_keys)
    wrong = sorted(
        name for name in wanted.keys() | found.keys()
        if wanted.get(name) != found.get(name) and not (name in tied and name not in found)
    )  # fmt: skip
    if wrong:
        raise UserError(
            f"pruning: the weights in {folder} are not of its config: {wrong[0]} has the shape "
            f"{found.get(wrong[0], 'none')}, the config says {wanted.get(wrong[0], 'none')}."
        )


def _weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors files in the folder, by name."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        named = _json(folder, index.name).get("weight_map")
        names = sorted({str(name) for name in named.values()}) if isinstance(named, dict) else []
    if not names or any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
        raise UserError(f"pruning: {index} names no safetensors files beside it.")
    state: dict[str, Tensor] = {}
    for name in names:
        try:
            state |= load_file(folder / name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"pruning: {folder / name} cannot be read: {error}") from None
    if not state:
        raise UserError(f"pruning: {folder} holds no weights.")
    return state


def _json(folder: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"pruning: {folder / name} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"pruning: {folder / name} is not a JSON object.")
    return value
