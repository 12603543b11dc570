"""What is said of keys that disagree."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """A sentence about `key`; `others` are further keys whose place in the file is worth showing."""

    key: str
    text: str
    others: tuple[str, ...] = ()
