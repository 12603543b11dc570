"""Checkpoint directories from a stranger: nothing runs, nothing outside is touched, each refusal is quick."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import malicious
import pytest
import torch
from malicious import MANIFESTS, TENSORS, WRONG_JSON, Evil, bounded, forged, state_of
from shoestring.checkpoint import BrokenCheckpoint, describe_checkpoints, newest, open_checkpoint, prune, save
from shoestring.checkpoint.retention import best, best_name
from shoestring.checkpoint.tensors import check_header
from shoestring.recipes.errors import UserError

READ = ["MANIFEST.json", "trainer.json", "random.json", "optimizer.json", "trained.safetensors",
        "optimizer.safetensors", "nested/config.json"]  # fmt: skip
NEVER_READ = ["pytorch_model.bin", "adapter_model.bin", "optimizer.pt", "rng_state.pth", "training_args.bin",
              "scheduler.pt", "data.pkl", "trained.npy", ".metadata"]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two whole checkpoints; the second is attacked."""

    def copy(folder: Path) -> None:
        (folder / "nested").mkdir()
        (folder / "nested" / "config.json").write_text('{"a": 1}')

    for step in (1, 2):
        tensors = {"trained": {"w": torch.ones(4)}, "optimizer": {"m": torch.ones(5)}}
        values = {"trainer": {"step": step}, "random": [], "optimizer": {}}
        save(tmp_path / "run", step=step, tensors=tensors, json=values, copy=copy)
    return tmp_path / "run"


def refused(run: Path, says: str) -> None:
    """`newest` passes over it with one line, `open_checkpoint` refuses it, and both are quick and small."""
    lines: list[str] = []
    with bounded():
        found = newest(run, lines.append)
    assert found is not None
    assert found.step == 1
    assert len(lines) == 1
    assert lines[0].startswith("checkpoint-000002 is skipped: ")
    assert says in lines[0]
    assert lines[0].isprintable()
    assert len(lines[0]) < 400
    with bounded(), pytest.raises(UserError) as caught:
        open_checkpoint(run / "checkpoint-000002")
    assert says in str(caught.value)
    assert [fact.problem is None for fact in describe_checkpoints(run)] == [False, True]


@pytest.mark.parametrize("evil", MANIFESTS, ids=str)
def test_a_hostile_manifest_is_refused(run: Path, evil: Evil) -> None:
    evil.make(run / "checkpoint-000002")
    refused(run, evil.says)


@pytest.mark.parametrize("name", TENSORS)
def test_hostile_tensors_are_refused_though_the_manifest_vouches_for_them(run: Path, name: str) -> None:
    forged(run / "checkpoint-000002", "trained.safetensors", TENSORS[name])
    refused(run, "trained.safetensors")


def test_a_header_of_a_sparse_terabyte_is_not_read(run: Path) -> None:
    path = run / "checkpoint-000002" / "trained.safetensors"
    os.truncate(path, 1 << 40)
    with path.open("r+b") as file:
        file.write(((1 << 40) - 8).to_bytes(8, "little"))
    with bounded(), pytest.raises(BrokenCheckpoint) as caught:
        check_header(run / "checkpoint-000002", path.name)
    assert "claims a header of 1,099,511,627,768 bytes" in str(caught.value)


@pytest.mark.parametrize("name", WRONG_JSON)
def test_hostile_values_are_refused_when_they_are_read(run: Path, name: str) -> None:
    checkpoint = run / "checkpoint-000002"
    forged(checkpoint, "trainer.json", WRONG_JSON[name])
    found = open_checkpoint(checkpoint)
    with bounded(), pytest.raises(BrokenCheckpoint, match=r"trainer\.json is not valid JSON") as caught:
        found.json("trainer")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("file", READ)
def test_a_pickle_under_any_name_is_never_loaded(run: Path, file: str, tmp_path: Path) -> None:
    canary, checkpoint = tmp_path / "canary", run / "checkpoint-000002"
    content = malicious.payload(canary)
    if file == "MANIFEST.json":
        malicious.seal(checkpoint, content)
    else:
        forged(checkpoint, file, content)
    found = newest(run, lambda line: None)
    assert found is not None
    for part in ("trainer", "random", "optimizer"):
        try:
            found.json(part)
        except BrokenCheckpoint:
            assert file == f"{part}.json"
    assert found.step == (2 if file.endswith(".json") and file != "MANIFEST.json" else 1)
    assert not canary.exists()
    pickle.loads(content)  # the attack is real
    assert canary.is_dir()


