"""The Hopper SSD: run on the CPU against the loop in float64, compiled, and on the GPU itself."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from mambench.kernels.ssd import (
    hopper_config,
    hopper_kernel,
    hopper_launch,
    hopper_parts,
    hopper_ssd,
)

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
SHAPE = {"headdim": 64, "dtype": "float16", "long_memory": True}
# The interpreter has no products of bf16, which the scores need; the consumers' are torch's.
CASES = {
    "one segment, ragged": {**SHAPE, "seqlen": 130, "d_state": 32, "gated": False, "segments": 1},
    "segments, gate": {**SHAPE, "seqlen": 300, "d_state": 64, "segments": 3},
    "bf16, own scores": {
        **SHAPE, "seqlen": 300, "d_state": 64, "dtype": "bfloat16", "scores": False, "segments": 3,
    },
    "odd heads of groups, padded P and N, D (H, P)": {
        **SHAPE, "seqlen": 200, "batch": 2, "nheads": 3, "ngroups": 3, "headdim": 40,
        "d_state": 24, "D": 2, "segments": 2,
    },
    "two blocks of channels, nothing optional": {
        **SHAPE, "seqlen": 450, "nheads": 4, "ngroups": 2, "headdim": 128, "d_state": 16, "D": 0,
        "gated": False, "bias": False, "start": False, "segments": 2,
    },
    "one token, limits": {
        **SHAPE, "seqlen": 1, "headdim": 32, "d_state": 128, "segments": 4,
        "dt_softplus": False, "dt_limit": (0.05, 0.4),
    },
}  # fmt: skip


FAULTS = {
    "a state that does not decay": ("state * decay[:, None], scaled", "state, scaled"),
    "stages that are never released": (
        "        mbarrier.arrive(empty.index(stage), count=1)\n    tma.store_wait(0)\n",
        "    tma.store_wait(0)\n",
    ),
    "an output tile reused too early": (
        "        fence_async_shared()\n        tma.store_wait(0)\n",
        "        fence_async_shared()\n",
    ),
    "weights of later tokens": ("i[None, :] >= j[:, None]", "i[None, :] + 1 >= j[:, None]"),
}  # fmt: skip
FAULTY = {
    **CASES["bf16, own scores"], "seqlen": 330, "d_state": 32, "nheads": 1, "segments": 1,
}  # fmt: skip
JOBS = {name: {"case": case} for name, case in CASES.items()} | {
    name: {"case": FAULTY, "changes": [change]} for name, change in FAULTS.items()
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


def test_a_single_segment_has_no_pass_over_states(results):
    assert results["one segment, ragged"]["launches"] == [0, 1, 0, 0]


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_caught(results, name):
    found = results[name]
    assert "raised" in found or wrong(found, FAULTY["dtype"])


def described(shape, dtype, rows_layout=None):
    """The signature's type of a descriptor."""
    layout = hopper_launch.tile_layout(*(rows_layout or shape[-2:]), dtype)
    return f"tensordesc<{NAMES[dtype]}[{', '.join(map(str, shape))}],{layout!r}>"


def compiled(kernel, types, constants, *, source=GluonASTSource, **options):
    names = kernel.arg_names
    constants = {
        n: None for n in names if n.endswith(("_ptr", "_desc")) and n not in types
    } | constants
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")
    }
    fixed = {(names.index(n),): v for n, v in constants.items()}
    target = GPUTarget("cuda", 90, 32)
    return triton.compile(
        source(kernel, signature, fixed, attributes),
        target=target,
        options={"num_warps": 4} | options,
    )


