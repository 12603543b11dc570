"""Small tokenizers of every kind that GGUF files are written for, trained on a few sentences."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = ("gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2", "tekken")
SENTENCEPIECE = ("prepend", "always", "first", "gemma")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "Hello world, it's the 12345th day: we'll see what THEY'RE doing at 3.14159 o'clock.",
    "  two  spaces,\n\nnew lines\r\n\tand tabs   ",
    "naïve café, Überraschung! 你好,世界。 مرحبا हिन्दी 🙂👩‍👩‍👧",
    "def f(x):\n    return x ** 2  # 2024-01-01 http://example.org/a/b?c=d",
    "HelloWorld CamelCase iPhone XMLHttpRequest 1000000 12 123 1234",
] * 3
TEXTS = [
    *CORPUS[:5],
    "",
    " ",
    "a",
    " a  b   c ",
    "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
    "x<tool>y</tool> <tool> z",
    "ÀÉÎõü ßẞ ǅ ʰ ٣٤٥ ⅷ ½ x²",
    "'S 'LL don't DON'T",
    "a\u00a0b\u2003c\u200bd",
    "\n \n\n  \t\t x",
    "日本語テキスト123テスト",
    "!!??...---___///\n//",
]


def _byte_level(kind: str) -> Tokenizer:
    patterns = {"llama-bpe": LLAMA3, "smaug-bpe": LLAMA3, "qwen2": QWEN2, "tekken": TEKKEN}
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind in ("llama-bpe", "tekken")))
    if kind in patterns:
        first: list[Any] = [pre_tokenizers.Split(Regex(patterns[kind]), "isolated")]
    else:
        first = [pre_tokenizers.Digits(individual_digits=True)] if kind == "smollm" else []
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind not in patterns)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, last]) if first else last
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _sentencepiece(kind: str) -> Tokenizer:
    """Pieces are learned within words; every cut of a piece in two is a merge, as converters list them."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    learned.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=260, show_progress=False))
    pieces = sorted(learned.get_vocab(), key=learned.get_vocab().__getitem__)
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    numbers = {piece: index for index, piece in enumerate(vocabulary)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in numbers and piece[cut:] in numbers
    ]
    tokenizer = Tokenizer(models.BPE(numbers, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if kind == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind == "gemma":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def tokenizer(kind: str, *, bos: bool = False) -> PreTrainedTokenizerFast:
    """With a chat template; `<tool>` is an added token that is not special. `bos`: put before each text."""
    from tokenizers import processors

    backend = _byte_level(kind) if kind in BYTE_LEVEL else _sentencepiece(kind)
    start = "<s>" if kind in SENTENCEPIECE else "<|im_start|>"
    backend.add_special_tokens(
        [AddedToken(t, normalized=False) for t in ("<|im_start|>", "<|im_end|>", start)]
    )
    backend.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("</tool>", normalized=False)])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{start} $A",
            pair=f"{start} $A {start} $B",
            special_tokens=[(start, backend.token_to_id(start))],
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=start,
        eos_token="<|im_end|>",
        unk_token="<unk>" if kind in SENTENCEPIECE else None,
    )
    fast.chat_template = TEMPLATE
    return fast
