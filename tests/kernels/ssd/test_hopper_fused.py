"""The Hopper SSD as one launch: run on the CPU, compiled for sm_90, and on the GPU itself."""

import math
import re
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from mambench.kernels import prepared
from mambench.kernels.ssd import hopper_config, hopper_fused_kernel, hopper_launch, hopper_ssd

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
    "a head that remembers nothing": {
        **SHAPE, "seqlen": 200, "d_state": 16, "segments": 2, "gone": True,
    },
    "steps that wipe the state out": {
        **SHAPE, "seqlen": 300, "d_state": 16, "nheads": 1, "segments": 2, "jolt": 40,
    },
}  # fmt: skip


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
FAULTY = {**SHAPE, "seqlen": 200, "d_state": 16, "nheads": 1, "gated": False, "segments": 4}
LONGER = {"a stage that is never released": {"seqlen": 600, "segments": 2}}
JOBS = {name: {"case": case} for name, case in CASES.items()} | {
    name: {"case": FAULTY | LONGER.get(name, {}), "changes": changes}
    for name, changes in FAULTS.items()
}


@pytest.fixture(scope="module")
def results(hopper_judged):
    return hopper_judged(JOBS)


def wrong(errors, dtype):
    """Return the names of what is off by more than a few roundings."""
    bound = torch.finfo(getattr(torch, dtype)).eps
    return [name for name, e in errors.items() if name != "launches" and not e < bound]


@pytest.mark.parametrize("name", CASES)
def test_it_gives_the_recurrence_and_what_enters_segments(results, name):
    assert wrong(results[name], CASES[name]["dtype"]) == []


def test_there_is_no_other_launch(results):
    assert results["one segment, ragged"]["launches"] == [0, 0, 1, 0]


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_caught(results, name):
    found = results[name]
    assert "raised" in found or wrong(found, FAULTY["dtype"])


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


def sizes(batch, seqlen, nheads, headdim=64):
    return {
        "batch": batch, "seqlen": seqlen, "nheads": nheads, "headdim": headdim, "ngroups": 1,
    }  # fmt: skip


def planned(*shape, **options):
    batch, seqlen, nheads = shape
    x = torch.empty(batch, seqlen, nheads, 64, dtype=torch.bfloat16)
    B = torch.empty(batch, seqlen, 1, 128, dtype=torch.bfloat16)
    return hopper_ssd.plan_hopper(x, B, dt_softplus=True, dt_limit=(0.0, 1.0), **options)


def test_one_launch_where_launches_are_mostly_starting():
    short = ((1, 512, 32), (1, 2048, 4), (4, 128, 32), (2, 512, 32), (1, 512, 128), (1, 8192, 8))
    for shape in short:
        plan = planned(*shape, keep=False)
        assert hopper_ssd.choose(plan, keep=False).fused
        assert not hopper_ssd.choose(plan, keep=True).fused
    for shape in ((1, 2048, 8), (1, 1024, 32), (1, 131072, 32), (1, 16384, 128), (8, 8192, 32)):
        assert not hopper_ssd.choose(planned(*shape, keep=False), keep=False).fused


@pytest.mark.parametrize(("headdim", "d_state"), [(40, 128), (64, 24), (64, 8)])
def test_one_launch_for_longer_where_states_are_padded(headdim, d_state):
    shape = {"batch": 1, "nheads": 32, "headdim": headdim, "ngroups": 1, "d_state": d_state}
    assert hopper_config.one_launch(**shape, seqlen=2048)
    assert not hopper_config.one_launch(**shape, seqlen=2049)
    assert not hopper_config.one_launch(**shape | {"headdim": 64, "d_state": 64}, seqlen=2048)


@pytest.mark.parametrize(
    ("seqlen", "ngroups", "one"),
    [(8192, 8, True), (8256, 8, False), (2048, 4, True), (2112, 4, False)],
)
def test_one_launch_for_longer_where_few_heads_share_the_scores(seqlen, ngroups, one):
    shape = {"batch": 1, "nheads": 32, "headdim": 64, "ngroups": ngroups, "d_state": 128}
    assert hopper_config.one_launch(**shape, seqlen=seqlen) == one


