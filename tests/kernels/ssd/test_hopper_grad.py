"""The SSD backward's Hopper kernels: run on the CPU, compiled for sm_90, and on the GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from mambench.kernels.ssd import (
    hopper_exits_kernel,
    hopper_grad,
    hopper_grad_c_kernel,
    hopper_grad_kernel,
    hopper_launch,
    hopper_states_kernel,
)

SMALL = {"headdim": 16, "d_state": 16, "long_memory": True}
CASES = {
    "more heads than stages, three segments": {
        **SMALL, "seqlen": 270, "nheads": 5, "segments": 3,
    },
    "groups, in blocks of few heads, other channels and states": {
        "seqlen": 80, "batch": 2, "nheads": 6, "ngroups": 2, "headdim": 40, "d_state": 24,
        "D": 2, "start": False, "final": False, "long_memory": True, "multiprocessors": 16,
    },
    "one head, one segment, nothing optional": {
        **SMALL, "seqlen": 70, "nheads": 1, "D": 0, "bias": False, "start": False, "segments": 1,
    },
    "more blocks before than of all heads' products": {
        **SMALL, "seqlen": 100, "nheads": 5, "multiprocessors": 4, "start": False,
    },
    "x that TMA cannot read": {**SMALL, "seqlen": 70, "nheads": 2, "off": True},
}  # fmt: skip
FAULTY = {**SMALL, "seqlen": 200, "nheads": 5, "segments": 2}
RELEASED = "        mbarrier.arrive(empty.index(stage), count=1)\n"
FAULTS = {
    "a stage that is never released": [
        (RELEASED + "        mbarrier.arrive(taken", "        mbarrier.arrive(taken"),
    ],
    "weights that nobody waits to be taken": [
        ("        mbarrier.arrive(taken.index(k % 2), count=1)\n", ""),
    ],
    "weights that are not made": [("        mbarrier.arrive(made.index(which), count=1)\n", "")],
    "sums over tokens that come later": [("gl.where(causal, total_sums, 0.0)", "total_sums")],
    "an output tile reused too early": [
        ("        tma.store_wait(0)\n        grad_x, grad_B", "        grad_x, grad_B"),
    ],
    "segments' parts that do not decay": [
        ("* gl.exp2(total)[:, None]\n        state = warpgroup_mma(scaled, Cs",
         "* 1.0\n        state = warpgroup_mma(scaled, Cs"),
    ],
    "segments' parts along time": [("t = (first + count - 1 - c) * _Q", "t = (first + c) * _Q")],
    "a state released before it is stored": [
        ("        tma.store_wait(0)\n        gl.thread_barrier()\n", ""),
    ],
    "states of the end of the chunk": [
        ("        kept.store(state.to(dtype))\n", "        kept.store((state * 0.9).to(dtype))\n"),
    ],
}  # fmt: skip
JOBS = {name: {"case": case} for name, case in CASES.items()} | {
    name: {"case": FAULTY, "changes": changes} for name, changes in FAULTS.items()
}


@pytest.fixture(scope="module")
def results():
    script = Path(__file__).with_name("hopper_grad_cases.py")
    command = [sys.executable, script, json.dumps(list(JOBS.values()))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(JOBS, json.loads(done.stdout), strict=True))


def wrong(errors):
    """Return the names of what is off by more than a few roundings."""
    bound = torch.finfo(torch.float16).eps
    return [name for name, e in errors.items() if name != "launches" and not e < bound]


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_recurrence(results, name):
    assert wrong(results[name]) == []


def test_each_kernel_is_launched_where_it_fits(results):
    launches = {name: results[name]["launches"] for name in CASES}
    assert launches.pop("x that TMA cannot read") == [0, 0, 0, 0]
    assert launches.pop("one head, one segment, nothing optional") == [0, 1, 1, 2]
    assert set(map(tuple, launches.values())) == {(1, 1, 1, 2)}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_caught(results, name):
    found = results[name]
    assert "raised" in found or wrong(found)


NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def described(shape, dtype):
    """The signature's type of a descriptor."""
    layout = hopper_launch.tile_layout(*shape[-2:], dtype)
    return f"tensordesc<{NAMES[dtype]}[{', '.join(map(str, shape))}],{layout!r}>"


