"""Which characters of a rendered conversation are trained: each assistant turn with its end mark, for any
template.

No template is asked to mark anything. A conversation is rendered again with its contents replaced by
sentinels; what stands around the sentinels is what the template adds. Three facts follow:

    start   a turn starts where the template's own generation prompt ends (what comes after it the model must
            write itself when it answers), or at its content if that prompt is not part of the text
    end     a turn ends behind its content
    mark    and includes what the template writes behind a last turn, up to its last special token

The layout of the sentinels depends only on the roles, so it is computed once for each sequence of roles; a
row costs one rendering. It is proved for every row: literals and contents (as they are, or stripped) must
reassemble to the rendered text, character by character. Where they do not (a template that drops earlier
thoughts, moves the system prompt, or renders tool calls), each turn is located by replacing it alone. A row
where that fails too is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from .formats import Messages
from .raw import RowProblem
from .template import render, render_all

Span = tuple[int, int]
"""First character, one past the last."""

PLAIN_KEYS = {"role", "content", "weight"}


@dataclass(frozen=True)
class Rendered:
    """One conversation as text, with the spans to train on."""

    text: str
    spans: list[Span]
    ends: bool
    """Whether the last turn ends with a special token; if not, nobody would teach the model to stop."""


@dataclass(frozen=True)
class _Layout:
    literals: list[str]
    """What stands before the first content, between two, and after the last."""
    before: list[int]
    """For each message: how many characters in front of its content the model must write itself."""
    behind: list[int]
    """For each message: how many characters behind its content are its end mark."""
    ends: bool


class TemplateMask:
    """Renders conversations with a tokenizer's chat template and finds the assistant's turns in the text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._layouts: dict[tuple[str, ...], _Layout | None] = {}
        added = getattr(tokenizer, "added_tokens_decoder", {})
        marks = {str(token.content) for token in added.values() if token.special}
        marks.update(str(token) for token in tokenizer.all_special_tokens)
        self._marks = sorted((mark for mark in marks if mark), key=len, reverse=True)

    def render(self, conversations: Sequence[Messages]) -> list[Rendered | RowProblem]:
        """Each conversation with its spans; a problem stands in the place of a row that has none."""
        done: list[Rendered | RowProblem] = []
        for messages, text in zip(conversations, render_all(self._tokenizer, conversations), strict=True):
            if isinstance(text, RowProblem):
                done.append(text)
                continue
            try:
                done.append(self._by_layout(messages, text) or self._by_turn(messages, text))
            except RowProblem as problem:
                done.append(problem)
        return done

    def _by_layout(self, messages: Messages, text: str) -> Rendered | None:
        if any(not PLAIN_KEYS.issuperset(message) for message in messages):
            return None
        roles = tuple(message["role"] for message in messages)
        if roles not in self._layouts:
            self._layouts[roles] = self._layout(roles)
        layout = self._layouts[roles]
        if layout is None:
            return None
        contents = _align(text, layout.literals, [message["content"] for message in messages])
        if contents is None:
            return None
        spans = [
            (start - layout.before[k], end + layout.behind[k])
            for k, (start, end) in enumerate(contents)
            if _is_trained(messages[k])
        ]
        return Rendered(text, spans, layout.ends)

    def _layout(self, roles: tuple[str, ...]) -> _Layout | None:
        """The template's own text around the messages of these roles; None if it treats sentinels unlike
        contents.
        """
        sentinels = [_sentinel(k) for k in range(len(roles))]
        skeleton = [
            {"role": role, "content": sentinel} for role, sentinel in zip(roles, sentinels, strict=True)
        ]
        try:
            text = render(self._tokenizer, skeleton)
        except RowProblem:
            return None
        literals, position = [], 0
        for sentinel in sentinels:
            found = text.find(sentinel, position)
            if found < 0 or text.count(sentinel) != 1:
                return None
            literals.append(text[position:found])
            position = found + len(sentinel)
        literals.append(text[position:])
        before, behind, ends = [0] * len(roles), [0] * len(roles), False
        start = 0
        for k, role in enumerate(roles):
            start += len(literals[k])
            if role == "assistant":
                before[k] = self._written_before(skeleton[:k], literals[k])
                behind[k], ends = self._end_mark(skeleton[: k + 1], sentinels[k], literals[k + 1])
            start += len(sentinels[k])
        return _Layout(literals, before, behind, ends)

    def _written_before(self, skeleton: Messages, literal: str) -> int:
        """How much of the literal between two contents is not part of the generation prompt.

        Only what follows the last content is compared: what comes earlier may be another text while the turn
        is the last one (a system prompt that moves into the last question).
        """
        try:
            prompt = render(self._tokenizer, skeleton, generation_prompt=True)
        except RowProblem:  # a template may refuse a part of a conversation
            return 0
        tail = prompt.rpartition(skeleton[-1]["content"])[2] if skeleton else prompt
        return len(literal) - len(tail) if literal.startswith(tail) else 0

    def _by_turn(self, messages: Messages, text: str) -> Rendered:
        """Locate each turn by rendering the conversation with that turn alone replaced."""
        spans: list[Span] = []
        ends = False
        for k, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            sentinel = _sentinel(k)
            replaced = [*messages[:k], {"role": "assistant", "content": sentinel}, *messages[k + 1 :]]
            probe = render(self._tokenizer, replaced)
            if probe.count(sentinel) != 1:
                raise _unaligned(k, "the template does not print this turn once")
            before, after = probe.split(sentinel)
            end = len(text) - len(after)
            if not text.endswith(after):
                raise _unaligned(k, "what follows it depends on its content")
            start = self._prompt(messages[:k], text)
            if start is None or start > end:
                start = len(before)
                if not text.startswith(before) or start > end:
                    raise _unaligned(k, "what precedes it depends on its content")
            if spans and start < spans[-1][1]:
                raise _unaligned(k, "it overlaps the turn before")
            behind, ends = self._end_mark(replaced[: k + 1], sentinel, after)
            if _is_trained(message):
                spans.append((start, end + behind))
        return Rendered(text, spans, ends)

    def _prompt(self, messages: Messages, text: str) -> int | None:
        """Length of the generation prompt after these messages, if the text starts with it."""
        try:
            prompt = render(self._tokenizer, messages, generation_prompt=True)
        except RowProblem:
            return None
        return len(prompt) if text.startswith(prompt) else None

    def _end_mark(self, through: Messages, sentinel: str, after: str) -> tuple[int, bool]:
        """Length of the end mark behind a turn, and whether there is a special token in it.

        `through` ends with that turn as `sentinel`; `after` is what follows it in the whole conversation.
        """
        try:
            _, _, alone = render(self._tokenizer, through).partition(sentinel)
        except RowProblem:
            alone = after
        same = alone[: _common(alone, after)]
        if length := self._through_last_mark(same):
            return length, True
        if same == alone:
            return len(same), False
        # A last turn has another mark (<|return|>, not <|end|>). Two marks in a row: an end, then a header.
        first = self._mark_at(after, 0)
        return (first, True) if first and self._mark_at(after, first) else (0, False)

    def _through_last_mark(self, text: str) -> int:
        return max((text.rfind(mark) + len(mark) for mark in self._marks if mark in text), default=0)

    def _mark_at(self, text: str, position: int) -> int:
        while position < len(text) and text[position].isspace():
            position += 1
        return next((position + len(mark) for mark in self._marks if text.startswith(mark, position)), 0)


def _common(one: str, other: str) -> int:
    """Number of characters that two texts have in common at their start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((k for k, (a, b) in pairs if a != b), min(len(one), len(other)))


def _sentinel(k: int) -> str:
    """Letters only, so that no template takes it for markup; no number is the start of another."""
    return f"Qzx{k:04d}xzQ"


def _is_trained(message: dict[str, object]) -> bool:
    return message["role"] == "assistant" and message.get("weight") != 0


def _unaligned(k: int, why: str) -> RowProblem:
    return RowProblem("cannot be matched to the chat template's text", f"message {k + 1}: {why}")


def _align(text: str, literals: Sequence[str], contents: Sequence[str]) -> list[Span] | None:
    """Places of the contents if literals and contents, each as it is or stripped, reassemble to the text."""
    spans: list[Span] = []
    position = 0
    for k, content in enumerate(contents):
        if not text.startswith(literals[k], position):
            return None
        position += len(literals[k])
        for form in (content, content.strip(), content.rstrip(), content.lstrip()):
            end = position + len(form)
            if text.startswith(form, position) and text.startswith(literals[k + 1], end):
                break
        else:
            return None
        spans.append((position, end))
        position = end
    return spans if text[position:] == literals[-1] else None
