import weakref

import pytest
import torch

from mambench.harness.spec import Case, Device, DeviceKind, DType, Family, Level, Pass, Problem
from mambench.implementations.ops.associative_scan import AssociativeScan
from mambench.implementations.problems.attention import AttentionProblem
from mambench.implementations.problems.s6 import S6Problem
from mambench.implementations.problems.ssd import SsdProblem
from mambench.implementations.workload import build, problem_family

CPU = Device(kind=DeviceKind.CPU, name="cpu", memory_bytes=1 << 33)
S6 = Problem(family=Family.S6, batch=1, seqlen=20, d_inner=8, d_state=4, ngroups=1)
SSD = Problem(family=Family.SSD, batch=1, seqlen=20, d_inner=8, headdim=4, d_state=4, ngroups=1)
ATTENTION = Problem(family=Family.ATTENTION, batch=1, seqlen=20, d_inner=8, headdim=4)


def make(problem=S6, pass_=Pass.TRAINING, dtype=DType.FP32):
    case = Case(
        implementation="associative_scan",
        variant="torch",
        problem=problem,
        pass_=pass_,
        dtype=dtype,
    )
    return build(case, AssociativeScan(), CPU, seed=1)


def test_only_the_passes_with_gradients_ask_for_them():
    assert not any(tensor.requires_grad for tensor in make(pass_=Pass.FORWARD).inputs.values())
    workload = make(pass_=Pass.BACKWARD)
    assert all(tensor.requires_grad and tensor.is_leaf for tensor in workload.inputs.values())
    assert workload.forward()[0].requires_grad


def test_the_same_seed_gives_the_same_inputs():
    first, second = make(), make()
    assert all(torch.equal(first.inputs[name], second.inputs[name]) for name in first.inputs)


@pytest.mark.parametrize("problem", [S6, SSD])
@pytest.mark.parametrize("dtype", [DType.FP32, DType.BF16])
def test_forward_has_the_dtype_and_no_graph(problem, dtype):
    workload = make(problem, Pass.TRAINING, dtype)
    (y,) = workload.prepare(Pass.FORWARD)()
    assert y.dtype == {DType.FP32: torch.float32, DType.BF16: torch.bfloat16}[dtype]
    assert not y.requires_grad


def counted(workload):
    """Count the calls of a workload's operation."""
    calls = []
    operation = workload.op
    workload.op = lambda *args, **kwargs: calls.append(1) or operation(*args, **kwargs)
    return calls


def test_one_call_executes_the_pass_once():
    workload = make()
    calls = counted(workload)
    for pass_, per_call in ((Pass.FORWARD, 1), (Pass.BACKWARD, 0), (Pass.TRAINING, 1)):
        execute = workload.prepare(pass_)
        calls.clear()
        execute()
        execute()
        assert len(calls) == 2 * per_call, pass_


def test_gradients_are_equal_in_both_passes_and_never_accumulate():
    workload = make()
    backward, training = workload.prepare(Pass.BACKWARD), workload.prepare(Pass.TRAINING)
    first = backward()
    assert len(first) == len(workload.inputs)
    for other in (backward(), training(), training()):
        for expected, actual in zip(first, other, strict=True):
            assert torch.equal(expected, actual)
    assert all(tensor.grad is None for tensor in workload.inputs.values())


def test_passes_run_whatever_the_grad_mode_around_them():
    workload = make()
    training = workload.prepare(Pass.TRAINING)
    with torch.no_grad():
        assert len(training()) == len(workload.inputs)
        assert len(workload.prepare(Pass.BACKWARD)()) == len(workload.inputs)


def test_a_forward_workload_has_no_backward():
    with pytest.raises(ValueError, match="forward has no gradients"):
        make(pass_=Pass.FORWARD).prepare(Pass.BACKWARD)


def test_release_frees_the_inputs():
    workload = make(pass_=Pass.FORWARD)
    execute = workload.prepare(Pass.FORWARD)
    execute()
    refs = [weakref.ref(tensor) for tensor in workload.inputs.values()]
    workload.release()
    assert all(ref() is None for ref in refs)


def test_each_family_has_its_problem_and_the_cpu_a_smaller_budget():
    cuda = Device(kind=DeviceKind.CUDA, name="gpu", memory_bytes=1 << 36)
    for problem, cls in ((S6, S6Problem), (SSD, SsdProblem), (ATTENTION, AttentionProblem)):
        for device in (CPU, cuda):
            assert isinstance(problem_family(problem, print, device), cls)
    small, large = problem_family(S6, print, CPU), problem_family(S6, print, cuda)
    assert isinstance(small, S6Problem)
    assert isinstance(large, S6Problem)
    assert small.judged_states < large.judged_states


def test_a_block_runs_around_the_mixer():
    block = Problem(
        family=Family.S6,
        level=Level.BLOCK,
        batch=1,
        seqlen=12,
        d_inner=64,
        d_model=32,
        d_state=4,
        ngroups=1,
    )
    workload = make(block)
    calls = counted(workload)
    (y,) = workload.prepare(Pass.FORWARD)()
    assert y.shape == (1, 12, 32)
    assert len(calls) == block.nblocks == 2


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
@pytest.mark.parametrize("problem", [S6, SSD])
def test_runs_on_the_gpu(problem):
    device = Device(kind=DeviceKind.CUDA, name="gpu", memory_bytes=1 << 34)
    case = Case(
        implementation="associative_scan",
        variant="torch",
        problem=problem,
        pass_=Pass.TRAINING,
        dtype=DType.BF16,
    )
    workload = build(case, AssociativeScan(), device, seed=1)
    assert all(grad.is_cuda for grad in workload.prepare(Pass.TRAINING)())
