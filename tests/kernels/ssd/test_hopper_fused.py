"""The Hopper SSD as one launch: run on the CPU, compiled for sm_90, and on the GPU itself."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from mambench.kernels.ssd import hopper_fused_kernel, hopper_launch, hopper_ssd

SHAPE = {"headdim": 64, "dtype": "bfloat16", "fused": True, "long_memory": True}
CASES = {
    "one segment, ragged": {**SHAPE, "seqlen": 130, "d_state": 32, "gated": False, "segments": 1},
    "segments, gate": {**SHAPE, "seqlen": 300, "d_state": 64, "segments": 3},
    "fp16, odd heads of groups, padded P and N, D (H, P)": {
        **SHAPE, "seqlen": 200, "batch": 2, "nheads": 3, "ngroups": 3, "headdim": 40,
        "d_state": 24, "D": 2, "segments": 2, "dtype": "float16",
    },
    "two blocks of channels, nothing optional": {
        **SHAPE, "seqlen": 330, "nheads": 2, "headdim": 128, "d_state": 16, "D": 0,
        "gated": False, "bias": False, "start": False, "segments": 2,
    },
    "one token, limits": {
        **SHAPE, "seqlen": 1, "headdim": 32, "d_state": 128, "segments": 4,
        "dt_softplus": False, "dt_limit": (0.05, 0.4),
    },
    "steps that wipe the state out": {
        **SHAPE, "seqlen": 300, "d_state": 16, "nheads": 1, "segments": 2, "jolt": 40,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def results(hopper_judged):
    return dict(zip(CASES, hopper_judged(list(CASES.values())), strict=True))


def wrong(errors, dtype):
    """Return the names of what is off by more than a few roundings."""
    bound = torch.finfo(getattr(torch, dtype)).eps
    return [name for name, e in errors.items() if name != "launches" and not e < bound]


@pytest.mark.parametrize("name", CASES)
def test_it_gives_the_recurrence_and_what_enters_segments(results, name):
    assert wrong(results[name], CASES[name]["dtype"]) == []


def test_there_is_no_other_launch(results):
    assert results["one segment, ragged"]["launches"] == [0, 0, 1]


PUBLISHED = "            publish(flags + segment)\n"
FAULTS = {
    "a flag set before the state is stored": [
        ("            there = segment", PUBLISHED + "            there = segment"),
        ("            gl.store(decays + segment + one, log_decay)\n" + PUBLISHED,
         "            gl.store(decays + segment + one, log_decay)\n"),
    ],
    "a wait for its own flag": [
        ("await_published(flags, segment)", "await_published(flags, segment + 1)"),
    ],
    "a segment not added": [("for k in range(0, segment)", "for k in range(1, segment)")],
    "readers that are not counted": [("    count_readers(flags, segment)\n", "")],
    "a stage that is never released": [
        ("        state = warpgroup_mma_wait(0, deps=(state,))\n"
         "        mbarrier.arrive(empty.index(stage), count=1)\n    return",
         "        state = warpgroup_mma_wait(0, deps=(state,))\n    return"),
    ],
    "weights of later tokens": [("j[:, None] <= i[None, :]", "j[:, None] <= i[None, :] + 1")],
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_caught(hopper_judged, name):
    case = {**SHAPE, "seqlen": 200, "d_state": 16, "nheads": 1, "gated": False, "segments": 4}
    if name == "a stage that is never released":
        case |= {"seqlen": 600, "segments": 2}
    source = Path(hopper_fused_kernel.__file__).read_text()
    changed = source
    for old, new in FAULTS[name]:
        assert old in changed
        changed = changed.replace(old, new)
    try:
        (errors,) = hopper_judged([case], source, changed, "fused")
    except AssertionError:  # raised or never ended
        return
    assert wrong(errors, case["dtype"])


NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def described(shape, dtype):
    """The signature's type of a descriptor."""
    layout = hopper_launch.tile_layout(*shape[-2:], dtype)
    return f"tensordesc<{NAMES[dtype]}[{', '.join(map(str, shape))}],{layout!r}>"


