"""What is known of a model before its weights are loaded: configuration, sizes, names and shapes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..recipes.errors import UserError
from .gguf_config import gguf_config, require_gguf
from .gguf_header import read_gguf_header
from .quiet import quiet_libraries
from .source import KEY, Source, locate

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from ..recipes.model_data import ModelConfig

_SAMPLE_BYTES = 1 << 16
_MOST_LAYERS = 10_000  # of modules built one by one; published models have up to some hundred


@dataclass(frozen=True)
class LinearShape:
    """All linear layers of one name and size: W is (out_features x in_features)."""

    name: str  # last part of the module's name, such as q_proj
    in_features: int
    out_features: int
    count: int


@dataclass(frozen=True)
class ModelFacts:
    """A model described without its weights."""

    source: str
    kind: Literal["hub", "folder", "gguf"]
    config: PretrainedConfig
    parameters: int  # tied weights counted once
    embedding_parameters: int  # input and, where not tied, output embedding
    layers: int
    hidden_size: int
    vocab_size: int
    tied: bool
    linear_modules: tuple[LinearShape, ...]
    parameter_shapes: tuple[tuple[str, tuple[int, ...]], ...]
    fingerprint: str  # of the weights' files: names, sizes and samples of their contents, or the hub's commit
    max_positions: int
    trust_remote_code: bool
    location: Source

    def skeleton(self) -> PreTrainedModel:
        """The model on the meta device: names and shapes of everything, no memory."""
        model = build_skeleton(self.config, self.trust_remote_code)
        model.name_or_path = self.source
        return model


def build_skeleton(config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """`config`'s causal language model on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM  # untyped in transformers
    with torch.device("meta"), quiet_libraries():
        model: PreTrainedModel = auto.from_config(config, trust_remote_code=trust_remote_code)
    return model


def read_facts(model: ModelConfig) -> ModelFacts:
    """Describe the model of a recipe without loading its weights.

    Raises:
        UserError: not found, not complete, not a causal language model, needs custom code, or already
            quantised.
    """
    source = locate(model)
    if source.kind == "gguf":
        assert source.gguf_file is not None
        require_gguf(source.gguf_file)
        config = gguf_config(read_gguf_header(source.gguf_file))
        fingerprint = _fingerprint([source.gguf_file])
    else:
        config = _read_config(source, model.trust_remote_code)
        fingerprint = source.revision or _fingerprint(_model_files(source.folder))
        if source.revision:
            fingerprint = hashlib.sha256(f"{source.name}@{source.revision}".encode()).hexdigest()[:32]
    _check_causal(source, config, model.trust_remote_code)
    try:
        skeleton = build_skeleton(config, model.trust_remote_code)
    except Exception as error:  # sizes that make no model, told by whichever layer is built first
        raise _refused(source, error) from error
    return _describe(source, config, skeleton, fingerprint, model.trust_remote_code)


def facts_of_skeleton(skeleton: PreTrainedModel, facts: ModelFacts) -> ModelFacts:
    """`facts`, of a changed copy of its skeleton: other shapes, the same source."""
    config = skeleton.config
    return _describe(facts.location, config, skeleton, facts.fingerprint, facts.trust_remote_code)


def _describe(
    source: Source,
    config: PretrainedConfig,
    skeleton: PreTrainedModel,
    fingerprint: str,
    trust_remote_code: bool,
) -> ModelFacts:
    import torch

    untyped: Any = skeleton
    embedding, head = untyped.get_input_embeddings(), untyped.get_output_embeddings()
    embeddings = {
        id(module.weight): module.weight.numel() for module in (embedding, head) if module is not None
    }
    text = config.get_text_config()
    linears = Counter(
        (name.rpartition(".")[2], module.in_features, module.out_features)
        for name, module in skeleton.named_modules()
        if isinstance(module, torch.nn.Linear)
    )
    return ModelFacts(
        source=source.name,
        kind=source.kind,
        config=config,
        parameters=sum(parameter.numel() for parameter in skeleton.parameters()),
        embedding_parameters=sum(embeddings.values()),
        layers=int(text.num_hidden_layers),
        hidden_size=int(text.hidden_size),
        vocab_size=int(text.vocab_size),
        tied=head is not None and head.weight is embedding.weight,
        linear_modules=tuple(LinearShape(*shape, count) for shape, count in linears.items()),
        parameter_shapes=tuple((name, tuple(value.shape)) for name, value in skeleton.named_parameters()),
        fingerprint=fingerprint,
        max_positions=int(getattr(text, "max_position_embeddings", None) or 1 << 20),
        trust_remote_code=trust_remote_code,
        location=source,
    )


