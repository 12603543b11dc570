"""A run whose optimizer state is on disk goes on from its keeper's snapshot, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from forked import CONTEXT
from shoestring.checkpoint.slot_writer import SlotWriter
from shoestring.plan import Plan
from shoestring.recipes.errors import BudgetError
from shoestring.train import loop
from shoestring.train.run import train_recipe
from test_train_snapshots import DIES_AT, EVERY_STEP, STEPS, keepers, result

pytestmark = pytest.mark.slow

DISK = {"optimizer": "disk", "buffer_size": "16KiB", "buffer_count": 3, "io": "threads"}
KINDS: dict[str, dict[str, Any]] = {
    "bf16 master": {"optimizer": {"name": "adamw", "learning_rate": 1e-2, "weights": "master"}},
    "steps in backward": {"optimizer": {"name": "adamw", "learning_rate": 1e-3, "step_in_backward": True}},
    "apollo": {"optimizer": {"name": "apollo", "learning_rate": 1e-2, "rank": 8}},
    "lora": {"adapter": {"name": "lora", "r": 16}},
}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def recipe(folder: Path, kind: str = "adamw", **sections: Any) -> Path:
    folder.mkdir(exist_ok=True)
    given: dict[str, Any] = {
        "adapter": None,
        "budget": {"steps": STEPS},
        "checkpoint": EVERY_STEP,
        "eval": {"samples": 0},
        "export": "none",
        "offload": DISK,
    }
    if kind == "bf16 master":
        given["model"] = {"model_name_or_path": str(folder / "model"), "dtype": "bfloat16"}
    return tiny.recipe(folder, **{**given, **KINDS.get(kind, {}), **sections})


def train(path: Path, *overrides: str, fresh: bool = False) -> int:
    torch.set_num_threads(1)
    return train_recipe(str(path), overrides, fresh=fresh, started=time.monotonic())


def die_at(path: Path, step: int, with_keeper: bool, publishing: float) -> None:
    """publishing: seconds that it takes to publish a snapshot once it is copied."""
    record, publish = loop._record, SlotWriter.publish

    def slowly(self: SlotWriter, **values: Any) -> Any:
        time.sleep(publishing)
        return publish(self, **values)

    def killing(run: Any, *values: Any) -> None:
        record(run, *values)
        if run.state.step == step:
            if with_keeper:
                os.kill(run.snapshots._own.keeper_pid, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

    loop._record = killing
    SlotWriter.publish = slowly  # type: ignore[method-assign]
    train(path)


def killed(path: Path, step: int = DIES_AT, *, with_keeper: bool = False, publishing: float = 0.0) -> None:
    process = CONTEXT.Process(target=die_at, args=(path, step, with_keeper, publishing))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def end_keepers(folder: Path) -> None:
    for keeper in keepers(folder):
        keeper.kill()
        keeper.wait()


def written_by_the_keeper(run: Path) -> Path:
    deadline = time.monotonic() + 30.0
    while time.monotonic() < deadline:
        found = sorted(text.parent for text in run.glob("checkpoint-*/scratch.json"))
        if found:
            return found[-1]
        time.sleep(0.05)
    raise AssertionError("the keeper has written nothing")


def scratch_files(folder: Path) -> list[Path]:
    return [path for path in (folder / "run" / ".offload").rglob("*") if path.is_file()]


def keeper_log(folder: Path) -> str:
    """What the keeper had to say, for a failure."""
    log = folder / "run" / "keeper.log"
    return log.read_text() if log.exists() else "the keeper said nothing"


def assert_nothing_left(folder: Path) -> None:
    assert scratch_files(folder) == []
    assert list((folder / "run").glob("checkpoint-*/scratch.json")) == []
    deadline = time.monotonic() + 10.0
    while keepers(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert keepers(folder) == []


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Weights and losses of the whole run with its state in memory."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(recipe(folder), "offload.optimizer=device") == 0
    return result(folder)[:2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_goes_on_from_its_snapshot_to_the_bit(tmp_path: Path, kind: str) -> None:
    whole, cut = (recipe(tmp_path / name, kind) for name in ("whole", "cut"))
    assert train(whole, "offload.optimizer=device") == 0
    killed(cut)
    assert scratch_files(tmp_path / "cut")
    if kind == "bf16 master":
        killed(cut, DIES_AT + 2)  # and again, with state that was read from the first one's
    assert train(cut) == 0
    weights, losses, resumed = result(tmp_path / "cut")
    assert resumed is not None
    assert int(resumed.split("-")[1].split(" ")[0]) >= DIES_AT - 1, keeper_log(tmp_path / "cut")
    assert (weights, losses) == result(tmp_path / "whole")[:2]
    assert_nothing_left(tmp_path / "cut")


def test_what_the_keeper_wrote_is_as_good_while_the_scratch_file_is_there(
    tmp_path: Path, uninterrupted: Any
) -> None:
    cut = recipe(tmp_path / "cut")
    killed(cut)
    written = written_by_the_keeper(tmp_path / "cut" / "run")
    end_keepers(tmp_path)
    assert train(cut) == 0
    weights, losses, resumed = result(tmp_path / "cut")
    assert resumed == written.name > "checkpoint-000005"
    assert (weights, losses) == uninterrupted
    assert_nothing_left(tmp_path / "cut")


def test_no_step_begins_before_the_snapshot_is_published(tmp_path: Path, uninterrupted: Any) -> None:
    """Otherwise it would overwrite the state of the one before, and a kill would find neither."""
    cut = recipe(tmp_path / "cut")
    killed(cut, publishing=0.3)
    assert train(cut) == 0
    weights, losses, resumed = result(tmp_path / "cut")
    assert resumed is not None
    assert "000007" in resumed
    assert (weights, losses) == uninterrupted


def test_the_state_may_go_back_into_memory(tmp_path: Path, uninterrupted: Any) -> None:
    cut = recipe(tmp_path / "cut")
    killed(cut)
    assert train(cut, "offload.optimizer=device") == 0
    weights, losses, resumed = result(tmp_path / "cut")
    assert resumed is not None
    assert resumed > "checkpoint-000005"
    assert (weights, losses) == uninterrupted
    assert_nothing_left(tmp_path / "cut")


@pytest.mark.parametrize("lost", ["keeper", "file", "bytes"])
def test_without_either_half_it_goes_on_from_the_disk(
    tmp_path: Path, lost: str, uninterrupted: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = recipe(tmp_path / "cut")
    killed(cut, with_keeper=lost == "keeper")
    (state,) = [path for path in scratch_files(tmp_path / "cut") if path.name == "optimizer"]
    if lost == "file":
        state.unlink()
    elif lost == "bytes":
        data = bytearray(state.read_bytes())
        data[100::4096] = bytes(byte ^ 1 for byte in data[100::4096])
        state.write_bytes(data)
    assert train(cut) == 0
    said = "".join(capsys.readouterr())
    if lost == "file":
        assert "is skipped: its state on disk" in said
    if lost == "bytes":
        assert "of its state on disk is damaged" in said
    weights, losses, resumed = result(tmp_path / "cut")
    assert resumed == "checkpoint-000005"
    assert (weights, losses) == uninterrupted
    assert_nothing_left(tmp_path / "cut")


def test_an_error_leaves_the_state_for_the_next_start(
    tmp_path: Path, uninterrupted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = recipe(tmp_path / "cut")
    record = loop._record

    def failing(run: Any, *values: Any) -> None:
        record(run, *values)
        if run.state.step == DIES_AT:
            raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_record", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            train(cut)
    assert scratch_files(tmp_path / "cut")
    assert train(cut) == 0
    weights, losses, resumed = result(tmp_path / "cut")
    assert resumed is not None
    assert "000007" in resumed
    assert (weights, losses) == uninterrupted
    assert_nothing_left(tmp_path / "cut")


def test_a_fresh_start_deletes_the_state_of_the_old_one(tmp_path: Path) -> None:
    path = recipe(tmp_path / "cut")
    killed(path)
    assert scratch_files(tmp_path / "cut")
    assert train(path, fresh=True) == 0
    assert result(tmp_path / "cut")[2] is None
    assert_nothing_left(tmp_path / "cut")


def test_the_plan_counts_what_stays_in_memory_and_both_places_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(tmp_path / "run")
    assert train(path) == 0
    plan = Plan.from_json((tmp_path / "run" / "run" / "plan.json").read_text())
    on_disk = next(part.bytes for part in plan.placement.parts if part.part == "optimizer")
    weights = 4 * plan.trained_parameters
    assert 2 * weights <= plan.snapshot_bytes < 2 * (weights + 0.1 * on_disk)

    monkeypatch.setattr("shoestring.plan.snapshots.missing_for_second_places", lambda *_: 5 * 10**9)
    with pytest.raises(BudgetError, match=r"for which 5.0\d* GB are missing"):
        train(path, f"output_dir={tmp_path / 'full'}")
    assert train(path, f"output_dir={tmp_path / 'full'}", "checkpoint.in_memory=auto") == 0
    assert Plan.from_json((tmp_path / "full" / "plan.json").read_text()).snapshot_bytes == 0