def compiled(
    *, d_state=128, dtype=torch.bfloat16, gated=False, D=1, segments=True, wide=False, keep=False,
    final=False, start=False, bias=True,
):  # fmt: skip
    """The kernel as the launcher has it compiled."""
    config = hopper_ssd.Config(fused=True)
    ring = hopper_ssd.ring(d_state, dtype, gated, config)
    x, tile = described((1, 1, 64, 64), dtype), described((1, 1, 64, ring.block_n), dtype)
    types = {"out_desc": x, "x_desc": x, "B_desc": tile, "C_desc": tile}
    types |= {"dt_ptr": "*bf16", "A_ptr": "*fp32", "dt_min": "fp32", "dt_max": "fp32"}
    states = "*bf16" if dtype == torch.bfloat16 and not wide else "*fp32"
    optional = {
        "z_desc": (gated, x), "bias_ptr": (bias, "*fp32"), "D_ptr": (D > 0, "*fp32"),
        "start": (start, "*fp32"), "slots": (segments, states), "decays": (segments, "*fp32"),
        "flags": (segments, "*i32"), "kept": (keep, "*fp32"), "final": (final, "*fp32"),
    }  # fmt: skip
    types |= {name: kind for name, (there, kind) in optional.items() if there}
    scores = {torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}[ring.scores_dtype]
    constants = {
        "P": 64, "N": d_state, "BLOCK_N": ring.block_n, "STAGES": ring.stages,
        "REGISTERS": config.fused_registers[0], "HELPER_REGISTERS": config.fused_registers[1],
        "SCORES": scores, "SCORES_LAYOUT": hopper_launch.tile_layout(64, 64, ring.scores_dtype),
        "SOFTPLUS": True, "D_DIMS": D,
    } | dict.fromkeys(name for name in optional if name not in types)  # fmt: skip
    kernel = hopper_fused_kernel.fused_kernel
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*"
    }
    fixed = {(names.index(n),): v for n, v in constants.items()}
    source = GluonASTSource(kernel, signature, fixed, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


COMPILED = {
    "as timed": {},
    "with states at both ends": {"start": True, "final": True},
    "for a backward": {"keep": True, "wide": True},
    "gated": {"gated": True, "D": 2},
    "fp16": {"dtype": torch.float16, "gated": True},
    "small state, bare, one segment": {"d_state": 16, "D": 0, "bias": False, "segments": False},
}


def usage(kernel, tmp_path):
    """What ptxas gave the kernel, and what it says of it."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    cubin, ptx = tmp_path / "kernel.cubin", tmp_path / "kernel.ptx"
    cubin.write_bytes(kernel.asm["cubin"])
    ptx.write_text(kernel.asm["ptx"])
    command = [tools / "cuobjdump", "-res-usage", cubin]
    used = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    command = [tools / "ptxas", "-arch=sm_90a", "-v", ptx, "-o", tmp_path / "again.cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return used, said


@pytest.mark.parametrize("name", COMPILED)
def test_it_compiles_for_sm_90_without_spills_or_serial_products(name, tmp_path):
    kernel = compiled(**COMPILED[name])
    used, said = usage(kernel, tmp_path)
    # A few words kept across the walks are not spills of the walks themselves.
    assert int(used.split("STACK:")[1].split()[0]) <= 16
    assert "LOCAL:0" in used
    assert "serialized" not in said  # products in flight that the compiler waits for at once
    assert kernel.metadata.shared <= 232448


def test_a_state_is_seen_before_its_flag():
    ptx = compiled().asm["ptx"]
    lines = [line.strip() for line in ptx.splitlines()]
    released = [i for i, line in enumerate(lines) if "atom.global.gpu.release.add" in line]
    awaited = [i for i, line in enumerate(lines) if line.startswith("ld.acquire.gpu.global")]
    assert len(released) == len(awaited) == 2  # one a consumer
    barrier = re.compile(r"(bar|barrier)\.sync")
    for flag in released:  # every thread has stored when one sets the flag
        before = lines[:flag]
        stores = [i for i, line in enumerate(before) if "st.global" in line]
        barriers = [i for i, line in enumerate(before) if barrier.match(line)]
        assert max(barriers) > max(stores)
    for flag in awaited:  # a state is read after a barrier that follows the wait
        after = lines[flag:]
        loads = [i for i, line in enumerate(after) if "ld.global" in line and "v4" in line]
        barriers = [i for i, line in enumerate(after) if barrier.match(line)]
        assert min(barriers) < min(loads)
