"""The Hopper scan's backward: its PTX run on the CPU against float64, its launcher, and the GPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

import backward_cases as cases
from backward_cases import Emulated, Problem, machine, run

from mambench.kernels.s6 import hopper_backward, hopper_backward_kernel, hopper_memory

Config = hopper_backward.BackwardConfig
KERNELS = (
    "segment_adjoint_kernel", "move_states_kernel", "pass_back_kernel", "scan_backward_kernel",
)  # fmt: skip


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    """Run the launcher's kernels on the CPU."""
    for name in KERNELS:
        monkeypatch.setattr(hopper_backward, name, Emulated(getattr(hopper_backward, name)))


BARE = Problem(
    d_inner=20, dtype=torch.float16, has_D=False, has_bias=False, softplus=False, has_last=False
)
SMALL = Config(channels=2, tile=4, warps=1, chunk=32)
EMULATED = {
    "two warps, tiles of 8": (
        Problem(d_inner=32, seqlen=40),
        Config(channels=2, tile=8, warps=2, chunk=32),
    ),
    "odd, gated, groups, one segment": (
        Problem(batch=2, d_inner=6, ngroups=2, seqlen=35, gated=True, segments=1),
        SMALL,
    ),
    "fp32, even length, fewer states": (
        Problem(d_inner=5, seqlen=66, d_state=9, dtype=torch.float32, has_last=False),
        SMALL,
    ),
    "four channels, fp16, bare": (
        replace(BARE, gated=True),
        Config(channels=4, tile=4, warps=1, chunk=32),
    ),
}


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("name", EMULATED)
def test_its_ptx_gives_the_gradients(name: str) -> None:
    run(*EMULATED[name])


NARROW = Config(channels=2, tile=4, warps=2, chunk=32)
FP32 = Problem(d_inner=64, seqlen=96, dtype=torch.float32, has_last=False)
IN_PLACE = {
    "segments, a last chunk cut short": (replace(FP32, seqlen=124), NARROW, 2),
    "three rounds of two items": (
        replace(FP32, batch=3, seqlen=128, has_last=True), NARROW, 2
    ),
    "gated, groups": (replace(FP32, batch=2, ngroups=2, gated=True, segments=1), NARROW, 2),
    "segments of one chunk, in two rounds": (replace(FP32, batch=2, seqlen=64), NARROW, 2),
    "parts of segments": (replace(FP32, seqlen=512), NARROW, 2),
    "bf16, no room for the last state": (
        Problem(d_inner=64, seqlen=138, segments=1), replace(NARROW, tile=8, warps=4, chunk=64), 1
    ),
}  # fmt: skip


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("name", IN_PLACE)
def test_sums_lie_in_the_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p, config, processors = IN_PLACE[name]
    monkeypatch.setattr(hopper_backward, "multiprocessors", lambda device: processors)
    made: list[hopper_memory.Division] = []
    divide = hopper_memory.divide
    monkeypatch.setattr(
        hopper_backward, "divide", lambda **sizes: made.append(divide(**sizes)) or made[-1]
    )
    run(p, config, give=True)
    assert [division.in_place for division in made] == [True]


FAULTS = {
    "what is passed back not read": ("        if HAS_R:\n", "        if not HAS_R:\n"),
    "steps past the end that decay": ("dt = gl.where(io_mask, dt, 0.0)  # steps", "# steps"),
    "a warp's partial sum": (
        "part = gl.sum(part_smem.load(PARTIAL), 1)",
        "part = gl.reduce(part_smem.load(PARTIAL), 1, first)",
    ),
    "steps in the wrong order": ("gl.join(parts[0], parts[2])", "gl.join(parts[2], parts[0])"),
    "sums added up before they are there": (
        "            acquire(written_ptr, iteration * blocks_per_group)\n            sums",
        "            sums",
    ),
    "sums of a block forgotten": ("APART + source < blocks)", "APART + source < blocks - 1)"),
}  # fmt: skip
# where sums lie in the gradients: of so many steps, in so many segments
FAULTS_IN_PLACE = {
    "sums over others that are not read": (
        "                        acquire(read_ptr, blocks_per_group)",
        "                        pass", 64, 1,
    ),
    "sums in the next chunk": (
        "gl.maximum(chunk - 2, first_chunk)", "gl.maximum(chunk - 1, first_chunk)", 160, 1,
    ),
    "the last gradient but one over sums that are not read": (
        "own = final | has_held", "own = final", 96, 1
    ),
    "the last gradient but one forgotten": ("if iteration > 2:", "if iteration > 3:", 96, 1),
    "the last gradient over sums that are not read": (
        "acquire(read_ptr, gl.where(iteration == 2, 2, 1) * blocks_per_group)", "pass", 96, 1,
    ),
    "a gradient over another row's sums": ("acquire(column_ptr + 32, rows)", "pass", 128, 2),
}  # fmt: skip


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("name", [*FAULTS, *FAULTS_IN_PLACE])
def test_faults_are_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, *where = FAULTS.get(name) or FAULTS_IN_PLACE[name]
    wrong = cases.faulty(hopper_backward_kernel, tmp_path, name, old, new)
    monkeypatch.setattr(
        hopper_backward, "scan_backward_kernel", Emulated(wrong.scan_backward_kernel)
    )
    p = Problem(d_inner=64, seqlen=40)
    if where:
        monkeypatch.setattr(hopper_backward, "multiprocessors", lambda device: 2)
        p = replace(FP32, seqlen=where[0], segments=where[1])
    with pytest.raises(AssertionError):
        run(p, NARROW)


