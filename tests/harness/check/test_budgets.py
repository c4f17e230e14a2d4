"""Promises with a limit of their own: read with line numbers, judged by intervals."""

from dataclasses import replace
from pathlib import Path

import pytest

from mambench.harness.analysis.intervals import Interval
from mambench.harness.analysis.results import Analysis, Result
from mambench.harness.analysis.runs import Source
from mambench.harness.check import budgets
from mambench.harness.errors import SuiteError
from mambench.harness.spec import Case, DeviceKind, DType, Family, Outcome, Pass, Problem
from mambench.harness.verdict import Verdict

SEQLEN = 4096
PROBLEM = Problem(family=Family.SSD, batch=1, seqlen=SEQLEN, d_inner=64, headdim=32, d_state=16)


def result(name: str, time_s: float, *, spread: float = 0.01, rounds: int = 7, **more) -> Result:
    case = Case(
        implementation=name, variant="v", problem=PROBLEM, pass_=Pass.FORWARD, dtype=DType.BF16
    )
    values = tuple(time_s * (1 + spread * (i / 5 - 1)) for i in range(11))
    return Result(
        source="s", run_id="r", case=case, outcome=Outcome.OK, time_s=time_s, rounds=rounds,
        interval=Interval(
            low=time_s * (1 - spread), high=time_s * (1 + spread), coverage=0.95, over="rounds"
        ),
        samples_s=values, round_medians_s=values if rounds > 1 else (), **more,
    )  # fmt: skip


def found(*results: Result, device: str = "NVIDIA H100") -> Analysis:
    source = Source(key="s", label="here", kind=DeviceKind.CUDA, device_name=device, runs=())
    return Analysis(sources=(source,), results=results)


def read(tmp_path: Path, text: str) -> tuple[budgets.Budget, ...]:
    path = tmp_path / "budgets.yaml"
    path.write_text(text)
    return budgets.read(path)


def one(tmp_path: Path, *lines: str) -> tuple[budgets.Budget, ...]:
    head = "budgets:\n  - name: promise\n    cases: [implementation=ssd]\n"
    return read(tmp_path, head + "".join(f"    {line}\n" for line in lines))


def verdicts(asked, *results, **where):
    return [p.verdict for p in budgets.judge(asked, found(*results, **where))]


@pytest.mark.parametrize(
    ("time_s", "verdict"),
    [(0.9e-3, Verdict.SAME), (1.005e-3, Verdict.INCONCLUSIVE), (1.1e-3, Verdict.REGRESSED)],
)
def test_an_absolute_limit_is_judged_by_the_interval(tmp_path, time_s, verdict):
    asked = one(tmp_path, "at_most: 1.0e-3")
    assert verdicts(asked, result("ssd", time_s)) == [verdict]


def test_a_single_process_is_given_less_credit(tmp_path):
    asked = one(tmp_path, "at_most: 1.0e-3")
    assert verdicts(asked, result("ssd", 1.02e-3)) == [Verdict.REGRESSED]
    assert verdicts(asked, result("ssd", 1.02e-3, rounds=1)) == [Verdict.INCONCLUSIVE]


@pytest.mark.parametrize(
    ("rate", "verdict"),
    [(1.1, Verdict.SAME), (1.0, Verdict.INCONCLUSIVE), (0.9, Verdict.REGRESSED)],
)
def test_at_least_is_the_other_way_round(tmp_path, rate, verdict):
    asked = one(tmp_path, "metric: tokens_per_s", "at_least: 4e6")
    assert verdicts(asked, result("ssd", SEQLEN / (4e6 * rate))) == [verdict]


@pytest.mark.parametrize(
    ("theirs", "verdict"),
    [(2.2e-3, Verdict.SAME), (2.0e-3, Verdict.INCONCLUSIVE), (1.8e-3, Verdict.REGRESSED)],
)
def test_a_relative_limit_compares_with_the_same_problem(tmp_path, theirs, verdict):
    asked = one(tmp_path, "at_most: 0.5", "of: [implementation=mamba_ssm]")
    assert verdicts(asked, result("ssd", 1e-3), result("mamba_ssm", theirs)) == [verdict]


def test_a_relative_rate_is_the_inverse_of_the_times(tmp_path):
    asked = one(tmp_path, "metric: tokens_per_s", "at_least: 2", "of: [implementation=mamba_ssm]")
    assert verdicts(asked, result("ssd", 1e-3), result("mamba_ssm", 2.2e-3)) == [Verdict.SAME]
    assert verdicts(asked, result("ssd", 1e-3), result("mamba_ssm", 1.8e-3)) == [Verdict.REGRESSED]


