"""A disk that is full, fails or writes short, at every call: older checkpoints live, the error is told."""

import errno
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from shoestring.checkpoint import newest, prune, save, set_best
from shoestring.recipes.errors import ShoestringError, UserError

TENSORS = {"model": {"w": torch.arange(3000.0)}, "optimizer": {"m": torch.ones(7).bfloat16()}}


def put(run: Path, step: int, **more: Any) -> Path:
    return save(run, step=step, tensors=TENSORS, json={"trainer": {"step": step}}, **more)


def add_config(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


class Faults:
    """Wraps functions of `os`: call number `at` among them (and all later ones if persistent) fails."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, calls: dict[str, int], at: int, persistent: bool
    ) -> None:
        self.count = 0
        self.hit = False
        for name, code in calls.items():
            monkeypatch.setattr(os, name, self._wrap(getattr(os, name), code, at, persistent))

    def _wrap(self, real: Callable[..., Any], code: int, at: int, persistent: bool) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            # Only opening for writing takes room, or is refused by a failing disk in these tests.
            if real is REAL_OPEN and not args[1] & os.O_CREAT:
                return real(*args, **options)
            index = self.count
            self.count += 1
            if index == at or (persistent and index > at):
                self.hit = True
                raise OSError(code, os.strerror(code))
            return real(*args, **options)

        return call


REAL_OPEN = os.open
FULL = dict.fromkeys(("write", "open", "mkdir"), errno.ENOSPC)
QUOTA = dict.fromkeys(("write", "open", "mkdir"), errno.EDQUOT)
SYNC = {"fsync": errno.EIO}
WRITE = {"write": errno.EIO, "rename": errno.EIO}


def whole(run: Path) -> dict[str, Any]:
    """Everything in the run directory that is not a checkpoint in the making: path -> content."""
    return {
        str(path.relative_to(run)): path.read_bytes() if path.is_file() else None
        for path in sorted(run.rglob("*"))
        if ".aside-" not in str(path)
    }


def choose_and_prune(run: Path) -> None:
    set_best(run, run / "checkpoint-000003")
    prune(run, keep=1)


def caught(kind: type[Exception], action: Callable[[], object]) -> Exception | None:
    try:
        action()
    except kind as error:
        return error
    return None


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("again", [False, True], ids=["new step", "same step"])
@pytest.mark.parametrize(
    ("calls", "kind"),
    [(FULL, UserError), (QUOTA, UserError), (SYNC, ShoestringError), (WRITE, ShoestringError)],
)
def test_a_fault_at_each_call_of_a_save(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    calls: dict[str, int],
    kind: type,
    again: bool,
    persistent: bool,
) -> None:
    run = tmp_path / "run"
    put(run, 1)
    put(run, 2)
    step = 2 if again else 3
    before = whole(run)
    at = 0
    while True:
        with monkeypatch.context() as patch:
            faults = Faults(patch, calls, at, persistent)
            error = caught(ShoestringError, lambda: put(run, step, copy=add_config))
        failed = error is not None
        assert failed == faults.hit
        if error is not None:
            assert type(error) is kind
            assert f"checkpoint of step {step}" in str(error)
            assert len(str(error).splitlines()) <= 6
        if not failed:
            break
        published = "checkpoint-000003/MANIFEST.json" in whole(run) or (
            again and "checkpoint-000002/config.json" in whole(run)
        )
        if published:
            # Only the very last fsync, of the names in the run directory, comes after the rename.
            shutil.rmtree(run / f"checkpoint-00000{step}")
            for leftover in run.glob(".aside-*"):
                shutil.rmtree(leftover)
            if again:
                put(run, 2)
                before = whole(run)
        assert newest(run, lambda line: None).json("trainer") == {"step": 2}  # type: ignore[union-attr]
        assert whole(run) == before
        assert not list(run.glob(".aside-*"))
        at += 1
    assert at >= 4
    assert newest(run, lambda line: None).json("trainer") == {"step": step}  # type: ignore[union-attr]


@pytest.mark.parametrize("persistent", [False, True])
def test_a_fault_at_each_call_of_best_and_prune(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, persistent: bool
) -> None:
    calls = dict.fromkeys(("mkdir", "rename", "replace", "symlink", "unlink", "rmdir", "fsync"), errno.EIO)
    at = 0
    while True:
        run = tmp_path / str(at)
        for step in (1, 2, 3):
            put(run, step)
        set_best(run, run / "checkpoint-000002")
        with monkeypatch.context() as patch:
            faults = Faults(patch, calls, at, persistent)
            error = caught(ShoestringError, partial(choose_and_prune, run))
        assert (error is not None) == faults.hit
        if error is not None:
            assert re.match(
                f"{run}: (best cannot be set to|checkpoint-00000[12] cannot be deleted)", str(error)
            )
        found = newest(run, lambda line: None)
        assert found is not None
        assert found.step == 3
        assert (run / "best" / "MANIFEST.json").exists()
        assert not list(run.glob(".aside-*"))
        if not faults.hit:
            break
        at += 1
    assert at > 10


def test_a_failed_fsync_is_never_tried_again_on_that_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, 1)
    real, seen = os.fsync, []

    def fsync(fd: int) -> None:
        target = os.readlink(f"/proc/self/fd/{fd}")
        seen.append(target)
        if target.endswith("model.safetensors"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(ShoestringError) as told:
        put(tmp_path, 2)
    assert str(told.value) == (
        f"{tmp_path}: the disk failed while the checkpoint of step 2 was written: Input/output error.\n"
        "That checkpoint is given up; all older ones are as they were. Check the disk (see dmesg);\n"
        "then give the same command again: it resumes from the newest whole checkpoint."
    )
    assert sum(target.endswith("model.safetensors") for target in seen) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-000001"]


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, memoryview(data)[: max(1, len(data) // 3)]))
    put(tmp_path, 1)
    found = newest(tmp_path, lambda line: None)
    assert found is not None
    assert torch.equal(found.tensors("model")["w"], TENSORS["model"]["w"])


def test_too_little_room_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_500_000))
    touched: list[str] = []
    monkeypatch.setattr(os, "mkdir", lambda *args, **options: touched.append("mkdir"))
    with pytest.raises(UserError) as told:
        put(tmp_path, 2, copy_bytes=2_000_000)
    assert str(told.value) == (
        f"{tmp_path}: the checkpoint of step 2 needs at least 2.01 MB; 1.50 MB is free on this disk.\n"
        "Nothing was deleted: all older checkpoints are as they were.\n"
        "Free some space, keep fewer (checkpoint.keep=1), or write elsewhere (output_dir=/other/disk/run);\n"
        "then give the same command again: it resumes from the newest checkpoint."
    )
    assert touched == []


def test_a_disk_that_fills_while_a_library_writes_is_told_the_same_way(tmp_path: Path) -> None:
    put(tmp_path, 1)

    def copy(folder: Path) -> None:
        (folder / "adapter_model.safetensors").write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(UserError, match=r"needs at least .* kB; .* is free .* reports it full \(a quota"):
        put(tmp_path, 2, copy=copy)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-000001"]


def test_no_permission_is_the_users_to_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Faults(monkeypatch, {"mkdir": errno.EROFS}, 0, True)
    with pytest.raises(UserError) as told:
        put(tmp_path, 2)
    assert str(told.value) == (
        f"{tmp_path}: the checkpoint of step 2 cannot be written: Read-only file system.\n"
        "Change the permissions of that directory, or set output_dir=another/folder."
    )


def test_an_error_that_is_no_affair_of_the_disk_stays_what_it_was(tmp_path: Path) -> None:
    def copy(folder: Path) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        put(tmp_path, 1, copy=copy)
    assert list(tmp_path.iterdir()) == []
