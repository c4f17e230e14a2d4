"""The gate on operations that update their state in place: planted faults, and what passes."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from mambench.harness import gate
from mambench.harness.spec import Case, Device, DeviceKind, DType, Family, Pass, Problem
from mambench.implementations.workload import Workload, problem_family
from mambench.kernels.state_update.torch_update import selective_state_update as update

CPU = Device(kind=DeviceKind.CPU, name="cpu", memory_bytes=1 << 33)
PROBLEMS = {
    Family.S6: Problem(family=Family.S6, batch=3, seqlen=None, d_inner=24, d_state=16, ngroups=2),
    Family.SSD: Problem(
        family=Family.SSD, batch=3, seqlen=None, d_inner=64, headdim=16, d_state=16, ngroups=2,
        gated=True,
    ),
    Family.ATTENTION: Problem(
        family=Family.ATTENTION, batch=3, seqlen=200, d_inner=64, headdim=16
    ),
}  # fmt: skip


def workload(op, *, family=Family.SSD, dtype=DType.BF16):
    problem = PROBLEMS[family]
    case = Case(implementation="x", variant="x", problem=problem, pass_=Pass.DECODE, dtype=dtype)
    owner = problem_family(problem, op, CPU, Pass.DECODE)
    return Workload(case=case, family=owner, op=op, device="cpu", seed=7), case


def check(op, **options):
    made, case = workload(op, **options)
    return gate.check(made, case, seed=0)


def attend(q, k, v, k_cache, v_cache, context):
    k_cache[:, context : context + 1] = k
    v_cache[:, context : context + 1] = v
    keys, values = (cache[:, : context + 1].transpose(1, 2) for cache in (k_cache, v_cache))
    return sdpa(q.transpose(1, 2), keys, values).transpose(1, 2)


OPS = {Family.S6: update, Family.SSD: update, Family.ATTENTION: attend}


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("dtype", [DType.FP64, DType.FP32, DType.FP16, DType.BF16])
def test_a_correct_implementation_passes_and_its_state_is_judged(family, dtype):
    report = check(OPS[family], family=family, dtype=dtype)
    assert report.passed, report.reason
    judged = {"y", "k_cache", "v_cache"} if family is Family.ATTENTION else {"y", "state"}
    assert set(report.errors) == judged


@pytest.mark.parametrize("family", Family)
def test_the_state_is_put_back(family):
    made, case = workload(OPS[family], family=family)
    before = {name: tensor.clone() for name, tensor in made.inputs.items()}
    assert gate.check(made, case, seed=0).passed
    assert all(torch.equal(before[name], tensor) for name, tensor in made.inputs.items())


@pytest.mark.parametrize("family", Family)
def test_what_was_proven_holds_after_the_state_has_been_updated_many_times(family):
    made, case = workload(OPS[family], family=family)
    report = gate.check(made, case, seed=0)
    execute = made.prepare(Pass.DECODE)
    for _ in range(50):
        execute()
    assert gate.check_again(made, case, report, seed=0) is None


def state_left_as_it_was(state, *args, **kwargs):
    return update(state.clone(), *args, **kwargs)


def state_of_one_row_stale(state, *args, **kwargs):
    stale = state[1, 2, 3].clone()
    y = update(state, *args, **kwargs)
    state[1, 2, 3] = stale
    return y


def decay_of_the_neighbouring_head(state, x, dt, A, *args, **kwargs):
    return update(state, x, dt, A.roll(1), *args, **kwargs)


def output_of_the_state_before(state, *args, **kwargs):
    kept = state.clone()
    update(state, *args, **kwargs)
    x, dt, A, B, C = args
    zero = torch.zeros_like(x)
    return update(kept, zero, torch.full_like(dt, -30.0), A, B, C, **kwargs) + zero


def state_updated_twice(state, *args, **kwargs):
    y = update(state.clone(), *args, **kwargs)
    update(state, *args, **kwargs)
    update(state, *args, **kwargs)
    return y


def another_input_changed(state, x, dt, *args, **kwargs):
    y = update(state, x, dt, *args, **kwargs)
    dt[0, 0] = dt[0, 0] + 1
    return y


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (state_left_as_it_was, "state"),
        (state_of_one_row_stale, "state in the block [1, 2, 3, 0:16]"),
        (decay_of_the_neighbouring_head, "state"),
        (output_of_the_state_before, "y"),
        (state_updated_twice, "state"),
        (another_input_changed, "dt: the operation changed its input"),
    ],
)
def test_a_faulty_state_update_is_caught(fault, named):
    report = check(fault)
    assert not report.passed
    assert report.reason is not None
    assert report.reason.startswith(named)


def nothing_appended(q, k, v, k_cache, v_cache, context):
    return attend(q, k, v, k_cache.clone(), v_cache.clone(), context)


def appended_one_too_far(q, k, v, k_cache, v_cache, context):
    y = attend(q, k, v, k_cache.clone(), v_cache.clone(), context)
    k_cache[:, context + 1 : context + 2] = k
    v_cache[:, context : context + 1] = v
    return y


def own_token_not_seen(q, k, v, k_cache, v_cache, context):
    attend(q, k, v, k_cache, v_cache, context)
    return attend(q, k, v, k_cache.clone(), v_cache.clone(), context - 1)


def end_of_the_cache_seen(q, k, v, k_cache, v_cache, context):
    attend(q, k, v, k_cache, v_cache, context)
    tensors = (t.transpose(1, 2) for t in (q, k_cache, v_cache))
    return sdpa(*tensors).transpose(1, 2)


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (nothing_appended, "k_cache"),
        (appended_one_too_far, "k_cache: the operation changed its input"),
        (own_token_not_seen, "y"),
        (end_of_the_cache_seen, "y"),
    ],
)
def test_a_faulty_attention_is_caught(fault, named):
    report = check(fault, family=Family.ATTENTION)
    assert not report.passed
    assert report.reason is not None
    assert report.reason.startswith(named)
