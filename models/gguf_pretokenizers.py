"""Names that llama.cpp has for ways of cutting text, recognised by the structure of tokenizer.json.

Byte-level vocabularies: the chain of pre-tokenizers, with the regular expression of each split, is a key of
`_NAMES`. A chain that is not there is refused.
"""

from __future__ import annotations

import json
from typing import Any, Final

from ..recipes.errors import UserError

_ENGLISH: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3: Final = rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2: Final = rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN: Final = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS_ITSELF: Final = ("ByteLevel", True)
_BYTES_ONLY: Final = ("ByteLevel", False)
_DIGITS: Final = ("Digits", True)
# (chain, ignore_merges) -> name. With ignore_merges a piece of the vocabulary is taken whole.
_NAMES: Final[dict[tuple[tuple[Any, ...], bool], str]] = {
    ((_SPLITS_ITSELF,), False): "gpt-2",
    ((_DIGITS, _SPLITS_ITSELF), False): "smollm",
    ((("Split", _LLAMA3), _BYTES_ONLY), True): "llama-bpe",
    ((("Split", _LLAMA3), _BYTES_ONLY), False): "smaug-bpe",
    ((("Split", _QWEN2), _BYTES_ONLY), False): "qwen2",
    ((("Split", _TEKKEN), _BYTES_ONLY), True): "tekken",
}


def byte_level_name(parts: dict[str, Any], notes: list[str]) -> str:
    """`tokenizer.ggml.pre` of a byte-level BPE, from the parts of tokenizer.json; adds to `notes`.

    Raises:
        UserError: the chain has no name, or the text is changed before it is cut.
    """
    normalizer = parts.get("normalizer")
    if normalizer is not None and normalizer != {"type": "NFC"}:
        raise _unknown("normalizer", normalizer)
    given = parts.get("pre_tokenizer") or {"type": "nothing"}
    links = given["pretokenizers"] if given["type"] == "Sequence" else [given]
    chain = tuple(_link(link) for link in links)
    name = _NAMES.get((chain, bool(parts["model"].get("ignore_merges"))))
    if name is None:
        raise _unknown("pre_tokenizer", given)
    if name == "tekken":
        notes.append(
            "llama.cpp's tekken leaves combining marks out: scripts such as Devanagari get other ids"
        )
    if normalizer is not None:
        notes.append("text is not brought to NFC in llama.cpp: decomposed accents get other ids")
    return name


def _link(link: dict[str, Any]) -> Any:
    """What of a pre-tokenizer decides how text is cut; the link itself where it has no name here."""
    match link["type"]:
        case "ByteLevel" if not link["add_prefix_space"]:
            return "ByteLevel", link["use_regex"]
        case "Digits":
            return "Digits", link["individual_digits"]
        case "Split" if "Regex" in link["pattern"]:
            # the expressions match every character: keeping the matches alone is the same as isolating them
            if (link["behavior"], link["invert"]) in (("Isolated", False), ("Removed", True)):
                return "Split", link["pattern"]["Regex"]
    return json.dumps(link, sort_keys=True)


def sentencepiece_prefix(parts: dict[str, Any], has_template: bool, notes: list[str]) -> bool:
    """`add_space_prefix` of a BPE with byte fallback, whose spaces become ▁; adds to `notes`.

    Raises:
        UserError: the text is changed or cut in another way.
    """
    normalizer, cutter = parts.get("normalizer"), parts.get("pre_tokenizer")
    steps = [] if normalizer is None else [normalizer]
    if normalizer is not None and normalizer["type"] == "Sequence":
        steps = normalizer["normalizers"]
    prefix = replaced = False
    for step in steps:
        if step == {"type": "Prepend", "prepend": "▁"}:
            prefix = True
        elif step == {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
            replaced = True
        else:
            raise _unknown("normalizer", step)
    if cutter is None or (replaced and cutter["type"] == "Split" and cutter["pattern"] == {"String": " "}):
        if not replaced:
            raise _unknown("normalizer", normalizer)
        return prefix
    if cutter["type"] != "Metaspace" or cutter["replacement"] != "▁" or cutter.get("split", True) or steps:
        raise _unknown("pre_tokenizer", cutter)
    if cutter["prepend_scheme"] == "first":
        notes.append(
            "the tokenizer puts a space before the beginning of a text only; llama.cpp does it after each "
            f"special token too, or never: {'never, as chats need' if has_template else 'after each'}"
        )
        return not has_template
    if cutter["prepend_scheme"] == "always":
        notes.append(
            "text that begins with a space (at its start or after an added token) gets one more in llama.cpp"
        )
    return bool(cutter["prepend_scheme"] == "always")


def _unknown(what: str, found: Any) -> UserError:
    shown = json.dumps(found, ensure_ascii=False)
    known = ", ".join(sorted(_NAMES.values()))
    return UserError(
        f"gguf: llama.cpp has no name for this {what} of tokenizer.json: {shown[:300]}\n"
        f"  Known: the ways of {known}, and SentencePiece's with byte fallback.\n"
        "  Such a model stays with transformers: --to merged"
    )
