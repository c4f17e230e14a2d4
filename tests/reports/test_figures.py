"""Figures are data: their numbers are the rows', their dictionaries Plotly's."""

import math

import pytest

from mambench.harness.spec import Outcome
from mambench.reports import figures
from mambench.reports.figures import (
    CHARTS,
    decades,
    over_length,
    over_state,
    powers_of_two,
    resolve,
)

go = pytest.importorskip("plotly.graph_objects")


def everything(report):
    for part in report.slices:
        for chart in CHARTS:
            figure = over_length(report, part, chart)
            if any(not trace["meta"].get("failure") for trace in figure["data"]):
                yield part, chart, figure
        for length in part.state_lengths:
            yield part, CHARTS[0], over_state(report, part, length)


def test_plotly_takes_every_figure(report):
    for _, _, figure in everything(report):
        made = resolve(figure, report.rows)
        for trace in made["data"]:
            trace.pop("meta")
        go.Figure(made)  # raises for an unknown property or value


def test_every_point_is_its_rows_number(report):
    seen = 0
    for _, chart, figure in everything(report):
        for trace in resolve(figure, report.rows)["data"]:
            if trace["meta"].get("failure"):
                continue
            for index, y in zip(trace["customdata"], trace["y"], strict=True):
                assert y == report.rows[index].value(chart.metric)
                seen += 1
    assert seen > 500


def test_every_measured_row_is_drawn_once_over_length(gpu_report):
    part = gpu_report.slices[0]
    drawn = [i for trace in over_length(gpu_report, part, CHARTS[0])["data"] for i in trace["rows"]]
    usual = [r.index for s in part.series for r in s.at_state(s.usual_state)]
    assert sorted(drawn) == sorted(usual)


def test_failures_stand_in_the_strip_at_their_length(gpu_report):
    data = over_length(gpu_report, gpu_report.slices[0], CHARTS[0])["data"]
    failures = [t for t in resolve_all(gpu_report, data) if t["meta"].get("failure")]
    assert {t["meta"]["series"] for t in failures} == {
        "associative_scan",
        "naive_recurrence · s6",
        "naive_recurrence · ssd",
    }
    scan = next(t for t in failures if t["meta"]["series"] == "associative_scan")
    assert (scan["x"], scan["text"], scan["yaxis"]) == ([131072], ["oom"], "y2")


def resolve_all(report, data):
    return resolve({"data": data, "layout": {}}, report.rows)["data"]


def test_a_failed_case_is_never_a_point(report):
    for _, _, figure in everything(report):
        for trace in figure["data"]:
            outcomes = {report.rows[index].outcome for index in trace["rows"]}
            assert (Outcome.OK in outcomes) != bool(trace["meta"].get("failure"))


def test_attention_is_a_level_line_over_states(gpu_report):
    part = gpu_report.slices[0]
    figure = resolve(over_state(gpu_report, part, 4096), gpu_report.rows)
    line = next(t for t in figure["data"] if t["meta"].get("reference"))
    expected = next(r for r in part.series[0].rows if r.seqlen == 4096).time_s
    assert line["x"] == [16, 256]
    assert line["y"] == [expected, expected]


def test_intervals_are_the_rows(gpu_report):
    figure = resolve(over_length(gpu_report, gpu_report.slices[0], CHARTS[0]), gpu_report.rows)
    trace = figure["data"][0]
    for i, index in enumerate(trace["customdata"]):
        row = gpu_report.rows[index]
        assert row.time_s + trace["error_y"]["array"][i] == pytest.approx(row.time_high_s)
        assert row.time_s - trace["error_y"]["arrayminus"][i] == pytest.approx(row.time_low_s)


def test_axes_are_labelled_in_units_and_span_the_data(report):
    for _, chart, figure in everything(report):
        axis = figure["layout"]["yaxis"]
        low, high = axis["range"]
        values = [
            v
            for t in resolve(figure, report.rows)["data"]
            if not t["meta"].get("failure")
            for v in t["y"]
        ]
        assert low < math.log10(min(values)) <= math.log10(max(values)) < high
        unit = {"throughput": "tok/s", "memory": "B", "energy": "J", "per_joule": "tok/J"}.get(
            chart.name, "s"
        )
        if chart.name not in ("traffic", "ceiling", "launch"):
            assert all(text.endswith(unit) for text in axis["ticktext"])


def test_symbols_differ_between_families_of_one_implementation(gpu_report):
    part = gpu_report.slices[0]
    data = over_length(gpu_report, part, CHARTS[0])["data"]
    symbols = {t["name"]: t["marker"]["symbol"] for t in data}
    assert symbols["naive_recurrence · s6"] == "cross"
    assert symbols["naive_recurrence · ssd"] == "cross-open"
    looks = {
        figures.series_symbol(part, s, figures.styles(gpu_report.implementations))
        for s in part.series
    }
    assert len(looks) == len(part.series)


@pytest.mark.parametrize(
    ("values", "ticks"),
    [([512, 4096], [512, 1024, 2048, 4096]), ([600, 1500], [512, 1024, 2048]), ([], [])],
)
def test_powers_of_two(values, ticks):
    assert powers_of_two(values) == ticks


def test_long_axes_have_few_ticks():
    assert len(powers_of_two([1, 2**30])) <= 9
    assert len(decades(1e-7, 1e4)) <= 8
    assert decades(1.1e-3, 3e-3) == pytest.approx([1e-3, 2e-3])
