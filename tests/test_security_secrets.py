"""Secrets of the environment stay there: a real run leaves none of them in any file, word or memory."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import forked
import pytest
import tiny
from bad_input_files import Case, line, run_case, sound_folder
from shoestring.train.environment import HIDDEN, redact, redact_command

SECRETS = {
    "WANDB_API_KEY": "canary-wandb-0123456789abcdef",
    "HF_TOKEN": "hf_canaryCanaryCanary0123456789",
    "AWS_SECRET_ACCESS_KEY": "canary/aws/0123456789",
    "AWS_SESSION_TOKEN": "canary-session",
    "OPENAI_API_KEY": "sk-canary0123456789abcdef",
    "HTTPS_PROXY": "http://bee:canary-proxy@proxy.invalid:3128",
    "MY_OWN_VARIABLE": "canary-of-my-own",
}
# Runs the command line, and at step 8 copies what its keeper holds: environment, command and memory.
SPY = """
import os, sys
from pathlib import Path
from shoestring.train import loop
from shoestring.train.cli import main

record, seen = loop._record, Path(sys.argv.pop(1))

def spying(run, *values):
    record(run, *values)
    if run.state.step == 8:
        keeper = Path(f"/proc/{run.snapshots._own.keeper_pid}")
        for name in ("environ", "cmdline"):
            (seen / name).write_bytes((keeper / name).read_bytes())
        for fd in (keeper / "fd").iterdir():
            if "memfd" in os.readlink(fd):
                (seen / "memory").write_bytes(fd.read_bytes())

loop._record = spying
main()
"""


def contains(data: bytes, word: str) -> bool:
    """The word as it is, as JSON escapes it, or in two bytes a character."""
    return any(
        form in data for form in (word.encode(), word.replace("/", "\\/").encode(), word.encode("utf-16-le"))
    )


def test_a_run_with_secrets_around_it_keeps_none(tmp_path: Path) -> None:
    recipe = tiny.recipe(
        tmp_path,
        checkpoint={"every": 4, "keep_best": True, "in_memory": True, "snapshot_every": 1},
        track={"report_to": [], "run_name": "canaries"},
    )
    seen = tmp_path / "seen"
    seen.mkdir()
    environment = {**os.environ, **SECRETS, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    command = [sys.executable, "-c", SPY, str(seen), "train", str(recipe)]
    done = forked.run(command, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    names = {path.name for path in files}
    assert {"report.html", "events.jsonl", "environment.json", "memory", "environ", "trainer.json"} <= names
    files |= {Path("stdout"): done.stdout.encode(), Path("stderr"): done.stderr.encode()}
    for name, secret in SECRETS.items():
        for word in {secret, secret.partition("bee:")[2].partition("@")[0] or secret}:
            assert [str(path) for path, data in files.items() if contains(data, word)] == [], name
    assert b"canaries" in files[tmp_path / "run" / "report.html"]  # the search does find what is there
    # The memory held a snapshot, not nothing; the keeper knows a few variables and no other.
    assert b"lora_A" in (seen / "memory").read_bytes()
    known = {
        entry.partition(b"=")[0].decode() for entry in (seen / "environ").read_bytes().split(b"\0") if entry
    }
    assert "PATH" in known
    assert not known & SECRETS.keys()
    assert (
        json.loads((tmp_path / "run" / "environment.json").read_text())["variables"]["HF_HUB_OFFLINE"] == "1"
    )


@pytest.mark.parametrize("key", ["data.train", "data.eval", "model"])
def test_a_login_in_a_path_is_not_repeated(key: str, tmp_path: Path) -> None:
    url = "https://bee:canary-login@example.invalid/x.jsonl?signature=canary-sig"
    argv = ("check", "recipe.yaml", f"{key}={url}")
    said = run_case(Case(key, 2, "", argv), sound_folder(tmp_path / "case", tmp_path / "stock"))
    assert said.code == 2
    assert "https://***@example.invalid/x.jsonl is a URL" in said.message
    assert "canary" not in said.message


def test_a_mistake_says_nothing_of_the_environment(tmp_path: Path) -> None:
    case = Case("", 2, "", ("train", "recipe.yaml"), line("r: 4", "r: four"), environment=SECRETS)
    said = run_case(case, sound_folder(tmp_path / "case", tmp_path / "stock"))
    assert said.code == 2
    assert "canary" not in said.message


WORDS = [
    *("num_tokens", "max_new_tokens", "cls_token", "eos_token", "pad_token", "bos_token", "unk_token"),
    *("tokens_per_second", "token_count", "tokenizer", "batch_tokens", "trained_tokens", "author", "keyword"),
]
HIDE = [
    *("hf_token", "access_token", "api_key", "WANDB_API_KEY", "aws_secret_access_key", "private_key"),
    *("password", "credentials", "auth", "client_secret"),
]


def test_words_of_models_are_no_secrets() -> None:
    values = dict.fromkeys(WORDS, "value")
    assert redact(values) == values
    assert redact_command([f"{word}=value" for word in WORDS]) == " ".join(f"{word}=value" for word in WORDS)


def test_secrets_are_hidden_by_name_by_shape_and_in_urls() -> None:
    assert set(redact(dict.fromkeys(HIDE, "canary")).values()) == {HIDDEN}
    shapes = [SECRETS["HF_TOKEN"], SECRETS["OPENAI_API_KEY"], "ghp_" + "a" * 20, "AKIA" + "A" * 16]
    assert redact([f"use {shape} now" for shape in shapes]) == [f"use {HIDDEN} now"] * 4
    assert redact({"proxy": SECRETS["HTTPS_PROXY"]}) == {"proxy": f"http://{HIDDEN}@proxy.invalid:3128"}
    assert redact("https://x/y?token=canary&a=1") == f"https://x/y?token={HIDDEN}&a=1"
    assert redact({"a": [{"b": {"api_key": "canary"}}]}) == {"a": [{"b": {"api_key": HIDDEN}}]}
