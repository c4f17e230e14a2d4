"""The state that a prefill leaves, against the literal recurrence and with planted faults."""

import pytest
import torch

from mambench.harness import gate
from mambench.harness.spec import Case, Device, DeviceKind, DType, Family, Pass, Problem
from mambench.implementations.problems.base import Sample
from mambench.implementations.problems.prefill import S6Prefill, SsdPrefill
from mambench.implementations.workload import Workload, problem_family
from mambench.kernels import recurrence_torch

CPU = Device(kind=DeviceKind.CPU, name="cpu", memory_bytes=1 << 33)
S6 = Problem(family=Family.S6, batch=2, seqlen=50, d_inner=16, d_state=4, ngroups=2, gated=True)
SSD = Problem(family=Family.SSD, batch=2, seqlen=50, d_inner=32, headdim=8, d_state=4, ngroups=2)
OPS = {Family.S6: recurrence_torch.selective_scan, Family.SSD: recurrence_torch.state_space_dual}


def check(op, problem, dtype=DType.BF16):
    case = Case(implementation="x", variant="x", problem=problem, pass_=Pass.PREFILL, dtype=dtype)
    family = problem_family(problem, op, CPU, Pass.PREFILL)
    workload = Workload(case=case, family=family, op=op, device="cpu", seed=2)
    return gate.check(workload, case, seed=0)


def test_the_states_are_those_of_the_recurrence(literal_s6, literal_ssd, assert_close):
    owner = S6Prefill()
    inputs = owner.make_inputs(S6, dtype=torch.float64, device="cpu", seed=0)
    for part in (Sample(), Sample(channels=(0, 5, 9))):
        y, state = owner.reference(S6, owner.select_inputs(S6, inputs, part), part)
        truth = owner.select_outputs(S6, literal_s6(**inputs), part)
        assert_close(y, truth[0], 1e-10)
        assert_close(state, truth[1], 1e-10)
    owner = SsdPrefill()
    inputs = owner.make_inputs(SSD, dtype=torch.float64, device="cpu", seed=0)
    for part in (Sample(), Sample(heads=(0, 3))):
        y, state = owner.reference(SSD, owner.select_inputs(SSD, inputs, part), part)
        truth = owner.select_outputs(SSD, literal_ssd(**inputs), part)
        assert_close(y, truth[0], 1e-10)
        assert_close(state, truth[1], 1e-10)


@pytest.mark.parametrize("problem", [S6, SSD])
@pytest.mark.parametrize("dtype", [DType.FP32, DType.BF16])
def test_a_correct_implementation_passes(problem, dtype):
    report = check(OPS[problem.family], problem, dtype)
    assert report.passed, report.reason
    assert set(report.errors) == {"y", "final_state"}


@pytest.mark.parametrize("problem", [S6, SSD])
def test_a_state_of_one_step_before_is_caught(problem):
    def op(*args, **kwargs):
        y, _ = OPS[problem.family](*args, **kwargs)
        time = 2 if problem.family is Family.S6 else 1  # of x; of all others the last or the second
        shorter = [
            t.narrow(-1 if time == 2 else 1, 0, problem.length - 1)
            if isinstance(t, torch.Tensor) and t.dim() > 2
            else t
            for t in args
        ]
        return y, OPS[problem.family](*shorter, **{**kwargs, "z": None})[1]

    report = check(op, problem)
    assert not report.passed
    assert report.reason is not None
    assert report.reason.startswith("final_state")
