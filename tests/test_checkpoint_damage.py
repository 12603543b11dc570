"""Damage and malice: every changed byte is noticed, and no manifest leads outside its directory."""

import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from shoestring.checkpoint import BrokenCheckpoint, newest, save
from shoestring.checkpoint.reading import verify
from shoestring.recipes.errors import UserError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    def copy(folder: Path) -> None:
        (folder / "nested").mkdir()
        (folder / "nested" / "config.json").write_text('{"a": 1}')

    for step in (1, 2):
        torch.manual_seed(step)
        tensors = {
            "model": {"w": torch.randn(40, 10), "b": torch.randn(10).bfloat16()},
            "optimizer": {"m": torch.ones(5)},
        }
        save(tmp_path / "run", step=step, tensors=tensors, json={"trainer": {"step": step}}, copy=copy)
    return tmp_path / "run"


def rewrite(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest as an attacker would: with its own checksum made right again."""
    body = json.loads((checkpoint / "MANIFEST.json").read_text())
    del body["sha256"]
    change(body)
    body["files"] = (
        dict(sorted(body["files"].items())) if isinstance(body.get("files"), dict) else body.get("files")
    )
    seal(checkpoint, json.dumps(body, indent=1).encode())


def seal(checkpoint: Path, text: bytes) -> None:
    text = text.removesuffix(b"\n}")
    end = b',\n "sha256": "' + hashlib.sha256(text).hexdigest().encode() + b'"\n}\n'
    (checkpoint / "MANIFEST.json").write_bytes(text + end)


def assert_falls_back(run: Path, reason: str) -> None:
    lines: list[str] = []
    found = newest(run, lines.append)
    assert found is not None
    assert found.step == 1
    assert len(lines) == 1
    assert lines[0].startswith("checkpoint-000002 is skipped: ")
    assert reason in lines[0]
    assert found.json("trainer") == {"step": 1}


def test_every_flipped_bit_is_noticed(run: Path) -> None:
    rng = random.Random(0)
    checkpoint = run / "checkpoint-000002"
    verify(checkpoint)
    for path in sorted(file for file in checkpoint.rglob("*") if file.is_file()):
        good = path.read_bytes()
        positions = (
            range(len(good))
            if path.name == "MANIFEST.json"
            else sorted(rng.sample(range(len(good)), min(60, len(good))))
        )
        for position in positions:
            bad = bytearray(good)
            bad[position] ^= 1 << rng.randrange(8)
            path.write_bytes(bad)
            with pytest.raises(BrokenCheckpoint, match=path.name):
                verify(checkpoint)
        path.write_bytes(good)
    verify(checkpoint)


@pytest.mark.parametrize(
    "file",
    ["MANIFEST.json", "model.safetensors", "optimizer.safetensors", "trainer.json", "nested/config.json"],
)
def test_truncated_emptied_zeroed_missing_and_lengthened_files_are_noticed(run: Path, file: str) -> None:
    path = run / "checkpoint-000002" / file
    good = path.read_bytes()
    for bad in (good[:-1], good[: len(good) // 2], b"", bytes(len(good)), good + b"\0"):
        path.write_bytes(bad)
        assert_falls_back(run, Path(file).name)
    path.unlink()
    assert_falls_back(run, f"{file} is missing")
    path.mkdir()
    assert_falls_back(run, f"{file} is not a regular file")


def test_files_swapped_between_steps_and_a_renamed_directory_are_noticed(run: Path) -> None:
    first, second = (run / f"checkpoint-00000{step}" / "model.safetensors" for step in (1, 2))
    good = second.read_bytes()
    second.write_bytes(first.read_bytes())
    assert_falls_back(run, "model.safetensors is damaged: its checksum is not the one that was written")
    second.write_bytes(good)
    (run / "checkpoint-000002").rename(run / "checkpoint-000009")
    lines: list[str] = []
    newest(run, lines.append)
    assert lines == ["checkpoint-000009 is skipped: holds step 2, not the step of its name"]


@pytest.mark.parametrize(
    "name",
    [
        "../checkpoint-000001/trainer.json",
        "/etc/passwd",
        "a/../../x",
        "a//b",
        ".",
        "",
        "a\0b",
        "C:\\x",
        "x" * 600,
    ],
)
def test_a_manifest_naming_files_elsewhere_is_refused(run: Path, name: str) -> None:
    rewrite(
        run / "checkpoint-000002", lambda body: body["files"].update({name: {"bytes": 1, "xxh3_128": "0"}})
    )
    assert_falls_back(run, "is not a name that a file in a checkpoint may have")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda body: body.pop("format"), "has no format version"),
        (lambda body: body.update(step="2"), "lacks step"),
        (lambda body: body.update(files=[]), "must list"),
        (lambda body: body["files"].update({"t": 5}), "the entry of t is not a size and a checksum"),
        (lambda body: body["files"]["trainer.json"].update(bytes=-1), "the entry of trainer.json is not"),
        (lambda body: body["files"]["trainer.json"].update(bytes=10**30), "trainer.json has"),
        (lambda body: body["files"]["trainer.json"].update(run="rm -rf"), "the entry of trainer.json is not"),
        (
            lambda body: body["files"].update({f"f{i}": {"bytes": 0, "xxh3_128": ""} for i in range(10_001)}),
            "at most",
        ),
    ],
)
def test_a_manifest_of_the_wrong_shape_is_refused(
    run: Path, change: Callable[[Any], object], reason: str
) -> None:
    rewrite(run / "checkpoint-000002", change)
    assert_falls_back(run, reason)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{",
        '{"step": NaN}',
        '{"a": 1, "a": 2}',
        "[" * 100_000,
        "\xff",
        '{"$float": "x"}',
        "9" * 5000,
    ],
)
def test_a_manifest_that_is_no_strict_json_is_refused(run: Path, text: str) -> None:
    (run / "checkpoint-000002" / "MANIFEST.json").write_text(text, encoding="latin-1")
    assert_falls_back(run, "MANIFEST.json does not match its own checksum")
    seal(run / "checkpoint-000002", text.encode("latin-1"))
    assert_falls_back(run, "MANIFEST.json")


def test_a_huge_manifest_is_not_read(run: Path) -> None:
    os.truncate(run / "checkpoint-000002" / "MANIFEST.json", 1 << 40)  # a sparse terabyte
    assert_falls_back(run, "MANIFEST.json has 1,099,511,627,776 bytes; at most 16,777,216 are read")


@pytest.mark.parametrize("part", ["file", "directory", "checkpoint"])
def test_links_are_refused_wherever_they_stand(run: Path, part: str) -> None:
    checkpoint = run / "checkpoint-000002"
    victim = {
        "file": checkpoint / "trainer.json",
        "directory": checkpoint / "nested",
        "checkpoint": checkpoint,
    }[part]
    outside = run.parent / "outside"
    victim.rename(outside)
    victim.symlink_to(outside)
    assert_falls_back(
        run, "is a link or a file" if part == "checkpoint" else "cannot be opened as a plain file"
    )


def test_a_pipe_in_place_of_a_file_does_not_hang(run: Path) -> None:
    path = run / "checkpoint-000002" / "trainer.json"
    path.unlink()
    os.mkfifo(path)
    assert_falls_back(run, "trainer.json is not a regular file")


def blob(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def spec(shape: list[int], offsets: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01\x02",
        blob({}, length=2**63),
        blob({}, length=100_000_001),
        blob({}, length=3000),
        blob(b"not json"),
        blob({"a": spec([2], [0, 4])}, bytes(4)),
        blob({"a": spec([1], [0, 4]), "b": spec([1], [2, 6])}, bytes(6)),
        blob({"a": spec([1], [4, 8])}, bytes(8)),
        blob({"a": spec([2**40, 2**40], [0, 4])}, bytes(4)),
        blob({"a": spec([-1], [0, 4])}, bytes(4)),
        blob({"a": spec([1], [0, 4], "PICKLE")}, bytes(4)),
        b"\x80\x04\x95" + bytes(200),  # the beginning of a pickle
    ],
)
def test_malformed_tensor_files_are_refused_though_the_manifest_vouches_for_them(
    run: Path, content: bytes
) -> None:
    checkpoint = run / "checkpoint-000002"
    (checkpoint / "model.safetensors").write_bytes(content)
    entry = {"bytes": len(content), "xxh3_128": xxhash.xxh3_128(content).hexdigest()}
    rewrite(checkpoint, lambda body: body["files"].update({"model.safetensors": entry}))
    assert_falls_back(run, "model.safetensors")


def test_a_later_format_is_refused_not_passed_over(run: Path) -> None:
    rewrite(
        run / "checkpoint-000002", lambda body: body.update(format=2, writer="shoestring 9.9", files="other")
    )
    with pytest.raises(UserError) as caught:
        newest(run, lambda line: None)
    assert str(caught.value) == (
        f"{run / 'checkpoint-000002'}: written by shoestring 9.9 in format 2, this version reads up to 1.\n"
        "Install that version, start over with --fresh, or set another output_dir."
    )
