"""Compiling ahead by a call: what is called, and that long cases are shortened."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mambench.harness import registry
from mambench.harness.spec import Case, Device, DeviceKind, DType, Family, Pass, Problem
from mambench.implementations import warm, workload
from mambench.implementations.peers.warm import call_once as call_peer_once

PROBLEM = Problem(
    family=Family.SSD, batch=2, seqlen=2048, d_inner=2048, d_state=128, headdim=64, ngroups=1
)
CASE = Case(
    implementation="ssd", variant="hopper", problem=PROBLEM, pass_=Pass.FORWARD, dtype=DType.BF16
)


@pytest.fixture
def called(monkeypatch) -> list[Case]:
    """The cases that are built and run on a GPU that is pretended."""
    cases: list[Case] = []

    def build(case: Case, implementation: object, device: Device, *, seed: int) -> object:
        assert device.kind is DeviceKind.CUDA
        return SimpleNamespace(prepare=lambda pass_: lambda: cases.append(case))

    monkeypatch.setattr(workload, "build", build)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return cases


@pytest.mark.parametrize(
    ("name", "family", "variant", "pass_"),
    [
        ("ssd", Family.SSD, "hopper", Pass.FORWARD),
        ("ssd", Family.SSD, "triton", Pass.TRAINING),
        ("ssd", Family.SSD, "triton", Pass.DECODE),
        ("selective_scan", Family.S6, "hopper", Pass.TRAINING),
        ("selective_scan", Family.S6, "triton", Pass.DECODE),
        ("associative_scan", Family.S6, "triton", Pass.FORWARD),
    ],
)
def test_kernels_that_are_compiled_for_a_gpu_are_called_as_they_are_timed(
    called, name, family, variant, pass_
):
    problem = replace(PROBLEM, family=family, headdim=64 if family is Family.SSD else None)
    problem = replace(problem, seqlen=None if pass_ is Pass.DECODE else 2001, d_state=16)
    case = replace(CASE, implementation=name, variant=variant, pass_=pass_, problem=problem)
    registry.get(name).precompile(case)
    assert called == [case]


def test_a_peer_is_called_with_one_short_sequence(called):
    call_peer_once(registry.get("mamba_ssm_ssd"), CASE)
    assert [(c.problem.batch, c.problem.seqlen) for c in called] == [(1, 512)]


def test_a_case_that_needs_much_memory_is_shortened_and_keeps_its_alignment():
    ssd = registry.get("ssd")
    assert warm.shortened(ssd, CASE) == CASE
    long = replace(CASE, problem=replace(PROBLEM, seqlen=1 << 20))
    short = warm.shortened(ssd, long).problem
    assert 512 <= short.length < 1 << 20
    assert short.length & (short.length - 1) == 0
    assert replace(short, seqlen=1 << 20) == long.problem


def test_without_a_gpu_nothing_is_called(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(workload, "build", lambda *_, **__: pytest.fail("built"))
    warm.call_once(registry.get("ssd"), CASE)
