"""The Hopper scan's backward of more than 16 states: its PTX on the CPU, its launcher, the GPU."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

import backward_cases as cases
from backward_cases import Problem, machine, run

from mambench.kernels.s6 import (
    hopper_backward,
    hopper_memory,
    hopper_wide,
    hopper_wide_kernel,
    hopper_wide_memory,
)

Config = hopper_wide_memory.WideConfig
KERNELS = (
    "segment_adjoint_kernel", "pass_back_kernel", "move_states_kernel", "scan_backward_wide_kernel",
)  # fmt: skip


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    """Run the launcher's kernels on the CPU, on three multiprocessors."""
    for name in KERNELS:
        monkeypatch.setattr(hopper_wide, name, cases.Emulated(getattr(hopper_wide, name)))
    monkeypatch.setattr(hopper_backward, "multiprocessors", lambda device: 3)


SMALL = Config(warps_n=2, warps_d=1, chunk=64)
LANES_8 = Config(lanes_n=8, warps_n=1, warps_d=1, chunk=64, mid=32, exchange=8)
EMULATED = {
    "two segments, each state in its own span": (
        Problem(d_inner=32, seqlen=128, d_state=32), SMALL, True,
    ),
    "two segments, odd, first states apart": (
        Problem(d_inner=16, seqlen=131, d_state=17), SMALL, True,
    ),
    "warps over channels, gated, two rounds": (
        Problem(batch=2, d_inner=40, seqlen=101, d_state=32, gated=True, segments=1),
        Config(warps_n=2, warps_d=2, chunk=64, note=16), True,
    ),
    "states kept apart, groups, fp32": (
        Problem(
            batch=2, d_inner=12, seqlen=70, d_state=20, ngroups=2, dtype=torch.float32, gated=True
        ), replace(SMALL, chunk=32), False,
    ),
    "8 lanes of states, two launches": (
        Problem(d_inner=30, seqlen=90, d_state=30, dtype=torch.float16, segments=1), LANES_8, True,
    ),
}  # fmt: skip


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("name", EMULATED)
def test_its_ptx_gives_the_gradients(name: str) -> None:
    p, config, give = EMULATED[name]
    run(p, config, give=give)


@pytest.mark.usefixtures("emulated")
def test_one_set_of_sums_is_written_over_when_all_have_read_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hopper_wide_memory, "_SETS", ((8, 1),))
    run(Problem(d_inner=32, seqlen=40, d_state=32, segments=1), SMALL, give=True)


FAULTS = {
    "no notes": ("if at % NOTE == 0:", "if at % NOTE == TILE:"),
    "a segment's first state left out": (
        "h += load_states(head_ptr + head, live & (span == first_span)",
        "h += load_states(head_ptr + head, live & (span < first_span)",
    ),
    "sums added up before they are there": (
        "                            acquire(written_ptr, iteration * blocks_per_group)\n", ""
    ),
    "a row that does not wait for the one before": ("acquire(column_ptr, team)", "pass"),
}  # fmt: skip


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = cases.faulty(hopper_wide_kernel, tmp_path, name, *FAULTS[name])
    launched = cases.Emulated(wrong.scan_backward_wide_kernel)
    monkeypatch.setattr(hopper_wide, "scan_backward_wide_kernel", launched)
    channels = 16 if "row" in name else 20  # with one block a row, both segments run at once
    with pytest.raises((AssertionError, machine.Hazard)):
        run(Problem(d_inner=channels, seqlen=150, d_state=20), replace(SMALL, note=16), give=True)


