"""The performance model against numbers worked out by hand, its limits, and what a ring really moves."""

from __future__ import annotations

import contextlib
import io
import runpy
from math import inf
from pathlib import Path

import pytest
import torch
from shoestring.offload.model import (
    Moves,
    Phase,
    Speeds,
    StepLoad,
    Traffic,
    break_even_tokens,
    fill_seconds,
    gpu_stride,
    kept_bytes,
    run_traffic,
    step_time,
    step_traffic,
    wear,
)
from shoestring.offload.placement import Placed, Placement
from shoestring.offload.ring import Ring
from shoestring.offload.segments import Segment
from shoestring.offload.support import supports
from shoestring.recipes import (
    AdaLomo,
    AdamMini,
    AdamW,
    AdamW8bit,
    Apollo,
    ApolloMini,
    BAdam,
    Cosmos,
    Frugal,
    GaLore,
    Lomo,
    Muon,
    NaturalGaLore,
    QApollo,
    Soap,
)

# Time

# A 7B model, 12 bytes of state a parameter.
SPEEDS = Speeds(flops=150e12, disk=6e9, update=2e9, link=25e9)
LOAD = StepLoad(parameters=7e9, tokens=20_000, state_bytes=12, link_bytes=2, backward_flops=6)


def test_a_step_by_hand() -> None:
    step = step_time(LOAD, SPEEDS)
    assert step.forward == Phase(compute=pytest.approx(1.8666667))  # 2 · 7e9 · 2e4 / 150e12
    assert step.backward.compute == pytest.approx(5.6)  # 6 · 7e9 · 2e4 / 150e12
    assert step.update.disk == pytest.approx(28.0)  # 24 · 7e9 / 6e9
    assert step.update.update == pytest.approx(3.5)  # 7e9 / 2e9
    assert step.update.link == pytest.approx(0.56)  # 2 · 7e9 / 25e9
    assert step.fill == 0.0
    assert step.after_backward == pytest.approx(1.8666667 + 5.6 + 28.0)
    assert step.inside_backward == pytest.approx(1.8666667 + 28.0)
    assert step.bound_by == "disk"


def test_the_fill_is_one_segment_each_way() -> None:
    assert fill_seconds(48e6, 3e9) == pytest.approx(0.032)
    plain = step_time(LOAD, SPEEDS)
    filled = step_time(StepLoad(**{**vars(LOAD), "segment_bytes": 60e6}), SPEEDS)
    assert filled.after_backward - plain.after_backward == pytest.approx(0.02)
    assert filled.inside_backward - plain.inside_backward == pytest.approx(0.02)


def test_break_even_is_the_worked_example_and_knows_no_size() -> None:
    tokens = break_even_tokens(24, 150e12, 6e9, backward_flops=6)
    assert tokens == pytest.approx(100_000)
    assert break_even_tokens(12, 150e12, 6e9, backward_flops=6) == pytest.approx(50_000)
    assert break_even_tokens(24, 150e12, 6e9) == pytest.approx(150_000)
    assert break_even_tokens(2, 150e12, 25e9) == pytest.approx(3_000)
    for parameters in (1e8, 7e9, 70e9):
        load = StepLoad(parameters, tokens, state_bytes=12, backward_flops=6)
        step = step_time(load, Speeds(150e12, disk=6e9))
        assert step.update.disk == pytest.approx(step.backward.compute)
        assert step.inside_backward == pytest.approx(step.forward.seconds + step.backward.seconds)


def test_streamed_weights_go_through_disk_and_link_in_each_pass() -> None:
    # A frozen base of 70e9 bfloat16 weights, read in both passes of two micro-batches.
    load = StepLoad(
        70e9,
        10_000,
        backward_flops=4,
        micro_batches=2,
        forward=Moves(disk=2, link=2),
        backward=Moves(disk=2, link=2),
    )
    step = step_time(load, Speeds(400e12, disk=7e9, link=28e9))
    assert step.forward == Phase(
        compute=pytest.approx(3.5), disk=pytest.approx(40.0), link=pytest.approx(10.0)
    )
    assert step.backward.compute == pytest.approx(7.0)
    assert step.after_backward == step.inside_backward == pytest.approx(80.0)
    # Trained, its state on the same disk waits for the weights: 2 · 12 · 70e9 / 7e9 = 240 s more.
    trained = step_time(StepLoad(**{**vars(load), "state_bytes": 12}), Speeds(400e12, disk=7e9, link=28e9))
    assert trained.inside_backward == pytest.approx(40.0 + 280.0)


