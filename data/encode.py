"""Rows as token ids with the mask of what is trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ..recipes.errors import UserError
from .formats import Messages
from .mask import Rendered, Span, TemplateMask
from .raw import RowProblem
from .template import has_template, plain_parts, plain_prompt_ids


@dataclass(frozen=True)
class Encoded:
    """One row. `trained[i]`: token i is a target of the loss; the first token has nothing before it and never
    is. `second`: where the rejected conversation of a pair starts.
    """

    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]
    second: int | None = None

    @property
    def longest(self) -> int:
        """Tokens of its longest conversation, which is what a limit is for."""
        return max(self.second, len(self.tokens) - self.second) if self.second else len(self.tokens)


class RowEncoder:
    """Tokenises rows in batches."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, assistant_only_loss: bool) -> None:
        """Raise UserError when the tokenizer lacks what masks and ends of turns need."""
        if not tokenizer.is_fast:
            raise UserError(
                f"the tokenizer {type(tokenizer).__name__} does not say which characters a token stands for, "
                "which the mask of trained tokens needs.\n"
                "  Use a model whose folder has a tokenizer.json"
            )
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no eos_token, so the model could never learn to stop.\n"
                "  Set eos_token in its tokenizer_config.json"
            )
        self._tokenizer = tokenizer
        self._assistant_only = assistant_only_loss
        self._mask = TemplateMask(tokenizer) if has_template(tokenizer) else None
        self.eos_added = 0
        """Rows to whose last turn the end-of-text token was added because the chat template puts no mark
        there.
        """

    def encode(self, rows: Sequence[Messages | str]) -> list[Encoded | RowProblem]:
        """Tokens and mask of each row; a problem stands in the place of a row that has none.

        Raises:
            UserError: several turns, and no chat template.

        """
        done: list[Encoded | RowProblem] = [RowProblem("") for _ in rows]
        chats = [k for k, row in enumerate(rows) if not isinstance(row, str)]
        texts = [k for k, row in enumerate(rows) if isinstance(row, str)]
        conversations: list[Messages] = [row for row in rows if not isinstance(row, str)]
        encode = self._plain if self._mask is None else self._templated
        for k, encoded in zip(chats, encode(conversations), strict=True):
            done[k] = encoded
        for k, encoded in zip(texts, self._texts([row for row in rows if isinstance(row, str)]), strict=True):
            done[k] = encoded
        return done

    def _templated(self, conversations: Sequence[Messages]) -> list[Encoded | RowProblem]:
        assert self._mask is not None
        if not conversations:
            return []
        rendered = self._mask.render(conversations)
        texts = [row.text for row in rendered if isinstance(row, Rendered)]
        # The template has written every special token, the first one too.
        encodings = iter(self._tokenizer(texts, add_special_tokens=False).encodings if texts else ())
        done: list[Encoded | RowProblem] = []
        for row in rendered:
            done.append(self._masked(row, next(encodings)) if isinstance(row, Rendered) else row)
        return done

    def _masked(self, row: Rendered, encoding: Any) -> Encoded:
        tokens = np.array(encoding.ids, dtype=np.int32)
        trained = np.zeros(len(tokens), dtype=np.bool_)
        for span in row.spans:
            first, end = token_span(encoding, span)
            trained[first:end] = True
        if not row.ends:
            tokens = np.append(tokens, np.int32(self._tokenizer.eos_token_id))
            trained = np.append(trained, bool(row.spans))
            self.eos_added += 1
        return self._finish(tokens, trained)

    def _finish(self, tokens: NDArray[np.int32], trained: NDArray[np.bool_]) -> Encoded:
        if not self._assistant_only:
            trained[:] = True
        trained[:1] = False
        return Encoded(tokens, trained)

    def _plain(self, conversations: Sequence[Messages]) -> list[Encoded | RowProblem]:
        """Prompt and answer are tokenised apart, as they will be when the model answers."""
        if not conversations:
            return []
        parts = [plain_parts(messages) for messages in conversations]
        answers = self._tokenizer([answer for _, answer in parts], add_special_tokens=False)["input_ids"]
        done: list[Encoded | RowProblem] = []
        for messages, (prompt, _), answer in zip(conversations, parts, answers, strict=True):
            before = plain_prompt_ids(self._tokenizer, prompt)
            tokens = np.array([*before, *answer, self._tokenizer.eos_token_id], dtype=np.int32)
            trained = np.arange(len(tokens)) >= len(before)
            if messages[-1].get("weight") == 0:
                trained[:] = False
            done.append(self._finish(tokens, trained))
        return done

    def _texts(self, texts: Sequence[str]) -> list[Encoded]:
        """All of a text is trained, and where it ends."""
        done = []
        for text in texts:
            tokens = np.array(
                [*plain_prompt_ids(self._tokenizer, text), self._tokenizer.eos_token_id], dtype=np.int32
            )
            trained = np.ones(len(tokens), dtype=np.bool_)
            trained[0] = False
            done.append(Encoded(tokens, trained))
        return done


def token_span(encoding: Any, span: Span) -> Span:
    """Tokens that hold any character of a span of the text: first, one past the last; empty when there are
    none.

    A token across the edge is inside: it cannot be predicted without the characters that are. Characters that
    belong to no token (spaces that a tokenizer drops) are passed over.
    """
    start, end = span
    first = next((t for c in range(start, end) if (t := encoding.char_to_token(c)) is not None), None)
    if first is None:
        return 0, 0
    last: int = next(t for c in range(end - 1, start - 1, -1) if (t := encoding.char_to_token(c)) is not None)
    # One character may be several tokens (bytes of an emoji); the look-up gives the first of them.
    while last + 1 < len(encoding) and (chars := encoding.token_to_chars(last + 1)) and chars[0] < end:
        last += 1
    return first, last + 1
