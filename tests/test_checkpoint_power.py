"""Loss of power, simulated: whatever a disk may have forgotten that nobody fsynced, at every moment of a
save.

A recorder follows the system calls of saves, of a second save of one step, of `best` and `prune`. After each
call it asks which disks could be found after a power cut at that moment. The content of a file is durable
once that file was fsynced; until then it may be there, be cut in half or be empty. A name (created, moved,
removed) is durable once the directory it stands in was fsynced; until then one, or it and all later ones, may
be lost. Every such disk is built and resumed.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from shoestring.checkpoint import newest, prune, save, set_best
from shoestring.recipes.errors import UserError


def put(run: Path, step: int) -> None:
    def copy(folder: Path) -> None:
        (folder / "sub").mkdir()
        fd = os.open(folder / "sub" / "config.json", os.O_CREAT | os.O_WRONLY, 0o600)
        os.write(fd, str(step).encode() * 40)
        os.close(fd)

    tensors = {"model": {"w": torch.full((50,), float(step))}}
    save(run, step=step, tensors=tensors, json={"trainer": step}, copy=copy)


@dataclass
class Node:
    """A file, a directory or a link as the disk knows it: apart from its names."""

    kind: str
    data: bytes = b""
    synced: bytes | None = None


@dataclass
class Names:
    """A change of directory entries that happens as a whole: (directory, name) -> node, None when removed."""

    changes: dict[tuple[int, str], int | None]
    durable: bool = False


@dataclass
class Recorder:
    root: Path
    forgets: str = ""  # the kind of node whose fsync does nothing: a program that forgot it
    nodes: list[Node] = field(default_factory=lambda: [Node("dir")])
    log: list[Names] = field(default_factory=list)
    open_files: dict[int, int] = field(default_factory=dict)
    entries: dict[tuple[int, str], int] = field(default_factory=dict)

    def find(self, path: Any, dir_fd: int | None = None) -> tuple[int, str] | None:
        """(directory, name) of a path inside the root, None for any other."""
        path = Path(path) if dir_fd is None else Path(os.readlink(f"/proc/self/fd/{dir_fd}"), path)
        if not path.is_relative_to(self.root) or path == self.root:
            return None
        node = 0
        for part in path.relative_to(self.root).parts[:-1]:
            node = self.entries[node, part]
        return node, path.name

    def node_of(self, path: Path) -> int | None:
        if path == self.root:
            return 0
        where = self.find(path)
        return None if where is None else self.entries.get(where)

    def change(self, changes: dict[tuple[int, str], int | None]) -> None:
        self.log.append(Names(changes))
        for where, node in changes.items():
            if node is None:
                del self.entries[where]
            else:
                self.entries[where] = node

    def add(self, where: tuple[int, str], node: Node) -> int:
        self.nodes.append(node)
        self.change({where: len(self.nodes) - 1})
        return len(self.nodes) - 1

    def sync(self, node: int) -> None:
        if self.nodes[node].kind == self.forgets:
            return
        if self.nodes[node].kind == "file":
            self.nodes[node].synced = self.nodes[node].data
        for names in self.log:
            names.durable |= any(directory == node for directory, _ in names.changes)

    def disks(self) -> Iterator[tuple[Any, ...]]:
        """Each tree that may be found now, as sorted (path, content) pairs; directories have content None."""
        contents: list[Callable[[Node], bytes]] = [
            lambda node: node.synced if node.synced is not None else b"",
            lambda node: node.synced if node.synced is not None else node.data[: len(node.data) // 2],
            lambda node: node.data,
        ]
        # Older ones are on the disk: the journal of a file system commits by itself every few seconds.
        pending = [index for index, names in enumerate(self.log) if not names.durable][-12:]
        for lost in [
            [],
            *([index] for index in pending),
            *(pending[start:] for start in range(len(pending))),
        ]:
            entries: dict[tuple[int, str], int] = {}
            for index, names in enumerate(self.log):
                for where, node in names.changes.items() if index not in lost else ():
                    if node is None:
                        entries.pop(where, None)
                    else:
                        entries[where] = node
            for content in contents:
                yield tuple(self.tree(entries, content))

    def tree(
        self,
        entries: dict[tuple[int, str], int],
        content: Callable[[Node], bytes],
        of: int = 0,
        path: str = "",
    ) -> Iterator[tuple[str, str, bytes]]:
        for (directory, name), index in sorted(entries.items()):
            if directory == of:
                node = self.nodes[index]
                yield f"{path}{name}", node.kind, content(node) if node.kind == "file" else node.data
                yield from self.tree(entries, content, index, f"{path}{name}/")


def install(recorder: Recorder, patch: pytest.MonkeyPatch, after_each: Callable[[], None]) -> None:
    """Put the recorder between the program and `os`."""
    real = {
        name: getattr(os, name) for name in ("open", "close", "write", "fsync", "mkdir", "rename", "symlink")
    }
    real |= {name: getattr(os, name) for name in ("replace", "unlink", "rmdir")}

    def open_(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        where = recorder.find(path, dir_fd) if flags & os.O_CREAT else None
        fd: int = real["open"](path, flags, mode, dir_fd=dir_fd)
        node = (
            recorder.add(where, Node("file"))
            if where
            else recorder.node_of(Path(os.readlink(f"/proc/self/fd/{fd}")))
        )
        if node is not None:
            recorder.open_files[fd] = node
        after_each()
        return fd

    def close(fd: int) -> None:
        recorder.open_files.pop(fd, None)
        real["close"](fd)

    def write(fd: int, data: Any) -> int:
        if fd in recorder.open_files:
            recorder.nodes[recorder.open_files[fd]].data += bytes(data)
        count: int = real["write"](fd, data)
        after_each()
        return count

    def fsync(fd: int) -> None:
        real["fsync"](fd)
        recorder.sync(recorder.open_files[fd])
        after_each()

    def mkdir(path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        real["mkdir"](path, mode, dir_fd=dir_fd)
        if where := recorder.find(path, dir_fd):
            recorder.add(where, Node("dir"))
            after_each()

    def symlink(target: Any, path: Any) -> None:
        real["symlink"](target, path)
        where = recorder.find(path)
        assert where is not None
        recorder.add(where, Node("link", str(target).encode()))
        after_each()

    def rename(old: Any, new: Any) -> None:
        real["rename"](old, new)
        source, target = recorder.find(old), recorder.find(new)
        assert source is not None
        assert target is not None
        recorder.change({target: recorder.entries[source], source: None})
        after_each()

    def remove(name: str) -> Callable[..., None]:
        def call(path: Any, *, dir_fd: int | None = None) -> None:
            where = recorder.find(path, dir_fd)
            real[name](path, dir_fd=dir_fd)
            assert where is not None
            recorder.change({where: None})
            after_each()

        return call

    fakes: dict[str, Any] = {"open": open_, "close": close, "write": write, "fsync": fsync, "mkdir": mkdir}
    fakes |= {
        "symlink": symlink,
        "rename": rename,
        "replace": rename,
        "unlink": remove("unlink"),
        "rmdir": remove("rmdir"),
    }
    for name, fake in fakes.items():
        patch.setattr(os, name, fake)


def build(disk: tuple[Any, ...], folder: Path) -> None:
    folder.mkdir()
    for path, kind, data in disk:
        if kind == "dir":
            (folder / path).mkdir()
        elif kind == "link":
            (folder / path).symlink_to(data.decode())
        else:
            (folder / path).write_bytes(data)


def power_cuts(
    work: Path, monkeypatch: pytest.MonkeyPatch, steps: tuple[int, ...], forgets: str = ""
) -> tuple[int, set[int], list[str]]:
    """How many different disks there were, the steps resumed from, and what was wrong with any of them."""
    run = work / "run"
    run.mkdir()
    recorder = Recorder(run, forgets)
    acknowledged = -1
    found: dict[tuple[Any, ...], int] = {}  # disk -> the last step that `save` had returned by then

    def look() -> None:
        for disk in recorder.disks():
            found[disk] = max(found.get(disk, -1), acknowledged)

    with monkeypatch.context() as patch:
        install(recorder, patch, look)
        for step in steps:
            put(run, step)
            acknowledged = max(acknowledged, step)
            set_best(run, run / f"checkpoint-00000{step}")
            prune(run, keep=1)

    resumed, problems = set(), []
    for number, (disk, step) in enumerate(found.items()):
        folder = work / str(number)
        build(disk, folder)
        try:
            resumed.add(resume(folder, step))
        except (AssertionError, UserError) as error:
            problems.append(f"{error}")
        shutil.rmtree(folder)
    return len(found), resumed, problems


def resume(folder: Path, acknowledged: int) -> int:
    checkpoint = newest(folder, lambda line: None)
    step = -1 if checkpoint is None else checkpoint.step
    assert step >= acknowledged
    if checkpoint is not None:
        assert checkpoint.json("trainer") == step
        assert torch.equal(checkpoint.tensors("model")["w"], torch.full((50,), float(step)))
        assert (checkpoint.path / "sub" / "config.json").read_text() == str(step) * 40
    return step


def test_every_disk_that_a_power_cut_can_leave_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, resumed, problems = power_cuts(tmp_path, monkeypatch, (1, 2, 2, 3))
    assert problems == []
    assert count > 150
    assert resumed == {-1, 1, 2, 3}


@pytest.mark.parametrize("forgets", ["file", "dir"])
def test_the_simulation_finds_a_missing_fsync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgets: str
) -> None:
    """Otherwise the test above would prove nothing."""
    _, _, problems = power_cuts(tmp_path, monkeypatch, (1,), forgets)
    assert problems
