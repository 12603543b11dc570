"""Figures that outlive a killed run: one JSON object on each line of a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gsm8k


class Results:
    """JSON lines in a file; its first line is the setting, so that figures of two settings never mix."""

    def __init__(self, path: Path, setting: dict[str, Any]) -> None:
        self.path = path
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            self.add({"kind": "setting", **setting})
        found = self.all("setting")[0]
        if found != {"kind": "setting", **setting}:
            sys.exit(f"{path} was begun with {found}.  Give the same, or another --results")

    def add(self, record: dict[str, Any]) -> None:
        """To the screen and the file."""
        print(json.dumps(record), flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def all(self, kind: str, **fields: Any) -> list[dict[str, Any]]:
        """The records with these fields."""
        wanted = {"kind": kind, **fields}
        found = gsm8k.rows(self.path)
        return [record for record in found if wanted.items() <= record.items()]
