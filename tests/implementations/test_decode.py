"""The pass `decode` of every implementation: what runs where, and that it passes the gate."""

from dataclasses import replace

import pytest

from mambench.harness import gate, registry
from mambench.harness.spec import Case, Device, DeviceKind, DType, Family, Pass, Problem
from mambench.implementations.cost import case_cost
from mambench.implementations.workload import build

CPU = Device(kind=DeviceKind.CPU, name="cpu", memory_bytes=1 << 33)
H100 = Device(
    kind=DeviceKind.CUDA, name="NVIDIA H100", compute_capability=(9, 0), memory_bytes=80 << 30
)
T4 = replace(H100, name="Tesla T4", compute_capability=(7, 5))
S6 = Problem(family=Family.S6, batch=2, seqlen=None, d_inner=64, d_state=16, ngroups=2)
SSD = Problem(
    family=Family.SSD, batch=2, seqlen=None, d_inner=64, headdim=16, d_state=32, ngroups=2,
    gated=True,
)  # fmt: skip
ATTENTION = Problem(family=Family.ATTENTION, batch=2, seqlen=70, d_inner=64, headdim=16)


def case(name, variant, problem, dtype=DType.FP32, pass_=Pass.DECODE):
    return Case(implementation=name, variant=variant, problem=problem, pass_=pass_, dtype=dtype)


@pytest.mark.parametrize(
    ("name", "variant", "problem", "dtype"),
    [
        ("selective_scan", "numba", S6, DType.FP32),
        ("selective_scan", "torch", S6, DType.BF16),
        ("ssd", "numba", SSD, DType.FP32),
        ("ssd", "torch", SSD, DType.FP16),
        ("naive_recurrence", "torch", S6, DType.FP32),
        ("naive_recurrence", "torch", SSD, DType.FP32),
        ("flash_attention", "sdpa-flash", ATTENTION, DType.FP32),
        ("flash_attention", "sdpa-math", ATTENTION, DType.BF16),
    ],
)
def test_what_runs_on_the_cpu_is_right_and_leaves_its_state(name, variant, problem, dtype):
    asked, implementation = case(name, variant, problem, dtype), registry.get(name)
    variants = {v.name: v.unavailable for v in implementation.decode_variants(CPU)}
    assert variants[variant] is None
    assert implementation.unsupported(asked, CPU) is None
    workload = build(asked, implementation, CPU, seed=0)
    report = gate.check(workload, asked, seed=0)
    assert report.passed, report.reason


@pytest.mark.parametrize("name", ["selective_scan", "ssd"])
def test_a_gpu_gets_triton_first(name):
    implementation = registry.get(name)
    assert [v.name for v in implementation.decode_variants(H100)] == ["triton", "torch"]
    old = {v.name: v.unavailable for v in implementation.decode_variants(T4)}
    assert old == {"triton": "needs compute capability 8.0, Tesla T4 has 7.5", "torch": None}


def test_attention_offers_what_is_made_for_decoding_first():
    variants = registry.get("flash_attention").decode_variants(H100)
    assert [v.name for v in variants[:3]] == ["fa3", "fa2", "sdpa-flash"]
    assert "flex" not in {v.name for v in variants}


@pytest.mark.parametrize(
    ("name", "variant", "change", "dtype", "says"),
    [
        ("ssd", "triton", {"d_state": 512}, DType.BF16, "at most 256, got 512"),
        ("ssd", "triton", {}, DType.FP64, "compute in fp32"),
        ("selective_scan", "numba", {}, DType.BF16, "in place, got bf16"),
        ("selective_scan", "numba", {"d_state": 20}, DType.FP32, "multiple of 16, got 20"),
        ("selective_scan", "torch", {"d_state": 512}, DType.BF16, None),
    ],
)
def test_limits_are_named(name, variant, change, dtype, says):
    problem = replace(S6 if name == "selective_scan" else SSD, **change)
    reason = registry.get(name).unsupported(case(name, variant, problem, dtype), H100)
    assert (reason is None) if says is None else (says in reason)


def test_an_operation_without_decode_says_so():
    scan = registry.get("associative_scan")
    assert scan.decode_variants(H100) == ()
    with pytest.raises(NotImplementedError, match="associative_scan has no decode"):
        scan.decode_op(Family.S6, "torch")
    with pytest.raises(ValueError, match="got variant 'hopper'"):
        registry.get("ssd").decode_op(Family.SSD, "hopper")


@pytest.mark.parametrize("name", ["selective_scan", "ssd", "naive_recurrence", "flash_attention"])
def test_estimates_need_no_length(name):
    problem = {"flash_attention": ATTENTION, "ssd": SSD}.get(name, S6)
    implementation = registry.get(name)
    for variant in implementation.decode_variants(H100):
        asked = case(name, variant.name, problem, DType.BF16)
        assert implementation.workspace_bytes(asked) >= 0
        assert implementation.launches(asked) >= 1


def test_the_state_is_read_and_written_once_whatever_came_before():
    bf16 = case_cost(case("ssd", "triton", SSD, DType.BF16))
    states = 2 * 64 * 32
    assert bf16.state_bytes == 2 * states
    activations = 2 * (3 * 2 * 64 + 2 * 2 * 2 * 32 + 2 * 4)  # x, z, out; B, C; dt
    assert bf16.compulsory_bytes == 2 * 2 * states + activations
    assert case_cost(case("ssd", "triton", SSD)).state_bytes == 4 * states
    assert (
        case_cost(case("selective_scan", "triton", S6, DType.BF16)).state_bytes == 2 * 2 * 64 * 16
    )
    assert case("ssd", "triton", SSD).tokens == 2


def test_the_cache_grows_with_the_context():
    one, two = (
        case_cost(case("flash_attention", "fa2", replace(ATTENTION, seqlen=n), DType.BF16))
        for n in (1000, 2000)
    )
    assert one.state_bytes == 2 * 2 * 2 * 64 * 1001
    assert two.state_bytes - one.state_bytes == 2 * 2 * 2 * 64 * 1000
    assert two.compulsory_bytes - one.compulsory_bytes == 2 * 2 * 2 * 64 * 1000
    assert two.model_flop == 4 * 2 * 64 * 2001


def test_prefill_costs_a_forward_and_the_state():
    full = replace(S6, seqlen=100)
    forward, prefill = (
        case_cost(case("selective_scan", "triton", full, DType.BF16, pass_))
        for pass_ in (Pass.FORWARD, Pass.PREFILL)
    )
    assert prefill.model_flop == forward.model_flop
    assert prefill.compulsory_bytes - forward.compulsory_bytes == 4 * 2 * 64 * 16
    assert prefill.state_bytes == 4 * 2 * 64 * 16
    assert forward.state_bytes is None
    kept = case_cost(case("flash_attention", "fa2", ATTENTION, DType.BF16, Pass.PREFILL))
    assert kept.state_bytes == 2 * 2 * 2 * 64 * 70
