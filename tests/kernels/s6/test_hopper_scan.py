"""The Hopper scan: its PTX run on the CPU against float64, its compilation, and the GPU itself."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton.experimental.gluon")

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from mambench.kernels.s6 import hopper_kernel, hopper_scan, hopper_serial

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
OUT_LIMIT = {torch.bfloat16: 3e-3, torch.float16: 5e-4, torch.float32: 2e-6}  # one rounding
STATE_LIMIT = 1e-5


def load(path: Path, name: str) -> ModuleType:
    """Import a file as a module of its own."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


machine = load(Path(__file__).parents[1] / "ptx_machine.py", "ptx_machine")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Sizes and switches of a scan."""

    batch: int = 1
    d_inner: int = 16
    seqlen: int = 520
    ngroups: int = 1
    d_state: int = 16
    dtype: torch.dtype = torch.bfloat16
    gated: bool = False
    has_D: bool = True
    has_bias: bool = True
    softplus: bool = True
    checkpoint_every: int | None = None


def tensors(p: Problem, device: str = "cpu") -> dict[str, Any]:
    """Draw the inputs; a quarter of the channels remember longer than the sequence."""
    gen = torch.Generator().manual_seed(p.seqlen + p.d_state)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen)

    A = -torch.rand(p.d_inner, p.d_state, generator=gen) - 0.1
    A[: p.d_inner // 4] *= 1e-3
    shape = (p.batch, p.d_inner, p.seqlen)
    delta = draw(*shape) * 0.5
    rows = (p.batch, p.ngroups, p.d_state, p.seqlen)
    made = {
        "u": draw(*shape).to(p.dtype),
        "delta": (delta if p.softplus else delta.abs() * 0.2).to(p.dtype),
        "A": A,
        "B": draw(*rows).to(p.dtype),
        "C": draw(*rows).to(p.dtype),
        "D": draw(p.d_inner) if p.has_D else None,
        "z": draw(*shape).to(p.dtype) if p.gated else None,
        "delta_bias": draw(p.d_inner) * 0.1 if p.has_bias else None,
    }
    return {k: None if v is None else v.to(device) for k, v in made.items()}


def reference(p: Problem, t: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the recurrence in float64: out, last state, the states before every K-th step."""
    d = {k: None if v is None else v.double() for k, v in t.items()}
    dt = d["delta"] if d["delta_bias"] is None else d["delta"] + d["delta_bias"][:, None]
    dt = F.softplus(dt, threshold=1e9) if p.softplus else dt
    B, C = (d[k].repeat_interleave(p.d_inner // p.ngroups, 1) for k in "BC")
    h = torch.zeros(p.batch, p.d_inner, p.d_state, dtype=torch.float64, device=dt.device)
    ys, saved = [], []
    for i in range(p.seqlen):
        if i % (p.checkpoint_every or p.seqlen) == 0:
            saved.append(h)
        h = torch.exp(dt[..., i, None] * d["A"]) * h + (dt * d["u"])[..., i, None] * B[..., i]
        ys.append((h * C[..., i]).sum(-1))
    y = torch.stack(ys, -1)
    y = y if d["D"] is None else y + d["u"] * d["D"][:, None]
    y = y if d["z"] is None else y * F.silu(d["z"])
    return y, h, torch.stack(saved, 1)


AnyConfig = hopper_scan.Config | hopper_scan.SerialConfig


def compiled(p: Problem, config: AnyConfig, module: ModuleType | None = None) -> tuple[Any, int]:
    """Compile the kernel of a problem for sm_90; returns it and the alignment unit of rows."""
    unit = next(u for u in (8, 2, 1) if p.seqlen % u == 0)
    absent = {"D_ptr": p.has_D, "z_ptr": p.gated, "bias_ptr": p.has_bias}
    absent["checkpoints_ptr"] = p.checkpoint_every is not None
    constants: dict[str, Any] = {name: None for name, there in absent.items() if not there}
    constants |= hopper_scan.specialisation(
        d_inner=p.d_inner, ngroups=p.ngroups, d_state=p.d_state, dtype=p.dtype, unit=unit,
        has_D=p.has_D, has_z=p.gated, has_bias=p.has_bias, softplus=p.softplus,
        checkpoint_every=p.checkpoint_every, config=config,
    )  # fmt: skip
    if isinstance(config, hopper_scan.SerialConfig):
        kernel = (module or hopper_serial).serial_scan_kernel
    else:
        kernel = (module or hopper_kernel).scan_forward_kernel
    narrow = ("u_ptr", "delta_ptr", "B_ptr", "C_ptr", "z_ptr", "out_ptr")
    signature: dict[str, str] = {}
    for name in kernel.arg_names:
        pointer = "*" + (TYPES[p.dtype] if name in narrow else "fp32")
        integer = pointer if name.endswith("_ptr") else "i32"
        signature[name] = "constexpr" if name in constants else integer
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
    }
    named = {(kernel.arg_names.index(k),): v for k, v in constants.items()}
    source = GluonASTSource(kernel, signature, named, attributes)
    target = GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={"num_warps": config.warps}), unit


