"""The Hopper SSD as a walk that looks back: run on the CPU, compiled for sm_90, and on the GPU."""

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

import subprocess
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from mambench.kernels.ssd import hopper_launch, hopper_ssd, hopper_walk_kernel

SHAPE = {"headdim": 64, "dtype": "float16", "look_back": True, "long_memory": True}
# The interpreter has no products of bf16, which the scores need.
CASES = {
    "gate, more chunks than stages": {**SHAPE, "seqlen": 700, "d_state": 32, "segments": 2},
    "odd heads of groups, ragged": {
        **SHAPE, "seqlen": 200, "d_state": 32, "batch": 2, "nheads": 3, "ngroups": 3, "segments": 3,
    },
    "two blocks of channels, nothing optional": {
        **SHAPE, "seqlen": 330, "headdim": 128, "nheads": 1, "d_state": 32, "D": 0, "gated": False,
        "bias": False, "start": False, "segments": 4,
    },
    "segments shorter than the ring": {
        **SHAPE, "seqlen": 520, "d_state": 32, "nheads": 2, "gated": False, "segments": 8,
    },
    "one segment, kept for a backward": {
        **SHAPE, "seqlen": 330, "d_state": 32, "nheads": 3, "segments": 1,
    },
    "one segment, padded": {
        **SHAPE, "seqlen": 200, "headdim": 40, "d_state": 24, "nheads": 1, "segments": 1,
    },
    "the only launch, gate": {**SHAPE, "seqlen": 700, "d_state": 32, "segments": 2, "alone": True},
    "the only launch, groups, odd heads, ragged": {
        **SHAPE, "seqlen": 300, "d_state": 32, "batch": 2, "nheads": 6, "ngroups": 2, "segments": 3,
        "alone": True,
    },
    "the only launch, a head that remembers nothing": {
        **SHAPE, "seqlen": 200, "d_state": 32, "gated": False, "segments": 2, "alone": True,
        "gone": True,
    },
    "a head that remembers nothing": {
        **SHAPE, "seqlen": 200, "d_state": 32, "gated": False, "segments": 2, "gone": True,
    },
    "the only launch, two blocks of channels, nothing optional": {
        **SHAPE, "seqlen": 330, "headdim": 128, "nheads": 1, "d_state": 32, "D": 0, "gated": False,
        "bias": False, "start": False, "segments": 4, "alone": True,
    },
    "padded, by four launches": {
        **SHAPE, "seqlen": 200, "headdim": 40, "d_state": 24, "nheads": 1, "gated": False,
        "segments": 2,
    },
}  # fmt: skip
# The interpreter's scores are fp16's, whose chunks all count as steep: some are mild here.
MILD_IN_FP16 = [
    ("Bs.dtype == gl.bfloat16 and scores_ring.dtype == gl.bfloat16", "True"),
    ("_LEAST_MILD = gl.constexpr(-128.0)", "_LEAST_MILD = gl.constexpr(-6.0)"),
]
MILD = {
    "mild chunks, gate": {**SHAPE, "seqlen": 500, "d_state": 32, "segments": 3},
    "mild chunks, the only launch": {
        **SHAPE, "seqlen": 500, "d_state": 32, "segments": 3, "alone": True,
    },
    "mild and steep chunks, the only launch": {
        **SHAPE, "seqlen": 500, "d_state": 32, "nheads": 3, "D": 2, "long_memory": False,
        "gated": False, "segments": 2, "alone": True,
    },
    "mild and steep chunks": {
        **SHAPE, "seqlen": 500, "d_state": 32, "nheads": 3, "D": 2, "long_memory": False,
        "gated": False, "segments": 2,
    },
}  # fmt: skip
PUBLISHED = "            publish(flags + segment)\n"
RELEASED = "        mbarrier.arrive(empty.index(item % STAGES), count=1)\n"
FAULTS = {
    "a flag set before the state is stored": [
        ("            gl.store(slots + (", PUBLISHED + "            gl.store(slots + ("),
        ("            gl.store(decays + segment + one, log_decay)\n" + PUBLISHED,
         "            gl.store(decays + segment + one, log_decay)\n"),
    ],
    "a segment not added": [("for k in range(0, segment)", "for k in range(1, segment)")],
    "a stage of the first walk that is never released": [
        (RELEASED + "    return state", "    return state"),
    ],
    "the first walk forwards": [("own - 1 - item, P)", "item, P)")],
    "a chunk weighted as if none came after it": [("        after += total\n", "")],
    "a chunk taken for one that is still in the ring": [("if c < early:", "if c <= early:")],
    "a chunk looked for where another one is": [("- c % STAGES", "+ c % STAGES")],
    "an output tile reused too early": [
        ("        fence_async_shared()\n        tma.store_wait(0)\n",
         "        fence_async_shared()\n"),
    ],
    "a state that enters a chunk's middle as it entered the chunk": [
        *MILD_IN_FP16, ("gl.exp2(ahead + middle)", "gl.exp2(ahead)"),
    ],
    "outputs scaled from the chunk's start on": [
        *MILD_IN_FP16, ("gl.exp2(cum_i - middle)", "gl.exp2(cum_i)"),
    ],
    "a state that stays in the last chunk's middle": [
        *MILD_IN_FP16, ("            if MILD:\n", "            if False:\n"),
    ],
    "a state that does not decay over a mild chunk": [
        *MILD_IN_FP16,
        ("ahead = total - middle", "ahead = 0.0"),
    ],
}  # fmt: skip
COUNTED = "    _count_made(work, start, 2 * step)\n"
MADE = "    for item in range(0, count):\n        stage = item % STAGES\n        mbarrier.wait(full"
ALONE_FAULTS = {
    "scores of tokens to come": [("gl.where(j[:, None] <= i[None, :], scores, 0.0)", "scores")],
    "scores of another chunk": [
        ("(group * nchunks + chunk) *", "(group * nchunks + nchunks - 1 - chunk) *"),
    ],
    "scores that nobody counts": [(COUNTED, "")],
    "scores counted before they are stored": [
        (COUNTED, ""), (MADE, COUNTED + MADE),
    ],
    "scores counted to the segment before": [
        ("begin = gl.minimum(segment", "begin = gl.minimum((segment + 1)"),
    ],
    "counts that are not left zero": [("        gl.store(counter, 0)", "        pass")],
    "a weight in the end state as if no chunk came after": [
        ("gl.exp2((after + total)[:, None] - cumj)", "gl.exp2(total[:, None] - cumj)"),
    ],
    "a weight as if the chunk itself came after": [("chunk < k", "chunk <= k")],
    "steps asked for past the end": [
        ("t = gl.minimum(first * _Q + part * STEPS + gl.arange(0, STEPS, layout=LINES), last)",
         "t = first * _Q + part * STEPS + gl.arange(0, STEPS, layout=LINES)"),
    ],
    "tiles asked for past the end": [
        ("t = gl.minimum((first + c) * _Q + row, seqlen - 1)", "t = ((first + c) * _Q + row)"),
    ],
    "steps past the end": [("dt = gl.where(inside, dt, 0.0)", "dt = dt * 1.0")],
    "a mild chunk's factor without its step": [
        *MILD_IN_FP16, ("dt * gl.exp2(middle - cum)", "gl.exp2(middle - cum)"),
    ],
    "rows of a mild chunk from its start on": [
        *MILD_IN_FP16, ("middle = (total * 0.5)[:, None]", "middle = (total * 0.0)[:, None]"),
    ],
    "the first chunk's total for every chunk": [
        *MILD_IN_FP16,
        ("last = totals.index(which * WITHIN + c)", "last = totals.index(which * WITHIN)"),
    ],
}  # fmt: skip
FAULTY = {
    **SHAPE, "seqlen": 600, "d_state": 32, "nheads": 1, "gated": False, "segments": 2,
}  # fmt: skip
JOBS = (
    {name: {"case": case} for name, case in CASES.items()}
    | {name: {"case": case, "changes": MILD_IN_FP16} for name, case in MILD.items()}
    | {name: {"case": FAULTY, "changes": changes} for name, changes in FAULTS.items()}
    | {
        name: {"case": FAULTY | {"alone": True}, "changes": changes}
        for name, changes in ALONE_FAULTS.items()
    }
)


