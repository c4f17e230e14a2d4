"""The profiler `traffic`: what the counters found, as measurements of cases."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mambench.harness.counters import count as counters
from mambench.harness.counters.count import Counted, Request
from mambench.harness.profilers import catalog
from mambench.harness.profilers.base import Batch, Failed, Measured, Work
from mambench.harness.profilers.traffic import Traffic
from mambench.harness.spec import Case, Device, DeviceKind, Outcome, Settings

_SPEC = importlib.util.spec_from_file_location(
    "planning", Path(__file__).parent.parent / "faults" / "planning.py"
)
assert _SPEC is not None
assert _SPEC.loader is not None
planning = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(planning)

GPU = Device(kind=DeviceKind.CUDA, name="g", compute_capability=(9, 0), memory_bytes=1 << 36)
CPU = Device(kind=DeviceKind.CPU, name="c", memory_bytes=1 << 36)
CASES = tuple(planning.case(name) for name in ("good", "raises", "refuses"))


def measure(monkeypatch: pytest.MonkeyPatch, *found: Counted) -> list[Measured | Failed]:
    asked: dict[str, Any] = {}

    def count(
        cases: tuple[Case, ...], request: Request, *, launches: Any, on_begin: Any
    ) -> Iterator[tuple[Case, Counted]]:
        asked.update(request=request, launches=[launches(case) for case in cases])
        for case, counted in zip(cases, found, strict=True):
            on_begin(case)
            yield case, counted

    monkeypatch.setattr(counters, "count_cases", count)
    begun: list[Case] = []
    batch = Batch(
        cases=CASES,
        times_s={},
        device=GPU,
        settings=Settings(seed=7, time_limit_s=9),
        threads=3,
        plugins=(str(planning.PLUGIN),),
        sys_path=("a",),
        note=lambda _: None,
        on_case=begun.append,
    )
    pairs = list(Traffic().measure_batch(batch))
    assert [case for case, _ in pairs] == list(CASES) == begun
    assert (asked["request"].seed, asked["request"].time_limit_s) == (7, 9)
    assert asked["launches"] == [10, 10, 10]  # the default of an implementation
    return [result for _, result in pairs]


def test_a_lack_is_missing_and_a_crash_is_a_failure(monkeypatch: pytest.MonkeyPatch):
    good, lacking, crashed = measure(
        monkeypatch,
        Counted(values={"dram_bytes": 5}, details={"launches": 1}),
        Counted(outcome=Outcome.UNAVAILABLE, reason="ERR_NVGPUCTRPERM"),
        Counted(outcome=Outcome.CRASHED, reason="it died"),
    )
    assert isinstance(good, Measured)
    assert (good.values, good.method) == ({"dram_bytes": 5}, "ncu-kernel-replay")
    assert isinstance(lacking, Measured)
    assert lacking.values == {}
    assert lacking.details["missing"] == "ERR_NVGPUCTRPERM"
    assert isinstance(crashed, Failed)
    assert (crashed.outcome, crashed.reason) == (Outcome.CRASHED, "it died")


def test_what_a_time_budget_leaves_out_is_tried_again(monkeypatch: pytest.MonkeyPatch):
    over = Counted(outcome=Outcome.SKIPPED, reason=counters.OVER)
    many = Counted(outcome=Outcome.SKIPPED, reason="about 10 launches")
    cut, many_launches, good = measure(monkeypatch, over, many, Counted(values={"dram_bytes": 5}))
    assert isinstance(cut, Failed)  # `skipped` is not finished
    assert cut.outcome is Outcome.SKIPPED
    assert "--time-budget" in cut.reason
    assert isinstance(many_launches, Measured)
    assert isinstance(good, Measured)


def test_it_is_switched_on_by_name_and_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch):
    profiler = catalog.load()["traffic"]
    tags = {metric.tag for metric in profiler.metrics}
    assert tags == {"dram_bytes", "dram_read_bytes", "dram_write_bytes", "traffic_ratio"}
    assert "cuda only" in (profiler.missing(CPU) or "")
    monkeypatch.setenv("PATH", "")
    assert "ncu" in (profiler.missing(GPU) or "")


def test_its_cost_is_one_start_and_a_little_a_case():
    work = Work(case=CASES[0], device=GPU, settings=Settings(), execution_s=1e-3, launches=10)
    assert 0 < Traffic().estimate_s(work) < Traffic.start_s / 5
