"""Save a pruned model so that transformers loads it without this package.

`uniform` files are read by a plain class of transformers: the model's own where its config allows the shape,
else one that computes the same (forms.py): a Llama with a number of heads that does not divide its hidden
size becomes a `mistral`, a Mistral or Qwen2 with compensating biases a `llama`. `per_layer` holds any widths,
with model code of its own (per_layer.py). Beside the weights lies `pruning.json`: what was kept, by which
method.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from ..recipes.errors import UserError
from .anatomy import Anatomy, read_anatomy
from .forms import choose_form
from .pad import pad
from .per_layer import save_per_layer, stock, stock_values

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Form = Literal["uniform", "per_layer", "padded"]
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
    form: Form = "uniform",
) -> str:
    """Write weights, config, generation config, tokenizer and `record`; the model type that was written.

    `uniform` needs layers of one width. `per_layer` holds any, and is loaded with `trust_remote_code=True` or
    by `load_pruned`. `padded` fills a copy of the model with zeros up to the widest layer (pad.py), which is
    plain again: twice the memory while it is written.

    The files hold the weights' own type. The model is not changed. Writes into `folder` as save_pretrained
    does, not atomically.

    Raises:
        UserError: another form, layers of different widths, or a shape that no plain class holds.
    """
    if form not in get_args(Form):
        raise UserError(f"pruning.form: {form} is not one of {', '.join(get_args(Form))}.")
    if form == "padded":
        model = copy.deepcopy(model)
        pad(model)
    anatomy = read_anatomy(model)
    written = save_per_layer(anatomy, folder) if form == "per_layer" else _save_plain(anatomy, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if record is not None:
        text = json.dumps(dict(record), indent=1, allow_nan=False)
        (Path(folder) / RECORD).write_text(text + "\n", encoding="utf-8")
    return written


def _save_plain(anatomy: Anatomy, folder: Path) -> str:
    model = anatomy.model
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
    return form


def _check_even(anatomy: Anatomy) -> None:
    neurons = sorted({block.neurons for block in anatomy.blocks})
    groups = sorted({block.groups for block in anatomy.blocks})
    if any(block.is_narrow for block in anatomy.blocks):
        raise UserError(
            "pruning.form: heads of q and k, or of v, were narrowed and plain configs hold one head_dim for "
            "all three.\n  Save with form: per_layer, or padded for evaluation."
        )
    if len(neurons) > 1 or len(groups) > 1:
        raise UserError(
            "pruning: the layers differ in width and plain configs hold one: neurons "
            f"{neurons[0]} to {neurons[-1]}, groups of heads {groups[0]} to {groups[-1]}.\n"
            "  Prune with widths: uniform, or save with form: per_layer, or padded for evaluation."
        )


def _shell(anatomy: Anatomy, form: str) -> Any:
    """The class to save, without weights."""
    import transformers

    config: Any = anatomy.model.config
    kind: Any = stock(type(anatomy.model))
    first = anatomy.blocks[0]
    counts = {  # configs of form per_layer may declare more heads than there are
        "num_key_value_heads": first.groups,
        "num_attention_heads": first.groups * first.heads_per_group,
        "intermediate_size": first.neurons,
    }
    if form == anatomy.family:
        # made anew, so that the class's own rules are checked
        plain = stock(type(config)).from_dict({**stock_values(config), **counts})
    else:
        given: dict[str, Any] = {name: getattr(config, name) for name in _SHARED} | counts
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
