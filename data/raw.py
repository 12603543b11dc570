"""A row as it was read, before anyone knows what its columns mean."""

from typing import Any, NamedTuple


class RowProblem(Exception):
    """Why one row cannot be used.

    `reason` is the same text for all rows with the same problem (they are counted by it, and it completes the
    sentence "3 of 812 rows ..."); `detail` is about this row alone and may be empty.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class RawRow(NamedTuple):
    """One row of a source; `value` means nothing when there is a `problem`."""

    where: str
    """`chats.jsonl:4` for text files (the line it starts on), `chats.parquet row 4` for others; both count
    from 1.
    """
    value: Any
    problem: RowProblem | None = None


def alternating(turns: list[Any]) -> list[dict[str, Any]]:
    """Messages from a bare list of turns: the user speaks first, then the assistant, and so on."""
    return [
        {"role": "assistant" if number % 2 else "user", "content": turn} for number, turn in enumerate(turns)
    ]
