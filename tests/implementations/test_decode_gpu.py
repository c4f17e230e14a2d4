"""Decode and prefill of every implementation on a GPU: `pytest -m gpu tests/implementations`."""

import pytest
import torch

from mambench.harness import gate, machine, registry
from mambench.harness.spec import Case, Device, DType, Family, Pass, Problem
from mambench.implementations.workload import build

# What other projects warn of while they are imported and compile is theirs.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

OPS = ("selective_scan", "ssd", "naive_recurrence", "flash_attention")


@pytest.fixture(scope="module")
def device() -> Device:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    torch.cuda.set_stream(torch.cuda.Stream())
    return machine.detect("cuda")


def problem(family: Family, batch: int, pass_: Pass) -> Problem:
    if family is Family.ATTENTION:
        return Problem(family=family, batch=batch, seqlen=1000, d_inner=512, headdim=128)
    return Problem(
        family=family,
        batch=batch,
        seqlen=None if pass_ is Pass.DECODE else 1000,
        d_inner=512,
        d_state=16 if family is Family.S6 else 128,
        headdim=None if family is Family.S6 else 64,
        ngroups=2,
        gated=batch > 1,
    )


def judged(name: str, family: Family, variant: str, pass_: Pass, dtype: DType, device: Device):
    implementation = registry.get(name)
    for batch in (1, 7):
        case = Case(
            implementation=name,
            variant=variant,
            problem=problem(family, batch, pass_),
            pass_=pass_,
            dtype=dtype,
        )
        if implementation.unsupported(case, device) is not None:
            continue
        try:
            workload = build(case, implementation, device, seed=0)
            report = gate.check(workload, case, seed=0)
        except RuntimeError as error:
            if "has no" not in str(error):
                raise
            continue  # torch declines this problem for a backend, and says so
        yield case, report, workload


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", [DType.BF16, DType.FP16, DType.FP32])
def test_every_variant_decodes_rightly(name: str, dtype: DType, device: Device) -> None:
    implementation = registry.get(name)
    seen = 0
    for family in implementation.families:
        for variant in implementation.decode_variants(device):
            if variant.unavailable is not None:
                continue
            found = judged(name, family, variant.name, Pass.DECODE, dtype, device)
            for case, report, workload in found:
                assert report.passed, f"{case.label}: {report.reason}"
                execute = workload.prepare(Pass.DECODE)
                for _ in range(20):
                    execute()
                again = gate.check_again(workload, case, report, seed=0)
                assert again is None, f"{case.label}: {again}"
                seen += 1
    assert seen


@pytest.mark.parametrize("name", OPS)
def test_every_variant_prefills_rightly(name: str, device: Device) -> None:
    implementation = registry.get(name)
    seen = 0
    for family in implementation.families:
        for variant in implementation.variants(device):
            if variant.unavailable is not None:
                continue
            for case, report, _ in judged(
                name, family, variant.name, Pass.PREFILL, DType.BF16, device
            ):
                assert report.passed, f"{case.label}: {report.reason}"
                seen += 1
    assert seen
