"""The fold of observations into results, on data with known answers and on planted wrong data."""

import math
from dataclasses import replace

import numpy as np
import pytest

from mambench.harness.analysis.folding import fold
from mambench.harness.analysis.results import QUANTILES, Result, columns
from mambench.harness.records import Observation
from mambench.harness.spec import Case, DType, Family, Outcome, Pass, Problem

CASE = Case(
    implementation="ssd",
    variant="triton",
    problem=Problem(family=Family.SSD, batch=2, seqlen=512, d_inner=64, d_state=16, headdim=32),
    pass_=Pass.FORWARD,
    dtype=DType.FP32,
)
SAMPLES = (0.010, 0.012, 0.011, 0.013, 0.009, 0.030, 0.011)


def observation(second: int = 0, **changes) -> Observation:
    values = {"time_s": 0.011, "model_flop": 1000, "compulsory_bytes": 2000, "first_call_s": 0.5}
    base = Observation(
        case=CASE,
        measurement="time",
        outcome=Outcome.OK,
        observation_id="x",
        started_at=f"2026-01-01T00:00:{second:02d}Z",
        duration_s=1.0,
        method="perf_counter",
        values=values,
        samples_s=SAMPLES,
        details={"converged": True},
    )
    return replace(base, **changes)


def failed(outcome: Outcome, second: int = 0, **changes) -> Observation:
    changes = {"reason": f"it was {outcome}", "values": {}, "samples_s": None} | changes
    return observation(second, outcome=outcome, **changes)


def fold_one(*observations: Observation) -> Result:
    (result,) = fold([("run", o) for o in observations], source="s")
    return result


def test_one_round_keeps_the_records_numbers():
    result = fold_one(
        observation(),
        observation(
            1, measurement="memory", samples_s=None, values={"peak_memory_bytes": 4096}, details={}
        ),
    )
    assert result.outcome is Outcome.OK
    assert result.time_s == 0.011
    assert result.tokens_per_s == 2 * 512 / 0.011
    assert result.flop_per_s == 1000 / 0.011
    assert result.modelled_bytes_per_s == 2000 / 0.011
    assert result.peak_memory_bytes == 4096
    assert result.first_call_s == 0.5
    assert result.converged is True
    assert result.quantiles_s == pytest.approx(np.quantile(SAMPLES, QUANTILES))
    assert result.missing["call_time_s"] == "not measured"
    assert result.flags == ()


def test_survives_the_line_format():
    line = observation().to_line()
    assert fold_one(Observation.from_line(line)) == fold_one(observation())


def test_of_a_rounds_observations_the_last_line_counts():
    assert fold_one(failed(Outcome.OOM), observation(1)).outcome is Outcome.OK
    result = fold_one(observation(), failed(Outcome.CRASHED, 1))
    assert (result.outcome, result.time_s) == (Outcome.CRASHED, None)
    # A clock that was set back between the two does not matter.
    assert fold_one(failed(Outcome.OOM, 2), observation(1)).outcome is Outcome.OK


def test_rounds_give_the_median_of_medians_and_its_interval():
    medians = [0.010, 0.011, 0.012, 0.013, 0.020, 0.011]
    rounds = [
        observation(i, round=i, values={"time_s": m}, samples_s=(m,) * 9)
        for i, m in enumerate(medians)
    ]
    result = fold_one(*rounds)
    assert result.time_s == pytest.approx(0.0115)
    assert result.interval is not None
    assert result.interval.over == "rounds"
    assert (result.interval.low, result.interval.high) == (0.010, 0.020)
    assert result.interval.coverage == pytest.approx(1 - 2 / 64)
    assert result.rounds == 6
    assert len(result.samples_s) == 54


def test_two_rounds_show_at_least_both_intervals():
    slow = tuple(2 * s for s in SAMPLES)
    result = fold_one(
        observation(), observation(1, round=1, samples_s=slow, values={"time_s": 0.022})
    )
    assert result.time_s == pytest.approx(0.0165)
    assert result.interval is not None
    assert result.interval.over == "hull"
    assert result.interval.low == min(SAMPLES)
    assert result.interval.high == 2 * max(SAMPLES)


def test_a_round_that_failed_makes_the_case_fail():
    result = fold_one(observation(), failed(Outcome.CRASHED, 1, round=1), observation(2, round=2))
    assert result.outcome is Outcome.CRASHED
    assert result.reason == "in 1 of 3 rounds: it was crashed"
    assert result.time_s is None
    assert result.interval is None


def test_wrong_in_any_measurement_condemns_the_case():
    result = fold_one(observation(), failed(Outcome.WRONG, measurement="memory"))
    assert result.outcome is Outcome.WRONG
    assert result.time_s is None
    assert columns([result])["time_s"] == [None]
    assert columns([result])["tokens_per_s"] == [None]
    assert result.missing["time_s"] == "the case ended as wrong"
    assert result.model_flop == 1000, "what is modelled does not depend on the outcome"


def test_failed_memory_leaves_only_memory_missing():
    result = fold_one(observation(), failed(Outcome.TIMEOUT, measurement="memory"))
    assert result.outcome is Outcome.OK
    assert result.time_s == 0.011
    assert result.missing["peak_memory_bytes"] == "memory ended as timeout: it was timeout"


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -1.0, None])
def test_a_planted_impossible_time_is_never_a_number(value):
    result = fold_one(observation(values={"time_s": value}, samples_s=None))
    assert result.time_s is None
    assert result.tokens_per_s is None
    assert "finite" in result.missing["time_s"]


def test_a_planted_time_that_is_not_the_samples_median_is_flagged():
    assert fold_one(observation(values={"time_s": 0.005})).flags != ()


def test_an_unconverged_measurement_is_flagged():
    result = fold_one(observation(details={"convergence": {"converged": False}}))
    assert result.converged is False
    assert "limit" in result.flags[0]


def test_a_throttled_measurement_is_flagged():
    result = fold_one(observation(details={"throttled": ["power_cap"]}))
    assert result.flags == ("the device was slowed down: power_cap",)


def test_a_time_that_holds_launch_gaps_is_flagged() -> None:
    details = {"launch_gaps": True, "not_captured": "it launches for over 6 s"}
    (flag,) = fold_one(observation(method="events", details=details)).flags
    assert "gaps between launches" in flag
    assert "over 6 s" in flag
    none = {**details, "launch_gaps": False}
    assert fold_one(observation(method="events", details=none)).flags == ()
    assert fold_one(observation(method="cuda-graph", details={})).flags == ()


def test_memory_that_could_not_be_read_says_why():
    memory = observation(measurement="memory", values={}, details={"missing": "no meter here"})
    assert fold_one(observation(), memory).missing["peak_memory_bytes"] == "no meter here"


def test_columns_hold_the_results_numbers():
    result = fold_one(observation())
    table = columns([result], {"s": "Fixture GPU"})
    assert table["time_s"] == [0.011]
    assert table["device"] == ["Fixture GPU"]
    assert table["case_id"] == [CASE.case_id]
    assert table["call_time_s"] == [None]
