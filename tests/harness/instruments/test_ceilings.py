"""Ceilings: kept per machine, compared with cases, measured on a processor with tiny sizes."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from mambench.harness import machine
from mambench.harness.errors import MeasurementError
from mambench.harness.instruments import ceilings, datasheets
from mambench.harness.instruments.ceilings import Ceiling, Ceilings
from mambench.harness.profilers import speed_of_light
from mambench.harness.profilers.base import Batch
from mambench.harness.spec import (
    Case,
    Device,
    DeviceKind,
    DType,
    Family,
    Pass,
    Problem,
    Settings,
)
from mambench.implementations.cost import case_cost
from mambench.implementations.exponentials import case_exponentials

TINY = {"copy_bytes": 1 << 16, "matrix": 64, "exp": 1 << 8, "seconds": 0.002}
SCAN = Problem(family=Family.S6, batch=1, seqlen=64, d_inner=32, d_state=16, ngroups=1)
SDPA = Problem(family=Family.ATTENTION, batch=1, seqlen=64, d_inner=32, headdim=16)


def case(problem: Problem, dtype: DType = DType.BF16) -> Case:
    return Case(implementation="x", variant="x", problem=problem, pass_=Pass.FORWARD, dtype=dtype)


def made(**values: float | None) -> Ceilings:
    """Return ceilings; names with _ for -."""
    found = {
        name.replace("_", "-"): Ceiling(
            name=name, unit="1", value=value, reason=None if value else "planted"
        )
        for name, value in values.items()
    }
    return Ceilings(
        device="d", fingerprint="f", measured_at="t", ceilings=found, details={"threads": 1}
    )


FAST = {"copy": 1e30, "exp": 1e30, "vector": 1e30, "matrix_bf16": 1e30, "matrix_fp32": 1e30}


@pytest.mark.parametrize(
    ("problem", "name", "work"),
    [
        (SCAN, "copy", lambda c: case_cost(c).compulsory_bytes),
        (SCAN, "exp", case_exponentials),
        (SCAN, "vector", lambda c: case_cost(c).model_flop),  # not the matrix units' rate
        (SDPA, "matrix_bf16", lambda c: case_cost(c).model_flop),
        (SDPA, "exp", case_exponentials),
    ],
)
def test_the_slowest_ceiling_binds(problem: Problem, name: str, work: Any):
    bound = ceilings.bound(case(problem), made(**{**FAST, name: 10.0}))
    assert not isinstance(bound, str)
    assert bound.ceiling == name.replace("_", "-")
    assert bound.time_s == pytest.approx(work(case(problem)) / 10)
    assert len(bound.times_s) == 3


def test_fp32_products_are_bound_by_the_faster_of_both_units():
    wanted = case(SDPA, DType.FP32)
    rates: dict[str, float | None] = {**FAST, "matrix_fp32": 5.0}
    for tf32, name in ((None, "matrix-fp32"), (2.0, "matrix-fp32"), (9.0, "matrix-tf32")):
        bound = ceilings.bound(wanted, made(**rates, matrix_tf32=tf32))
        assert not isinstance(bound, str)
        assert bound.ceiling == name


def test_a_missing_ceiling_is_no_bound_and_says_why():
    reason = ceilings.bound(case(SCAN), made(**{**FAST, "exp": None}))
    assert reason == "the ceiling 'exp' is missing: planted"
    assert "was not measured" in str(ceilings.bound(case(SDPA, DType.FP64), made(**FAST)))


def test_the_share_is_in_the_record_with_what_binds():
    found = made(**{**FAST, "copy": 100.0})
    least_s = case_cost(case(SCAN)).compulsory_bytes / 100
    measured = speed_of_light.judge(case(SCAN), 2 * least_s, found)
    assert measured.values == {"sol_frac": pytest.approx(0.5)}
    assert measured.details["ceiling"] == "copy"
    assert measured.details["ceilings"]["copy"] == 100.0
    for time_s in (None, 0.0):  # a time that is not known is no reason for an infinite share
        lacking = speed_of_light.judge(case(SCAN), time_s, found)
        assert lacking.values == {}
        assert "no time" in lacking.details["missing"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mambench"


def test_ceilings_are_kept_for_the_machine_that_they_were_measured_on(cache: Path):
    device = machine.cpu()
    assert ceilings.load(device, 1) is None
    found = replace(made(**FAST), fingerprint=ceilings.fingerprint(device, 1))
    assert ceilings.save(found, device) is None
    assert ceilings.load(device, 1) == found
    assert ceilings.load(device, 2) is None  # other threads are another machine
    other = replace(device, name="another processor")
    assert ceilings.load(other, 1) is None
    (path,) = cache.iterdir()
    path.write_text(path.read_text()[:-20])  # torn
    assert ceilings.load(device, 1) is None
    path.write_text(json.dumps({**found.to_dict(), "schema": 99}))
    assert ceilings.load(device, 1) is None


def test_another_driver_or_power_limit_is_another_machine(monkeypatch: pytest.MonkeyPatch):
    gpu = Device(kind=DeviceKind.CUDA, name="g", compute_capability=(9, 0), memory_bytes=1)
    state = {"uuid": "GPU-1", "driver": "580", "power_limit_w": 700.0}
    seen: set[str] = set()
    for changes in ({}, {"driver": "590"}, {"power_limit_w": 500.0}, {"uuid": "GPU-2"}):
        monkeypatch.setattr(machine, "gpu_environment", lambda device, c=changes: {**state, **c})
        seen.add(ceilings.fingerprint(gpu, 1))
    assert len(seen) == 4


def test_the_table_shows_what_is_missing_and_what_is_stated():
    found = made(copy=3.0e12, exp=None)
    stated = replace(found.ceilings["copy"], datasheet=4.0e12, source="a document", unit="bytes/s")
    text = replace(found, ceilings={**found.ceilings, "copy": stated}).text()
    assert "3 Tbytes/s" in text
    assert "75 %" in text
    assert "none" in text
    assert "planted" in text
    assert text.endswith("datasheet: a document")


def test_a_processor_is_measured_in_a_process_of_its_own():
    found = ceilings.measure(machine.cpu(), 1, sizes=TINY)
    for name in ("copy", "matrix-fp32", "matrix-fp64", "vector", "exp", "launch-eager"):
        value = found.value(name)
        assert value is not None, name
        assert value > 0
    for name in ("matrix-tf32", "launch-graph"):
        assert found.value(name) is None
        assert found.ceilings[name].reason
    copy = found.details["copy"]
    assert len(copy["samples_s"]) >= 5
    assert copy["statistic"] == "fastest 10%"
    fastest = max(1, round(0.1 * len(copy["samples_s"])))
    taken_s = median(sorted(copy["samples_s"])[:fastest])
    assert found.value("copy") == pytest.approx(2 * copy["bytes_each"] / taken_s)
    assert found.ceilings["copy"].unit == "bytes/s"
    assert found.ceilings["launch-eager"].unit == "s"
    assert found.ceilings["copy"].datasheet is None  # nothing is known of this processor
    assert Ceilings.from_dict(json.loads(json.dumps(found.to_dict()))).ceilings == found.ceilings


def test_samples_that_waited_for_the_scheduler_are_no_ceiling():
    calibration = pytest.importorskip("mambench.harness.instruments.calibration")
    samples_s = (8e-3,) * 15 + (2e-5, 2.2e-5, 2.1e-5, 2e-5, 3e-5)
    assert calibration.Rate(1e5, samples_s, 0.1).per_s == pytest.approx(5e9)
    assert calibration.Rate(1e5, samples_s).per_s == pytest.approx(1e5 / 8e-3)  # a GPU's


def test_a_calibrated_machine_is_not_planned_to_be_calibrated(monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []

    def load(device: Device, threads: int) -> object:
        asked.append(threads)
        return kept

    monkeypatch.setattr(ceilings, "load", load)
    kept = None
    settings = Settings(threads=3)
    assert (
        speed_of_light.SpeedOfLight().start_estimate_s(machine.cpu(), settings)
        == ceilings.CALIBRATION_S
    )
    kept = object()
    assert speed_of_light.SpeedOfLight().start_estimate_s(machine.cpu(), settings) == 0
    assert asked == [3, 3]


def test_a_calibration_that_fails_says_so(monkeypatch: pytest.MonkeyPatch):
    broken = replace(machine.cpu(), kind=DeviceKind.CUDA, index=97)
    with pytest.raises(MeasurementError, match="calibration ended with 1: "):
        ceilings.measure(broken, 1, sizes=TINY)  # torch has no CUDA, or there is no device
    monkeypatch.setattr(ceilings, "LIMIT_S", 0.01)
    with pytest.raises(MeasurementError, match=r"longer than 0\.01 s"):
        ceilings.measure(machine.cpu(), 1, sizes=TINY)


def test_the_profiler_calibrates_once(cache: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []
    device = machine.cpu()

    def measure(where: Device, threads: int) -> Ceilings:
        calls.append(where.name)
        return replace(made(**FAST), fingerprint=ceilings.fingerprint(where, threads))

    monkeypatch.setattr(ceilings, "measure", measure)
    wanted = case(SCAN)
    notes: list[str] = []
    batch = Batch(
        cases=(wanted,),
        times_s={wanted.case_id: 1.0},
        device=device,
        settings=Settings(),
        threads=1,
        plugins=(),
        sys_path=(),
        note=notes.append,
        on_case=lambda _: None,
    )
    for _ in range(2):
        ((found_case, found),) = speed_of_light.SpeedOfLight().measure_batch(batch)
        assert found_case == wanted
        assert found.values["sol_frac"] > 0
    assert len(calls) == len(notes) == 1


def test_a_failed_calibration_is_a_reason_for_each_case(
    cache: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(where: Device, threads: int) -> Ceilings:
        raise MeasurementError("planted")

    monkeypatch.setattr(ceilings, "measure", fail)
    wanted = case(SCAN)
    batch = Batch(
        cases=(wanted,),
        times_s={wanted.case_id: 1.0},
        device=machine.cpu(),
        settings=Settings(),
        threads=1,
        plugins=(),
        sys_path=(),
        note=lambda _: None,
        on_case=lambda _: None,
    )
    ((_, found),) = speed_of_light.SpeedOfLight().measure_batch(batch)
    assert found.values == {}
    assert found.details["missing"] == "planted"


@pytest.mark.parametrize(
    ("name", "bytes_per_s"),
    [
        ("NVIDIA H100 80GB HBM3", 3.35e12),
        ("NVIDIA H100 PCIe", 2.0e12),
        ("NVIDIA H200", 4.8e12),
        ("NVIDIA A100-SXM4-40GB", 1.555e12),
        ("NVIDIA GeForce RTX 4090", 1.008e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),  # another chip of the same name
        ("NVIDIA H100 80GB HBM2e", None),
        ("GPU of tomorrow", None),
    ],
)
def test_a_datasheet_is_of_that_very_gpu_or_none(name: str, bytes_per_s: float | None):
    sheet = datasheets.find(name)
    assert (sheet and sheet.memory_bytes_per_s) == bytes_per_s
    if sheet is not None:
        assert sheet.source


def test_datasheet_values_stand_beside_measured_ones(monkeypatch: pytest.MonkeyPatch):
    gpu = Device(
        kind=DeviceKind.CUDA,
        name="NVIDIA H100 80GB HBM3",
        compute_capability=(9, 0),
        memory_bytes=1,
    )
    state = {"clocks_hz": {"sm": {"max": 2.0e9}}}
    monkeypatch.setattr(machine, "gpu_environment", lambda device: state)
    measured = {
        "ceilings": {
            "copy": {"value": 3e12, "method": "m"},
            "exp": {"value": None, "reason": "planted"},
            "matrix-bf16": {"value": 7e14},
        },
        "sm_count": 100,
        "measured_at": "now",
        "telemetry": {},
    }
    found = ceilings._with_datasheet(gpu, 1, measured).ceilings
    assert (found["copy"].value, found["copy"].datasheet) == (3e12, 3.35e12)
    assert found["exp"].value is None  # a stated value never takes a measured one's place
    assert found["exp"].datasheet == 16 * 100 * 2.0e9
    assert found["matrix-bf16"].unit == "FLOP/s"
