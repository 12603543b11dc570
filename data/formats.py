"""Formats: which columns of a source mean what, found out from its first rows, and each row as a list of
messages.

| format | columns |
|---|---|
| messages | `messages` (or `conversations`): a list of {role, content} |
| sharegpt | `conversations`: a list of {from, value} |
| prompt_completion | `prompt` and `completion`: text, or lists of messages |
| question_answer | `question` and `answer` |
| alpaca | `instruction`, `input`, `output`, `system`, `history` |
| text | `text` |
| preference | `chosen` and `rejected`, with a `prompt` or as whole conversations (see preferences.py) |
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..recipes.errors import UserError
from ..recipes.model_data import Columns, DataFormat
from .raw import RowProblem

Messages = list[dict[str, Any]]

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "bot": "assistant", "function_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
"""Spelling in the wild -> one of the four roles."""

KEPT_KEYS = ("tool_calls", "tool_call_id", "name", "reasoning_content", "weight")
"""What a message may carry besides role and content. All but `weight` are for the chat template; a weight of
0 keeps an assistant turn out of the loss, as in OpenAI's files.
"""


@dataclass(frozen=True)
class Format:
    """How to read the rows of one source."""

    name: DataFormat
    columns: Mapping[str, str]
    """Part of a row -> the column that holds it."""
    why: str


def choose_format(
    sample: Sequence[Mapping[str, Any]], *, format: DataFormat | None, columns: Columns | None, label: str
) -> Format:
    """Decide from the first rows of a source, or take what the recipe says.

    Raises:
        UserError: nothing fits, or a named column does not exist; the columns that do are listed.

    """
    present = columns_of(sample)
    if format == "preference":
        raise _not_for_sft(label)
    elif columns is not None:
        chosen = _named(columns, format)
    elif format is not None:
        chosen = Format(format, usual_columns(format, present), "data.format says so")
    else:
        chosen = _detect(sample, present, label)
    check_columns(chosen, present, label, "{prompt: ..., completion: ...}, {messages: ...} or {text: ...}")
    return chosen


def columns_of(sample: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns of some rows, in the order in which they first appear."""
    return list(dict.fromkeys(key for row in sample for key in row))


def check_columns(chosen: Format, present: Sequence[str], label: str, example: str) -> None:
    """Raise UserError for a column that no row has, and say how to name it: `example`."""
    for part, column in chosen.columns.items():
        if column not in present and part not in ("system", "input", "history"):
            near = difflib.get_close_matches(column, present, n=1)
            raise UserError(
                f"{label}  has no column {column!r} for the {part} of format {chosen.name} ({chosen.why}).\n"
                f"  its columns: {', '.join(present) or 'none'}"
                + (f"\n  Did you mean {near[0]!r} ?" if near else "")
                + f"\n  Name them: data.columns={example}"
            )


def _not_for_sft(label: str) -> UserError:
    return UserError(
        f"{label}  holds preferences (columns chosen, rejected), which sft does not train on.\n"
        "  To train on the pairs: objective=dpo\n"
        "  To train on the chosen answers: data.columns={prompt: prompt, completion: chosen}"
    )


def _named(columns: Columns, format: DataFormat | None) -> Format:
    given = {part: name for part, name in columns.model_dump().items() if name is not None}
    if "text" in given:
        name: DataFormat = "text"
    elif "messages" in given:
        name = "sharegpt" if format == "sharegpt" else "messages"
    else:
        name = "prompt_completion"
        given = {"prompt": "prompt", "completion": "completion"} | given
    return Format(name, given, "data.columns says so")


def usual_columns(format: DataFormat, present: Sequence[str]) -> dict[str, str]:
    """Part of a row -> the column that usually holds it, where there are several the one that is present."""
    system = {"system": "system"} if "system" in present else {}
    match format:
        case "messages":
            other = (
                "conversations" if "messages" not in present and "conversations" in present else "messages"
            )
            return {"messages": other} | system
        case "sharegpt":
            return {"messages": "conversations"} | system
        case "prompt_completion":
            return {"prompt": "prompt", "completion": "completion"} | system
        case "question_answer":
            return {"prompt": "question", "completion": "answer"} | system
        case "alpaca":
            optional = {name: name for name in ("input", "history") if name in present}
            return {"prompt": "instruction", "completion": "output"} | optional | system
        case "text":
            return {"text": "text"}
        case "preference":
            prompt = next((name for name in ("prompt", "question", "instruction") if name in present), None)
            before = {"prompt": prompt} if prompt else {}
            return before | {"chosen": "chosen", "rejected": "rejected"} | system