def emulate(
    p: Problem, config: AnyConfig, module: ModuleType | None = None
) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Run the kernel's PTX on the CPU, outputs poisoned with NaN."""
    kernel, unit = compiled(p, config, module)
    t = tensors(p)
    nan = float("nan")
    out = torch.full_like(t["u"], nan)
    state = torch.full((p.batch, p.d_inner, p.d_state), nan)
    slots = triton.cdiv(p.seqlen, p.checkpoint_every) if p.checkpoint_every else 0
    saved = torch.full((p.batch, slots, p.d_inner, p.d_state), nan) if slots else None
    blocks = triton.cdiv(p.d_inner // p.ngroups, config.block)
    order = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    pointers = [x for x in (*(t[k] for k in order), out, state, saved) if x is not None]
    sizes = [p.seqlen // unit, p.d_inner, p.ngroups, p.d_state, blocks, slots]
    if isinstance(config, hopper_scan.SerialConfig):
        del sizes[3]  # the number of states is known when compiling
    ptx = kernel.asm["ptx"]
    missing = ptx[: ptx.index(".reqntid")].count(".param") - len(pointers) - len(sizes)
    machine.launch(
        ptx,
        p.batch * p.ngroups * blocks,
        [*pointers, *sizes, *[0] * missing],
        threads=32 * config.warps,
        shared_bytes=kernel.metadata.shared,
    )
    return t, out, state, saved


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def assert_right(
    p: Problem, t: dict[str, Any], out: torch.Tensor, state: torch.Tensor, saved: Any
) -> None:
    want_out, want_state, want_saved = reference(p, t)
    assert error(out, want_out) < OUT_LIMIT[p.dtype]
    assert error(state, want_state) < STATE_LIMIT
    if p.checkpoint_every is not None:
        torch.testing.assert_close(saved.double(), want_saved, rtol=1e-4, atol=1e-5)


WIDE = hopper_scan.Config()
TWO = hopper_scan.Config(channels=2, warps=8)  # channels a warp
ODD = Problem(d_inner=10, ngroups=2, seqlen=43, d_state=20, gated=True, checkpoint_every=16)
BARE = Problem(dtype=torch.float16, seqlen=40, has_D=False, has_bias=False, softplus=False)
SERIAL = hopper_scan.SerialConfig(warps_d=1)
EIGHT = replace(SERIAL, lanes=8, channels=1, warps_d=2)  # lanes that share a channel
SPLIT = replace(SERIAL, channels=1, warps_n=2)  # states over warps
EMULATED = {
    "serial": (Problem(seqlen=72), SERIAL),
    "serial, eight lanes, 64 steps, even length": (
        Problem(d_inner=10, seqlen=134, gated=True),
        replace(EIGHT, tile=64),
    ),
    "serial, odd, gated, groups, checkpoints": (
        replace(ODD, batch=2, checkpoint_every=32),
        SPLIT,
    ),
    "serial, fp16, bare, 16 steps": (BARE, replace(EIGHT, steps=16)),
    "serial, fp32, few steps": (
        Problem(dtype=torch.float32, seqlen=40, gated=True, d_state=16),
        replace(SERIAL, steps=4),
    ),
    "plain": (Problem(seqlen=1032), WIDE),
    "two channels a warp, gated": (Problem(seqlen=520, gated=True), TWO),
    "two channels a warp, odd, checkpoints": (ODD, TWO),
    "odd, gated, groups, checkpoints": (ODD, WIDE),
    "four warps, odd, checkpoints": (ODD, replace(WIDE, warps=4, wide=False)),
    "even length, blocks of states": (Problem(d_inner=5, seqlen=514, d_state=32), WIDE),
    "fp16, bare": (BARE, replace(WIDE, wide=False)),
    "not widened, gated, checkpoints, blocks of states": (
        Problem(seqlen=530, d_state=20, gated=True, checkpoint_every=128),
        replace(WIDE, wide=False),
    ),
    "fp32, gated": (Problem(dtype=torch.float32, seqlen=40, gated=True), WIDE),
}


@pytest.mark.parametrize("name", EMULATED)
def test_its_ptx_gives_the_recurrence(name: str) -> None:
    problem, config = EMULATED[name]
    assert_right(problem, *emulate(problem, config))


def planted(
    tmp_path: Path, name: str, old: str, new: str, kernel: ModuleType = hopper_kernel
) -> ModuleType:
    """Import a copy of a kernel with a fault."""
    source = Path(str(kernel.__file__)).read_text()
    assert old in source
    path = tmp_path / f"{name}.py"
    path.write_text(source.replace(old, new))
    return load(path, name)


FAULTS = {
    "a dropped carry": (
        "lane_scan(run_decay, local_end, queue, lane)",
        "lane_scan(run_decay, local_end, queue * 0.0, lane)",
    ),
    "a carry that the second lane does not get": ("lane <= 1, 17", "lane == 0, 17"),
    "the next state's decay": ("A_smem.index(k * N + n)", "A_smem.index(k * N + (n + 1) % N)"),
    "steps past the end that decay": ("dt = gl.where(start + time < seqlen, dt, 0.0)", "dt += 0.0"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_caught(name: str, tmp_path: Path) -> None:
    wrong = planted(tmp_path, name.replace(" ", "_").replace("'", ""), *FAULTS[name])
    problem = Problem(seqlen=520)
    with pytest.raises(AssertionError):
        assert_right(problem, *emulate(problem, WIDE, wrong))


SERIAL_FAULTS = {
    "a state that starts anew": ("inflow + decay * gl.expand_dims(h, 0)", "inflow"),
    "steps in the wrong order": ("gl.join(sums[0], sums[2])", "gl.join(sums[2], sums[0])"),
    "steps past the end that decay": ("gl.where(start + io_step < seqlen, dt, 0.0)", "dt"),
    "a partial sum": ("gl.sum(y_smem.load(PARTS), 1)", "gl.reduce(y_smem.load(PARTS), 1, last)"),
}


@pytest.mark.parametrize("name", SERIAL_FAULTS)
def test_faults_of_the_serial_kernel_are_caught(name: str, tmp_path: Path) -> None:
    stem = name.replace(" ", "_")
    wrong = planted(tmp_path, stem, *SERIAL_FAULTS[name], kernel=hopper_serial)
    problem = Problem(seqlen=70, d_state=32)
    with pytest.raises(AssertionError):
        assert_right(problem, *emulate(problem, SPLIT, wrong))


def test_missing_barriers_are_caught() -> None:
    p = Problem()
    kernel, unit = compiled(p, WIDE)
    t = tensors(p)
    order = ("u", "delta", "A", "B", "C", "D", "delta_bias")
    out, state = torch.empty_like(t["u"]), torch.empty(p.batch, p.d_inner, p.d_state)
    ptx = kernel.asm["ptx"].replace("bar.sync", "//")
    arguments = [*(t[k] for k in order), out, state]
    arguments += [p.seqlen // unit, p.d_inner, p.ngroups, p.d_state, 1, 0]
    missing = ptx[: ptx.index(".reqntid")].count(".param") - len(arguments)
    shared_bytes = kernel.metadata.shared
    with pytest.raises(machine.Hazard):
        machine.launch(ptx, 1, arguments + [0] * missing, threads=512, shared_bytes=shared_bytes)


def resources(kernel: Any, folder: Path) -> str:
    """What cuobjdump says of a kernel's registers, stack and local memory."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    ran = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True)
    return ran.stdout


@pytest.mark.parametrize(
    "problem",
    [
        Problem(dtype=torch.float32, d_state=176, gated=True),
        Problem(dtype=torch.float32, d_state=256, gated=True),
        Problem(dtype=torch.float32, d_state=256, gated=True, seqlen=511),
        Problem(d_state=176, gated=True, seqlen=511),
        Problem(d_state=192, gated=True),
        Problem(d_state=256, gated=True, seqlen=511),
        Problem(d_state=256, gated=True, seqlen=511, checkpoint_every=128),
    ],
    ids=str,
)
def test_shared_memory_has_place_for_what_is_chosen(problem: Problem) -> None:
    for d_inner in (512, 1024, 2048):
        config = hopper_scan.choose(
            batch=1, d_inner=d_inner, d_state=problem.d_state, dtype=problem.dtype,
            checkpoint_every=problem.checkpoint_every, multiprocessors=132,
        )  # fmt: skip
        assert compiled(problem, config)[0].metadata.shared <= 232448


@pytest.mark.parametrize("config", [WIDE, replace(WIDE, wide=False)], ids=["wide", "half"])
def test_it_compiles_for_sm_90_without_spills_or_a_barrier_per_state(
    config: hopper_scan.Config, tmp_path: Path
) -> None:
    kernel, _ = compiled(Problem(seqlen=2048), config)
    usage = resources(kernel, tmp_path)
    assert "STACK:0" in usage
    assert "LOCAL:0" in usage
    assert kernel.metadata.shared <= 232448
    loop = inner_loop(kernel.asm["ptx"])
    assert loop.count("ex2.approx") >= 16 * config.channels
    assert "bar.sync" not in loop


SERIAL_CONFIGS = {
    "many channels": (16, hopper_scan.SerialConfig()),
    "few channels": (16, hopper_scan.SerialConfig(lanes=8, channels=1, tile=64)),
    "fewer channels": (16, hopper_scan.SerialConfig(channels=1, warps_d=2)),
    "many states": (128, hopper_scan.SerialConfig(channels=1, warps_n=8, warps_d=2)),
    "many states, long tiles": (
        128,
        hopper_scan.SerialConfig(channels=1, warps_n=8, warps_d=2, tile=64),
    ),
}


@pytest.mark.parametrize("name", SERIAL_CONFIGS)
def test_the_serial_kernel_compiles_without_spills_or_a_barrier_per_run(
    name: str, tmp_path: Path
) -> None:
    d_state, config = SERIAL_CONFIGS[name]
    kernel, _ = compiled(Problem(d_inner=2048, seqlen=2048, d_state=d_state), config)
    usage = resources(kernel, tmp_path)
    assert "STACK:0" in usage
    assert "LOCAL:0" in usage
    assert kernel.metadata.shared <= 232448
    assert kernel.asm["ptx"].count("bar.sync") <= 4


def test_the_kernel_is_chosen_by_the_channels_there_are() -> None:
    def chosen(batch: int, d_inner: int, d_state: int = 16, every: int | None = None) -> AnyConfig:
        return hopper_scan.choose(
            batch=batch, d_inner=d_inner, d_state=d_state, checkpoint_every=every,
            multiprocessors=132,
        )  # fmt: skip

    serial, kept = hopper_scan.SerialConfig(), replace(WIDE, wide=False)
    assert chosen(8, 2048) == chosen(8, 2048, every=64) == serial
    assert chosen(4, 2048) == replace(serial, channels=1, warps_d=2)  # half the channels a thread
    assert chosen(1, 2048) == chosen(2, 2048) == chosen(3, 2048) == WIDE
    assert chosen(1, 2048, every=64) == chosen(8, 2048, every=16) == kept
    assert chosen(1, 2048, 32) == chosen(1, 2048, 64) == WIDE
    assert chosen(1, 2048, 256) == kept  # shared memory has no place for what is widened
    many = SERIAL_CONFIGS["many states, long tiles"][1]
    assert chosen(1, 2048, 128) == chosen(1, 2048, 100) == chosen(1, 2048, 128, every=64) == many
    assert chosen(1, 2048, 128, every=32) == kept
    # A block for every multiprocessor, as long as there are as many.
    assert chosen(1, 1024) == chosen(1, 1056) == chosen(1, 1024, 128) == replace(WIDE, warps=8)
    assert chosen(1, 512) == chosen(2, 64, 256) == replace(WIDE, warps=4)
    assert chosen(1, 512, every=64) == chosen(1, 1024, every=64) == replace(kept, warps=4)


def test_the_choice_is_within_four_per_cent_of_the_best_measured() -> None:
    """Against the published times of every configuration on an H100, the latest first."""
    names: dict[AnyConfig, str] = {
        TWO: "wide",
        WIDE: "1ch-wide",
        replace(WIDE, wide=False): "1ch",
        **{replace(WIDE, warps=w): f"1ch-wide/{w}" for w in (4, 8)},
        **{replace(WIDE, warps=w, wide=False): f"1ch/{w}" for w in (4, 8)},
        hopper_scan.SerialConfig(): "k4c2",
        hopper_scan.SerialConfig(channels=1, warps_d=2): "k4c1w2",
        SERIAL_CONFIGS["many states, long tiles"][1]: "k4c1",
    }
    root = Path(__file__).parents[3] / "published" / "experiments"
    times: dict[str, dict[str, float]] = {}
    for file in ("chain", "serial", "lanes"):
        record = json.loads((root / f"h100-s6-forward-{file}.json").read_text())
        for key, value in record["times_ms"].items():
            config, _, shape = key.partition(" ")
            times.setdefault(shape, {}).setdefault(config, value)
    assert len(times) > 8
    # Three blocks of four warps share a multiprocessor there, but not with a gate: not taken.
    del times["(1, 1536, 8192, 16) kept every 128"]["1ch/4"]
    judged = 0
    for problem, measured in times.items():
        shape, _, every = problem.partition(" kept every ")
        batch, d_inner, _, d_state = (int(part) for part in shape.strip("()").split(", "))
        chosen = hopper_scan.choose(
            batch=batch, d_inner=d_inner, d_state=d_state,
            checkpoint_every=int(every) if every else None, multiprocessors=132,
        )  # fmt: skip
        if names[chosen] in measured:  # the serial kernel was not timed at each with states kept
            assert measured[names[chosen]] <= 1.04 * min(measured.values()), problem
            judged += 1
    assert judged >= len(times) - 2


def inner_loop(ptx: str) -> str:
    """The loop over states: the text between its label and the backward branch."""
    scan = ptx.index("selp.f32 h")
    start = ptx.rindex("\n$L__BB", 0, scan)
    label = ptx[start + 1 : ptx.index(":", start)]
    return ptx[start : ptx.index(f"bra \t{label}", scan)]


def test_supported_names_what_is_refused() -> None:
    assert hopper_scan.supported(d_state=16, dtype=torch.bfloat16) is None
    assert hopper_scan.supported(d_state=256, dtype=torch.float32) is None
    assert "257" in str(hopper_scan.supported(d_state=257, dtype=torch.bfloat16))
    assert "float64" in str(hopper_scan.supported(d_state=16, dtype=torch.float64))


def test_checkpoints_must_fall_on_run_boundaries() -> None:
    t = tensors(Problem(seqlen=32))
    with pytest.raises(ValueError, match="checkpoint_every 24"):
        hopper_scan.scan_forward(**t, checkpoint_every=24, config=WIDE)


def test_rows_are_as_aligned_as_length_and_pointers_allow() -> None:
    flat = torch.empty(64, dtype=torch.bfloat16)
    assert [hopper_scan.row_unit(n, (flat,)) for n in (8, 16, 12, 7)] == [8, 8, 2, 1]
    assert hopper_scan.row_unit(8, (flat, flat[1:])) == 1


GPU_PROBLEMS = (
    Problem(d_inner=64, seqlen=2048),
    Problem(batch=2, d_inner=48, ngroups=2, seqlen=1000, gated=True, checkpoint_every=256),
    Problem(d_inner=40, seqlen=1001, gated=True, checkpoint_every=256),
    Problem(batch=3, d_inner=21, ngroups=3, seqlen=777, has_D=False, has_bias=False),
    Problem(d_inner=32, seqlen=1040, d_state=128),
    Problem(d_inner=16, seqlen=1, d_state=256, gated=True),
    Problem(d_inner=33, seqlen=1100, d_state=200, dtype=torch.float16),
    Problem(d_inner=19, seqlen=1023, dtype=torch.float32, gated=True, checkpoint_every=128),
    Problem(batch=8, d_inner=2080, seqlen=100),  # channels enough for the serial kernel
    Problem(batch=8, d_inner=2080, seqlen=99, ngroups=2, gated=True, checkpoint_every=32),
)


@pytest.fixture
def poisoned() -> Any:
    """Fill torch.empty with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize("problem", GPU_PROBLEMS, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_it_is_right_on_the_gpu(problem: Problem) -> None:
    t = tensors(problem, "cuda")
    run: Callable[..., Any] = hopper_scan.scan_forward
    options = {"delta_softplus": problem.softplus, "checkpoint_every": problem.checkpoint_every}
    full = replace(WIDE, wide=problem.d_state <= 176)  # what is chosen where channels are many
    for config in (None, full):
        for _ in range(2):  # as bound by Triton, and as repeated
            t = {name: None if value is None else value.clone() for name, value in t.items()}
            assert_right(problem, t, *run(**t, **options, config=config))


@pytest.mark.gpu
def test_channels_past_32_bit_offsets_are_right() -> None:
    problem = Problem(d_inner=2064, seqlen=(1 << 20) + 8)
    shape = (1, problem.d_inner, problem.seqlen)
    t = tensors(replace(problem, d_inner=16), "cuda")
    whole = t | {k: torch.zeros(shape, dtype=problem.dtype, device="cuda") for k in ("u", "delta")}
    for k in ("u", "delta"):
        whole[k][:, -16:] = t[k]
    for k in ("A", "D", "delta_bias"):
        whole[k] = t[k].repeat(problem.d_inner // 16, *[1] * (t[k].dim() - 1))
    out, state, _ = hopper_scan.scan_forward(**whole, delta_softplus=True)
    want_out, want_state, _ = hopper_scan.scan_forward(**t, delta_softplus=True)
    assert torch.equal(out[:, -16:], want_out)
    assert torch.equal(state[:, -16:], want_state)
