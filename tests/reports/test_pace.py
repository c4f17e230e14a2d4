"""Time per token over the length, as a table."""

from dataclasses import replace

import pytest

from mambench.harness.analysis.results import Analysis, Result
from mambench.harness.analysis.runs import Source
from mambench.harness.spec import Case, DeviceKind, DType, Family, Outcome, Pass, Problem
from mambench.reports import pace


def result(seqlen, time_s, *, batch=1, outcome=Outcome.OK, pass_=Pass.FORWARD):
    problem = Problem(
        family=Family.S6, batch=batch, seqlen=seqlen, d_inner=64, d_state=16, ngroups=1
    )
    case = Case(implementation="scan", variant="x", problem=problem, pass_=pass_, dtype=DType.BF16)
    return Result(case=case, outcome=outcome, source="a", run_id="r", time_s=time_s)


def table(*results):
    source = Source(key="a", label="a GPU", kind=DeviceKind.CUDA, device_name="a GPU", runs=())
    return pace.table(Analysis(sources=(source,), results=results))


def test_a_row_is_a_curve_and_says_how_flat_it_is():
    text = table(
        result(8192, 8192e-9 * 4),
        result(1 << 20, (1 << 20) * 5e-9),
        result(1 << 20, (1 << 20) * 9e-9, pass_=Pass.TRAINING),
        result(8192, 8192e-9 * 18, pass_=Pass.TRAINING, batch=2),
        result(8192, 1e-3, batch=4, outcome=Outcome.OOM),
    )
    head, _, *rows = text.splitlines()[2:]
    assert head == "| pass | implementation | 8K | 1M | slowest over fastest |"
    assert rows == ["| forward | s6 scan:x B=1 N=16 | 4 | 5 | +25.0% |"]


def test_a_batch_counts_all_of_its_tokens():
    assert pace.ns_per_token(result(1000, 8e-3, batch=8)) == pytest.approx(1000.0)


def test_without_two_lengths_there_is_no_table():
    assert table(result(8192, 1e-3)) == "No time was measured at two lengths."
    with pytest.raises(ValueError, match="expected a time and a length"):
        pace.ns_per_token(replace(result(8192, 1e-3), time_s=None))