def _detect(sample: Sequence[Mapping[str, Any]], present: Sequence[str], label: str) -> Format:
    def have(*names: str) -> int:
        return sum(all(row.get(name) is not None for name in names) for row in sample)

    for column in ("messages", "conversations"):
        kinds = [_list_kind(row.get(column)) for row in sample]
        count = sum(kind is not None for kind in kinds)
        if count:
            name: DataFormat = "sharegpt" if kinds.count("from") > kinds.count("role") else "messages"
            keys = "{from, value}" if name == "sharegpt" else "{role, content}"
            system = {"system": "system"} if "system" in present else {}
            why = f"`{column}` is a list of {keys} in {count} of the first {len(sample)} rows"
            return Format(name, {"messages": column} | system, why)
    if have("chosen", "rejected"):
        raise _not_for_sft(label)
    pairs: list[tuple[DataFormat, tuple[str, ...]]] = [
        ("alpaca", ("instruction", "output")),
        ("prompt_completion", ("prompt", "completion")),
        ("question_answer", ("question", "answer")),
        ("text", ("text",)),
    ]
    for format, names in pairs:
        if count := have(*names):
            columns = " and ".join(f"`{name}`" for name in names)
            return Format(
                format,
                usual_columns(format, present),
                f"{columns} in {count} of the first {len(sample)} rows",
            )
    shown = ", ".join(repr(name[:40]) for name in present[:12]) or "none"
    raise UserError(
        f"{label}  has the columns {shown}: no known format.\n"
        "  Known: messages | conversations | prompt, completion | question, answer | instruction, output "
        "| text\n  Name yours: data.columns={prompt: ..., completion: ...}, {messages: ...} or {text: ...}"
    )


def _list_kind(value: Any) -> str | None:
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return next((key for key in ("role", "from") if key in value[0]), None)
    return None


def normalise(row: Any, format: Format) -> Messages | str:
    """One row as messages (ending with an assistant turn), or as text for the format `text`.

    Messages after the last assistant turn carry no loss and are cut off.

    Raises:
        RowProblem: with the reason that the row is counted under.

    """
    if not isinstance(row, Mapping):
        raise RowProblem("are not objects with columns", f"{type(row).__name__}")
    columns = format.columns
    if format.name == "text":
        return text_of(row, columns["text"])
    if "messages" in columns:
        messages = messages_of(row.get(columns["messages"]), columns["messages"])
    else:
        messages = _pair(row, columns, format.name)
    system = row.get(columns["system"]) if "system" in columns else None
    if (
        isinstance(system, str)
        and system.strip()
        and not any(message["role"] == "system" for message in messages)
    ):
        messages.insert(0, {"role": "system", "content": system})
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise RowProblem("have no assistant turn")
    return messages


def text_of(row: Mapping[str, Any], column: str) -> str:
    """The text in a column. Raises RowProblem when it is none, or empty."""
    value = row.get(column)
    if not isinstance(value, str):
        raise RowProblem(f"have a `{column}` that is not text", type(value).__name__)
    if not value.strip():
        raise RowProblem(f"have an empty `{column}`")
    return value


def _pair(row: Mapping[str, Any], columns: Mapping[str, str], format: str) -> Messages:
    prompt, completion = columns["prompt"], columns["completion"]
    if isinstance(row.get(prompt), list) or isinstance(row.get(completion), list):
        # Conversational prompt and completion: only the completion is learned.
        before = (
            messages_of(row.get(prompt), prompt)
            if isinstance(row.get(prompt), list)
            else _user(text_of(row, prompt))
        )
        answer = row.get(completion)
        after = (
            messages_of(answer, completion) if isinstance(answer, list) else _answer(text_of(row, completion))
        )
        return [m | {"weight": 0} if m["role"] == "assistant" else m for m in before] + after
    text = text_of(row, prompt)
    messages: Messages = []
    if format == "alpaca":
        extra = row.get(columns.get("input", ""))
        if isinstance(extra, str) and extra.strip():
            text = f"{text}\n{extra}"
        for pair in row.get(columns.get("history", "")) or ():
            if not (
                isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(t, str) for t in pair)
            ):
                raise RowProblem("have a `history` that is not a list of [prompt, answer]")
            messages += _user(pair[0]) + _answer(pair[1])
    return messages + _user(text) + _answer(text_of(row, completion))


def _user(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def _answer(text: str) -> Messages:
    return [{"role": "assistant", "content": text}]


def messages_of(value: Any, column: str) -> Messages:
    """A list of messages in our spelling. Raises RowProblem when the value of `column` is none."""
    if not isinstance(value, list):
        raise RowProblem(f"have a `{column}` that is not a list", type(value).__name__)
    messages: Messages = []
    for number, item in enumerate(value, 1):
        if not isinstance(item, Mapping):
            raise RowProblem(
                "have a message that is not an object", f"message {number} is a {type(item).__name__}"
            )
        given = item.get("role", item.get("from"))
        role = ROLES.get(given.strip().lower()) if isinstance(given, str) else None
        if role is None:
            raise RowProblem(
                "have an unknown role", f"message {number}: {given!r}, allowed: system, user, assistant, tool"
            )
        kept = {key: item[key] for key in KEPT_KEYS if item.get(key) is not None}
        content = _content(item.get("content", item.get("value")), number, optional="tool_calls" in kept)
        if not content.strip() and "tool_calls" not in kept:
            if role == "system":  # an empty system field is how many files say "none"
                continue
            raise RowProblem("have an empty message", f"message {number}, {role}")
        messages.append({"role": role, "content": content, **kept})
    return messages


def _content(value: Any, number: int, *, optional: bool) -> str:
    """The text of a message; a list of text parts is joined."""
    if isinstance(value, str):
        return value
    if value is None and optional:
        return ""
    if isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
        others = {str(part.get("type")) for part in value if not isinstance(part.get("text"), str)}
        if not others:
            return "".join(part["text"] for part in value)
        raise RowProblem("have content that is not text", f"message {number}: {', '.join(sorted(others))}")
    raise RowProblem("have content that is not text", f"message {number} is a {type(value).__name__}")