def resources(kernel, tmp_path):
    """What ptxas gave the kernel."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [tool, "-res-usage", cubin]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def scan(
    *, d_state=128, dtype=torch.bfloat16, gated=False, D=1, entry=True, first=True,
    combine=False, final=True, **config,
):  # fmt: skip
    config = hopper_ssd.Config(**config)
    ring = hopper_ssd.ring(d_state, dtype, gated, config)
    x = described((1, 1, 64, 64), dtype)
    n_tile = described((1, 1, 64, ring.block_n), dtype)
    row = described((1, 64), torch.float32)
    types = {"out_desc": x, "x_desc": x, "B_desc": n_tile, "C_desc": n_tile}
    types |= {"cum_desc": row, "cumj_desc": row}
    types |= {"z_desc": x} if gated else {}
    types |= {"scores_desc": described((64, 64), ring.scores_dtype)} if config.scores else {}
    types |= {"D_ptr": "*fp32"} if D else {}
    types |= {"entry": "*fp32"} if entry else {}
    types |= {"entry_decay": "*fp32", "start": "*fp32"} if combine else {}
    types |= {} if first else {"entry": "*bf16", "start": "*fp32"}
    types |= {"final": "*fp32"} if final else {}
    constants = {
        "PDL": config.pdl, "P": 64, "N": d_state, "BLOCK_N": ring.block_n, "STAGES": ring.stages,
        "REGISTERS": config.registers, "D_DIMS": D, "HAS_Z": gated, "HAS_ENTRY": entry,
        "FIRST": int(first), "COMBINE": combine, "STORE_FINAL": final, "SCORES": config.scores,
    }  # fmt: skip
    optional = ("entry", "entry_decay", "start", "final")
    constants |= {name: None for name in optional if name not in types}
    return compiled(hopper_kernel.scan_kernel, types, constants)


SCANS = {
    "as timed": {"first": False, "final": False},
    "two segments": {"first": False, "combine": True},
    "for a backward": {},
    "gated": {"gated": True, "D": 2},
    "fp16": {"dtype": torch.float16, "gated": True},
    "small state, bare": {"d_state": 16, "D": 0, "entry": False, "final": False},
}


@pytest.mark.parametrize("name", SCANS)
def test_the_scan_compiles_for_sm_90_without_spills(name, tmp_path):
    kernel = scan(**SCANS[name])
    usage = resources(kernel, tmp_path)
    # A few words kept across the walk are not spills of the walk itself.
    stack = int(usage.split("STACK:")[1].split()[0])
    assert stack <= 16
    assert "LOCAL:0" in usage
    assert kernel.metadata.shared <= 232448
    ptx = kernel.asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert "cp.async.bulk.tensor.4d.global" in ptx
    assert "ldmatrix.sync.aligned.m8n8.x4.trans" in ptx


@pytest.mark.parametrize("states", ["*fp32", "*bf16"])
def test_the_state_walk_compiles_for_sm_90_without_spills(states, tmp_path):
    ring = hopper_ssd.ring(128, torch.bfloat16, False, hopper_ssd.DEFAULT)
    row = described((1, 64), torch.float32)
    types = {"x_desc": described((1, 1, 64, 64), torch.bfloat16), "cum_desc": row, "cumj_desc": row}
    types |= {
        "B_desc": described((1, 1, 64, 128), torch.bfloat16),
        "end": states,
        "decay": "*fp32",
    }
    constants = {"PDL": True, "P": 64, "N": 128, "BLOCK_N": 128, "STAGES": ring.state_stages}
    constants |= {"REGISTERS": hopper_ssd.DEFAULT.state_registers, "FIRST": 0}
    kernel = compiled(hopper_kernel.state_kernel, types, constants)
    assert "STACK:0" in resources(kernel, tmp_path)
    assert kernel.metadata.shared <= 232448


@pytest.mark.parametrize("scores", [True, False])
def test_the_small_launches_compile_for_sm_90_without_spills(scores, tmp_path):
    types = {
        "dt_ptr": "*bf16",
        "B_ptr": "*bf16",
        "C_ptr": "*bf16",
        "dt_min": "fp32",
        "dt_max": "fp32",
    }
    types |= dict.fromkeys(("A_ptr", "bias_ptr", "cum_ptr", "cumj_ptr"), "*fp32")
    types |= {"scores_ptr": "*bf16"} if scores else {}
    constants = {
        "Q": 64, "BLOCK_H": 8, "N": 128, "BLOCK_N": 128, "HAS_BIAS": True, "SOFTPLUS": True,
        "SCORES": scores, "PDL": True,
    }  # fmt: skip
    kernel = compiled(hopper_parts.prepare_kernel, types, constants, source=ASTSource)
    assert "STACK:0" in resources(kernel, tmp_path)
    assert "griddepcontrol.launch_dependents" in kernel.asm["ptx"]
    types = {"slots_ptr": "*bf16" if scores else "*fp32", "decay_ptr": "*fp32"}
    constants = {"SIZE": 8192, "BLOCK": 256, "HAS_START": False, "FIRST": int(not scores)}
    constants |= {"PDL": True}
    kernel = compiled(hopper_parts.prefix_kernel, types, constants, source=ASTSource, num_warps=2)
    assert "STACK:0" in resources(kernel, tmp_path)
    assert "griddepcontrol.wait" in kernel.asm["ptx"]


def test_supported_names_what_is_refused():
    good = {"headdim": 64, "d_state": 128, "dtype": torch.bfloat16}
    assert hopper_ssd.supported(**good) is None
    assert "float32" in str(hopper_ssd.supported(**good | {"dtype": torch.float32}))
    assert "headdim 129" in str(hopper_ssd.supported(**good | {"headdim": 129}))
    assert "d_state 20" in str(hopper_ssd.supported(**good | {"d_state": 20}))
    x, B = torch.empty(1, 8, 2, 60, dtype=torch.bfloat16), torch.empty(1, 8, 1, 16)
    with pytest.raises(ValueError, match="headdim 60"):
        hopper_ssd.plan_hopper(x, B, dt_softplus=True, dt_limit=(0.0, 1.0))


def test_only_what_tma_cannot_read_is_copied():
    whole = torch.zeros(2, 10, 4, 72, dtype=torch.bfloat16)
    assert hopper_launch.fetchable(whole) is whole
    part = whole[:, :, :, 8:]
    assert hopper_launch.fetchable(part) is part
    for refused in (whole[..., 1:65], whole[:1].expand(2, -1, -1, -1), whole.transpose(2, 3)):
        copied = hopper_launch.fetchable(refused)
        assert copied.is_contiguous()
        assert copied.data_ptr() % 16 == 0
        assert torch.equal(copied, refused)


def test_rings_fit_into_shared_memory():
    ring = hopper_ssd.ring(128, torch.bfloat16, False, hopper_ssd.DEFAULT)
    assert (ring.stages, ring.block_n) == (3, 128)
    wide = hopper_ssd.ring(128, torch.float16, True, hopper_ssd.DEFAULT)
    assert (wide.stages, wide.scores_dtype) == (2, torch.float32)


def planned(batch, seqlen, nheads):
    x = torch.empty(batch, seqlen, nheads, 64, dtype=torch.bfloat16)
    B = torch.empty(batch, seqlen, 1, 128, dtype=torch.bfloat16)
    return hopper_ssd.plan_hopper(x, B, dt_softplus=True, dt_limit=(0.0, 1.0))


def test_programmatic_launches_only_where_the_launches_are_long():
    for shape in ((1, 512, 32), (1, 2048, 32)):
        assert not hopper_ssd.choose(planned(*shape)).pdl
    for shape in ((1, 8192, 32), (8, 2048, 32), (1, 16384, 128)):
        assert hopper_ssd.choose(planned(*shape)).pdl
    segmented = replace(planned(1, 2048, 80), nsegments=8)  # states in bf16 without a backward
    assert hopper_ssd.choose(segmented, keep=False).pdl


def test_time_is_divided_only_where_it_is_long():
    def per_segment(seqlen):
        return hopper_config.chunks_per_segment(
            batch=1, seqlen=seqlen, nheads=32, headdim=64, ngroups=1, multiprocessors=132
        )

    assert per_segment(512) == 8
    assert per_segment(1) == 1
    assert per_segment(8192) == 16
    assert planned(1, 512, 32).nsegments == 1


def segments(seqlen, nheads):
    per_segment = hopper_config.chunks_per_segment(
        batch=1, seqlen=seqlen, nheads=nheads, headdim=64, ngroups=1, multiprocessors=132
    )
    return -(-seqlen // 64 // per_segment)


def test_states_between_segments_take_no_more_than_the_output():
    for seqlen in (576, 640, 768, 1024, 1536, 2048, 4096):
        for nheads in (4, 8, 16, 32, 64):
            states = 2 * (segments(seqlen, nheads) - 1) * nheads * 64 * 128  # bytes of bf16
            assert 0 < states <= 2 * seqlen * nheads * 64, (seqlen, nheads)


@pytest.mark.parametrize("seqlen", [2048, 32768, 131072, 1 << 20])
def test_one_wave_that_fills_the_device_is_taken_before_several(seqlen):
    assert segments(seqlen, 32) == 8  # of 16 blocks each, on 132 multiprocessors


def test_where_one_wave_leaves_much_idle_there_are_several():
    assert segments(65536, 132) == 2  # of 66 blocks
    assert segments(65536, 100) > 2  # of 50 blocks: two are 76 % of the device


GPU_CASES = (
    *CASES.values(),
    {
        "seqlen": 1024,
        "headdim": 64,
        "d_state": 128,
        "dtype": "bfloat16",
        "nheads": 8,
        "segments": None,
    },
    {"seqlen": 777, "headdim": 64, "d_state": 128, "dtype": "bfloat16", "segments": 4, "batch": 2},
)


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
@pytest.mark.parametrize("pdl", [True, False])
@pytest.mark.usefixtures("poisoned")
def test_it_is_right_on_the_gpu(cases, case, pdl):
    case = dict(case)
    config = hopper_ssd.Config(
        segments=case.pop("segments"), scores=case.pop("scores", True), pdl=pdl
    )
    shared = {"dt_softplus": case.pop("dt_softplus", True)}
    shared["dt_limit"] = case.pop("dt_limit", (0.0, float("inf")))
    exact = cases.draw(**case)
    want = cases.loop(**exact, **shared)
    dtype = getattr(torch, case["dtype"])
    inputs = {k: v.detach() for k, v in cases.cast(exact, dtype, "cuda").items()}
    got = hopper_ssd.ssd_forward(**inputs, **shared, return_final_states=True, config=config)
    bound = torch.finfo(dtype).eps
    assert cases.relative_error(got[0], want[0]) < bound
    assert cases.relative_error(got[1], want[1]) < bound
    for changed in ({"combined": 16}, {"combined": 0}, {"walk": 1}):  # without a backward
        config = replace(config, **changed)
        got = hopper_ssd.ssd_forward(
            **inputs, **shared, return_final_states=True, keep=False, config=config
        )
        assert cases.relative_error(got[0], want[0]) < bound
        assert cases.relative_error(got[1], want[1]) < bound
