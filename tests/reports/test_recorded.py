"""Runs without times: what else was measured is the answer, and nothing speaks of times."""

from dataclasses import replace

import pytest

from mambench import reports
from mambench.harness.analysis import loading
from mambench.harness.spec import Outcome
from mambench.reports import markdown, names, recorded, rows, summary, text

COUNTED = {"kernel_count": 13, "busy_time_s": 1.5e-4, "max_shared_bytes": 2048, "model_flop": 7}


@pytest.fixture(scope="module")
def counted_run(gpu_observations, kernels, write_run, tmp_path_factory):
    """The forward passes of two lengths, of which launches alone were recorded; one ran out."""
    timed = [o for o in gpu_observations() if o.measurement == "time" and o.outcome is Outcome.OK]
    short = [
        o for o in timed if o.case.problem.seqlen in (512, 1024) and o.case.pass_.value == "forward"
    ]
    made = [
        replace(o, measurement="launches", method="torch.profiler", values=COUNTED,
                samples_s=None, details={"kernels": kernels})
        for o in short
    ]  # fmt: skip
    made[0] = replace(made[0], outcome=Outcome.OOM, reason="needs 90 GiB", values={})
    return write_run(tmp_path_factory.mktemp("counted") / "run", made, suite="training")


@pytest.fixture(scope="module")
def counted(counted_run):
    return rows.make(loading.load([counted_run]))


def test_the_answer_names_what_was_measured_and_no_times(counted):
    said = summary.summarise_slice(counted.slices[0])
    assert said.crossing == (
        "No times here: what was measured is kernels, busy time and shared memory."
    )
    assert said.headline == said.evidence == ""


def test_cells_have_units_and_what_is_modelled_or_failed_is_left_out(counted):
    found = recorded.of(counted.slices[0])
    assert [metric.name for metric in found.metrics] == ["kernels", "busy time", "shared memory"]
    assert {found.cells(row) for row in found.rows} == {("13", "150 µs", "2.00 KiB")}
    assert len(found.rows) == len(counted.slices[0].rows) - 1
    named = {recorded.named(row) for row in found.rows}
    assert "ssd (L = 512, N = 128)" in named
    assert "flash_attention · fa4 (L = 1,024)" in named


def test_one_metric_is_not_a_list(counted):
    found = recorded.of(counted.slices[0])
    alone = replace(found, metrics=found.metrics[:1])
    assert alone.headline == "No times here: what was measured is kernels."


def test_a_selection_with_one_time_is_told_by_its_times(gpu_report):
    assert recorded.of(gpu_report.slices[0]) is None
    assert summary.summarise_slice(gpu_report.slices[0]).recorded is None


def test_nothing_is_recorded_where_all_failed(counted, gpu_observations, write_run, tmp_path):
    failed = [
        replace(o, outcome=Outcome.ERROR, reason="no", values={}, samples_s=None)
        for o in gpu_observations()[:4]
    ]
    report = rows.make(loading.load([write_run(tmp_path / "failed", failed)]))
    assert recorded.of(report.slices[0]) is None
    said = summary.summarise_slice(report.slices[0])
    assert "No case of this selection was measured." in said.crossing + said.headline


def test_every_format_shows_the_table_and_no_column_of_times(counted, counted_run, tmp_path):
    plain, marked = text.render(counted), markdown.render(counted)
    assert "150 µs" in plain
    assert "time at L" not in plain
    assert "oom" in plain  # among the cases that did not end ok
    assert "| ssd (L = 512, N = 128) | 13 | 150 µs | 2.00 KiB |" in marked
    assert "| L |" not in marked
    html = reports.build([counted_run], tmp_path / "r.html").read_text("utf-8")
    assert "What was measured" in html
    assert "Time at each length" not in html
    assert "no time" not in html.partition('id="data"')[0]


def test_names_are_explained_as_where_times_are(counted):
    assert "ssd: Mamba-2" in names.brief(counted.slices)


@pytest.mark.browser
def test_the_page_shows_kernels_and_hides_what_compares_times(chromium, counted_run, tmp_path):
    file = reports.build([counted_run], tmp_path / "r.html")
    tab = chromium.new_page()
    errors = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(file.as_uri())
    tab.wait_for_selector("html[data-ready]")
    assert not errors
    assert tab.is_visible("#kernels-table")
    assert not tab.is_visible("#wins")
    assert not tab.is_visible("#points")
    assert not tab.is_visible("#chart-grid figure")
    tab.close()
