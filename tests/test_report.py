"""report.html: complete, offline, safe against text from models, and right about what it says."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_fakes import Fake, write_run
from shoestring.recipes.errors import UserError
from shoestring.train.report import render, write_report
from shoestring.train.report_data import read_run
from shoestring.train.tracking import EventsLog

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"' onload=alert(3) </title></style>{{body}}"


class Page(HTMLParser):
    """Elements, their attributes and the text, as a browser would see them; checks that tags match."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    def titles(self) -> list[str]:
        return [str(attrs["aria-label"]) for tag, attrs in self.elements if tag == "svg"]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    write_run(root, Fake())
    write_run(root, Fake("rank-64", seed=1, rank=64, rate=3e-4, floor=2.1))
    write_run(root, Fake("gpu", seed=2, steps=300, finished=False, watts=True, gpu=True))
    return root


def page(*paths: Path) -> Page:
    return Page(render([read_run(path) for path in paths]))


def test_one_run_has_everything(folder: Path) -> None:
    shown = page(folder / "cpu-demo")
    assert shown.titles() == [
        "Loss", "Learning rate", "Progress through the budget", "Throughput, tokens per second",
        "Gradient norm", "Memory",
    ]  # fmt: skip
    for words in (
        "cpu-demo", "done, time budget used", "3.412 → 2.041", "-40 %", "709 k", "in 180 steps", "4.97 k/s",
        "1.98 GB", "predicted 1.89 GB", "4.88 M of 135 M parameters trained (3.6 %)", "AMD EPYC",
        "activations 731 MB", "host memory, 24.6 GB available", "1.98 GB (+5 %)",
        "load 9.1 s", "train 2 min", "709 k of 900 k",
        "What is the capital of France?", "Why did the robot cross the road?", "(no text)",
        "3 of 812 rows have no assistant turn", "would leave 71 % of padded batches empty",
        "learning_rate: 0.001 # cpu-demo.yaml:13", "shoestring train cpu-demo budget=3min", "2.13.0",
    ):  # fmt: skip
        assert words in shown.text, words


def test_an_unfinished_run_has_a_report_too(folder: Path) -> None:
    shown = page(folder / "gpu")
    assert "not finished when this was written" in shown.text
    assert "Power" in shown.titles()
    assert "device memory" in shown.text
    assert "Budget used" not in shown.text
    assert "NVIDIA H200" in shown.text


@pytest.mark.parametrize("kept", ["metrics.jsonl", "events.jsonl", "plan.json", "summary.json"])
def test_any_single_file_is_enough(folder: Path, tmp_path: Path, kept: str) -> None:
    shutil.copy(folder / "cpu-demo" / kept, tmp_path / kept)
    assert tmp_path.name in page(tmp_path).text