def test_what_a_step_takes_only_grows() -> None:
    base = step_time(LOAD, SPEEDS)
    for change in ({"tokens": 40_000}, {"state_bytes": 16}, {"parameters": 8e9}, {"backward_flops": 8.0}):
        more = step_time(StepLoad(**{**vars(LOAD), **change}), SPEEDS)
        assert more.after_backward > base.after_backward
        assert more.inside_backward >= base.inside_backward
    for change in ({"flops": 75e12}, {"disk": 3e9}):
        slower = step_time(LOAD, Speeds(**{**vars(SPEEDS), **change}))
        assert slower.after_backward > base.after_backward
    for tokens in (1, 1000, 100_000, 10**7):
        step = step_time(StepLoad(**{**vars(LOAD), "tokens": tokens}), SPEEDS)
        assert step.inside_backward <= step.after_backward <= 2 * step.inside_backward


def test_without_anything_moved_both_orders_are_plain_training() -> None:
    step = step_time(StepLoad(7e9, 20_000), Speeds(150e12))
    assert step.after_backward == step.inside_backward == pytest.approx(6 * 7e9 * 20_000 / 150e12)
    assert step.bound_by == "compute"
    assert step_time(StepLoad(7e9, 20_000, 12), Speeds(150e12, disk=inf)).update.seconds == 0.0


@pytest.mark.parametrize(
    ("gpu", "cpu", "stride"), [(1.0, 1.0, 2), (0.9, 1.0, 2), (2.1, 1.0, 4), (0.1, 0.5, 2)]
)
def test_the_stride_lets_the_cpu_work_through_one_round_trip(gpu: float, cpu: float, stride: int) -> None:
    assert gpu_stride(gpu, cpu) == stride
    assert (stride - 1) * cpu >= gpu > (stride - 2) * cpu


def test_the_stride_of_the_reference() -> None:
    # S parameters: t_c = S / 2e9 and t_g = 12 S / 25e9, of which 0.96 t_c.
    assert gpu_stride(12e8 / 25e9, 1e8 / 2e9) == 2
    with pytest.raises(ValueError, match="above 0"):
        gpu_stride(0.0, 1.0)


# Bytes


class Counting:
    """A file in memory that counts, and is done at once."""

    done = True

    def __init__(self) -> None:
        self.bytes_read = self.bytes_written = 0
        self.kept: dict[int, torch.Tensor] = {}

    def read(self, offset: int, into: torch.Tensor) -> Counting:
        self.bytes_read += len(into)
        into.copy_(self.kept[offset])
        return self

    def write(self, offset: int, data: torch.Tensor) -> Counting:
        self.bytes_written += len(data)
        self.kept[offset] = data.clone()
        return self

    def wait(self) -> None: ...

    def close(self) -> None: ...


def moved_by_a_ring(sizes: list[int], buffers: int, steps: int, same_way: bool = False) -> tuple[int, int]:
    """Bytes that `steps` passes, each the other way round or all the same, really read and write."""
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    segments = [Segment(i, at, size, []) for i, (at, size) in enumerate(zip(offsets, sizes, strict=True))]
    ring = Ring(segments, [torch.zeros(max(sizes), dtype=torch.uint8) for _ in range(buffers)], Counting())
    order = list(range(len(sizes)))
    for _ in range(steps):
        ring.expect(order, order if same_way else order[::-1], same_way=same_way)
        for index in order:
            with ring.using(index, changes=True):
                pass
            ring.wait()  # else what is idle depends on the threads
        if not same_way:
            order.reverse()
    ring.close()
    return ring.traffic


@pytest.mark.parametrize("buffers", [3, 4, 6])
@pytest.mark.parametrize("segments", [7, 20])
def test_the_bytes_of_a_run_are_what_a_ring_moves(segments: int, buffers: int) -> None:
    sizes, steps = [4096] * segments, 6
    found = moved_by_a_ring(sizes, buffers, steps)
    predicted = run_traffic(step_traffic(sizes, buffers), steps=steps)
    assert found == (predicted.read, predicted.written)


