"""What a ledger says of earlier observations, and what it writes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mambench.harness import suite
from mambench.harness.ledger import Ledger
from mambench.harness.plan import Plan, make_plan
from mambench.harness.profilers.base import DECIDING
from mambench.harness.spec import Case, Device, DeviceKind, Outcome
from mambench.harness.store import MANIFEST_KEYS, RunFolder
from mambench.harness.workers.protocol import Done, Finding

CPU = Device(kind=DeviceKind.CPU, name="a processor", memory_bytes=16 << 30)
FAILED = Done(outcome=Outcome.ERROR, reason="it broke", details={"phase": "gate"})


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(suite.find("custom"), CPU, implementations=["ssd"], measure=["time", "memory"])


@pytest.fixture
def case(plan: Plan) -> Case:
    return plan.cases[0].case


@pytest.fixture
def folder(tmp_path: Path):
    empty: dict[str, Any] = {
        key: {str: "x", int: 1, list: [], dict: {}}[kind] for key, kind in MANIFEST_KEYS.items()
    }
    with RunFolder.create(tmp_path / "run", empty) as opened:
        yield opened


def finding(measurement: str, **values: float) -> Finding:
    return Finding(
        measurement=measurement,
        started_at="2026-01-01",
        duration_s=1.0,
        method="m",
        values=values,
        samples_s=None,
        details={},
    )


def test_what_a_case_must_do_stands_beside_what_was_found(plan, case, folder):
    ledger = Ledger(plan, folder, 0)
    ledger.finding(case, finding(DECIDING, time_s=0.25))
    (written,) = ledger.observed
    assert written.values["time_s"] == 0.25
    assert written.values["model_flop"] > 0
    assert ledger.value(case, "time_s") == 0.25
    assert ledger.value(case, "first_call_s") == 0
    ledger.begin()
    assert ledger.observed == ()


@pytest.mark.parametrize("phase", ["gate", DECIDING, "memory"])
def test_a_failure_is_the_cases_unless_a_measurement_failed_alone(plan, case, folder, phase):
    ledger = Ledger(plan, folder, 0)
    done = replace(FAILED, details={"phase": phase})
    ledger.failure(case, "memory", done)
    assert ledger.earlier_failure(case, (DECIDING,)) == (None if phase == "memory" else done)
    assert ledger.earlier_failure(case, (DECIDING, "memory")) is None  # which is measured again
    assert Ledger(plan, folder, 1).earlier_failure(case, (DECIDING,)) is None  # of another round


def test_a_failure_is_finished_unless_it_is_to_be_tried_again(plan, case, folder):
    ledger = Ledger(plan, folder, 0)
    ledger.failure(case, DECIDING, FAILED)
    ledger.finding(case, finding("memory", peak_memory_bytes=1))
    both = {ledger.key(case, DECIDING), ledger.key(case, "memory")}
    assert ledger.finished(retry_failed=False) == both
    assert ledger.finished(retry_failed=True) == {ledger.key(case, "memory")}


def test_what_is_decided_is_recorded_once_for_every_measurement(plan, folder):
    ledger = Ledger(plan, folder, 0)
    decided = [replace(plan.cases[0], outcome=Outcome.UNSUPPORTED, reason="too wide")]
    for _ in range(2):
        ledger.record_decided(decided)
    assert [(o.measurement, o.reason) for o in ledger.observed] == [
        (measurement, "too wide") for measurement in plan.settings.measurements
    ]
    ledger.record_decided([replace(decided[0], reason="still too wide")])
    assert len(ledger.observed) == 2 * len(plan.settings.measurements)


def test_an_identity_does_not_depend_on_limits(plan, case, folder):
    slower = replace(plan, settings=replace(plan.settings, time_limit_s=99.0))
    other = replace(plan, settings=replace(plan.settings, seed=plan.settings.seed + 1))
    for made in (plan, slower, other):
        Ledger(made, folder, 0).failure(case, DECIDING, FAILED)
    first, second, third = folder.observations()
    assert first.observation_id == second.observation_id != third.observation_id
