"""How cases are divided among the workers that compile ahead."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from mambench.harness import precompile
from mambench.harness.spec import Pass

_PATH = Path(__file__).parent.parent / "faults" / "planning.py"
_SPEC = importlib.util.spec_from_file_location("planning_of_precompile", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
planning = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(planning)


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


def test_only_what_compiles_gets_a_worker() -> None:
    assert precompile._compiles("ssd")
    assert not precompile._compiles("flash_attention")
    assert precompile._compiles("known to a worker's plugin only")
