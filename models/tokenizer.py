"""The tokenizer of a model, with the recipe's chat template and a pad token that is not the end of a turn."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..recipes.errors import UserError
from .facts import ModelFacts
from .quiet import quiet_libraries
from .source import KEY

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..recipes.model_data import ModelConfig

_PAD_LIKE = (r"pad", r"reserved|unused|extra", r"endoftext|unk")


def load_tokenizer(facts: ModelFacts, model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that comes with the model.

    No token is ever added: padding here goes by mask, and new ids would need new embedding rows.

    Raises:
        UserError: the model has no tokenizer, or the chat template cannot be read or parsed.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    with quiet_libraries():
        if facts.kind == "gguf":
            file = facts.location.gguf_file
            assert file is not None
            # AutoTokenizer parses the whole file with the gguf package only to find this class
            tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(
                file.parent, gguf_file=file.name
            )
        else:
            try:
                tokenizer = AutoTokenizer.from_pretrained(
                    facts.location.load_name,
                    revision=facts.location.revision,
                    trust_remote_code=facts.trust_remote_code,
                )
            except (OSError, ValueError, TypeError, ImportError) as error:
                reason = str(error).partition("\n")[0].partition(" from one of:")[0]  # a list would follow
                raise UserError(
                    f"{KEY}: {facts.source} has no tokenizer that can be loaded: {reason}\n"
                    "  Copy tokenizer.json and tokenizer_config.json of its base model beside the weights."
                ) from error
    if len(tokenizer) == 0:
        raise UserError(
            f"{KEY}: the tokenizer of {facts.source} is empty.\n  Copy tokenizer.json beside the weights."
        )
    tokenizer.name_or_path = facts.source
    if tokenizer.model_max_length > 1 << 30:  # transformers' "unknown" is 1e30
        tokenizer.model_max_length = facts.max_positions
    _choose_pad(tokenizer)
    if model.chat_template_path is not None:
        tokenizer.chat_template = _read_template(model.chat_template_path)
    return tokenizer


def _choose_pad(tokenizer: PreTrainedTokenizerBase) -> None:
    """A pad token other than the end token where there is one; trainers that mask by id need that."""
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    free = [token for token in special if token not in (tokenizer.eos_token, tokenizer.bos_token)]
    for pattern in _PAD_LIKE:
        for token in free:
            if re.search(pattern, token, re.IGNORECASE):
                tokenizer.pad_token = token
                return
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token


def _read_template(path: str) -> str:
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(
            f"model.chat_template_path: {path} does not exist.   Give a Jinja file, or leave the key out"
        )
    text = file.read_text("utf-8")
    try:
        # `generation` is a block that transformers adds; it does not change the text
        plain = re.sub(r"\{%-?\s*(generation|endgeneration)\s*-?%\}", "", text)
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except TemplateSyntaxError as error:
        raise UserError(
            f"model.chat_template_path: {path}:{error.lineno} is not a Jinja template: {error.message}\n"
            "  Correct the file, or leave the key out to use the tokenizer's own template."
        ) from error
    return text