def test_torn_files_do_not_stop_it(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "cpu-demo", tmp_path / "torn")
    for path in (tmp_path / "torn").iterdir():
        data = path.read_bytes()
        path.write_bytes(data[: len(data) * 2 // 3])
    assert "Loss" in page(tmp_path / "torn").titles()


def test_no_run_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        write_report([tmp_path], tmp_path / "report.html")
    assert str(caught.value) == (
        f"{tmp_path} holds no run: there is no metrics.jsonl, events.jsonl, summary.json or plan.json.\n"
        "  Give the directory that `shoestring train` wrote to, for example runs/NAME."
    )
    assert not (tmp_path / "report.html").exists()


def test_several_runs_are_laid_over_each_other(folder: Path) -> None:
    shown = page(folder / "cpu-demo", folder / "rank-64")
    assert "2 runs side by side" in shown.text
    assert "adapter.r 16 64" in shown.text
    assert "optimizer.learning_rate 1e-3 3e-4" in shown.text
    assert "schedule.name" not in shown.text  # equal, so no difference
    names = [attrs.get("data-name") for tag, attrs in shown.elements if tag == "polyline"]
    assert {"cpu-demo", "rank-64", "cpu-demo, held out", "rank-64, held out"} <= set(names)
    best = [attrs for tag, attrs in shown.elements if tag == "td" and "best" in str(attrs.get("class"))]
    assert len(best) == 1


def test_nothing_is_asked_from_outside(folder: Path) -> None:
    text = render([read_run(folder / "cpu-demo")])
    shown = Page(text)
    for tag, attrs in shown.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form", "img"), tag
        assert not {"src", "href", "action", "srcset", "data", "poster", "background"} & set(attrs), (
            tag,
            attrs,
        )
    assert "url(" not in text
    assert "@import" not in text
    assert not re.search(r"https?://", text)
    policy = next(attrs["content"] for tag, attrs in shown.elements if attrs.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    script = text.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy


def test_text_of_models_and_files_stays_text(tmp_path: Path) -> None:
    run = write_run(tmp_path, Fake("evil"))
    run.write_samples(
        {"before": [{"prompt": EVIL, "reference": EVIL, "answer": EVIL}], "after": [{"answer": EVIL}]}
    )
    run.resolved.write_text(f"model: '{EVIL}'  # {EVIL}\nother: 1  # default\n")
    run.write_environment({"cpu": EVIL, "cores": 2, EVIL: EVIL, "started": EVIL})
    run.write_plan(
        {"memory": {"host": {EVIL: 5e8}}, "reasons": {EVIL: EVIL}, "parameters": 2, "trained_parameters": 1}
    )
    events = EventsLog(run.events, seconds=lambda: 1.0)
    events.write("warning", text=EVIL)
    events.write(EVIL, note=EVIL)
    events.close()
    evil_name = tmp_path / EVIL.replace("/", "_")
    shutil.copytree(run.path, evil_name)
    for paths in ([run.path], [evil_name], [run.path, evil_name]):
        shown = page(*paths)
        assert [tag for tag, _ in shown.elements].count("script") == 1
        assert not [tag for tag, _ in shown.elements if tag == "img"]
        assert not [attrs for _, attrs in shown.elements if any(name.startswith("on") for name in attrs)]
        assert "<script>alert(1)</script>" in shown.text
        assert "{{body}}" in shown.text


def test_it_is_quick_and_small(tmp_path: Path) -> None:
    run = write_run(tmp_path, Fake("long", steps=30_000, seconds=7200))
    began = time.process_time()  # other processes of a busy machine do not count
    write_report([run.path], run.report)
    assert time.process_time() - began < 1.0
    assert run.report.stat().st_size < 300_000


def test_a_resume_counts_each_step_once(tmp_path: Path) -> None:
    seconds = [0.0]
    events = EventsLog(tmp_path / "events.jsonl", seconds=lambda: seconds[0])
    for at, event, step, loss in (
        (1, "start", 0, None), (2, "eval", 0, 3.0), (3, "eval", 10, 2.0), (4, "eval", 20, 9.9),
        (5, "resume", 15, None), (6, "eval", 20, 1.5), (7, "eval", 20, 1.4),
    ):  # fmt: skip
        seconds[0] = at
        events.write(event, step=step, **({} if loss is None else {"loss": loss}))
    events.close()
    run = read_run(tmp_path)
    assert [(point["step"], point["loss"]) for point in run.evals] == [(0, 3.0), (10, 2.0), (20, 1.4)]
    assert run.figure("eval_loss_before") == 3.0


def test_states(tmp_path: Path) -> None:
    log = EventsLog(tmp_path / "events.jsonl", seconds=lambda: 0.0)
    log.write("start", step=0)
    assert read_run(tmp_path).state == ("running", "not finished when this was written")
    log.write("stop", step=9, reason="SIGTERM")
    assert read_run(tmp_path).state == ("stopped", "stopped: SIGTERM")
    (tmp_path / "summary.json").write_text(json.dumps({"stop_reason": "tokens", "eval_loss": 1.0}))
    log.write("stop", step=12, reason="tokens")
    assert read_run(tmp_path).state == ("done", "done, tokens budget used")
    log.write("resume", step=12)  # extended: the old summary is no longer the whole truth
    assert read_run(tmp_path).state[0] == "running"
    assert read_run(tmp_path).figure("eval_loss") is None
    log.write("diverged", step=14, where="layer 3 <b>")
    assert read_run(tmp_path).state == ("diverged", "diverged at step 14: layer 3 <b>")


def test_the_time_adds_up(folder: Path) -> None:
    run = read_run(folder / "cpu-demo")
    spent = run.time_by_kind
    assert sum(spent.values()) == pytest.approx(run.summary["seconds"], abs=0.1)
    assert spent["load"] == pytest.approx(9.1)
    assert spent["eval"] == pytest.approx(3.1 + 9 * 1.4)
    assert spent["train"] > 120