@pytest.fixture(scope="module")
def results(hopper_judged):
    return hopper_judged(JOBS)


def wrong(errors, dtype):
    """Return the names of what is off by more than a few roundings."""
    bound = torch.finfo(getattr(torch, dtype)).eps
    return [name for name, e in errors.items() if name != "launches" and not e < bound]


@pytest.mark.parametrize("name", [*CASES, *MILD])
def test_it_gives_the_recurrence(results, name):
    assert wrong(results[name], "float16") == []


def test_it_is_taken_where_no_state_is_padded(results):
    walks = {name: results[name]["launches"][-1] for name in CASES}
    assert walks.pop("padded, by four launches") == 0
    assert min(walks.values()) > 0


@pytest.mark.parametrize("name", [*FAULTS, *ALONE_FAULTS])
def test_faults_are_caught(results, name):
    found = results[name]
    assert "raised" in found or wrong(found, FAULTY["dtype"])


NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def described(shape, dtype):
    """The signature's type of a descriptor."""
    layout = hopper_launch.tile_layout(*shape[-2:], dtype)
    return f"tensordesc<{NAMES[dtype]}[{', '.join(map(str, shape))}],{layout!r}>"


def compiled(
    *, d_state=128, dtype=torch.bfloat16, gated=False, D=1, final=False, start=False, whole=False,
    alone=False, pdl=True,
):  # fmt: skip
    """The kernel as the launcher has it compiled."""
    config = hopper_ssd.Config(look_back=True)
    ring = hopper_ssd.ring(d_state, dtype, gated, config)
    x, tile = described((1, 1, 64, 64), dtype), described((1, 1, 64, ring.block_n), dtype)
    row, scores = described((1, 64), torch.float32), described((64, 64), ring.scores_dtype)
    types = {
        "out_desc": x, "x_desc": x, "B_desc": tile, "C_desc": tile, "scores_desc": scores,
        "cum_desc": row, "cumj_desc": row, "decays": "*fp32", "flags": "*i32",
        "slots": "*bf16" if dtype == torch.bfloat16 else "*fp32",
        "dt_min": "fp32", "dt_max": "fp32", "dt_ptr": "*fp32", "A_ptr": "*fp32",
        "bias_ptr": "*fp32", "x_ptr": f"*{NAMES[dtype]}",
        "scores_ptr": f"*{NAMES[ring.scores_dtype]}",
    }  # fmt: skip
    optional = {
        "z_desc": (gated, x), "D_ptr": (D > 0, "*fp32"), "start": (start, "*fp32"),
        "final": (final, "*fp32"),
    }  # fmt: skip
    types |= {name: kind for name, (there, kind) in optional.items() if there}
    if whole:
        optional |= {name: (False, types.pop(name)) for name in ("slots", "decays", "flags")}
    others = ("dt_ptr", "A_ptr", "bias_ptr", "x_ptr", "scores_ptr")
    others = ("cum_desc", "cumj_desc") if alone else others
    optional |= {name: (False, types.pop(name)) for name in others}
    constants = {
        "PDL": pdl, "P": 64, "N": d_state, "BLOCK_N": ring.block_n,
        "STAGES": ring.alone_stages if alone else ring.stages,
        "REGISTERS": config.walk_registers, "D_DIMS": D, "SOFTPLUS": True,
    } | dict.fromkeys(name for name in optional if name not in types)  # fmt: skip
    kernel = hopper_walk_kernel.walk_kernel
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
    "gated": {"gated": True, "D": 2},
    "fp16": {"dtype": torch.float16, "gated": True},
    "small state, bare": {"d_state": 32, "D": 0},
    "one segment": {"whole": True},
    "the only launch": {"alone": True},
    "the only launch, gated, with states at both ends": {
        "alone": True, "gated": True, "start": True, "final": True,
    },
    "the only launch, small state": {"alone": True, "d_state": 32, "D": 0},
}  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
def test_it_compiles_for_sm_90_without_spills_or_serial_products(name, tmp_path, machine_code):
    kernel = compiled(**COMPILED[name])
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    cubin, ptx = tmp_path / "kernel.cubin", tmp_path / "kernel.ptx"
    cubin.write_bytes(kernel.asm["cubin"])
    ptx.write_text(kernel.asm["ptx"])
    command = [tools / "cuobjdump", "-res-usage", cubin]
    used = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    command = [tools / "ptxas", "-arch=sm_90a", "-v", ptx, "-o", tmp_path / "again.cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    # A few words kept across the walks are not spills of the walks themselves.
    assert int(used.split("STACK:")[1].split()[0]) <= 16
    assert "LOCAL:0" in used
    assert "serialized" not in said  # products in flight that the compiler waits for at once
    assert kernel.metadata.shared <= 232448
    assert machine_code.mixed_descriptors(sass_of(cubin)) == []


def sass_of(cubin):
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("pdl", [True, False])
def test_every_role_of_the_only_launch_waits_for_the_launch_before(pdl, tmp_path, machine_code):
    """Without programmatic launch none needs to, and so all is found."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled(alone=True, d_state=32, D=0, pdl=pdl).asm["cubin"])
    found = {text.partition(".")[0].split()[0] for text in machine_code.unawaited(sass_of(cubin))}
    assert found == (set() if pdl else {"LDG", "STG", "ATOMG", "REDG", "UTMALDG", "UTMASTG"})


def test_a_stage_is_given_back_when_all_warps_have_read_it(tmp_path, machine_code):
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled(alone=True, d_state=32, D=0).asm["cubin"])
    sass = sass_of(cubin)
    assert machine_code.hurried(sass) == []
    # Of each of two consumers: two of the blocks that make scores, and one of each walk.
    without_a_wait = machine_code.hurried(sass.replace("WARPGROUP.DEPBAR.LE gsb0, 0x0", "NOP"))
    without_a_barrier = machine_code.hurried(sass.replace("BAR.SYNC", "NOP"))
    assert min(len(without_a_wait), len(without_a_barrier)) >= 2 * 4


# The steep side of a branch, as ptxas has compiled it: UR6 and UR7 are set on the other side only.
BRANCHES = """
/*0000*/ BRX R2 ;
/*0010*/ UMOV UR6, UR9 ;
/*0020*/ UIADD3.X UR7, UR5, URZ, URZ, UP0, !UPT ;
/*0030*/ @!P0 BRA 0x0080 ;
/*0040*/ UIADD3.64 UR6, UR8, 0x80, URZ ;
/*0050*/ HGMMA.64x128x16.F32.BF16 R24, R156, gdesc[UR4].tnspB, R24 ;
/*0060*/ @P1 BRA 0x0030 ;
/*0070*/ BRA 0x0000 ;
/*0080*/ NOP ;
/*0090*/ HGMMA.64x128x16.F32.BF16 R24, R124, gdesc[UR4].tnspB, R24 ;
/*00a0*/ BRA 0x0030 ;
"""


@pytest.mark.parametrize(
    ("steep", "mixed"), [("NOP", True), ("UIADD3.64 UR6, UR8, 0x0, URZ", False)]
)
def test_a_descriptor_of_the_other_path_is_found(steep, mixed, machine_code):
    found = machine_code.mixed_descriptors(BRANCHES.replace("NOP", steep))
    assert any("R124" in text for text in found) == mixed
    assert not any("R156" in text for text in found)


def planned(*shape, headdim=64, d_state=128, ngroups=1):
    batch, seqlen, nheads = shape
    x = torch.empty(batch, seqlen, nheads, headdim, dtype=torch.bfloat16)
    B = torch.empty(batch, seqlen, ngroups, d_state, dtype=torch.bfloat16)
    return hopper_ssd.plan_hopper(x, B, dt_softplus=True, dt_limit=(0.0, 1.0), keep=False)


def test_it_is_chosen_for_segments_without_a_backward(monkeypatch):
    monkeypatch.setattr(hopper_ssd, "multiprocessors", lambda device: 132)
    hopper_ssd._planned.cache_clear()
    for shape in ((1, 8192, 32), (1, 16384, 128), (1, 1 << 20, 32)):
        plan = planned(*shape)
        config = hopper_ssd.choose(plan, keep=False)
        assert config.look_back
        assert hopper_ssd._all_there(plan, torch.empty(0))
        assert not hopper_ssd.choose(plan, keep=True).look_back
    for keep in (False, True):  # one segment
        assert hopper_ssd.choose(planned(8, 8192, 32), keep=keep).look_back
    assert hopper_ssd.choose(planned(1, 8192, 32), keep=False).alone
    assert not hopper_ssd.choose(planned(1, 8192, 32, ngroups=8), keep=False).alone
    many = planned(3, 8192, 32)  # more blocks than are resident
    assert many.nsegments > 1
    assert not hopper_ssd._all_there(many, torch.empty(0))
    hopper_ssd._planned.cache_clear()


GPU_CASES = (
    *({k: v for k, v in case.items() if k != "look_back"} for case in CASES.values()),
    {"seqlen": 2048, "d_state": 128, "nheads": 8, "segments": 8, "dtype": "bfloat16"},
    {"seqlen": 777, "d_state": 128, "batch": 3, "nheads": 5, "segments": 4, "dtype": "bfloat16"},
    {"seqlen": 3000, "d_state": 128, "segments": 32, "dtype": "bfloat16", "gated": False},
    {"seqlen": 1200, "d_state": 128, "nheads": 8, "segments": 8, "dtype": "bfloat16"},
    {
        "seqlen": 2048,
        "d_state": 128,
        "nheads": 8,
        "segments": 8,
        "dtype": "bfloat16",
        "alone": True,
    },
    {
        "seqlen": 777,
        "d_state": 128,
        "batch": 3,
        "nheads": 5,
        "segments": 4,
        "dtype": "bfloat16",
        "alone": True,
    },
    {"seqlen": 1500, "d_state": 64, "segments": 3, "dtype": "bfloat16", "jolt": 100, "alone": True},
    {"seqlen": 1500, "d_state": 64, "segments": 3, "dtype": "bfloat16", "jolt": 100},
)


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_it_is_right_on_the_gpu(cases, case):
    case = {"headdim": 64, "long_memory": True} | case
    alone = case.pop("alone", False)
    config = hopper_ssd.Config(segments=case.pop("segments"), look_back=True, alone=alone)
    exact = cases.draw(**case)
    want = cases.loop(**exact, dt_softplus=True)
    dtype = getattr(torch, case["dtype"])
    inputs = {k: v.detach() for k, v in cases.cast(exact, dtype, "cuda").items()}
    first = None
    for _ in range(5):
        got = hopper_ssd.ssd_forward(
            **inputs, dt_softplus=True, return_final_states=True, keep=False, config=config
        )
        first = first or got
        assert torch.equal(got[0], first[0])
        assert torch.equal(got[1], first[1])
    for value, exactly in zip(got, want, strict=False):
        assert cases.relative_error(value, exactly) < torch.finfo(dtype).eps
