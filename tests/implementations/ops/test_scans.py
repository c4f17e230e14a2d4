"""naive_recurrence and associative_scan: the whole reference interfaces, against loops."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch.nn.functional import softplus

from mambench.harness.registry import get
from mambench.harness.spec import Case, Device, DeviceKind, DType, Family, Pass, Problem

NAMES = ["naive_recurrence", "associative_scan"]
SHAPES = list(product([1, 2, 3, 6, 19, 64], [1, 2]))
CPU = Device(kind=DeviceKind.CPU, name="cpu", memory_bytes=1 << 33)


def op_of(name, family):
    implementation = get(name)
    (variant,) = implementation.variants(CPU)
    assert variant.unavailable is None
    return implementation.op(family, variant.name)


def leaf(*shape, low=None):
    value = torch.randn(*shape, dtype=torch.float64)
    return (value if low is None else low - value.abs()).requires_grad_()


def s6_inputs(seqlen, ngroups):
    return {
        "u": leaf(2, 4, seqlen),
        "delta": leaf(2, 4, seqlen),
        "A": leaf(4, 3, low=-0.1),
        "B": leaf(2, ngroups, 3, seqlen),
        "C": leaf(2, ngroups, 3, seqlen),
        "D": leaf(4),
        "delta_bias": leaf(4),
        "z": leaf(2, 4, seqlen),
    }


def ssd_inputs(seqlen, ngroups, skip=(4,)):
    return {
        "x": leaf(2, seqlen, 4, 3),
        "dt": leaf(2, seqlen, 4),
        "A": leaf(4, low=-0.1),
        "B": leaf(2, seqlen, ngroups, 5),
        "C": leaf(2, seqlen, ngroups, 5),
        "D": leaf(*skip),
        "dt_bias": leaf(4),
        "z": leaf(2, seqlen, 4, 3),
        "initial_states": leaf(2, 4, 3, 5),
    }


@pytest.fixture
def assert_same(assert_close):
    """Equal outputs, and equal gradients of a random functional of them."""

    def check(actual, expected, inputs):
        grads = [torch.randn_like(value) for value in expected]
        for value, wanted in zip(actual, expected, strict=True):
            assert_close(value, wanted, 1e-12)
        actual_grads = torch.autograd.grad(actual, list(inputs.values()), grads)
        expected_grads = torch.autograd.grad(expected, list(inputs.values()), grads)
        for got, wanted in zip(actual_grads, expected_grads, strict=True):
            assert_close(got, wanted, 1e-12)

    return check


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("seqlen", "ngroups"), SHAPES)
def test_s6_with_every_argument(name, seqlen, ngroups, literal_s6, assert_same):
    inputs = s6_inputs(seqlen, ngroups)
    op = op_of(name, Family.S6)
    actual = op(**inputs, delta_softplus=True, return_last_state=True)
    assert_same(actual, literal_s6(**inputs), inputs)


@pytest.mark.parametrize("name", NAMES)
def test_s6_with_the_fewest_arguments(name, literal_s6, assert_same):
    inputs = s6_inputs(11, 1)
    given = {key: inputs[key] for key in ("u", "delta", "A", "B", "C")}
    zero = torch.zeros(4, dtype=torch.float64)
    # Without softplus the step size is delta itself; softplus has an inverse where it is positive.
    inputs["delta"].data.abs_().add_(0.1)
    y = op_of(name, Family.S6)(**given)
    raw = torch.log(torch.expm1(given["delta"]))
    expected, _ = literal_s6(**{**given, "delta": raw}, D=zero, delta_bias=zero)
    assert_same((y,), (expected,), given)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("seqlen", "ngroups"), SHAPES)
def test_ssd_with_every_argument(name, seqlen, ngroups, literal_ssd, assert_same):
    inputs = ssd_inputs(seqlen, ngroups)
    op = op_of(name, Family.SSD)
    actual = op(**inputs, chunk_size=16, dt_softplus=True, return_final_states=True)
    assert_same(actual, literal_ssd(**inputs), inputs)


@pytest.mark.parametrize("name", NAMES)
def test_ssd_with_a_skip_per_channel_and_limits(name, literal_ssd, assert_same):
    inputs = ssd_inputs(9, 2, skip=(4, 3))
    low, high = 0.4, 1.1
    y = op_of(name, Family.SSD)(**inputs, chunk_size=4, dt_softplus=True, dt_limit=(low, high))
    steps = softplus(inputs["dt"] + inputs["dt_bias"]).clamp(low, high)
    assert (steps == low).any()
    assert (steps == high).any()
    raw = torch.log(torch.expm1(steps))
    zero = torch.zeros(4, dtype=torch.float64)
    expected, _ = literal_ssd(**{**inputs, "dt": raw, "dt_bias": zero})
    assert_same((y,), (expected,), inputs)


@pytest.mark.parametrize("name", NAMES)
def test_ssd_with_the_fewest_arguments(name, literal_ssd, assert_same):
    inputs = ssd_inputs(11, 1)
    given = {key: inputs[key] for key in ("x", "dt", "A", "B", "C")}
    inputs["dt"].data.abs_().add_(0.1)
    y = op_of(name, Family.SSD)(**given, chunk_size=16)
    zero = torch.zeros(4, dtype=torch.float64)
    raw = torch.log(torch.expm1(given["dt"]))
    expected, _ = literal_ssd(**{**given, "dt": raw}, D=zero, dt_bias=zero)
    assert_same((y,), (expected,), given)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", [Family.S6, Family.SSD])
def test_low_precision_keeps_a_wide_state(name, family, assert_close):
    """600 equal small inflows: a bf16 state would stop growing after 256 of them."""
    seqlen, dtype = 600, torch.bfloat16
    ones = {"dtype": dtype}
    if family is Family.S6:
        args = (
            torch.ones(1, 1, seqlen, **ones),
            torch.full((1, 1, seqlen), 1e-3, **ones),
            torch.full((1, 1), -1e-6),
            torch.ones(1, 1, 1, seqlen, **ones),
            torch.ones(1, 1, 1, seqlen, **ones),
        )
        y, state = op_of(name, family)(*args, return_last_state=True)
        last = y[0, 0, -1]
    else:
        args = (
            torch.ones(1, seqlen, 1, 1, **ones),
            torch.full((1, seqlen, 1), 1e-3, **ones),
            torch.full((1,), -1e-6),
            torch.ones(1, seqlen, 1, 1, **ones),
            torch.ones(1, seqlen, 1, 1, **ones),
        )
        y, state = op_of(name, family)(*args, 64, return_final_states=True)
        last = y[0, -1, 0, 0]
    step = float(torch.tensor(1e-3, dtype=dtype))
    assert y.dtype == dtype
    assert state.dtype == torch.float32
    assert float(state) == pytest.approx(seqlen * step, rel=1e-4)
    assert float(last) == pytest.approx(seqlen * step, rel=4e-3)


def peak_bytes(run):
    """Most bytes that torch's allocator handed out at once while `run` ran."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    held = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", [Family.S6, Family.SSD])