@pytest.mark.parametrize(
    ("seqlen", "nheads", "ngroups", "alone"),
    [
        (576, 32, 1, True),
        (512, 32, 1, False),
        (2048, 16, 1, True),
        (8192, 16, 1, False),
        (8192, 32, 2, True),
        (8192, 32, 4, False),
        (8192, 32, 8, False),
        (4096, 64, 2, True),
        (8192, 64, 2, False),
        (768, 72, 1, False),
        (1024, 4, 1, True),
        (2048, 4, 1, False),
        (1024, 32, 8, False),
    ],
)
def test_the_walk_is_alone_where_its_scores_are_made_in_time(seqlen, nheads, ngroups, alone):
    shape = {"seqlen": seqlen, "nheads": nheads, "ngroups": ngroups}
    assert hopper_config.walks_alone(batch=1, headdim=64, d_state=128, **shape) == alone


class Allocating(prepared.Recording):
    """Allocates and launches nothing."""

    scratch_bytes = 0

    def scratch(self, shape, dtype, device):
        self.scratch_bytes += math.prod(shape) * dtype.itemsize
        return super().scratch(shape, dtype, device)

    def launch(self, *args, **options):
        pass


@pytest.mark.parametrize(
    ("seqlen", "nheads"),
    [(512, 32), (1024, 3), (1024, 32), (8192, 32), (16384, 32)],
    ids=["with a helper", "alone, odd heads", "alone", "alone, long", "two launches"],
)
def test_no_more_is_allocated_than_is_estimated(seqlen, nheads, monkeypatch):
    monkeypatch.setattr(hopper_ssd, "multiprocessors", lambda device: 132)
    hopper_ssd._planned.cache_clear()
    draw = partial(torch.empty, dtype=torch.float16)
    x, B = draw(1, seqlen, nheads, 64), draw(1, seqlen, 1, 128)
    tensors = hopper_ssd.Operands.laid_out(
        x, draw(1, seqlen, nheads), torch.empty(nheads), B, B, None, None, None, None
    )
    plan = hopper_ssd.plan_hopper(x, B, dt_softplus=True, dt_limit=(0.0, math.inf), keep=False)
    recording = Allocating(None)
    hopper_ssd.run_forward(recording, plan, tensors, return_final_states=False, keep=False)
    estimate = hopper_config.workspace_bytes(**sizes(1, seqlen, nheads), d_state=128)
    assert recording.scratch_bytes <= estimate <= 1.1 * recording.scratch_bytes


def test_the_division_follows_the_launches():
    looking_back = hopper_ssd.Config(fused=True)
    assert planned(1, 512, 8, config=hopper_ssd.Config()).nsegments == 1
    assert hopper_config.look_back_chunks(**sizes(1, 512, 32), multiprocessors=132) == 2
    assert planned(1, 2048, 32, config=looking_back).segment_chunks > 1


@pytest.mark.parametrize("headdim", [32, 64, 128])
@pytest.mark.parametrize("nheads", [1, 8, 32, 80, 300])
@pytest.mark.parametrize("seqlen", [1, 64, 130, 512, 2048, 100_000])
def test_blocks_that_look_back_are_resident_at_once(seqlen, nheads, headdim):
    chunks = hopper_config.look_back_chunks(
        **sizes(2, seqlen, nheads, headdim), multiprocessors=132
    )
    segments = math.ceil(math.ceil(seqlen / 64) / chunks)
    blocks = 2 * hopper_config.pairs(nheads, headdim)
    assert segments == 1 or segments * blocks <= 132
    assert segments <= hopper_config.MOST_SEGMENTS
    states = 2 * (segments - 1) * nheads * 64 * 128  # bytes of bf16, padded to 64 channels
    assert states <= 2 * seqlen * nheads * max(headdim, 64)


