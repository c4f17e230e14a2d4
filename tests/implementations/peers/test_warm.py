"""What is compiled ahead of autotuning, and what autotuning chose for one case and another."""

import sys
from contextlib import suppress
from dataclasses import replace
from types import ModuleType

import pytest

from mambench.harness import registry
from mambench.harness.spec import Case, DType, Family, Level, Pass, Problem
from mambench.implementations.peers.warm import _tuners, compiling_only, tune_for

triton = pytest.importorskip("triton")
torch = pytest.importorskip("torch")


@triton.jit
def kernel(x_ptr, n, BLOCK: triton.language.constexpr):
    triton.language.store(x_ptr, BLOCK + n)


@triton.jit
def other_kernel(x_ptr, n, BLOCK: triton.language.constexpr):
    triton.language.static_assert(BLOCK < 64)
    triton.language.store(x_ptr, BLOCK - n)


CONFIGS = [triton.Config({"BLOCK": size}) for size in (16, 32, 64)]


def case(seqlen: int = 64, pass_: Pass = Pass.TRAINING) -> Case:
    problem = Problem(
        family=Family.SSD,
        level=Level.OP,
        batch=1,
        seqlen=seqlen,
        d_inner=64,
        d_state=16,
        headdim=64,
    )
    return Case(
        implementation="peer", variant="triton", problem=problem, pass_=pass_, dtype=DType.BF16
    )


class Hopper:
    """As much of a driver as compiling needs, which is no GPU; launching fails."""

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def tuners(monkeypatch, tmp_path):
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", Hopper())
    return [
        triton.heuristics({})(triton.autotune(CONFIGS, key=["n"])(function))
        for function in (kernel, other_kernel)
    ]


def step(tuners) -> None:
    for tuner in tuners:
        tuner[(1,)](torch.zeros(4), 48)


def test_shares_compile_each_configuration_once_and_launch_none(tuners, tmp_path):
    names = []
    for share in range(2):
        with compiling_only(share, 2) as compiled:
            step(tuners[:1])
            step(tuners)  # what is called again is the same worker's
        names += compiled
    assert sorted(names) == ["kernel"] * 6 + ["other_kernel"] * 2  # its last is refused
    assert names[:2] == names[2:4] == ["kernel"] * 2
    assert len(list(tmp_path.rglob("*.cubin"))) == 5
    assert tuners[0].fn.best_config is CONFIGS[0]
    for function in (kernel, other_kernel):
        function.device_caches.clear()
    with compiling_only():
        step(tuners)
    assert len(list(tmp_path.rglob("*.cubin"))) == 5  # found there


def test_no_share_compiles_none(tuners, tmp_path):
    with compiling_only(None) as compiled:
        step(tuners)
    assert compiled == []
    assert not list(tmp_path.rglob("*.cubin"))


def test_autotuning_is_as_before_afterwards(tuners):
    usual = triton.runtime.autotuner.Autotuner.run
    with suppress(ZeroDivisionError), compiling_only(None):
        assert triton.runtime.autotuner.Autotuner.run is not usual
        raise ZeroDivisionError
    assert triton.runtime.autotuner.Autotuner.run is usual


def test_each_size_has_its_own_choice_also_under_heuristics(monkeypatch: pytest.MonkeyPatch):
    package, inner, other = ModuleType("tuned"), ModuleType("tuned.ops"), ModuleType("tunedother")
    bare, kept = (triton.autotune(CONFIGS, key=[])(kernel) for _ in range(2))
    under = triton.autotune(CONFIGS, key=[], cache_results=True)(kernel)
    inner.bare, inner.again, inner.plain, inner.number = bare, bare, kernel, 3
    inner.under = triton.heuristics({"EVEN": lambda _: True})(under)
    other.kept = kept
    for module in (package, inner, other):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert tune_for("tuned", case()) == 2
    for tuner in (bare, under, kept):
        tuner.cache["sizes but for the length"] = CONFIGS[0]
    assert tune_for("tuned", case(seqlen=128)) == 2
    assert not bare.cache
    assert not under.cache
    assert not under.cache_results
    assert kept.cache
    tune_for("tuned", replace(case(), pass_=Pass.BACKWARD))
    assert bare.cache == under.cache == {"sizes but for the length": CONFIGS[0]}
    tune_for("tuned", replace(case(), dtype=DType.FP16))
    assert not bare.cache


@pytest.mark.filterwarnings("default")  # what a peer and the libraries it imports warn of is theirs
@pytest.mark.gpu
def test_what_the_shares_compile_is_what_a_tuned_step_needs(monkeypatch, tmp_path):
    """With two configurations a kernel: all of them would take minutes."""
    from mambench.harness import machine
    from mambench.implementations.workload import build

    peer, device = registry.get("mamba_ssm_ssd"), machine.detect("cuda")
    if missing := peer.variants(device)[0].unavailable:
        pytest.skip(missing)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    long = replace(case(seqlen=2048), implementation=peer.name)
    peer.begin_case(long)
    for tuner in _tuners("mamba_ssm"):
        monkeypatch.setattr(tuner, "configs", tuner.configs[:2])
    for share in range(2):
        peer.precompile_share(long, share, 2)
    for tuner in _tuners("mamba_ssm"):
        jitted = tuner.fn
        while not hasattr(jitted, "device_caches"):
            jitted = jitted.fn
        jitted.device_caches.clear()  # what this process compiled; a timed one has the disk only
    compiled = len(list(tmp_path.rglob("*.cubin")))
    assert compiled > 10
    build(long, peer, device, seed=0).prepare(Pass.TRAINING)()
    torch.cuda.synchronize()
    assert len(list(tmp_path.rglob("*.cubin"))) == compiled
    assert any(tuner.cache for tuner in _tuners("mamba_ssm"))