def test_of_several_others_the_hardest_counts(tmp_path):
    asked = one(tmp_path, "at_most: 0.5", 'of: ["implementation=peer*"]')
    slow, fast = result("peer_a", 4e-3), result("peer_b", 1.5e-3)
    assert verdicts(asked, result("ssd", 1e-3), slow, fast) == [Verdict.REGRESSED]


def test_memory_needs_no_interval(tmp_path):
    asked = one(tmp_path, "metric: peak_memory_bytes", "at_most: 1000")
    assert verdicts(asked, result("ssd", 1.0, peak_memory_bytes=1000)) == [Verdict.SAME]
    assert verdicts(asked, result("ssd", 1.0, peak_memory_bytes=1001)) == [Verdict.REGRESSED]


@pytest.mark.parametrize("metric", ["call_time_s", "energy_j", "sol_frac"])
@pytest.mark.parametrize(
    ("value", "verdict"),
    [(0.97, Verdict.SAME), (1.01, Verdict.INCONCLUSIVE), (1.03, Verdict.REGRESSED)],
)
def test_what_varies_and_has_no_interval_is_given_what_processes_differ_by(
    tmp_path, metric, value, verdict
):
    asked = one(tmp_path, f"metric: {metric}", "at_most: 1.0")
    measured = replace(result("ssd", 1e-3), values={metric: value})
    if metric == "call_time_s":
        measured = replace(measured, values={}, call_time_s=value)
    assert verdicts(asked, measured) == [verdict]


def test_what_cannot_be_judged_says_so(tmp_path):
    asked = one(tmp_path, "at_most: 0.5", "of: [implementation=mamba_ssm]")
    good = result("ssd", 1e-3)
    assert verdicts(asked) == [Verdict.MISSING]
    assert verdicts(asked, good) == [Verdict.MISSING]
    bad = replace(good, outcome=Outcome.OOM, reason="too large", time_s=None, interval=None)
    assert verdicts(asked, bad, result("mamba_ssm", 2e-3)) == [Verdict.FAILED]
    absolute = one(tmp_path, "at_most: 1")
    assert verdicts(absolute, replace(good, time_s=None, interval=None)) == [Verdict.MISSING]
    assert verdicts(absolute, replace(good, interval=None)) == [Verdict.INCONCLUSIVE]


def test_a_budget_of_another_device_is_left_out(tmp_path):
    asked = one(tmp_path, "at_most: 1.0e-6", 'device: "*H100*"')
    assert verdicts(asked, result("ssd", 1.0), device="NVIDIA A100") == []
    assert verdicts(asked, result("ssd", 1.0)) == [Verdict.REGRESSED]


FAULTS = {
    "budgets: []": r"budgets.yaml:1: budgets: has no budget",
    "limits: []": r"budgets.yaml:1: limits: unknown field 'limits'",
    "budgets:\n - name: a": r"budgets.yaml:2: budgets\[0\]: lacks the field 'cases'",
    "budgets:\n - name: a\n   cases: [x]": r":2: budgets\[0\]: takes one of at_most and at_least",
    "budgets:\n - name: a\n   cases: [x]\n   at_most: 1\n   at_least: 1": r"takes one of",
    "budgets:\n - name: a\n   cases: [x]\n   at_most: fast": r":4: budgets\[0\].at_most: exp",
    "budgets:\n - name: a\n   cases: [x]\n   at_most: -1": r"above 0, got -1",
    "budgets:\n - name: a\n   cases: [x]\n   at_most: .nan": r"above 0",
    "budgets:\n - name: a\n   cases: [x]\n   at_most: yes": r"above 0, got True",
    "budgets:\n - name: a\n   cases: ['seqlen<<1']\n   at_most: 1": r":3: .*not a whole number",
    "budgets:\n - name: a\n   cases: ['sqlen=1']\n   at_most: 1": r":3: .*Did you mean 'seqlen'",
    "budgets:\n - name: a\n   cases: [x]\n   metric: tims_s\n   at_most: 1": r":4: .*'time_s'",
    "budgets: [": r"not YAML",
    "": r"empty; expected",
}


@pytest.mark.parametrize("text", FAULTS)
def test_a_mistake_is_named_with_its_line(tmp_path, text):
    with pytest.raises(SuiteError, match=FAULTS[text]):
        read(tmp_path, text)
