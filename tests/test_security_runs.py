"""Run directories from a stranger, at the command line: an exit code, a line, and nothing outside touched."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import malicious
import pytest
import torch
from bad_input_files import Case, Outcome, each, finished, run_case, sound_folder, unfinished
from malicious import DEEP, forged, state_of
from shoestring.checkpoint import name_of
from shoestring.train.rundir import RunDir, write_text

TRAIN = ("train", "recipe.yaml")
Change = Callable[[Path], object]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def outcome(shared: Path, tmp_path: Path, argv: tuple[str, ...], make: Change) -> Outcome:
    """What the command says in a folder of its own; the finished run is trained once for all."""
    folder = sound_folder(shared / tmp_path.name, shared / "stock")
    began = time.monotonic()
    said = run_case(Case("", 2, "", argv, make), folder)
    assert time.monotonic() - began < 60
    assert "Traceback" not in said.message, said.message
    return said


def at(name: str, put: Change) -> Change:
    return lambda folder: put(folder / name)


def text(content: bytes) -> Change:
    return lambda path: path.write_bytes(content)


def all_checkpoints(name: str, content: bytes) -> Change:
    """A forged file in both checkpoints, so that no other is left to fall back to."""

    def make(folder: Path) -> None:
        for step in (2, 4):
            forged(folder / "run" / name_of(step), name, content)

    return make


def outside_of(shared: Path, tmp_path: Path) -> Path:
    folder = shared / f"{tmp_path.name}-outside"
    folder.mkdir()
    (folder / "precious").write_text("precious\n")
    return folder


# Links and pipes under the names that a run writes


@pytest.mark.parametrize("name", [".lock", "events.jsonl"])
@pytest.mark.parametrize("kind", ["link", "pipe", "socket"])
def test_a_file_that_is_written_must_be_a_file(shared: Path, tmp_path: Path, name: str, kind: str) -> None:
    outside = outside_of(shared, tmp_path)
    before = state_of(outside)
    puts = {
        "link": malicious.link_to(outside / "precious"),
        "pipe": malicious.pipe,
        "socket": malicious.listener,
    }
    said = outcome(shared, tmp_path, TRAIN, unfinished(at(f"run/{name}", puts[kind])))
    assert said.code == 2
    assert name in said.message
    assert state_of(outside) == before


def test_files_that_are_replaced_are_replaced_not_followed(shared: Path, tmp_path: Path) -> None:
    outside = outside_of(shared, tmp_path)
    before = state_of(outside)
    names = ["metrics.jsonl", "resolved.yaml", "recipe.yaml", "plan.json", "environment.json", "report.html",
             f".metrics.jsonl.tmp{os.getpid()}", f".summary.json.tmp{os.getpid()}"]  # fmt: skip
    links = [at(f"run/{name}", malicious.link_to(outside / "precious")) for name in names]
    said = outcome(shared, tmp_path, (*TRAIN, "--fresh"), finished(each(*links)))
    assert said.code == 0, said.message
    assert state_of(outside) == before
    assert not any((shared / tmp_path.name / "run" / name).is_symlink() for name in names)


def test_writing_whole_never_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    for name in ("plan.json", f".plan.json.tmp{os.getpid()}"):
        (tmp_path / name).symlink_to("precious")
    write_text(tmp_path / "plan.json", "new")
    assert (tmp_path / "precious").read_text() == "x"
    assert (tmp_path / "plan.json").read_text() == "new"
    assert not (tmp_path / "plan.json").is_symlink()


def test_a_fresh_start_deletes_what_a_run_writes_and_nothing_else(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    theirs = [
        "checkpoint-500",
        "checkpoint-best",
        "film.mkv.part",
        "notes.tmp1",
        "export-x.part.txt",
        ".hidden",
    ]
    for name in theirs:
        (run.path / name).mkdir()
    for name in ("checkpoint-000004", "final", "best", "tensorboard"):
        (run.path / name).symlink_to(outside)
    for name in ("checkpoint-000008", "final.part", "export-merged.part"):
        (run.path / name).mkdir()
    malicious.pipe(run.path / "metrics.jsonl")
    (run.path / ".plan.json.tmp77").write_text("x")
    run.clear()
    assert sorted(path.name for path in run.path.iterdir()) == sorted(theirs)
    assert (outside / "precious").read_text() == "x"


# Files that a resume, an extension or an export reads


@pytest.mark.parametrize(
    "put",
    [
        *(malicious.pipe, malicious.endless, malicious.listener),
        *map(text, (DEEP, b"[]", b'{"legs": []}', b'{"legs": 1e999}', b'{"legs": "x"}', b"\xff")),
    ],
)
def test_a_summary_that_is_none(tmp_path: Path, put: Change) -> None:
    put(tmp_path / "summary.json")
    with malicious.bounded():
        assert RunDir(tmp_path).finished_legs() in (0, 1)


@pytest.mark.parametrize(
    "argv", [("extend", "run", "--budget", "steps=2"), ("export", "run"), ("eval", "run")]
)
@pytest.mark.parametrize("put", [malicious.pipe, malicious.endless, malicious.listener, text(DEEP)])
def test_a_resolved_recipe_that_is_none(
    shared: Path, tmp_path: Path, argv: tuple[str, ...], put: Change
) -> None:
    said = outcome(shared, tmp_path, argv, finished(at("run/resolved.yaml", put)))
    assert said.code == 2
    assert "resolved.yaml" in said.message


@pytest.mark.parametrize("name", sorted(malicious.TENSORS)[::4])
@pytest.mark.parametrize("argv", [TRAIN, ("export", "run")])
def test_hostile_tensors_end_a_command_with_a_line(
    shared: Path, tmp_path: Path, argv: tuple[str, ...], name: str
) -> None:
    make = all_checkpoints("trained.safetensors", malicious.TENSORS[name])
    said = outcome(shared, tmp_path, argv, unfinished(make) if argv == TRAIN else finished(make))
    assert said.code == 2
    assert "trained.safetensors" in said.message


@pytest.mark.parametrize("target", ["../stock/run/checkpoint-000004", "/etc", "checkpoint-000002/.."])
def test_the_best_checkpoint_is_one_of_this_run(shared: Path, tmp_path: Path, target: str) -> None:
    make = finished(at("run/best", malicious.link_to(Path(target))))
    said = outcome(shared, tmp_path, ("export", "run", "--checkpoint", "best"), make)
    assert said.code == 2
    assert "which is no checkpoint beside it" in said.message


def test_pickles_in_a_run_directory_are_never_loaded(shared: Path, tmp_path: Path) -> None:
    canary = shared / f"{tmp_path.name}-canary"

    def make(folder: Path) -> None:
        for place in (folder / "run", *(folder / "run" / name_of(step) for step in (2, 4))):
            for name in ("adapter_model.bin", "pytorch_model.bin", "optimizer.pt", "rng_state.pth", "x.pkl"):
                malicious.torch_payload(canary, place / name)

    said = outcome(shared, tmp_path, TRAIN, unfinished(make))
    assert said.code == 0, said.message
    assert not canary.exists()
    shutil.rmtree(shared / tmp_path.name)


def test_an_objective_s_code_comes_from_the_recipe_alone(shared: Path, tmp_path: Path) -> None:
    """Not from a checkpoint: what its own copy of a configuration names is never imported."""
    canary = shared / f"{tmp_path.name}-canary"

    def make(folder: Path) -> None:
        (folder / "hostile.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
        for step in (2, 4):
            found = folder / "run" / name_of(step)
            own = {"parent_library": "hostile", "base_model_class": "X"}
            config = {"peft_type": "LORA", "auto_mapping": own}
            forged(found, "adapter_config.json", json.dumps(config).encode())

    said = outcome(shared, tmp_path, TRAIN, unfinished(make))
    assert "Traceback" not in said.message
    assert not canary.exists()


# Whole files, as far as their checksums tell, that hold something else


@pytest.mark.parametrize("content", [b"[]", b"{}", b"null", b'"x"', DEEP])
@pytest.mark.parametrize("name", ["trainer.json", "random.json", "optimizer.json"])
def test_a_checkpoint_of_another_program_is_refused(
    shared: Path, tmp_path: Path, name: str, content: bytes
) -> None:
    said = outcome(shared, tmp_path, TRAIN, unfinished(all_checkpoints(name, content)))
    assert said.code == 2
    assert "--fresh" in said.message


@pytest.mark.parametrize("state", [{"step": "4"}, {"step": -1}, {"step": 10**30}, {"evil": 1}], ids=str)
def test_counters_that_no_run_has(shared: Path, tmp_path: Path, state: dict[str, Any]) -> None:
    def make(folder: Path) -> None:
        for step in (2, 4):
            place = folder / "run" / name_of(step)
            value = json.loads((place / "trainer.json").read_text())
            value["state"].update(state)
            forged(place, "trainer.json", json.dumps(value).encode())

    said = outcome(shared, tmp_path, TRAIN, unfinished(make))
    assert said.code == 2
    assert "does not hold what this version saves" in said.message


@pytest.mark.parametrize("put", [malicious.pipe, text(DEEP), text(b"[1]"), text(b"\xff")])
@pytest.mark.parametrize("name", ["plan.json", "stages.json", "legs.json"])
def test_what_a_run_keeps_may_be_anything(shared: Path, tmp_path: Path, name: str, put: Change) -> None:
    said = outcome(shared, tmp_path, TRAIN, unfinished(at(f"run/{name}", put)))
    assert (said.code, name in said.message) == (2, True)


@pytest.mark.parametrize("put", [malicious.pipe, text(DEEP), text(b"[1]"), text(b"\xff")])
def test_a_report_is_made_of_whatever_can_be_read(shared: Path, tmp_path: Path, put: Change) -> None:
    names = ("summary.json", "plan.json", "metrics.jsonl", "environment.json", "samples.json", "legs.json")
    make = finished(each(*(at(f"run/{name}", put) for name in names)))
    assert outcome(shared, tmp_path, ("report", "run"), make).code == 0


def test_a_leg_starts_from_a_checkpoint_of_its_run(tmp_path: Path) -> None:
    from shoestring.recipes.errors import UserError
    from shoestring.train.legs import Leg, plain_legs, read_legs

    for source in ("../x/checkpoint-000004", "/x/checkpoint-000004", "best"):
        leg = Leg({}, "hold", "", 1.0, source, 4, 1.0, 1)
        (tmp_path / "legs.json").write_text(json.dumps(plain_legs([leg])))
        with pytest.raises(UserError, match="is no checkpoint of this run"):
            read_legs(tmp_path / "legs.json")
