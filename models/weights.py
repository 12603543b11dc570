"""Load a model's weights: full precision types or a 4-bit base, from the hub, a folder or a GGUF file."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from ..ops.memory import give_back_freed_memory
from ..recipes.errors import UserError
from .facts import ModelFacts, build_skeleton
from .gguf_header import read_gguf_header
from .gguf_weights import DIRECT, read_parameter, read_state, tensor_names
from .quiet import quiet_libraries
from .source import KEY
from .weight_files import pickled_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..recipes.model_data import ModelConfig


def resolve_dtype(model: ModelConfig, *, full: bool, device: torch.device) -> torch.dtype:
    """Type of the weights that are not quantised.

    The recipe's, or for `auto`: float32 when all weights are trained (the loop computes in bfloat16 by
    autocast, the optimizer needs the digits), else bfloat16, or float32 on a GPU too old for it (float16
    would need its losses scaled).
    """
    if model.dtype is not None:
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[model.dtype]
    if full:
        return torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float32
    return torch.bfloat16


def load_model(
    facts: ModelFacts, model: ModelConfig, *, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """The model on `device`, in evaluation mode, plain: nothing of a GGUF file is left in it.

    With `model.load_in_4bit` the linear layers but the output head are bitsandbytes' 4-bit ones that compute
    in `dtype`. Attention is the recipe's, or sdpa; see `use_packed_attention` for the packed one.

    Raises:
        UserError: bitsandbytes is missing, the attention package is missing, or the file does not hold this
            model.
    """
    options: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": model.attn_implementation or "sdpa",
        "device_map": None if device.type == "cpu" else {"": device},
    }
    # holes that earlier work left in the heap seldom fit what comes, and would stay resident beside it
    give_back_freed_memory()
    if model.load_in_4bit:
        options["quantization_config"] = _four_bit(model, dtype)
    with quiet_libraries():
        try:
            loaded = _from_gguf(facts, options) if facts.kind == "gguf" else _from_folder(facts, options)
        except ImportError as error:
            raise UserError(
                f"model.attn_implementation: {model.attn_implementation} cannot be used here: "
                f"{str(error).splitlines()[0]}\n  Leave the key out: auto is sdpa or the packed attention "
                "of shoestring."
            ) from error
    if model.load_in_4bit:
        keep_four_bit_layout(loaded)
        give_back_freed_memory()  # packing leaves holes of several times what it packs into
    loaded.config._name_or_path = facts.source
    loaded.name_or_path = facts.source
    return loaded


def keep_four_bit_layout(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights the first time that they run in evaluation mode.

    On CPUs with AVX512-BF16 it stores them in another layout for inference, rounds the scales to bfloat16,
    and from then on computes without autograd: training after an evaluation would get no gradient through the
    base, and dequantising would give noise.
    """
    layers: Iterable[Any] = model.modules()
    for module in layers:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _four_bit(model: ModelConfig, dtype: torch.dtype) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "model.load_in_4bit: true needs the package bitsandbytes.\n  Install it: pip install "
            "'shoestring[quantized]'"
        )
    from transformers import BitsAndBytesConfig

    config: Any = BitsAndBytesConfig  # untyped in transformers
    return config(
        load_in_4bit=True,
        bnb_4bit_quant_type=model.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=model.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def _from_folder(facts: ModelFacts, options: dict[str, Any]) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM  # its return type leaves out `output_loading_info`
    try:
        loaded, info = auto.from_pretrained(
            facts.location.load_name,
            revision=facts.location.revision,
            trust_remote_code=facts.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            use_safetensors=True,
            **options,
        )
    except OSError as error:
        if facts.kind == "hub" and "safetensors" in str(error):
            raise pickled_weights(facts.source) from error
        raise
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        name, stored, wanted = mismatched[0]
        raise UserError(
            f"{KEY}: {len(mismatched)} weights of {facts.source} have another shape than its config.json "
            f"says;\n  {name} is {list(stored)}, wanted {list(wanted)}.\n"
            "  Weights and config.json are of different models. Fetch the model again."
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"{KEY}: the weights of {facts.source} lack {len(missing)} tensors, such as {missing[0]}.\n"
            "  They would start from random numbers. Fetch the model again."
        )
    model: PreTrainedModel = loaded
    return model


def _from_gguf(facts: ModelFacts, options: dict[str, Any]) -> PreTrainedModel:
    assert facts.location.gguf_file is not None
    header = read_gguf_header(facts.location.gguf_file)
    skeleton = build_skeleton(facts.config)
    try:
        state = read_state(header, skeleton, options["dtype"])
    except ValueError as error:
        raise UserError(
            f"{KEY}: {facts.source} does not hold a whole {facts.config.model_type} model: {error}\n"
            "  Give the original model (hub id or folder) in its place."
        ) from error
    # assigns the tensors as they are, builds rotary buffers, and quantises if asked to
    model: PreTrainedModel = type(skeleton).from_pretrained(
        None, config=facts.config, state_dict=state, **options
    )
    return model


def weight_reader(facts: ModelFacts) -> Callable[[str], torch.Tensor]:
    """A function from a parameter's name to its unquantised value, float32 on the CPU, one at a time.

    LoftQ needs the original weights beside the 4-bit ones.
    """
    if facts.kind == "gguf":
        assert facts.location.gguf_file is not None
        header, skeleton = read_gguf_header(facts.location.gguf_file), facts.skeleton()
        if header.architecture not in DIRECT:
            state = read_state(header, skeleton, torch.float32)
            return state.__getitem__
        names = tensor_names(header, skeleton)
        return lambda name: read_parameter(header, names, facts.config, name, torch.float32)
    with quiet_libraries():
        loaded = _from_folder(facts, {"dtype": torch.bfloat16, "attn_implementation": "sdpa"})
    return lambda name: loaded.get_parameter(name).detach().float()
