"""Save a pruned model so that plain transformers loads it, with nothing of ours.

The class is the model's own where its config allows the shape, else one that computes the same (forms.py):
a Llama with a number of heads that does not divide its hidden size becomes a `mistral`, a Mistral or Qwen2
with compensating biases a `llama`. Beside the weights lies `pruning.json`: what was kept, by which method.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..recipes.errors import UserError
from .anatomy import Anatomy, read_anatomy
from .forms import choose_form

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECORD = "pruning.json"
_SHARED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range"),
    *("rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings"),
    *("rope_parameters", "attention_dropout", "dtype"),
)


def save_pruned(
    model: PreTrainedModel,
    folder: Path,
    *,
    tokenizer: Any = None,
    record: Mapping[str, Any] | None = None,
) -> str:
    """Write weights, config, generation config, tokenizer and `record`; the model type that was written.

    The files hold the weights' own type. The model is not changed. Writes into `folder` as save_pretrained
    does, not atomically.

    Raises:
        UserError: layers of different widths, or a shape that no plain class holds.
    """
    anatomy = read_anatomy(model)
    _check_even(anatomy)
    form = choose_form(anatomy)
    target = _shell(anatomy, form)
    state = model.state_dict()
    for name in set(target.state_dict()) - set(state):
        # llama's attention_bias switches on all four; those that qwen2 lacks are zero
        if not name.endswith(".bias"):
            raise KeyError(f"the weights lack {name}")
        weight = state[name.removesuffix("bias") + "weight"]
        state[name] = weight.new_zeros(weight.shape[0])
    target.load_state_dict(state, strict=True, assign=True)
    target.tie_weights()
    target.generation_config = model.generation_config
    target.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if record is not None:
        text = json.dumps(dict(record), indent=1, allow_nan=False)
        (Path(folder) / RECORD).write_text(text + "\n", encoding="utf-8")
    return form


def _check_even(anatomy: Anatomy) -> None:
    neurons = sorted({block.neurons for block in anatomy.blocks})
    groups = sorted({block.groups for block in anatomy.blocks})
    if len(neurons) > 1 or len(groups) > 1:
        raise UserError(
            "pruning: the layers differ in width and plain configs hold one: neurons "
            f"{neurons[0]} to {neurons[-1]}, groups of heads {groups[0]} to {groups[-1]}.\n"
            "  Prune with widths: uniform, or pad the model with zeros for evaluation: pad(model)."
        )


def _shell(anatomy: Anatomy, form: str) -> Any:
    """The class to save, without weights."""
    import transformers

    config: Any = anatomy.model.config
    kind: Any = type(anatomy.model)
    if form == anatomy.family:
        # made anew, so that the class's own rules are checked
        plain = type(config).from_dict(config.to_dict())
    else:
        given: dict[str, Any] = {name: getattr(config, name) for name in _SHARED}
        first = anatomy.blocks[0]
        if form == "mistral":
            kind = transformers.MistralForCausalLM
            plain = transformers.MistralConfig(**given, sliding_window=None)
        else:
            kind = transformers.LlamaForCausalLM
            given["attention_bias"] = first.q.bias is not None or first.o.bias is not None
            given["mlp_bias"] = first.down.bias is not None
            plain = transformers.LlamaConfig(**given)
    plain.dtype = anatomy.model.dtype
    with torch.device("meta"):
        return kind(plain)
