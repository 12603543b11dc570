"""How the C++ library is made and kept: by one process for all, and anew where it is broken."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from shoestring.ops import native
from shoestring.ops.native import build

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=f"no C++ here: {native.missing()}")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a small library: one function, compiled in no time."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "one.cpp").write_text('extern "C" int one() { return 1; }\n')
    monkeypatch.setattr(build, "__file__", str(sources / "build.py"))
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "cache" / "shoestring" / "native"


def program(folder: Path, text: str) -> Path:
    """A shell script that stands for a compiler."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_it_is_kept_and_found_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.built().one() == 1
    monkeypatch.setattr(build, "_compile", None)
    assert build.built().one() == 1
    assert len(list(home.glob("*.so"))) == 1


def test_one_that_does_not_load_is_made_anew(home: Path) -> None:
    home.mkdir(mode=0o700, parents=True)
    path = home / f"{build._key(build.compiler())}.so"
    path.write_bytes(b"")  # a file whose contents a power cut has taken
    assert build.built().one() == 1
    assert path.stat().st_size > 1000


def test_processes_that_start_together_compile_once(home: Path, tmp_path: Path) -> None:
    real = build.compiler()[0]
    count = tmp_path / "count"
    script = program(tmp_path, f'echo x >> {count}\nsleep 0.3\nexec {real} "$@"')
    text = (
        "import os, sys\n"
        "from shoestring.ops.native import build\n"
        f"build.__file__ = {build.__file__!r}\n"
        f"os.environ.update(XDG_CACHE_HOME={str(home.parents[1])!r}, CXX={str(script)!r})\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "print(build.built().one())\n"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    for process in running:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in running:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.communicate(timeout=60)[0] for process in running] == ["1\n"] * 3
    assert count.read_text() == "x\nx\n"  # compiled, and linked


@pytest.mark.parametrize("given", ["env {}", "{} -DSEEN=1"])
def test_a_compiler_may_be_named_with_words_before_and_behind(
    given: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", given.format(build.compiler()[0]))
    assert build.built().one() == 1


def test_the_flags_of_a_compiler_make_another_library(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = build.compiler()[0]
    keys = set()
    for given in (real, f"{real} -O1", f"env {real}"):
        monkeypatch.setenv("CXX", given)
        keys.add(build._key(build.compiler()))
    assert len(keys) == 3


@pytest.mark.parametrize("given", ["/nowhere/c++ -O3", "'c++", "''"])
def test_a_compiler_that_is_not_there_is_named(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", given)
    with pytest.raises(build.NotBuilt, match="CXX="):
        build.compiler()


def test_an_error_of_the_assembler_is_told(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = program(tmp_path, "printf 'Assembler messages:\\n\\377 Error: no such instruction' >&2; exit 1")
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(build.NotBuilt, match=r"could not compile them: .* Error: no such instruction"):
        build.built()
    assert not list(home.glob("*.so"))


def test_a_compiler_that_hangs_is_ended(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its children, of which a compiler's driver has some."""
    pid = tmp_path / "pid"
    monkeypatch.setenv("CXX", str(program(tmp_path, f"sleep 60 & echo $! > {pid}\nwait")))
    monkeypatch.setattr(build, "PATIENCE", 0.5)
    start = time.monotonic()
    with pytest.raises(build.NotBuilt, match=r"did not end within 0\.5 seconds"):
        build.built()
    assert time.monotonic() - start < 20
    state = Path(f"/proc/{pid.read_text().strip()}/stat")
    assert not state.exists() or ") Z " in state.read_text()


def test_a_process_that_hangs_is_not_waited_for_for_ever(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home.mkdir(mode=0o700, parents=True)
    monkeypatch.setattr(build, "PATIENCE", 0.2)
    with build._alone(home / "lock"), pytest.raises(build.NotBuilt, match="another process"):
        build.built()


def test_it_is_kept_where_only_this_user_writes(home: Path, tmp_path: Path) -> None:
    assert build.kept_folder() == home
    assert home.stat().st_mode & 0o077 == 0
    home.chmod(0o777)
    aside = build.kept_folder()
    assert aside is not None
    assert aside.parent == tmp_path / "temporary"
    assert aside.stat().st_mode & 0o077 == 0
    home.chmod(0o700)
    home.parent.chmod(0o777)  # anyone could rename `native` and put another there
    assert build.kept_folder() == aside
    home.parent.chmod(0o755)
    assert build.kept_folder() == home


def test_a_home_that_cannot_be_written_needs_no_compiling_each_time(home: Path, tmp_path: Path) -> None:
    home.parents[1].write_text("a file where the cache would be")
    assert build.built().one() == 1
    assert len(list((tmp_path / "temporary").rglob("*.so"))) == 1


def test_without_any_folder_nothing_is_left_behind(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "kept_folder", lambda: None)
    library = build.built()
    assert list((tmp_path / "temporary").iterdir()) == []
    assert library.one() == 1


def test_threads_that_do_not_start_are_done_without(tmp_path: Path) -> None:
    """Where a user may have no more: those that run take the others' share. Without OpenMP alone."""
    (tmp_path / "thread").write_text(
        "#include <system_error>\n"
        "namespace std { struct thread {\n"
        "  template <class F> explicit thread(F& work) {\n"
        "    static int made = 0;\n"
        "    if (made++) throw system_error(make_error_code(errc::resource_unavailable_try_again));\n"
        "    work();\n"
        "  }\n"
        "  thread(thread&&) = default;\n"
        "  void join() {}\n"
        "}; }\n"
    )
    (tmp_path / "main.cpp").write_text(
        '#include "threads.h"\n'
        "int main() {\n"
        "  int64_t done = 0;\n"
        "  in_turns(100, 3, 4, [&](int64_t first, int64_t end) { done += end - first; });\n"
        "  return done == 100 ? 0 : 1;\n"
        "}\n"
    )
    found = [f"-I{tmp_path}", f"-I{Path(native.__file__).parent}"]
    made = str(tmp_path / "main")
    subprocess.run(
        [*build.compiler(), "-std=c++17", *found, str(tmp_path / "main.cpp"), "-o", made], check=True
    )
    assert subprocess.run([made], check=False).returncode == 0
