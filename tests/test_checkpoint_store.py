"""Checkpoints: what is written comes back bit for bit; which one is chosen, kept, replaced, refused."""

import json
import math
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shoestring.checkpoint import best, describe_checkpoints, newest, open_checkpoint, prune, save, set_best
from shoestring.checkpoint.reading import step_of
from shoestring.recipes.errors import UserError


def put(run: Path, step: int, **more: object) -> Path:
    return save(
        run, step=step, tensors={"model": {"w": torch.full((3,), float(step))}}, json={"t": step}, **more
    )


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def silent(line: str) -> None:
    raise AssertionError(f"nothing should be reported, but: {line}")


SAMPLES = {
    "bf16": torch.randn(7, 5).bfloat16(),
    "half": torch.randn(3).half(),
    "fp32 with nan": torch.tensor([math.nan, math.inf, -0.0, 1e-45]),
    "double": torch.randn(2, 2, 2, dtype=torch.float64),
    "int8": torch.arange(-5, 5, dtype=torch.int8),
    "uint8": torch.arange(256, dtype=torch.uint8),
    "int64": torch.tensor([2**62, -1]),
    "bool": torch.tensor([True, False]),
    "zero dimensions": torch.tensor(3.25),
    "empty": torch.empty(0, 4),
    "transposed": torch.randn(4, 6).t(),
    "strided": torch.randn(20)[::3],
    "expanded": torch.tensor([1.5]).expand(6),
    "complex": torch.randn(3, dtype=torch.complex64),
    "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
    "float8": torch.randn(5).to(torch.float8_e4m3fn),
    "parameter": torch.nn.Parameter(torch.randn(3)),
    "Ünicode/with.dots": torch.tensor([1]),
}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_tensors_come_back_bit_for_bit_and_other_readers_agree(tmp_path: Path) -> None:
    path = save(tmp_path, step=1, tensors={"model": SAMPLES, "none": {}}, json={})
    checkpoint = newest(tmp_path, silent)
    assert checkpoint is not None
    assert (checkpoint.path, checkpoint.step) == (path, 1)
    ours = checkpoint.tensors("model")
    theirs = load_file(path / "model.safetensors")
    assert ours.keys() == theirs.keys() == SAMPLES.keys()
    for name, tensor in SAMPLES.items():
        for read in (ours[name], theirs[name]):
            assert (read.dtype, read.shape, bits(read)) == (tensor.dtype, tensor.shape, bits(tensor)), name
    assert checkpoint.tensors("none") == {}


def test_json_comes_back_as_it_was(tmp_path: Path) -> None:
    value = {
        "nan": math.nan,
        "inf": [math.inf, -math.inf],
        "tenth": 0.1,
        "zero": -0.0,
        "big": 2**130,
        "text": "é\x00",
    }
    save(tmp_path, step=1, tensors={}, json={"trainer": value, "none": None})
    checkpoint = newest(tmp_path, silent)
    assert checkpoint is not None
    read = checkpoint.json("trainer")
    assert math.isnan(read.pop("nan"))
    assert math.copysign(1, read["zero"]) == -1
    assert read == {key: item for key, item in value.items() if key != "nan"}
    assert checkpoint.json("none") is None
    with pytest.raises(KeyError, match=r"has no other.json; it has none.json, trainer.json"):
        checkpoint.json("other")


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ({"a": {1: 2}}, "trainer.a has the key 1: keys must be strings"),
        ({"a": [0, {2}]}, r"trainer.a\[1\] is a set: it cannot be written as JSON"),
        ({"a": torch.ones(1)}, "trainer.a is a Tensor"),
        ({"$float": 1}, "reserved key"),
    ],
)
def test_what_json_would_bend_is_refused_by_name_before_anything_is_written(
    tmp_path: Path, value: object, error: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=error):
        save(tmp_path / "run", step=1, tensors={}, json={"trainer": value})
    assert not (tmp_path / "run").exists()