@pytest.mark.usefixtures("emulated")
def test_blocks_that_are_not_there_at_once_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One block of two is launched: it waits for the other for ever."""
    kernel = hopper_wide.scan_backward_wide_kernel
    monkeypatch.setattr(hopper_wide, "scan_backward_wide_kernel", {(2,): kernel[(1,)]})
    with pytest.raises(machine.Deadlock):
        run(Problem(d_inner=32, seqlen=40, d_state=32, segments=1), SMALL, give=True)


def chosen(d_state: int) -> Any:
    """Return what 2,048 channels are computed with on an H100."""
    return hopper_backward.choose(d_inner=2048, d_state=d_state, multiprocessors=132)


@pytest.mark.parametrize(("d_state", "gated"), [(128, False), (256, True)])
def test_it_compiles_for_sm_90_without_spills_in_its_loops(d_state: int, gated: bool) -> None:
    """None around the exchanges over lanes, of the innermost loop; and shared memory suffices."""
    config = chosen(d_state)
    sizes = {"batch": 1, "seqlen": 8192, "d_inner": 2048, "d_state": d_state, "ngroups": 1}
    plan = hopper_wide_memory.plan(config, **sizes, itemsize=2, resident=132)
    constants = hopper_wide.specialisation(
        d_state=d_state, unit=8, has_D=True, has_z=gated, has_bias=True, softplus=True,
        has_r=True, in_du=plan.in_du, first=True, last=plan.launches == 1, plan=plan, config=config,
    )  # fmt: skip
    absent = ("head_ptr", *(() if gated else ("z_ptr", "dz_ptr")))
    cases.assert_compiles_well(
        hopper_wide_kernel.scan_backward_wide_kernel, constants, config,
        absent=(*absent, "sum_ptr") if plan.launches == 1 else absent,
    )  # fmt: skip


@pytest.mark.parametrize("d_state", [17, 32, 40, 64, 100, 128, 200, 256])
@pytest.mark.parametrize("seqlen", [100, 2047, 2048, 2050, 4000, 8191, 8192, 1 << 17])
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_a_step_takes_no_more_than_mamba_ssm(d_state: int, seqlen: int, batch: int) -> None:
    """Outputs and gradients as large as the peer's, and no more besides than it has room for."""
    sizes = {
        "batch": batch, "seqlen": seqlen, "d_inner": 2048, "d_state": d_state, "ngroups": 1,
    }  # fmt: skip
    ours = hopper_wide_memory.training_bytes(
        chosen(d_state), **sizes, itemsize=2, gated=False, resident=132
    )
    both = 2 * batch * seqlen * (3 * 2048 + 2 * d_state) + 4 * 2048 * (d_state + 2)
    assert ours <= both + hopper_wide_memory.room_bytes(**sizes)


@pytest.mark.parametrize("d_state", [32, 64, 128, 256])
def test_a_gpu_holds_every_launch_and_all_channels_have_their_turn(d_state: int) -> None:
    config = chosen(d_state)
    for d_inner, ngroups in ((16, 1), (2048, 1), (4096, 1), (5120, 1), (2048, 8), (6000, 100)):
        if not hopper_wide_memory.fits(config, d_inner=d_inner, ngroups=ngroups, resident=132):
            continue
        plan = hopper_wide_memory.plan(
            config, batch=3, seqlen=4096, d_inner=d_inner, d_state=d_state, ngroups=ngroups,
            itemsize=2, resident=132,
        )  # fmt: skip
        assert plan.rows * ngroups * plan.blocks <= 132, "blocks wait for each other"
        assert plan.launches * plan.blocks * config.block >= d_inner // ngroups
        assert 4 + plan.launches <= 13, "launches of a training step"


def test_fewer_segments_where_their_states_have_no_room() -> None:
    """At 2,047 steps what is passed back has no place in ddelta, nor the first states in du."""
    sizes = {"batch": 1, "d_inner": 2048, "d_state": 32, "ngroups": 1, "itemsize": 2}
    plans = [
        hopper_wide_memory.plan(chosen(32), **sizes, seqlen=seqlen, resident=132)
        for seqlen in (2048, 2047, 8191)
    ]
    assert [plan.segments for plan in plans] == [4, 1, 4]
    assert [plan.heads for plan in plans] == [False, False, True]


def test_states_are_not_moved_where_a_span_is_too_short() -> None:
    plan = hopper_wide_memory.plan(
        replace(SMALL, chunk=32), batch=1, seqlen=64, d_inner=16, d_state=17, ngroups=1,
        itemsize=2, resident=1,
    )  # fmt: skip
    assert not plan.in_du
    assert hopper_memory.COUNTERS == 64


GPU = [
    Problem(d_inner=2048, seqlen=512, d_state=32),
    Problem(d_inner=2048, seqlen=512, d_state=64, segments=None),
    Problem(d_inner=2048, seqlen=300, d_state=128, segments=1),
    Problem(d_inner=2304, seqlen=600, d_state=128, segments=None),
    Problem(d_inner=2048, seqlen=520, d_state=256, segments=None),
    Problem(batch=2, d_inner=72, seqlen=515, d_state=100, ngroups=2, dtype=torch.float32),
    Problem(batch=2, d_inner=200, seqlen=301, d_state=20, ngroups=2, gated=True, segments=3),
    Problem(batch=3, d_inner=40, seqlen=333, d_state=200, dtype=torch.float16, gated=True),
]


@pytest.mark.gpu
@pytest.mark.parametrize("p", GPU)
def test_gradients_on_the_gpu_are_right_and_the_same_bits_again(p: Any) -> None:
    cases.run_on_the_gpu(p, chosen(p.d_state))
