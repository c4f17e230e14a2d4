"""Compiling ahead by a call: what is called, and that long cases are shortened."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mambench.harness import registry
from mambench.harness.spec import Case, Device, DeviceKind, DType, Family, Pass, Problem
from mambench.implementations import warm, workload
from mambench.implementations.peers.fla import FlaSimpleGla

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
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 80 << 30))
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


@pytest.mark.parametrize("name", ["mamba_ssm_ssd", "fla_simple_gla"])
def test_a_peer_is_called_as_it_is_timed_once_for_each_share(called, name):
    peer = registry.get(name)
    for share in range(peer.compile_shares):
        peer.precompile_share(CASE, share, peer.compile_shares)
    assert called == [CASE] * peer.compile_shares
    peer.precompile(CASE)
    assert called[peer.compile_shares :] == [CASE]


def test_only_one_share_lets_torch_compile_what_is_around_a_peer(called, monkeypatch):
    around = []
    monkeypatch.setattr(
        "mambench.implementations.peers.fla.compile_share",
        lambda implementation, case, share, shares: around.append(
            (implementation._compiled, share, shares)
        ),
    )
    for share in range(3):
        FlaSimpleGla().precompile_share(CASE, share, 3)
    assert around == [(True, None, 1), (False, 0, 2), (False, 1, 2)]


def test_a_state_update_is_compiled_by_one_worker(called):
    problem = replace(PROBLEM, seqlen=None)
    for share in range(3):
        case = replace(CASE, pass_=Pass.DECODE, problem=problem)
        registry.get("mamba_ssm_ssd").precompile_share(case, share, 3)
    assert len(called) == 1


def test_a_case_that_needs_much_memory_is_shortened_and_keeps_its_alignment():
    ssd = registry.get("ssd")
    assert warm.shortened(ssd, CASE) == CASE
    long = replace(CASE, problem=replace(PROBLEM, seqlen=1 << 20))
    short = warm.shortened(ssd, long).problem
    assert 512 <= short.length < 1 << 20
    assert short.length & (short.length - 1) == 0
    assert replace(short, seqlen=1 << 20) == long.problem


def test_on_a_large_gpu_longer_cases_are_called_as_they_are(called, monkeypatch):
    case = replace(CASE, pass_=Pass.TRAINING, problem=replace(PROBLEM, batch=8))
    peer = registry.get("mamba_ssm_ssd")
    peer.precompile(case)  # its heads a program depend on the length, and the kernels on them
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 16 << 30))
    peer.precompile(case)
    assert called == [case, replace(case, problem=replace(case.problem, seqlen=1024))]


def test_without_a_gpu_nothing_is_called(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(workload, "build", lambda *_, **__: pytest.fail("built"))
    warm.call_once(registry.get("ssd"), CASE)