def test_a_tensor_without_a_form_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"weight .* has no form"):
        save(tmp_path, step=1, tensors={"model": {"weight": torch.eye(3).to_sparse()}}, json={})
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "x" * 101])
def test_part_names_stay_plain(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a part"):
        save(tmp_path, step=1, tensors={}, json={name: 1})


def test_directory_layout_names_and_permissions(tmp_path: Path) -> None:
    def copy(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        (folder / "deep" / "er").mkdir(parents=True)
        (folder / "deep" / "er" / "chat.jinja").write_text("hello")

    path = put(tmp_path / "runs" / "bot", 1200, copy=copy)
    assert path == tmp_path / "runs" / "bot" / "checkpoint-001200"
    assert names(path) == ["MANIFEST.json", "config.json", "deep", "model.safetensors", "t.json"]
    assert names(tmp_path / "runs" / "bot") == ["checkpoint-001200"]
    for entry in [path, *path.rglob("*")]:
        assert stat.S_IMODE(entry.stat().st_mode) == (0o700 if entry.is_dir() else 0o600), entry
    manifest = json.loads((path / "MANIFEST.json").read_text())
    assert (manifest["format"], manifest["step"]) == (1, 1200)
    assert sorted(manifest["files"]) == ["config.json", "deep/er/chat.jinja", "model.safetensors", "t.json"]
    assert manifest["files"]["deep/er/chat.jinja"]["bytes"] == 5
    assert put(tmp_path, 12_345_678).name == "checkpoint-12345678"
    assert step_of("checkpoint-12345678") == 12_345_678
    assert [step_of(name) for name in ("checkpoint-1200", "checkpoint-0001200", "checkpoint-", "best")] == [
        None
    ] * 4


def test_copy_must_leave_plain_files_under_other_names(tmp_path: Path) -> None:
    put(tmp_path, 1)
    with pytest.raises(ValueError, match=r"`copy` has already written model.safetensors"):
        put(tmp_path, 2, copy=lambda folder: (folder / "model.safetensors").write_text("x"))
    with pytest.raises(ValueError, match="link is a symbolic link"):
        put(tmp_path, 2, copy=lambda folder: (folder / "link").symlink_to("/etc/passwd"))
    with pytest.raises(ValueError, match="not a name that a file in a checkpoint may have"):
        put(tmp_path, 2, copy=lambda folder: (folder / "MANIFEST.json").write_text("{}"))
    with pytest.raises(ValueError, match="pipe is not a regular file"):
        put(tmp_path, 2, copy=lambda folder: os.mkfifo(folder / "pipe"))
    assert names(tmp_path) == ["checkpoint-000001"]


def test_an_interrupt_while_saving_leaves_nothing(tmp_path: Path) -> None:
    put(tmp_path, 1)

    def interrupt(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        put(tmp_path, 2, copy=interrupt)
    assert names(tmp_path) == ["checkpoint-000001"]


def test_newest_is_by_step_not_by_time_and_none_before_the_first(tmp_path: Path) -> None:
    assert newest(tmp_path / "absent", silent) is None
    assert newest(tmp_path, silent) is None
    for step in (900, 1_000_000, 30):
        put(tmp_path, step)
    os.utime(tmp_path / "checkpoint-000030", (2e9, 2e9))
    (tmp_path / "checkpoint-500").mkdir()  # transformers' spelling: not ours
    (tmp_path / "metrics.jsonl").write_text("")
    checkpoint = newest(tmp_path, silent)
    assert checkpoint is not None
    assert checkpoint.step == 1_000_000


def test_the_same_step_saved_again_replaces_the_earlier_one(tmp_path: Path) -> None:
    put(tmp_path, 5)
    save(tmp_path, step=5, tensors={}, json={"t": "second"})
    checkpoint = newest(tmp_path, silent)
    assert checkpoint is not None
    assert checkpoint.json("t") == "second"
    assert names(tmp_path) == ["checkpoint-000005"]


def test_broken_ones_are_skipped_with_a_line_each_and_can_be_saved_again(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        put(tmp_path, step)
    (tmp_path / "checkpoint-000003" / "MANIFEST.json").unlink()
    os.truncate(tmp_path / "checkpoint-000002" / "model.safetensors", 10)
    lines: list[str] = []
    checkpoint = newest(tmp_path, lines.append)
    assert checkpoint is not None
    assert checkpoint.step == 1
    size = checkpoint.manifest.files["model.safetensors"].bytes
    assert lines == [
        "checkpoint-000003 is skipped: MANIFEST.json is missing",
        f"checkpoint-000002 is skipped: model.safetensors has 10 bytes, {size} were written",
    ]
    put(tmp_path, 2)
    checkpoint = newest(tmp_path, lines.append)
    assert checkpoint is not None
    assert checkpoint.step == 2


def test_starting_over_in_silence_is_refused_when_no_checkpoint_is_whole(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        put(tmp_path, step)
        (tmp_path / f"checkpoint-00000{step}" / "t.json").unlink()
    with pytest.raises(UserError) as caught:
        newest(tmp_path, lambda line: None)
    assert str(caught.value) == (
        f"{tmp_path}: no checkpoint can be read, so this run cannot be resumed.\n"
        "checkpoint-000003 is skipped: t.json is missing\n"
        "checkpoint-000002 is skipped: t.json is missing\n"
        "(and 1 more)\n"
        "Start over with --fresh, or set another output_dir."
    )


def test_retention_keeps_the_newest_whole_ones_the_best_and_the_protected(tmp_path: Path) -> None:
    for step in range(1, 8):
        put(tmp_path, step)
    set_best(tmp_path, tmp_path / "checkpoint-000002")
    (tmp_path / "checkpoint-000007" / "t.json").write_text("[]")  # damaged: does not count as one of the two
    deleted = prune(tmp_path, keep=2, protect={"checkpoint-000003"})
    assert [path.name for path in deleted] == ["checkpoint-000004", "checkpoint-000001"]
    left = [
        "checkpoint-000002",
        "checkpoint-000003",
        "checkpoint-000005",
        "checkpoint-000006",
        "checkpoint-000007",
    ]
    assert names(tmp_path) == ["best", *left]
    assert prune(tmp_path, keep=9) == []
    with pytest.raises(ValueError, match="at least one"):
        prune(tmp_path, keep=0)


def test_retention_deletes_nothing_for_damaged_newer_ones_and_nothing_foreign(tmp_path: Path) -> None:
    for step in range(1, 5):
        put(tmp_path, step)
    for step in (3, 4):
        os.truncate(tmp_path / f"checkpoint-00000{step}" / "model.safetensors", 9)
    (tmp_path / "checkpoint-000000").mkdir()
    (tmp_path / "checkpoint-000000" / "notes.txt").write_text("not ours")
    assert prune(tmp_path, keep=2) == []
    assert [path.name for path in prune(tmp_path, keep=1)] == ["checkpoint-000001"]
    assert (tmp_path / "checkpoint-000000" / "notes.txt").exists()


def test_best_is_a_relative_link_that_moves_in_one_step(tmp_path: Path) -> None:
    assert best(tmp_path, silent) is None
    for step in (1, 2):
        put(tmp_path, step)
        set_best(tmp_path, open_checkpoint(tmp_path / f"checkpoint-00000{step}"))
        assert os.readlink(tmp_path / "best") == f"checkpoint-00000{step}"
    found = best(tmp_path, silent)
    assert found is not None
    assert found.step == open_checkpoint(tmp_path / "best").step == 2
    with pytest.raises(ValueError, match="is no checkpoint in"):
        set_best(tmp_path, tmp_path / "checkpoint-000009")
    (tmp_path / "best").unlink()
    (tmp_path / "best").mkdir()
    with pytest.raises(UserError, match="is not the link that shoestring keeps there"):
        set_best(tmp_path, tmp_path / "checkpoint-000001")


@pytest.mark.parametrize("target", ["../elsewhere", "/etc", "checkpoint-1", "best", "sub/checkpoint-000001"])
def test_a_best_that_leaves_the_folder_is_not_followed(tmp_path: Path, target: str) -> None:
    put(tmp_path, 1)
    (tmp_path / "best").symlink_to(target)
    assert best(tmp_path, silent) is None
    with pytest.raises(UserError, match=r"links to .*, which is no checkpoint beside it"):
        open_checkpoint(tmp_path / "best")


def test_a_broken_best_is_told_and_open_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    put(tmp_path, 1)
    set_best(tmp_path, tmp_path / "checkpoint-000001")
    (tmp_path / "checkpoint-000001" / "t.json").unlink()
    lines: list[str] = []
    assert best(tmp_path, lines.append) is None
    assert lines == ["best (checkpoint-000001) is skipped: t.json is missing"]
    with pytest.raises(UserError, match=r"t.json is missing.\nUse another checkpoint of this run"):
        open_checkpoint(tmp_path / "checkpoint-000001")
    with pytest.raises(UserError, match="there is no such checkpoint"):
        open_checkpoint(tmp_path / "checkpoint-000009")


def test_doctor_sees_every_checkpoint_and_leftover_and_changes_nothing(tmp_path: Path) -> None:
    for step in (1, 2):
        put(tmp_path, step)
    set_best(tmp_path, tmp_path / "checkpoint-000001")
    (tmp_path / "checkpoint-000002" / "t.json").unlink()
    (tmp_path / ".aside-dead" / "new").mkdir(parents=True)
    before = names(tmp_path)
    second, first, leftover = describe_checkpoints(tmp_path)
    assert (second.name, second.problem, second.is_best) == ("checkpoint-000002", "t.json is missing", False)
    assert (first.name, first.problem, first.is_best) == ("checkpoint-000001", None, True)
    assert str(first).endswith("bytes  whole  (best)")
    assert leftover.problem == "left by a process that died; the next start clears it"
    assert names(tmp_path) == before
    assert describe_checkpoints(tmp_path / "absent") == []


def test_an_output_dir_that_is_a_file_or_not_ours_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"a file is in the way.  Set output_dir to a folder."):
        put(tmp_path / "file", 1)
    with pytest.raises(UserError, match="a file is in the way"):
        put(tmp_path / "file" / "run", 1)


def test_saving_holds_no_second_copy_of_the_tensors(tmp_path: Path) -> None:
    tensors = {f"layer.{index}": torch.ones(8 << 20) for index in range(8)}  # 8 times 32 MiB
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak

    def kib(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field))

    before = kib("VmRSS")
    save(tmp_path, step=1, tensors={"model": tensors}, json={})
    assert kib("VmHWM") - before < 48 << 10