def compiled(kernel, constants, *, d_state, dtype, wide, maxnreg=None):
    """A kernel as its launch has it compiled; `wide` sums are of several blocks of heads."""
    x, row = described((1, 1, 64, 64), dtype), described((1, 64), torch.float32)
    tile, state = (described((*one, 64, d_state), dtype) for one in ((1, 1), (1,)))
    kinds = {"state_desc": state, "B_desc": tile, "C_desc": tile, "m_desc": tile}
    kinds |= dict.fromkeys(("cum_desc", "cumj_desc", "dt_desc"), row)
    kinds["v_desc"] = x if "m_desc" in kernel.arg_names else row
    result = "*fp32" if wide else f"*{NAMES[dtype]}"
    kinds |= {"grad_B_ptr": result, "grad_C_ptr": result}
    constants = {"PDL": True, "P": 64, "N": d_state, "BLOCK_N": d_state, **constants}
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}

    def kind(name):
        if name in constants:
            return "constexpr"
        is_sum = name.endswith("_ptr") or name in ("end", "decay", "entry", "passed")
        return kinds.get(name, x if name.endswith("_desc") else "*fp32" if is_sum else "i32")

    signature = {name: kind(name) for name in names}
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*"
    }
    fixed = {(names.index(n),): v for n, v in constants.items()}
    source = GluonASTSource(kernel, signature, fixed, attributes)
    options = {"num_warps": 4} | ({"maxnreg": maxnreg} if maxnreg else {})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


