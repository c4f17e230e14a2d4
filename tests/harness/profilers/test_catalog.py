from pathlib import Path

import pytest

from mambench.harness import machine, registry, suite
from mambench.harness.counters import count as counters
from mambench.harness.errors import PluginError, UsageError
from mambench.harness.plan import make_plan
from mambench.harness.profilers import catalog
from mambench.harness.profilers.base import BatchProfiler, CaseProfiler
from mambench.harness.spec import METRICS, Device, DeviceKind

GPU = Device(kind=DeviceKind.CUDA, name="GPU", memory_bytes=1)
PLUGIN = str(Path(__file__).parents[2] / "faults" / "profilers.py")
SOUND = """
from mambench.harness.profilers.base import CaseProfiler, Measured
from mambench.harness.spec import Metric

class Mine(CaseProfiler):
    name = "NAME"
    summary = "mine"
    metrics = (Metric(tag="TAG", name="t", unit="1", description="d"),)

    def estimate_s(self, work):
        return 0.0

    def measure(self, context):
        return Measured()
"""


def test_names_are_the_classes_own_and_metrics_are_complete() -> None:
    found = catalog.load()
    assert list(found) == list(catalog.BUILT_IN)
    assert all(name == profiler.name for name, profiler in found.items())
    measured = {m.tag for profiler in found.values() for m in profiler.metrics}
    assert measured == {m.tag for m in METRICS if not m.modelled}
    for name, profiler in found.items():
        assert all(metric.measured_by == name for metric in profiler.metrics), name


def test_a_plugin_adds_profilers_and_need_not_hold_implementations() -> None:
    found = catalog.load([PLUGIN])
    assert {"outputs", "raises", "batched"} <= set(found)
    assert isinstance(found["batched"], BatchProfiler)
    assert list(registry.load([PLUGIN])) == list(registry.load())


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"NAME"', '"time"', "two profilers are named 'time'"),
        ("TAG", "time_s", "metric 'time_s' is already measured by 'time'"),
        ('"NAME"', '"not usable"', "'not usable' is not a usable name"),
        ('"NAME"', '"all"', "'all' is not a usable name"),
        ('    summary = "mine"\n', "", "lacks summary"),
    ],
)
def test_an_unsound_plugin_is_refused(tmp_path: Path, old: str, new: str, says: str) -> None:
    path = tmp_path / "plugin.py"
    assert old in SOUND
    path.write_text(SOUND.replace(old, new))
    with pytest.raises(PluginError, match=says):
        catalog.load([str(path)])


def test_an_unknown_measurement_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"unknown measurement 'enrgy'.* Did you mean 'energy'"):
        catalog.choose(["time", "enrgy"], catalog.load(), GPU)


def test_all_is_what_the_device_can_give() -> None:
    found = catalog.load([PLUGIN])
    on_cpu = catalog.choose(["memory", "all"], found, machine.cpu())
    assert on_cpu[:2] == ("memory", "time")
    assert not {"call_time", "host_time", "launches", "elsewhere"} & set(on_cpu)
    on_gpu = catalog.choose(["all"], found, GPU)
    assert {"time", "cold_time", "call_time", "host_time", "launches", "energy"} <= set(on_gpu)
    assert len(set(on_gpu)) == len(on_gpu)


def test_every_absence_has_a_reason_a_person_can_read() -> None:
    reasons = [p.missing(machine.cpu()) for p in catalog.load().values()]
    assert sum(reason is not None for reason in reasons) >= 3
    assert all(reason is None or len(reason) > 20 for reason in reasons)


H100 = Device(kind=DeviceKind.CUDA, name="G", compute_capability=(9, 0), memory_bytes=80 << 30)


@pytest.mark.parametrize("name", ["quick", "scan-vs-attention", "training"])
def test_everything_that_workers_measure_at_most_triples_the_time(name: str) -> None:
    # What the estimates promise: the samples' shares and the energy's region are chosen for it.
    asked = [n for n, profiler in catalog.load().items() if isinstance(profiler, CaseProfiler)]
    alone = make_plan(suite.find(name), H100, measure=["time"])
    everything = make_plan(suite.find(name), H100, measure=asked)
    assert len(asked) >= 7
    assert everything.estimate_s <= 3 * alone.estimate_s


@pytest.mark.parametrize("name", ["quick", "scan-vs-attention"])
def test_everything_with_counters_at_most_triples_the_time_a_start_up_aside(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counters, "missing", lambda device: None)
    alone = make_plan(suite.find(name), H100, measure=["time"])
    everything = make_plan(suite.find(name), H100, measure=list(catalog.load()))
    assert everything.measure_s["traffic"] > 0.3 * len(everything.runnable)
    assert everything.estimate_s - everything.start_s <= 3 * alone.estimate_s
