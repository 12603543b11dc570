"""The scratch file: past the page cache where the file system takes it, else beside it; what is refused."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from shoestring.offload import direct_file
from shoestring.offload.arena import Arena
from shoestring.offload.direct_file import DirectFile, dio_alignment
from shoestring.offload.errors import OffloadError

PAGE = 4096
MEMORY = Path("/dev/shm")


def memory(arena: Arena, nbytes: int) -> memoryview:
    return memoryview(arena.take(nbytes).numpy())


@pytest.fixture
def arena() -> Iterator[Arena]:
    with Arena(64 * PAGE) as arena:
        yield arena


def refuse_direct(patch: pytest.MonkeyPatch) -> None:
    """A file system that answers EINVAL to O_DIRECT, as several do."""
    real = os.open

    def refuse(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *rest, **named)

    patch.setattr(os, "open", refuse)


def round_trip(file: DirectFile, arena: Arena) -> None:
    data, back = memory(arena, 16 * PAGE), memory(arena, 16 * PAGE)
    data[:] = os.urandom(16 * PAGE)
    file.write(PAGE, data)
    file.read(PAGE, back)
    assert back == data
    with open(file.path, "rb", buffering=0) as other:
        assert other.read()[PAGE : 17 * PAGE] == data


def test_exact_bytes_at_an_offset(tmp_path: Path, arena: Arena) -> None:
    with DirectFile(tmp_path / "state", 20 * PAGE) as file:
        round_trip(file, arena)
        assert file.direct == bool(fcntl.fcntl(file.fd, fcntl.F_GETFL) & os.O_DIRECT)
        if file.direct:
            assert file.alignment == (dio_alignment(file.fd) or PAGE) <= PAGE
        else:
            assert any("O_DIRECT" in line for line in file.lines)
    assert list(tmp_path.iterdir()) == []


def test_all_blocks_are_there_from_the_start(tmp_path: Path) -> None:
    """Space is taken when the file is made, not when a training step meets a full disk."""
    with DirectFile(tmp_path / "state", 1 << 20) as file:
        status = os.stat(file.path)
        assert status.st_size == 1 << 20
        assert status.st_blocks * 512 >= 1 << 20
        assert status.st_mode & 0o777 == 0o600


def test_bytes_are_rounded_up_to_a_page(tmp_path: Path) -> None:
    with DirectFile(tmp_path / "state", PAGE + 1) as file:
        assert os.stat(file.path).st_size == file.nbytes == 2 * PAGE
    with pytest.raises(ValueError, match="at least one byte"):
        DirectFile(tmp_path / "none", 0)


@pytest.mark.skipif(not MEMORY.is_dir(), reason="no /dev/shm")
def test_on_a_file_system_in_memory_it_works_and_says_so(arena: Arena) -> None:
    path = MEMORY / f"shoestring-test-{os.getpid()}"
    with DirectFile(path, 20 * PAGE) as file:
        round_trip(file, arena)
        (line,) = (line for line in file.lines if "tmpfs" in line)
        assert "is memory" in line
        assert "offload.disk_path=PATH" in line
    assert not path.exists()


def test_without_o_direct_at_open(tmp_path: Path, arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_direct(monkeypatch)
    forgotten: list[tuple[int, int, int]] = []
    real = os.posix_fadvise

    def advise(fd: int, offset: int, nbytes: int, advice: int) -> None:
        forgotten.append((offset, nbytes, advice))
        real(fd, offset, nbytes, advice)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    with DirectFile(tmp_path / "state", 20 * PAGE) as file:
        assert not file.direct
        assert file.alignment == PAGE
        assert any("refuses O_DIRECT" in line and str(tmp_path) in line for line in file.lines)
        round_trip(file, arena)
    assert forgotten == [(PAGE, 16 * PAGE, os.POSIX_FADV_DONTNEED)] * 2


def test_without_o_direct_at_the_first_transfer(
    tmp_path: Path, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems take the flag and refuse the transfer."""
    real = os.pwritev

    def refuse(fd: int, buffers: list[memoryview], offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", refuse)
    with DirectFile(tmp_path / "state", 20 * PAGE) as file:
        assert not file.direct
        assert not fcntl.fcntl(file.fd, fcntl.F_GETFL) & os.O_DIRECT
        round_trip(file, arena)


def test_a_disk_that_wants_more_than_a_page(
    tmp_path: Path, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_file, "dio_alignment", lambda fd: 16 * PAGE)
    with DirectFile(tmp_path / "state", 20 * PAGE) as file:
        assert not file.direct
        assert any("65,536 bytes, more than 4,096" in line for line in file.lines)
        round_trip(file, arena)


def test_a_kernel_that_does_not_tell_the_alignment(
    tmp_path: Path, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_file, "dio_alignment", lambda fd: None)
    with DirectFile(tmp_path / "state", 20 * PAGE) as file:
        assert file.alignment == PAGE
        round_trip(file, arena)
        with pytest.raises(ValueError, match=r"offset 512 of a transfer to .* is no multiple of 4096"):
            file.read(512, memory(arena, PAGE))


@pytest.mark.parametrize(("offset", "nbytes"), [(100, PAGE), (0, 100), (20 * PAGE, PAGE)])
def test_misaligned_and_outside_are_refused(tmp_path: Path, arena: Arena, offset: int, nbytes: int) -> None:
    with DirectFile(tmp_path / "state", 20 * PAGE) as file:
        for call in (file.read, file.write):
            with pytest.raises(ValueError, match=r"no multiple|outside"):
                call(offset, memory(arena, nbytes))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_full_disk_is_found_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def full(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OffloadError) as caught:
        DirectFile(tmp_path / "state", 1 << 20)
    first, second = str(caught.value).splitlines()
    assert first == (
        f"offload.disk_path  cannot allocate 1,048,576 bytes at 0 of {tmp_path}/state: "
        f"{os.strerror(code)} ({errno.errorcode[code]})."
    )
    assert "offload.disk_path=PATH" in second
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == [], "nothing is left where the file could not be made"


@pytest.mark.skipif(not MEMORY.is_dir(), reason="no /dev/shm")
def test_a_really_full_file_system() -> None:
    """More than the file system holds in all is refused by its own ENOSPC, before anything is taken."""
    disk = os.statvfs(MEMORY)
    path = MEMORY / f"shoestring-test-full-{os.getpid()}"
    with pytest.raises(OffloadError, match="ENOSPC"):
        DirectFile(path, disk.f_blocks * disk.f_frsize + PAGE)
    assert not path.exists()


def test_what_is_there_is_never_taken_over(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("state", "link"):
        with pytest.raises(OffloadError, match="EEXIST"):
            DirectFile(tmp_path / name, PAGE)
    assert (tmp_path / "state").read_text() == "mine"
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(OffloadError, match="ENOENT"):
        DirectFile(tmp_path / "no" / "folder", PAGE)


def test_close_removes_or_keeps(tmp_path: Path) -> None:
    file = DirectFile(tmp_path / "kept", PAGE)
    file.close(remove=False)
    file.close()
    assert (tmp_path / "kept").exists()
    file = DirectFile(tmp_path / "gone", PAGE)
    (tmp_path / "gone").unlink()
    file.close()
    file.close()


def test_the_disk_takes_nothing(tmp_path: Path, arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that moves no byte, again and again, ends as an error and not as a loop."""
    with DirectFile(tmp_path / "state", 20 * PAGE) as file:
        monkeypatch.setattr(os, "pwritev", lambda fd, buffers, offset: 0)
        with pytest.raises(OffloadError, match="cannot write"):
            file.write(0, memory(arena, PAGE))