@pytest.mark.parametrize("buffers", [3, 6])
def test_steps_that_go_the_same_way_keep_half_as_much(buffers: int) -> None:
    sizes = [4096] * 40
    few, more = (moved_by_a_ring(sizes, buffers, steps, same_way=True)[1] for steps in (4, 9))
    each = step_traffic(sizes, buffers, same_way=True)
    assert (more - few) / 5 == pytest.approx(each.written, rel=0.03)
    assert each.written > step_traffic(sizes, buffers).written
    assert step_traffic(sizes[:3], buffers, same_way=True) == Traffic()


def test_what_fits_the_buffers_is_never_written() -> None:
    assert step_traffic([4096] * 6, 6) == Traffic(0.0, 0.0)
    assert moved_by_a_ring([4096] * 6, 6, 4) == (0, 0)
    assert kept_bytes([], 3) == 0


def test_segments_of_several_sizes_keep_the_mean_of_both_ends() -> None:
    sizes = [5, 1, 1, 1, 1, 1, 1, 3]
    assert kept_bytes(sizes, 3) == (5 + 1 + 1 + 1 + 1 + 3) / 2
    assert step_traffic(sizes, 3) == Traffic(8.0, 8.0)
    assert kept_bytes([5, 3], 3) == 8


def test_a_run_writes_every_step_and_reads_but_in_the_first() -> None:
    step = Traffic(10.0, 10.0)
    assert run_traffic(step, steps=5) == Traffic(40.0, 50.0)
    assert run_traffic(step, steps=5, saves=2) == Traffic(60.0, 50.0)
    assert run_traffic(step, steps=0) == Traffic(0.0, 0.0)
    assert Traffic(84e9, 84e9).seconds(6e9) == pytest.approx(28.0)


def test_wear_of_a_thousand_steps() -> None:
    # 12 bytes for each of 7e9 parameters, a thousand times: 84 TB of a drive rated for 1,200.
    worn = wear(run_traffic(Traffic(84e9, 84e9), steps=1000).written, 1200e12)
    assert (worn.terabytes, worn.share) == (pytest.approx(84.0), pytest.approx(0.07))
    with pytest.raises(ValueError, match="above 0"):
        wear(1.0, 0.0)


# The page


def test_the_tables_on_paper_are_what_the_script_prints() -> None:
    root = Path(__file__).parent.parent
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        runpy.run_path(str(root / "benchmarks" / "offload_paper.py"), run_name="__main__")
    tables = said.getvalue().strip()
    assert tables.count("**") == 4
    assert tables in (root / "docs" / "offload.md").read_text(encoding="utf-8")


# Placement and support


def test_a_placement_there_and_back() -> None:
    made = Placement(
        (
            Placed("weights", "device", 14, "computed with there"),
            Placed("optimizer", "disk", 84, "does not fit"),
            Placed("ring", "device", 1, "6 buffers"),
        )
    )
    assert Placement.from_json(made.to_json()) == made
    assert (made.tier("optimizer"), made.tier("weights"), made.tier("gradients")) == (
        "disk",
        "device",
        "device",
    )
    assert not made.all_on_device
    assert Placement(made.parts[:1]).all_on_device
    assert made.rows()[1] == ("optimizer", "disk", 84, "does not fit")
    with pytest.raises(ValueError, match="not a placement"):
        Placement.from_json([{"part": "optimizer"}])
    with pytest.raises(ValueError, match="not a placement: optimizer on tape"):
        Placement.from_json([{"part": "optimizer", "tier": "tape", "bytes": 1, "why": ""}])


def test_optimizers_whose_state_moves() -> None:
    ours = (Apollo, ApolloMini, QApollo, GaLore, NaturalGaLore, Frugal, Cosmos, Muon, Soap)
    assert [one.__name__ for one in (AdamW, *ours) if supports(one()) is not None] == []
    assert supports(Frugal(projection="blocks")) is not None
    assert "state_bits=8" in str(supports(AdamW8bit()))
    assert [one.__name__ for one in (BAdam, Lomo, AdaLomo, AdamMini) if supports(one()) is None] == []
