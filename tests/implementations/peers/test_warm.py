"""What autotuning chose for one case is not what the next one is timed with."""

import sys
from types import ModuleType

import pytest

from mambench.implementations.peers.warm import forget_tuning

triton = pytest.importorskip("triton")


@triton.jit
def kernel(x_ptr, BLOCK: triton.language.constexpr):
    triton.language.store(x_ptr, BLOCK)


CONFIGS = [triton.Config({"BLOCK": size}) for size in (16, 32)]


def test_what_was_chosen_is_forgotten_also_under_heuristics(monkeypatch: pytest.MonkeyPatch):
    if not hasattr(triton.runtime.autotuner, "Autotuner"):
        pytest.skip("this Triton has no autotuner of that name")
    package, inner, other = ModuleType("tuned"), ModuleType("tuned.ops"), ModuleType("tunedother")
    bare, kept = (triton.autotune(CONFIGS, key=[])(kernel) for _ in range(2))
    under = triton.autotune(CONFIGS, key=[], cache_results=True)(kernel)
    inner.bare, inner.again, inner.plain, inner.number = bare, bare, kernel, 3
    inner.under = triton.heuristics({"EVEN": lambda _: True})(under)
    other.kept = kept
    for module in (package, inner, other):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for tuner in (bare, under, kept):
        tuner.cache["sizes but for the length"] = CONFIGS[0]
    assert forget_tuning("tuned") == 2
    assert not bare.cache
    assert not under.cache
    assert not under.cache_results
    assert kept.cache