@pytest.mark.parametrize("pass_", [Pass.FORWARD, Pass.TRAINING])
def test_the_workspace_is_what_is_used(name, family, pass_):
    from mambench.implementations.workload import build

    headdim = None if family is Family.S6 else 16
    problem = Problem(
        family=family, batch=1, seqlen=256, d_inner=64, headdim=headdim, d_state=64, ngroups=1
    )
    case = Case(
        implementation=name, variant="torch", problem=problem, pass_=pass_, dtype=DType.FP32
    )
    implementation = get(name)
    run = build(case, implementation, CPU, seed=0).prepare(pass_)
    run()
    claimed = implementation.workspace_bytes(case)
    assert 0.8 * claimed < peak_bytes(run) < 1.25 * claimed


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", [Family.S6, Family.SSD])
def test_passes_the_gate_on_the_gpu(name, family):
    from mambench.harness.gate import check
    from mambench.implementations.workload import build

    headdim = None if family is Family.S6 else 64
    problem = Problem(
        family=family, batch=2, seqlen=500, d_inner=256, headdim=headdim, d_state=16, ngroups=1
    )
    case = Case(
        implementation=name, variant="torch", problem=problem, pass_=Pass.TRAINING, dtype=DType.BF16
    )
    device = Device(kind=DeviceKind.CUDA, name="gpu", memory_bytes=1 << 34)
    report = check(build(case, get(name), device, seed=0), case, seed=0)
    assert report.passed, report.reason


def test_the_associative_scan_is_triton_on_a_gpu_within_its_limits():
    device = Device(
        kind=DeviceKind.CUDA, name="H100", compute_capability=(9, 0), memory_bytes=80 << 30
    )
    scan = get("associative_scan")
    assert [v.name for v in scan.variants(device)] == ["triton", "torch"]
    turing = Device(kind=DeviceKind.CUDA, name="T4", compute_capability=(7, 5), memory_bytes=1)
    assert [v.name for v in scan.variants(turing) if v.unavailable is None] == ["torch"]
    problem = Problem(family=Family.S6, batch=1, seqlen=512, d_inner=64, d_state=16, ngroups=1)
    case = Case(
        implementation="associative_scan",
        variant="triton",
        problem=problem,
        pass_=Pass.FORWARD,
        dtype=DType.BF16,
    )
    deep, wide = replace(problem, d_state=257), replace(case, dtype=DType.FP64)
    assert scan.unsupported(case, device) is None
    assert "256" in scan.unsupported(replace(case, problem=deep), device)
    assert "fp32" in scan.unsupported(wide, device)
    assert scan.unsupported(replace(wide, variant="torch"), device) is None
    states = 4 * 512 * 64 * 16
    assert states <= scan.workspace_bytes(case) < 2 * states
    assert scan.workspace_bytes(replace(case, variant="torch")) >= 3 * states
