"""Text, Markdown, CSV, JSON and SVG say what the rows say."""

import csv
import io
import json
import math
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest

from mambench import reports
from mambench.harness.analysis import loading
from mambench.harness.errors import UsageError
from mambench.reports import export, figures, markdown, readme, rows, svg, text, units

HOSTILE_ESCAPE = "\x1b[31mred\x07"


def test_csv_and_json_hold_every_row(report):
    table = list(csv.DictReader(io.StringIO(export.to_csv(report))))
    data = json.loads(export.to_json(report))
    assert len(table) == len(data["results"]) == len(report.rows)
    for row, line, entry in zip(report.rows, table, data["results"], strict=True):
        assert line["case_id"] == entry["case_id"] == row.case_id
        assert entry["time_s"] == row.time_s
        assert line["time_s"] == ("" if row.time_s is None else repr(row.time_s))
        assert entry["device"] == row.device
    assert data["runs"]["gpu-run"]["gpu.driver"] == "580.0"


def test_every_format_is_rendered_from_run_folders(gpu_run, gpu_report):
    found = {name: reports.render([gpu_run], name) for name in reports.FORMATS}
    assert found["csv"] == export.to_csv(gpu_report)
    assert json.loads(found["json"])["results"]
    assert found["text"] == text.render(gpu_report)
    assert found["markdown"] == markdown.render(gpu_report)
    with pytest.raises(UsageError, match="Did you mean 'json'"):
        reports.render([gpu_run], "jsn")


def test_csv_cells_are_never_formulas(report):
    assert export._cell("=1+1") == "'=1+1"
    assert export._cell(-1.5) == -1.5


def test_text_holds_every_time_and_outcome(gpu_report):
    said = text.render(gpu_report)
    part = gpu_report.slices[0]
    for series in part.series:
        for row in series.at_state(series.usual_state):
            assert (units.seconds(row.time_s) if row.ok else row.outcome.value) in said
    assert "ssd overtakes flash_attention · fa4 at L ≈ 599." in said
    assert "needs 128 GiB of 79 GiB" in said


def test_text_holds_no_control_characters(hostile_run, gpu_report, tmp_path, write_run):
    from dataclasses import replace

    from mambench.harness.store import RunFolder

    observations = RunFolder.open(hostile_run).observations()
    planted = [replace(o, reason=HOSTILE_ESCAPE) if o.reason else o for o in observations]
    run = write_run(tmp_path / "run", planted)
    said = text.render(rows.make(loading.load([run])))
    assert "[31mred" in said
    assert "\x1b" not in said
    assert "\x07" not in said


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([1, 10, 100], "▁▅█"),
        ([1.0, None, 1.0], f"▁{units.TIMES}▁"),
        ([1.0, math.nan, 10.0], "▁\u00b7█"),
        ([], ""),
    ],
)
def test_sparkline(values, line):
    assert text.sparkline(values) == line


def test_markdown_has_a_cell_for_every_length(gpu_run, gpu_report):
    said = markdown.tables([gpu_run])
    body = [line for line in said.splitlines() if line.startswith("| 4,096 |")]
    assert len(body) == len(gpu_report.slices)
    part = gpu_report.slices[0]
    expected = [units.seconds(s.at_length(4096)[0].time_s) for s in part.series[:1]]
    assert expected[0] in body[0]
    assert "`run_bench.py run --suite scan-vs-attention`" in said
    assert "torch 2.11.0" in said


def test_markdown_escapes_what_a_record_holds(hostile_run):
    said = markdown.tables([hostile_run])
    outside_code = "".join(said.split("`")[::2])
    assert "<script" not in outside_code
    assert "<img" not in outside_code
    assert markdown.escape("a|b\n*c*") == r"a\|b \*c\*"
    assert markdown.code("a`b") == "``a`b``"


def test_chart_is_well_formed_and_regenerates_equal(gpu_report, hostile_run):
    part = gpu_report.slices[0]
    first, second = svg.chart(gpu_report, part), svg.chart(gpu_report, part)
    assert first == second
    root = ET.fromstring(first)
    labels = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "flash_attention · fa4" in labels
    assert "128K" in labels
    hostile = rows.make(loading.load([hostile_run]))
    root = ET.fromstring(svg.chart(hostile, hostile.slices[0]))
    assert not list(root.iter("{http://www.w3.org/2000/svg}script"))