HEADS = hopper_grad._GRAD | {"D_DIMS": 1, "partial_D_ptr": None}
WALK = hopper_grad._STATES | {"REVERSE": False, "end": None, "passed": None}
BACK = hopper_grad._STATES | {"REVERSE": True}
BF16 = {"d_state": 128, "dtype": torch.bfloat16, "wide": False}
COMPILED = {
    "heads": (hopper_grad_kernel.grad_kernel, HEADS, BF16),
    "heads, in blocks, fp16": (
        hopper_grad_kernel.grad_kernel, HEADS, BF16 | {"dtype": torch.float16, "wide": True},
    ),
    "heads, D of channels": (
        hopper_grad_kernel.grad_kernel,
        HEADS | {"D_DIMS": 2, "diag_ptr": None, "partial_D_ptr": NotImplemented}, BF16,
    ),
    "heads, 32 states, no D": (
        hopper_grad_kernel.grad_kernel, HEADS | {"D_DIMS": 0, "D_ptr": None},
        BF16 | {"d_state": 32},
    ),
    "states": (
        hopper_grad_c_kernel.grad_c_fetched_kernel, hopper_grad._GRAD_C,
        BF16 | {"wide": True, "maxnreg": hopper_grad._GRAD_C_MOST_REGISTERS},
    ),
    "exits": (hopper_exits_kernel.exits_kernel, hopper_grad._EXITS, BF16),
    "walk": (hopper_states_kernel.states_kernel, WALK, BF16),
    "walk back": (hopper_states_kernel.states_kernel, BACK, BF16),
    "walk back from zeros, fp16": (
        hopper_states_kernel.states_kernel, BACK | {"entry": None, "end": None},
        BF16 | {"dtype": torch.float16},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
def test_it_compiles_for_sm_90_without_spills_or_serial_products(name, tmp_path, machine_code):
    kernel, constants, options = COMPILED[name]
    constants = {n: v for n, v in constants.items() if v is not NotImplemented}
    made = compiled(kernel, constants, **options)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    cubin, ptx = tmp_path / "kernel.cubin", tmp_path / "kernel.ptx"
    cubin.write_bytes(made.asm["cubin"])
    ptx.write_text(made.asm["ptx"])
    command = [tools / "cuobjdump", "-res-usage", cubin]
    used = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    command = [tools / "ptxas", "-arch=sm_90a", "-v", ptx, "-o", tmp_path / "again.cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert int(used.split("STACK:")[1].split()[0]) <= 64  # a few words, kept across the loops
    assert "LOCAL:0" in used
    assert "serialized" not in said  # products in flight that the compiler waits for at once
    assert made.metadata.shared <= 232448
    command = [tools / "cuobjdump", "-sass", cubin]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert machine_code.mixed_descriptors(sass) == []


def test_heads_are_divided_so_that_one_wave_of_blocks_fills_the_device(monkeypatch):
    monkeypatch.setattr(hopper_grad, "multiprocessors", lambda device: 132)

    def blocks(batch, seqlen, **more):
        from mambench.kernels.ssd.triton_config import tiling
        from mambench.kernels.ssd.triton_launch import Launch

        tiles = tiling(2, 64, 128, wgmma=True)
        launch = Launch(
            batch=batch, seqlen=seqlen, nheads=32, ngroups=1, headdim=64, d_state=128,
            tiling=tiles, chunk=64, nchunks=-(-seqlen // 64), segment_chunks=1, nsegments=1,
            dt_softplus=True, dt_limit=(0.0, 1.0),
        )  # fmt: skip
        found = hopper_grad.Division.of(launch, None, **more)
        assert found.blocks * found.block_heads >= 32
        return found.blocks

    assert blocks(1, 8192) == 1
    assert blocks(1, 2048) == 4
    assert blocks(8, 2048) == 1
    assert blocks(1, 2048, most=3) == 3
    assert blocks(1, 8192, resident=2) == 2


GPU_CASES = (
    {"seqlen": 155, "nheads": 3, "headdim": 64, "d_state": 128, "segments": 3},
    {"seqlen": 1000, "nheads": 3, "headdim": 64, "d_state": 128, "segments": 7, "start": False},
    {"seqlen": 330, "batch": 2, "nheads": 8, "headdim": 64, "d_state": 64, "ngroups": 2, "D": 2},
    {"seqlen": 200, "nheads": 9, "headdim": 40, "d_state": 24, "D": 0, "dtype": "float16"},
)


def test_the_portable_operation_stays_portable_on_hopper(monkeypatch):
    from mambench.kernels.ssd import hopper_ssd, triton_launch

    monkeypatch.setattr(triton_launch, "has_wgmma", lambda device: True)
    x, B = torch.empty(1, 512, 4, 64, dtype=torch.float16), torch.empty(1, 512, 1, 128)
    portable = triton_launch.plan_launch(x, B, dt_softplus=True, dt_limit=(0.0, 1.0), segments=2)
    assert portable.tiling.whole_heads
    assert not portable.tiling.fetched
    config = hopper_ssd.Config(segments=2)
    hopper = hopper_ssd.plan_hopper(
        x, B, dt_softplus=True, dt_limit=(0.0, 1.0), config=config, keep=True
    )
    assert hopper.tiling.fetched
    hopper_ssd._planned.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_it_is_right_on_the_gpu_and_not_less_than_the_portable_kernels(cases, case, monkeypatch):
    from mambench.kernels.ssd import hopper_op, triton_ssd

    hopper_op._gradients.clear()
    launched = []
    real = hopper_grad.run_grad
    monkeypatch.setattr(hopper_grad, "run_grad", lambda *a: launched.append(1) or real(*a))
    case = {"gated": False, "long_memory": True, "dtype": "bfloat16"} | case
    options = {"device": "cuda", "segments": case.pop("segments", 2)}
    found = cases.errors(hopper_op.ssd, case, **options)
    assert cases.errors(hopper_op.ssd, case, **options) == found  # repeated: the same bits
    assert len(launched) == 1
    portable = cases.errors(triton_ssd.ssd, case, **options)
    assert len(launched) == 1
    bound = cases.tolerance(case["dtype"]) / 4
    assert not {name: e for name, e in found.items() if not e < max(bound, 1.5 * portable[name])}
