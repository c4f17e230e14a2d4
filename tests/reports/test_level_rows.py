"""Cases without a length, an SSM's decode, stand at every length of their slice."""

from dataclasses import replace

import pytest

from mambench.harness.analysis.results import Analysis, Result
from mambench.harness.analysis.runs import Source, make_run
from mambench.harness.curves import CrossoverKind
from mambench.harness.spec import Case, DType, Family, Outcome, Pass, Problem
from mambench.reports import export, figures, page, rows, summary, text

LENGTHS = (512, 2048, 8192)
RUN = make_run({"run_id": "r", "device": {"kind": "cuda", "name": "Fixture"}})


def result(name: str, family: Family, seqlen: int | None, time_s: float | None) -> Result:
    attention = family is Family.ATTENTION
    problem = Problem(
        family=family, batch=4, seqlen=seqlen, d_inner=64, d_state=None if attention else 16
    )
    case = Case(
        implementation=name, variant="v", problem=problem, pass_=Pass.DECODE, dtype=DType.BF16
    )
    return Result(
        source=RUN.source,
        run_id="r",
        case=case,
        outcome=Outcome.OK if time_s else Outcome.OOM,
        reason=None if time_s else "too large",
        time_s=time_s,
        samples_s=tuple((time_s or 0) * (1 + 0.001 * i) for i in range(-5, 6)),
        peak_memory_bytes=1000,
    )


def make(*results: Result) -> rows.Report:
    source = Source(
        key=RUN.source, label="Fixture", kind="cuda", device_name="Fixture", runs=(RUN,)
    )
    return rows.make(Analysis(sources=(source,), results=results))


SSD = result("ssd", Family.SSD, None, 2e-5)
ATTENTION = [result("fa", Family.ATTENTION, n, 1e-8 * n) for n in LENGTHS]


@pytest.fixture(scope="module")
def report() -> rows.Report:
    return make(SSD, *ATTENTION)


def test_a_case_is_one_row_and_stands_at_every_length(report: rows.Report) -> None:
    assert len(report.rows) == 4
    (part,) = report.slices
    level = next(series for series in part.series if series.key.implementation == "ssd")
    assert level.is_level
    placed = level.at_state(16)
    assert [row.seqlen for row in placed] == list(LENGTHS)
    assert len({row.index for row in placed}) == 1
    assert {row.case_id for row in placed} == {SSD.case.case_id}


def test_it_is_a_level_line(report: rows.Report) -> None:
    (part,) = report.slices
    for chart in figures.CHARTS:
        drawn = figures.resolve(figures.over_length(report, part, chart), report.rows)["data"]
        if not drawn:  # not measured
            continue
        line = next(trace for trace in drawn if trace["meta"]["implementation"] == "ssd")
        assert line["x"] == list(LENGTHS)
        assert len(set(line["y"])) == 1
        assert line["mode"] == "lines"


def test_the_crossover_is_where_the_cache_has_become_dearer(report: rows.Report) -> None:
    said = summary.summarise_slice(report.slices[0])
    found = next(s.crossover for s in said.series if s.series.key.implementation == "ssd")
    assert found is not None
    assert found.kind is CrossoverKind.AT
    assert found.seqlen == pytest.approx(2000, rel=0.01)
    assert [entry.seqlen for entry in said.lengths] == list(LENGTHS)
    assert [entry.fastest.label for entry in said.lengths if entry.fastest] == [
        "fa · v", "ssd", "ssd",
    ]  # fmt: skip


def test_throughput_counts_one_token_of_each_sequence(report: rows.Report) -> None:
    for row in report.rows:
        assert row.tokens_per_s == pytest.approx(4 / (row.time_s or 1))


@pytest.mark.parametrize("others", [[], [result("s6", Family.S6, None, 1e-5)]])
def test_without_any_length_everything_is_still_said_and_drawn(others: list[Result]) -> None:
    report = make(SSD, *others)
    (part,) = report.slices
    said = summary.summarise_slice(part)
    assert [entry.seqlen for entry in said.lengths] == [None]
    assert said.crossing == ("s6 is the fastest." if others else "Only ssd was asked for.")
    drawn = figures.resolve(figures.over_length(report, part, figures.CHARTS[0]), report.rows)
    assert [trace["x"] for trace in drawn["data"]] == [[1]] * (1 + len(others))
    assert "ssd" in text.render(report)
    assert "ssd" in page.render(report)
    assert export.records(report)[0]["seqlen"] is None


def test_a_failed_case_without_a_length_is_listed_and_marked() -> None:
    failed = replace(SSD, outcome=Outcome.OOM, reason="too large", time_s=None, samples_s=())
    report = make(failed, *ATTENTION)
    (failure,) = summary.failures(report)
    assert failure.seqlens == (None,)
    assert "too large" in text.render(report)
    drawn = figures.over_length(report, report.slices[0], figures.CHARTS[0])["data"]
    marks = next(trace for trace in drawn if trace["meta"].get("failure"))
    assert marks["x"] == list(LENGTHS)
