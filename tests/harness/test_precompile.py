"""How cases are divided among the workers that compile ahead."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from mambench.harness import precompile
from mambench.harness.spec import Case, Device, DeviceKind, DType, Family, Pass, Problem

_PATH = Path(__file__).parent.parent / "faults" / "planning.py"
_SPEC = importlib.util.spec_from_file_location("planning_of_precompile", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
planning = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(planning)

CPU, GPU = (
    Device(kind=kind, index=0, name="some", memory_bytes=1 << 36)
    for kind in (DeviceKind.CPU, DeviceKind.CUDA)
)


@pytest.mark.parametrize(("on_gpu", "expected"), [(False, [1]), (True, [3])])
def test_lengths_are_told_apart_on_a_gpu_only(on_gpu: bool, expected: list[int]) -> None:
    cases = [planning.case("good", seqlen=n) for n in (8, 9, 10, 10)]
    groups = precompile._groups(cases, on_gpu=on_gpu)
    assert [len(group) for group in groups] == expected
    assert groups[0][0] == cases[0]


def test_passes_and_variants_compile_side_by_side_on_a_gpu() -> None:
    case = planning.case("good")
    cases = [case, replace(case, pass_=Pass.TRAINING), replace(case, variant="other")]
    assert precompile._groups(cases, on_gpu=True) == [[each] for each in cases]
    assert precompile._groups(cases, on_gpu=False) == [cases]


def test_a_training_step_has_what_a_backward_needs() -> None:
    training = replace(planning.case("good"), pass_=Pass.TRAINING)
    cases = [replace(training, pass_=Pass.BACKWARD), training]
    assert precompile._groups(cases, on_gpu=True) == [[training]]


def test_much_to_compile_is_divided_and_begun_last() -> None:
    ssd = Problem(family=Family.SSD, batch=1, seqlen=64, d_inner=64, d_state=16, headdim=64)
    cases = [
        Case(implementation=name, variant="v", problem=ssd, pass_=Pass.TRAINING, dtype=DType.BF16)
        for name in ("mamba_ssm_ssd", "ssd")
    ]
    jobs = precompile._jobs(cases, on_gpu=True, parallel=4)
    assert [(job.cases[0].implementation, job.share, job.shares) for job in jobs] == [
        ("ssd", 0, 1),
        *(("mamba_ssm_ssd", share, 4) for share in range(4)),
    ]
    assert len(precompile._jobs(cases, on_gpu=False, parallel=4)) == 2


def test_the_longest_job_bounds_the_time_that_is_announced(monkeypatch) -> None:
    ssd = Problem(family=Family.SSD, batch=1, seqlen=64, d_inner=64, d_state=16, headdim=64)
    case = Case(
        implementation="mamba_ssm_ssd",
        variant="v",
        problem=ssd,
        pass_=Pass.TRAINING,
        dtype=DType.BF16,
    )
    monkeypatch.setattr(precompile, "_parallel", lambda: 2)
    two = precompile.seconds([case], GPU)
    monkeypatch.setattr(precompile, "_parallel", lambda: 1)
    one = precompile.seconds([case], GPU)
    alone_s = precompile._compile_s(case)
    assert alone_s > 60
    assert one == pytest.approx(precompile.START_S + alone_s)
    assert two == pytest.approx(precompile.START_S + alone_s / 2)
    assert precompile.seconds([case], CPU) == 0
    assert precompile.seconds([], GPU) == 0


def test_only_what_compiles_gets_a_worker() -> None:
    assert precompile._compiles("ssd")
    assert not precompile._compiles("flash_attention")
    assert precompile._compiles("known to a worker's plugin only")