GPU_CASES = (
    *CASES.values(),
    {**SHAPE, "seqlen": 2048, "d_state": 128, "nheads": 8, "segments": 8},
    {**SHAPE, "seqlen": 777, "d_state": 128, "batch": 3, "nheads": 5, "segments": 4},
    {**SHAPE, "seqlen": 3000, "d_state": 128, "nheads": 2, "gated": False, "segments": 32},
    {
        **SHAPE, "seqlen": 4096, "d_state": 128, "nheads": 32, "ngroups": 8,
        "gated": False, "segments": 8,
    },
)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_it_is_right_on_the_gpu(cases, case):
    case = {name: value for name, value in case.items() if name != "fused"}
    config = hopper_ssd.Config(segments=case.pop("segments"), fused=True)
    shared = {"dt_softplus": case.pop("dt_softplus", True)}
    shared["dt_limit"] = case.pop("dt_limit", (0.0, float("inf")))
    exact = cases.draw(**case)
    want = cases.loop(**exact, **shared)
    dtype = getattr(torch, case["dtype"])
    inputs = {k: v.detach() for k, v in cases.cast(exact, dtype, "cuda").items()}
    bound = torch.finfo(dtype).eps
    for keep in (True, False):
        got = hopper_ssd.ssd_forward(
            **inputs, **shared, return_final_states=True, keep=keep, config=config
        )
        assert cases.relative_error(got[0], want[0]) < bound
        assert cases.relative_error(got[1], want[1]) < bound


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 2048, 32), (1, 777, 8), (8, 1024, 8)], ids=str)
def test_repeats_replays_and_streams_give_the_same_bits_and_leave_the_flags(shape):
    from mambench.kernels import flags
    from mambench.kernels.ssd.hopper_op import ssd

    batch, seqlen, nheads = shape

    def draw(*size, dtype=torch.bfloat16):
        return torch.randn(size, device="cuda").to(dtype)

    tensors = {
        "x": draw(batch, seqlen, nheads, 64), "dt": draw(batch, seqlen, nheads),
        "A": -draw(nheads, dtype=torch.float32).abs() - 0.1,
        "B": draw(batch, seqlen, 1, 128), "C": draw(batch, seqlen, 1, 128),
    }  # fmt: skip

    def call():
        return ssd(**tensors, chunk_size=64, dt_softplus=True, return_final_states=True)

    with torch.no_grad():
        want = [value.clone() for value in call()]
        for _ in range(20):
            assert all(map(torch.equal, call(), want))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            held = [call() for _ in range(3)]
        streams = [torch.cuda.Stream() for _ in range(3)]
        torch.cuda.synchronize()
        beside = []
        for i in range(24):  # more blocks than multiprocessors, of several calls at once
            with torch.cuda.stream(streams[i % 3]):
                beside.append(call())
            if i % 8 == 0:
                graph.replay()
        torch.cuda.synchronize()
        for got in (*held, *beside):
            assert all(map(torch.equal, got, want))
    kept = [known.zeros for known in flags._graphs.values()]
    assert all(int(t.abs().sum()) == 0 for t in (*kept, *flags._streams.values()))


@pytest.mark.gpu
@pytest.mark.parametrize("seqlen", [512, 2048, 8192])
@pytest.mark.parametrize("way", ["copy", "side stream"])
def test_inputs_that_were_just_written_are_read(seqlen, way):
    """A launch may start before the one that writes its inputs is over, but not read them."""
    from mambench.kernels.ssd.hopper_op import ssd

    shape = (1, seqlen, 32, 64)
    sources = torch.randn(2, *shape, device="cuda").bfloat16()
    source, x = sources[0].clone(), torch.zeros(shape, device="cuda", dtype=torch.bfloat16)
    others = {
        "dt": torch.randn(1, seqlen, 32, device="cuda").bfloat16(),
        "A": -torch.rand(32, device="cuda") - 0.1,
        "B": torch.randn(1, seqlen, 1, 128, device="cuda").bfloat16(),
        "C": torch.randn(1, seqlen, 1, 128, device="cuda").bfloat16(),
    }
    side = torch.cuda.Stream()

    def call():
        if way == "copy":
            x.copy_(source)  # no kernel comes before, but a copy
        else:
            here = torch.cuda.current_stream()
            side.wait_stream(here)
            with torch.cuda.stream(side):
                torch.mul(source, 1.0, out=x)
            here.wait_stream(side)
        return ssd(x=x, **others, chunk_size=64, dt_softplus=True)

    with torch.no_grad():
        want = [ssd(x=given, **others, chunk_size=64, dt_softplus=True) for given in sources]
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            held = call()
        for turn in range(20):
            source.copy_(sources[turn % 2])
            graph.replay()
            assert torch.equal(held, want[turn % 2])
            assert torch.equal(call(), want[turn % 2])
