"""What the processes of `forked.py` share with new interpreters, since other tests rely on it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import forked
import pytest

SAYS = """
import json, os, sys, threading
print(json.dumps({
    "pid": os.getpid(), "parent": os.getppid(), "argv": sys.argv, "folder": os.getcwd(), "name": __name__,
    "bee": os.environ.get("BEE"), "path": os.environ.get("PYTHONPATH"), "threads": threading.active_count(),
    "ready": "shoestring.train.run" in sys.modules, "deepspeed": "deepspeed" in sys.modules,
}))
print("a word", file=sys.stderr)
sys.exit(3)
"""


def test_a_program_has_its_own_process_environment_folder_streams_and_code(tmp_path: Path) -> None:
    code = [sys.executable, "-c", SAYS, "one", "two"]
    done = forked.run(code, env={**os.environ, "BEE": "5"}, cwd=tmp_path)
    said = json.loads(done.stdout)
    assert done.returncode == 3
    assert done.stderr == "a word\n"
    assert said["pid"] != os.getpid() != said["parent"]
    assert said["argv"] == ["-c", "one", "two"]
    assert (said["folder"], said["name"], said["bee"]) == (str(tmp_path), "__main__", "5")
    assert said["path"] == os.environ.get("PYTHONPATH")
    assert said["threads"] == 1
    assert said["ready"]
    assert not said["deepspeed"]  # it changes PyTorch for the rest of a process
    again = json.loads(forked.run(code).stdout)
    assert again["pid"] != said["pid"]
    assert again["bee"] is None
    with pytest.raises(subprocess.CalledProcessError):
        forked.run(code, check=True)


def test_modules_and_scripts_run_as_the_interpreter_runs_them(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint(__name__, sys.argv)\nraise RuntimeError('it breaks')\n")
    done = forked.run([sys.executable, script, "x"])
    assert done.stdout == f"__main__ ['{script}', 'x']\n"
    assert "RuntimeError: it breaks" in done.stderr
    assert done.returncode == 1
    shown = forked.run([sys.executable, "-m", "shoestring.train", "--help"])
    assert shown.returncode == 0, shown.stderr
    assert "RECIPE" in shown.stdout


def test_signals_reach_it(tmp_path: Path) -> None:
    code = [sys.executable, "-c", "import time; print('here', flush=True); time.sleep(60)"]
    for number, expected in ((signal.SIGKILL, -9), (signal.SIGTERM, -15), (signal.SIGINT, 1)):
        output = tmp_path / str(number)
        process = forked.Popen(code, output=output)
        while not output.exists() or not output.read_text():
            assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        process.send_signal(number)
        assert process.wait(30) == process.returncode == expected