def _read_config(source: Source, trust_remote_code: bool) -> PretrainedConfig:
    from transformers import AutoConfig, PretrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        found = PretrainedConfig.get_config_dict(source.load_name, revision=source.revision)
        plain: dict[str, Any] = dict(found[0])
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{KEY}: config.json of {source.name} cannot be read: {(str(error).splitlines() or ['?'])[0]}\n"
            "  The download or copy did not finish; fetch the model again."
        ) from error
    kind = plain.get("model_type")
    _check_config(source, plain)
    if (not isinstance(kind, str) or kind not in CONFIG_MAPPING) and not trust_remote_code:
        if "auto_map" in plain:
            raise UserError(
                f"{KEY}: {source.name} comes with its own Python code "
                f"({_own_code(plain['auto_map'])}), which "
                "would run on this machine.\n  If you trust it: model.trust_remote_code=true"
            )
        raise UserError(
            f"{KEY}: {source.name} is of model_type {kind!r}, which the installed transformers does not "
            "know.\n"
            "  pip install -U transformers, if the model is newer than it."
        )
    try:
        with quiet_libraries():
            config: PretrainedConfig = AutoConfig.from_pretrained(
                source.load_name, revision=source.revision, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # each class checks its own keys, and raises what it likes
        raise _refused(source, error) from error
    return config


def _own_code(auto_map: Any) -> str:
    """What a config.json, which may say anything there, calls its own class."""
    return str(auto_map.get("AutoConfig") if isinstance(auto_map, dict) else auto_map)[:80]


def _refused(source: Source, error: Exception) -> UserError:
    words = (str(error).strip().splitlines() or [""])[0]
    return UserError(
        f"{KEY}: config.json of {source.name} is refused by transformers: {type(error).__name__}: "
        f"{words[:200]}\n"
        "  Fetch the model again; if it is newer than transformers: pip install -U transformers"
    )


def _check_config(source: Source, plain: Mapping[str, Any]) -> None:
    """Refuse what a config.json must not decide: code from the hub, and models that no memory can hold."""
    for part in (plain, *(value for value in plain.values() if isinstance(value, dict))):
        for key in ("attn_implementation", "_attn_implementation"):
            if "/" in str(part.get(key)):  # transformers would fetch this kernel from the hub and run it
                raise UserError(
                    f"{KEY}: config.json of {source.name} asks for the attention code {part[key]!r} of the "
                    "hub, which would run on this machine.\n  Take the key out of that file"
                )
        for key in ("num_hidden_layers", "n_layer", "num_layers"):
            layers = part.get(key)
            if isinstance(layers, int) and layers > _MOST_LAYERS:
                raise UserError(
                    f"{KEY}: config.json of {source.name} says {key} {str(layers)[:20]}; at most "
                    f"{_MOST_LAYERS:,} are built.\n  Is the file damaged?  Fetch the model again."
                )


def _check_causal(source: Source, config: PretrainedConfig, trust_remote_code: bool) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{KEY}: {source.name} is an encoder-decoder model ({config.model_type}); only causal language "
            "models are "
            "trained.\n  Choose one that continues text, such as a Llama, Qwen, Mistral, Gemma or SmolLM."
        )
    architectures = config.architectures or []
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or (
        trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    )
    generates = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    if not known or (architectures and not any(name.endswith(generates) for name in architectures)):
        what = ", ".join(architectures) or config.model_type
        raise UserError(
            f"{KEY}: {source.name} is not a causal language model: its config.json says {what}.\n"
            "  Choose one whose architecture ends in ForCausalLM."
        )
    quantization = getattr(config, "quantization_config", None) or {}
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    if quantization and method != "bitsandbytes":
        raise UserError(
            f"{KEY}: {source.name} is already quantised with {method}; such weights cannot be trained here.\n"
            "  Give the unquantised model; to hold it in 4 bits: model.load_in_4bit=true"
        )


def _model_files(folder: Path | None) -> list[Path]:
    assert folder is not None
    kept = {".safetensors", ".bin", ".json"}
    return sorted(
        path for path in folder.iterdir() if path.suffix in kept and not path.name.startswith("tokenizer")
    )


def _fingerprint(files: Iterable[Path]) -> str:
    """Hash of names, sizes and three samples of each file: stable over copies, changed by a fine-tune."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            for position in (0, size // 2, max(0, size - _SAMPLE_BYTES)):
                file.seek(position)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]
