"""A tokenizer in llama.cpp's terms: pieces, their types, merges or scores, and how text is cut before them.

llama.cpp has the code of each way of cutting text under a name. Here the name follows from the structure of
tokenizer.json (`gguf_pretokenizers.py`); a structure without a name is refused, since another name would give
other ids without a word. Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any, Final

from ..recipes.errors import UserError
from .gguf_pretokenizers import byte_level_name, sentencepiece_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # gguf.TokenType
_BYTE: Final = re.compile(r"<0x[0-9A-F]{2}>")
_NEVER: Final = -1e6  # score of a piece that no merge makes


@dataclass(frozen=True)
class Vocabulary:
    """What goes under `tokenizer.ggml`: a piece and type each row; merges for gpt2, scores for llama."""

    model: str
    pre: str
    pieces: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    special: dict[str, int] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)
    template: str | list[dict[str, str]] | None = None
    notes: tuple[str, ...] = ()


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, rows: int) -> Vocabulary:
    """The vocabulary of a model with `rows` rows of embedding.

    Raises:
        UserError: no tokenizer.json behind it, another kind than BPE, a way of cutting text that llama.cpp
            has no name for, or more tokens than rows.
    """
    plain: Any = tokenizer
    if getattr(plain, "backend_tokenizer", None) is None:
        raise UserError(
            f"gguf: the tokenizer {type(tokenizer).__name__} has no tokenizer.json behind it.\n"
            "  Load it as a fast one: AutoTokenizer.from_pretrained(FOLDER)"
        )
    parts: dict[str, Any] = json.loads(plain.backend_tokenizer.to_str())
    model = parts["model"]
    if model["type"] != "BPE":
        raise UserError(
            f"gguf: the tokenizer is of the kind {model['type']}; only BPE is written (byte-level, or "
            "SentencePiece with byte fallback).\n  Such a model stays with transformers: --to merged"
        )
    _check_plain(model)
    notes: list[str] = []
    flags = _ends(plain, notes)
    if model.get("byte_fallback"):
        flags["add_space_prefix"] = sentencepiece_prefix(parts, plain.chat_template is not None, notes)
        kind, pre = "llama", "default"
    else:
        kind, pre = "gpt2", byte_level_name(parts, notes)
    pieces, types = _pieces(plain, parts, rows, spaced=kind == "llama")
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
    scores: list[float] = []
    if kind == "llama":
        scores = _scores(model["vocab"], merges, rows, parts["added_tokens"], notes)
    return Vocabulary(
        model=kind,
        pre=pre,
        pieces=pieces,
        types=types,
        merges=[" ".join(pair) for pair in merges] if kind == "gpt2" else [],
        scores=scores,
        special=_special(plain),
        flags=flags,
        template=_template(plain.chat_template),
        notes=tuple(notes),
    )


def _check_plain(model: dict[str, Any]) -> None:
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UserError(
                f"gguf: the tokenizer's BPE has {key} {model[key]!r}, which llama.cpp does not know.\n"
                "  Such a model stays with transformers: --to merged"
            )


def _pieces(tokenizer: Any, parts: dict[str, Any], rows: int, *, spaced: bool) -> tuple[list[str], list[int]]:
    pieces = [f"[PAD{index}]" for index in range(rows)]
    types = [UNUSED] * rows
    added = {entry["id"]: entry for entry in parts["added_tokens"]}
    highest = max([*parts["model"]["vocab"].values(), *added])
    if highest >= rows:
        raise UserError(
            f"gguf: the tokenizer has a token {highest}, and the model's embedding {rows} rows.\n"
            "  Give the tokenizer that belongs to this model, or resize: model.resize_token_embeddings"
        )
    for piece, index in parts["model"]["vocab"].items():
        pieces[index] = piece
        types[index] = BYTE if spaced and _BYTE.fullmatch(piece) else NORMAL
    for index, entry in added.items():
        # llama.cpp looks for these in the text itself, where spaces are spaces
        pieces[index] = entry["content"].replace("▁", " ") if spaced else entry["content"]
        types[index] = CONTROL if entry["special"] else USER_DEFINED
    if spaced and tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = UNKNOWN
    return pieces, types


def _scores(
    vocabulary: dict[str, int],
    merges: list[tuple[str, ...]],
    rows: int,
    added: list[dict[str, Any]],
    notes: list[str],
) -> list[float]:
    """Minus the rank of the first merge that makes the piece.

    llama.cpp joins the two neighbours whose joined piece has the highest score; tokenizer.json lists pairs.
    The two agree if each way of cutting a piece in two pieces is a merge, which is counted here.
    """
    scores = [_NEVER] * rows
    known = set(merges)
    for rank, (left, right) in reversed(list(enumerate(merges))):
        scores[vocabulary[left + right]] = -float(rank)
    whole = {entry["content"] for entry in added}
    loose = 0
    for piece in vocabulary:
        if len(piece) < 2 or piece in whole or _BYTE.fullmatch(piece):
            continue
        cuts = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        loose += any(pair not in known and pair[0] in vocabulary and pair[1] in vocabulary for pair in cuts)
    if loose:
        notes.append(
            f"{loose} of {len(vocabulary)} pieces can be put together in ways that tokenizer.json does not "
            "list: llama.cpp may cut rare texts otherwise"
        )
    return scores


def _ends(tokenizer: Any, notes: list[str]) -> dict[str, bool]:
    """Whether bos is put before a text and eos after it, from what the tokenizer does."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    for first, last in product((False, True), repeat=2):
        if full == [tokenizer.bos_token_id] * first + bare + [tokenizer.eos_token_id] * last:
            break
    else:
        raise UserError(
            f"gguf: the tokenizer makes {full} of 'a' with special tokens and {bare} without; llama.cpp can "
            "add one bos token before and one eos token after.\n"
            "  Correct bos_token, eos_token or the post-processor of the tokenizer, and export again."
        )
    if any(token.lstrip or token.rstrip for token in tokenizer.added_tokens_decoder.values()):
        notes.append("tokens that swallow spaces beside them (lstrip, rstrip) do not do so in llama.cpp")
    return {"add_bos_token": first, "add_eos_token": last}


def _special(tokenizer: Any) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found = {key: getattr(tokenizer, f"{name}_token_id") for name, key in names.items()}
    return {f"{key}_token_id": int(value) for key, value in found.items() if value is not None}


def _template(template: Any) -> str | list[dict[str, str]] | None:
    if isinstance(template, dict):
        return [{"name": name, "template": text} for name, text in template.items()]
    return template or None