def test_points_with_gaps_between_launches_are_hollow_where_the_time_is_drawn(gaps_run):
    report = rows.make(loading.load([gaps_run]))
    part = report.slices[0]
    drawn = svg.chart(report, part)
    marked = [row for row in part.rows if row.result.launch_gaps]
    assert {row.series.implementation for row in marked} == {"ssd", "naive_recurrence"}
    assert figures.HOLLOW in drawn
    assert drawn.count(' hollow"') == 2
    memory = next(chart for chart in figures.CHARTS if chart.name == "memory")
    drawn = svg.chart(report, part, memory)
    assert figures.HOLLOW not in drawn
    assert ' hollow"' not in drawn


def test_chart_points_are_where_the_numbers_are(gpu_report):
    part = gpu_report.slices[0]
    figure = svg.figures.resolve(
        svg.figures.over_length(gpu_report, part, svg.figures.CHARTS[0]), gpu_report.rows
    )
    curves = svg._curves(
        figure, svg.styles(gpu_report.implementations), [False] * len(gpu_report.rows)
    )
    times = {t["name"]: t["y"] for t in figure["data"] if not t["meta"].get("failure")}
    for curve in curves:
        heights = [-y for _, y in curve.points]
        order = sorted(range(len(heights)), key=lambda i: heights[i])
        assert order == sorted(range(len(heights)), key=lambda i: times[curve.label][i])
        assert all(svg.LEFT <= x <= svg.WIDTH - svg.RIGHT for x, _ in curve.points)
        assert all(svg.TOP <= y <= svg.HEIGHT - svg.BOTTOM for _, y in curve.points)
    gaps = sorted(curve.label_y for curve in curves)
    assert all(b - a >= svg._LABEL_STEP - 0.2 for a, b in pairwise(gaps))


@pytest.fixture
def published(tmp_path, write_run, gpu_observations):
    folder = tmp_path / "published"
    write_run(folder / "gpu-quick", gpu_observations())
    return folder


def document(tmp_path, spec="gpu-quick"):
    path = tmp_path / "README.md"
    path.write_text(
        f"before\n\n<!-- figures:begin {spec} -->\nold 42 ms\n<!-- figures:end -->\n\nafter\n"
    )
    return path


def test_readme_blocks_are_made_from_published_runs(tmp_path, published):
    path = document(tmp_path)
    changed = readme.refresh([path], published)
    said = path.read_text()
    assert said.startswith("before\n\n<!-- figures:begin gpu-quick -->\n")
    assert said.endswith("<!-- figures:end -->\n\nafter\n")
    assert "42 ms" not in said
    assert "Measured on Fixture GPU 80GB." in said
    picture = published / "gpu-quick" / "time-op-forward-bf16-1-2048.svg"
    assert set(changed) == {path, picture}
    assert f"](published/gpu-quick/{picture.name})" in said
    assert readme.refresh([path], published) == [], "a second time changes nothing"


def test_readme_filters_choose_the_selection(tmp_path, published):
    path = document(tmp_path, "gpu-quick level=block pass=forward")
    readme.refresh([path], published)
    assert "one transformer layer" in path.read_text()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gpu-quik", "Did you mean 'gpu-quick'"),
        ("gpu-quick pas=forward", "Did you mean 'pass'"),
        ("gpu-quick pass=nothing", "no selection has pass=nothing"),
    ],
)
def test_readme_mistakes_are_named_and_change_nothing(tmp_path, published, spec, message):
    path = document(tmp_path, spec)
    before = path.read_text()
    with pytest.raises(UsageError, match=message):
        readme.refresh([path], published)
    assert path.read_text() == before


def test_a_block_without_end_is_refused(tmp_path, published):
    path = tmp_path / "README.md"
    path.write_text("<!-- figures:begin gpu-quick -->\n")
    with pytest.raises(UsageError, match="figures:end"):
        readme.refresh([path], published)
