"""Every bad input ends with its exit code and a message that helps; docs/bad-input.md shows them all."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bad_input_cases import CASES, GROUPS
from bad_input_files import Case, run_case, sound_folder

PAGE = Path(__file__).parent.parent / "docs/bad-input.md"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `stock`, what is made once, and a folder for each case."""
    folder = tmp_path_factory.mktemp("bad-input")
    (folder / "stock").mkdir()
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))
def test_bad_input(case: Case, shared: Path) -> None:
    folder = sound_folder(shared / str(CASES.index(case)), shared / "stock")
    got = run_case(case, folder)
    assert got.code == case.code, got.message
    assert case.says in got.message
    assert "Traceback" not in got.message
    assert "Warning:" not in got.message
    assert len(got.message.splitlines()) <= case.longer, got.message


def test_the_page_shows_every_case() -> None:
    shown = re.findall(r"^\| ([^|]+?) \| (\d+) \|", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert shown == [(case.name, str(case.code)) for case in CASES], (
        "make it anew: benchmarks/bad_input.py --write"
    )


def test_names_are_unique_and_all_exit_codes_of_mistakes_appear() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 45
    assert {case.code for case in CASES} == {0, 2, 3, 4}
    assert len(GROUPS) == 7