@pytest.mark.usefixtures("emulated")
def test_blocks_that_are_not_there_at_once_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One block of two is launched: it waits for the other for ever."""
    kernel = hopper_backward.scan_backward_kernel
    monkeypatch.setattr(hopper_backward, "scan_backward_kernel", {(2,): kernel[(1,)]})
    with pytest.raises(machine.Deadlock):
        run(Problem(d_inner=64, seqlen=33), NARROW)


@pytest.mark.parametrize("gated", [False, True])
def test_it_compiles_for_sm_90_without_spills_in_its_loops(gated: bool) -> None:
    """Few registers are spilled, and around the exchanges over lanes, of the inner loop, none."""
    config = Config()
    sizes = {"batch": 1, "seqlen": 8192, "d_inner": 2048, "d_state": 16, "ngroups": 1}
    division = hopper_memory.divide(
        **sizes, itemsize=2, chunk=config.chunk, block=config.block, slots=132 * config.resident
    )
    constants = hopper_backward.specialisation(
        d_state=16, unit=8, has_D=True, has_z=gated, has_bias=True, softplus=True, has_r=True,
        division=division, kept_unit=4, config=config,
    )  # fmt: skip
    cases.assert_compiles_well(
        hopper_backward_kernel.scan_backward_kernel, constants, config,
        absent=() if gated else ("z_ptr", "dz_ptr"),
    )  # fmt: skip


def test_what_is_not_chosen_runs_the_portable_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    few, more = Config(warps=2), Config(warps=4)
    monkeypatch.setattr(hopper_backward, "CHOSEN", {16: few, 128: more})
    chosen = [
        hopper_backward.choose(d_inner=d, d_state=n, ngroups=g, multiprocessors=132)
        for d, n, g in (
            (2048, 9, 1),
            (2048, 64, 1),
            (2048, 100, 1),
            (2048, 16, 512),
            (1 << 16, 128, 1),
        )
    ]
    assert chosen == [few, None, more, None, None]


def test_there_is_a_configuration_for_every_number_of_states() -> None:
    for d_state in range(1, 257):
        config = hopper_backward.choose(d_inner=2048, d_state=d_state, multiprocessors=132)
        assert config is not None
        assert config.chunk % 32 == 0


def test_what_it_refuses() -> None:
    assert hopper_backward.supported(d_state=16, dtype=torch.bfloat16) is None
    assert hopper_backward.supported(d_state=257, dtype=torch.bfloat16) is not None
    assert hopper_backward.supported(d_state=16, dtype=torch.float64) is not None


@pytest.mark.gpu
@pytest.mark.parametrize(
    "p",
    [
        Problem(d_inner=128, seqlen=512, segments=4),
        Problem(d_inner=2048, seqlen=192, segments=3),
        Problem(d_inner=2048, seqlen=1024, segments=2),  # of two parts each
        Problem(batch=9, d_inner=2048, seqlen=96, segments=1),
        Problem(batch=3, d_inner=192, seqlen=320, dtype=torch.float32, segments=3),
        Problem(batch=2, d_inner=72, seqlen=518, segments=2, gated=True, ngroups=2),
        Problem(batch=2, d_inner=40, seqlen=301, ngroups=2, gated=True, segments=3),
        Problem(d_inner=33, seqlen=67, d_state=7, dtype=torch.float32, gated=True),
    ],
)
def test_gradients_on_the_gpu_are_right_and_the_same_bits_again(p: Problem) -> None:
    cases.run_on_the_gpu(p, Config())