def test_files_that_no_manifest_names_are_never_read(run: Path, tmp_path: Path) -> None:
    canary, checkpoint = tmp_path / "canary", run / "checkpoint-000002"
    for name in NEVER_READ:
        (checkpoint / name).write_bytes(malicious.payload(canary))
    malicious.pipe(checkpoint / "pipe")
    found = newest(run, print)
    assert found is not None
    assert found.step == 2
    assert found.tensors("trained")["w"].sum() == 4
    with pytest.raises(KeyError, match="has no data"):
        found.json("data")
    assert not canary.exists()


@pytest.mark.parametrize("file", READ)
@pytest.mark.parametrize("put", [malicious.pipe, malicious.endless, malicious.listener])
def test_what_is_no_file_neither_hangs_nor_is_read(run: Path, file: str, put: Callable[[Path], None]) -> None:
    put(run / "checkpoint-000002" / file)
    refused(run, Path(file).name)


@pytest.mark.parametrize("name", ["checkpoint-000003", "checkpoint-000002/nested"])
def test_linked_directories_are_neither_read_nor_written_nor_deleted(
    run: Path, name: str, tmp_path: Path
) -> None:
    outside = tmp_path / "outside" / "checkpoint-000003"
    shutil.copytree(run / "checkpoint-000002", outside)
    malicious.reseal(outside, lambda body: body.update(step=3))
    before = state_of(tmp_path / "outside")
    if (run / name).exists():
        shutil.rmtree(run / name)
    (run / name).symlink_to(outside if "/" not in name else outside / "nested")
    lines: list[str] = []
    found = newest(run, lines.append)
    assert found is not None
    assert found.step == (2 if "/" not in name else 1)
    save(run, step=9, tensors={}, json={})
    prune(run, keep=1)
    assert state_of(tmp_path / "outside") == before
    # A link is never deleted as a checkpoint; inside of one of ours it goes with it, and alone.
    assert os.path.islink(run / name) == ("/" not in name)


def test_a_file_of_another_size_is_not_read(run: Path) -> None:
    os.truncate(run / "checkpoint-000002" / "trainer.json", 1 << 40)
    refused(run, "trainer.json has 1,099,511,627,776 bytes")


def test_hard_links_lose_only_their_own_name(run: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    os.link(run / "checkpoint-000001" / "trainer.json", outside / "trainer.json")
    content = (outside / "trainer.json").read_bytes()
    prune(run, keep=1)
    assert [path.name for path in run.iterdir()] == ["checkpoint-000002"]
    assert (outside / "trainer.json").read_bytes() == content


@pytest.mark.parametrize("kind", ["link", "pipe", "inside"])
def test_a_sweep_deletes_nothing_outside(run: Path, kind: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    before = state_of(outside)
    aside = run / ".aside-000000000000"
    if kind == "link":
        aside.symlink_to(outside)
    elif kind == "pipe":
        os.mkfifo(aside)
    else:
        aside.mkdir()
        (aside / "new").symlink_to(outside)
        (aside / "replaced-..").symlink_to(outside)
        (aside / "replaced-").mkdir()
        (aside / "removed-x").symlink_to(outside)
    lines: list[str] = []
    found = newest(run, lines.append)
    assert found is not None
    assert found.step == 2
    assert len(lines) == 1
    assert state_of(outside) == before
    assert aside.exists() == (kind != "inside")


@pytest.mark.parametrize(
    "target",
    [
        "../outside/checkpoint-000009",
        "/etc/passwd",
        "..",
        ".",
        "checkpoint-000001/../../x",
        "checkpoint-١٢٣٤٥٦",
    ],
)
def test_the_pointer_to_the_best_stays_inside(run: Path, target: str, tmp_path: Path) -> None:
    shutil.copytree(run / "checkpoint-000002", tmp_path / "outside" / "checkpoint-000009")
    malicious.reseal(tmp_path / "outside" / "checkpoint-000009", lambda body: body.update(step=9))
    (run / "best").symlink_to(target)
    assert best_name(run) is None
    assert best(run, print) is None
    with pytest.raises(UserError, match="which is no checkpoint beside it"):
        open_checkpoint(run / "best")


@pytest.mark.parametrize("put", [malicious.pipe, malicious.endless, malicious.listener])
def test_a_best_that_is_no_link_of_ours(run: Path, put: Callable[[Path], None]) -> None:
    put(run / "best")
    assert best(run, print) is None
    with pytest.raises(UserError), bounded():
        open_checkpoint(run / "best")
