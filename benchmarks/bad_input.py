"""The bad input table: broken recipes, data, models, run directories and budgets, and what each one brings.

The cases are those of tests/bad_input_cases.py. Prints exit code and message of each, and exits with 1 when
one is not as expected; `--write` also writes docs/bad-input.md.
"""

from __future__ import annotations

import argparse
import html
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from bad_input_cases import CASES, GROUPS  # noqa: E402  # found through the line above
from bad_input_files import Case, Outcome, run_case, sound_folder  # noqa: E402

PAGE = ROOT / "docs/bad-input.md"
SHOWN_LINES = 6
HEAD = """\
# Bad input

Each row is a mistake that was made on purpose, the exit code of the command, and what it said (on standard
error; of commands that succeed, the lines that matter). 0 means that the run goes on and says so, 2 that the
mistake is the user's, 3 that something does not fit, 4 that training diverged. None shows a traceback.

Made by `python benchmarks/bad_input.py --write`; `tests/test_bad_input.py` runs every row.
"""


def main() -> int:
    """Run all cases; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write docs/bad-input.md")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    given = parser.parse_args()
    wrong = 0
    page = [HEAD]
    with tempfile.TemporaryDirectory() as made:
        (Path(made) / "stock").mkdir()
        for group, cases in GROUPS.items():
            page += [f"\n## {group}\n", "| mistake | exit code | message |", "|---|---|---|"]
            for case in cases:
                if given.only in case.name:
                    got, seconds = _run(case, Path(made))
                    wrong += not _is_right(case, got)
                    mark = "  " if _is_right(case, got) else "! "
                    print(f"{mark}{case.name}  [{got.code}]  {seconds:.1f} s", flush=True)
                    print("".join(f"      {line}\n" for line in _lines(case, got)), flush=True)
                    page.append(_row(case, got))
    print(f"{len(CASES)} cases; {wrong} of those run are not as expected")
    if given.write and not given.only and not wrong:
        PAGE.write_text("\n".join(page) + "\n", encoding="utf-8")
        print(f"wrote {PAGE.relative_to(ROOT)}")
    return int(wrong > 0)


def _run(case: Case, made: Path) -> tuple[Outcome, float]:
    began = time.monotonic()
    got = run_case(case, sound_folder(made / str(CASES.index(case)), made / "stock"))
    return got, time.monotonic() - began


def _is_right(case: Case, got: Outcome) -> bool:
    return got.code == case.code and case.says in got.message and "Traceback" not in got.message


def _lines(case: Case, got: Outcome) -> list[str]:
    """The message; of a command that succeeded, the lines about the case."""
    lines = [line.rstrip() for line in got.message.splitlines()]
    if got.code == 0:
        lines = [line for line in lines if case.says in line or "resum" in line or "--fresh" in line]
    return lines if got.code else lines[:SHOWN_LINES]


def _row(case: Case, got: Outcome) -> str:
    shown = [
        html.escape(line, quote=False).replace("|", "&#124;").replace("  ", "&nbsp; ").replace("`", "&#96;")
        for line in _lines(case, got)
        if not line.startswith(("╭", "╰"))
    ]
    return f"| {case.name} | {got.code} | {'<br>'.join(shown)} |"


if __name__ == "__main__":
    sys.exit(main())
