"""The page as a file: self-contained, atomic, small, and safe whatever the records hold."""

import base64
import errno
import gzip
import hashlib
import json
import math
import statistics
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mambench import reports
from mambench.harness import beside
from mambench.harness.analysis import loading
from mambench.harness.analysis.results import QUANTILES
from mambench.harness.errors import RunFolderError
from mambench.harness.spec import METRICS
from mambench.reports import figures, packing, page, rows
from mambench.reports.text import render as as_text


class Outline(HTMLParser):
    """Collects elements, their text and their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text: list[str] = []
        self._script: dict[str, str | None] | None = None

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._script = dict(attrs) if tag in ("script", "style") else None

    def handle_data(self, data):
        if self._script is None:
            self.text.append(data)
        else:
            self.scripts.append((self._script, data))
            self._script = None


def outline(html: str) -> Outline:
    parsed = Outline()
    parsed.feed(html)
    return parsed


def embedded(html: str) -> dict:
    packed = next(
        text for attributes, text in outline(html).scripts if attributes.get("id") == "data"
    )
    return json.loads(gzip.decompress(base64.b64decode(packed)))


@pytest.fixture(scope="module")
def html(report) -> str:
    return page.render(report)


def test_nothing_is_loaded_from_elsewhere(html):
    for tag, attributes in outline(html).tags:
        assert tag not in ("link", "iframe", "img", "object", "base"), tag
        assert "src" not in attributes, tag
        assert (attributes.get("href") or "#").startswith("#")


def test_the_policy_admits_the_pages_own_scripts_only(html):
    parsed = outline(html)
    policy = next(a["content"] for _, a in parsed.tags if a.get("http-equiv"))
    assert "default-src 'none'" in policy
    assert "unsafe-inline" not in policy.split("script-src")[1].split(";")[0]
    own = [text for attributes, text in parsed.scripts if attributes == {}]
    script = next(text for text in own if "unpack" in text)
    plotly = next(text for a, text in parsed.scripts if a.get("id") == "plotly")
    for text in (script.encode(), gzip.decompress(base64.b64decode(plotly))):
        assert base64.b64encode(hashlib.sha256(text).digest()).decode() in policy


def column(data, name):
    """A column's values, as the script unpacks them."""
    found = data["columns"][name]
    if isinstance(found, dict):
        found = [found["distinct"][place] for place in found["at"]]
    if name == "case_id":
        return [base64.b64decode(text).hex() for text in found]
    if name in ("time_low_s", "time_high_s"):
        times = column(data, "time_s")
        return [
            None if share is None else time * (1 + share / 1e6)
            for share, time in zip(found, times, strict=True)
        ]
    return found


def test_embedded_numbers_are_the_rows(report, html):
    data = embedded(html)
    names = ("case_id", "time_s", "peak_memory_bytes", "time_low_s", "time_high_s")
    columns = {name: column(data, name) for name in names}
    assert len(columns["case_id"]) == len(report.rows)
    for row in report.rows:
        assert columns["case_id"][row.index] == row.case_id
        for name in ("time_s", "peak_memory_bytes", "time_low_s", "time_high_s"):
            expected = getattr(row, name)
            near = 2e-6 if name in ("time_low_s", "time_high_s") else 5e-7
            assert columns[name][row.index] == (
                None if expected is None else pytest.approx(expected, rel=near)
            )


def rows_of(trace):
    """Row numbers as the script unpacks them."""
    rows = trace["rows"]
    if len(rows) < 2 or rows[1] >= 0:
        return rows
    first, count, step = *rows, *([1] if len(rows) == 2 else [])
    return range(first, first - count * step, step)


def test_every_reference_of_a_figure_is_a_column(html):
    data = embedded(html)
    known = {*data["columns"], *page.DERIVED, *data["derived"], "tokens"}
    charts = [e for s in data["slices"] for e in s["over_length"]]
    states = [
        (o["looks"], e) for s in data["slices"] for o in s["over_state"] for e in o["lengths"]
    ]
    assert states
    for looks, entry in states:
        for place, own in entry["data"]:
            assert looks[place]["meta"]["implementation"] in data["looks"]
            assert max(rows_of(own)) < len(column(data, "case_id"))
            assert {own[axis] for axis in "xy" if isinstance(own[axis], str)} <= known
    charts += [s["roofline"] for s in data["slices"] if s["roofline"]]
    assert len(charts) > 8
    for figure in charts:
        for trace in figure["data"]:
            names = {trace[a]["column"] for a in "xy" if isinstance(trace[a], dict)}
            assert names <= known
            assert max(rows_of(trace), default=0) < len(column(data, "case_id"))
    assert {chart[2] for chart in data["charts"]} <= {m.tag for m in METRICS} | set(data["derived"])


def test_charts_share_their_curves_and_lose_no_row(report, html):
    for part, drawn in zip(report.slices, embedded(html)["slices"], strict=True):
        for chart in figures.CHARTS:
            figure = figures.over_length(report, part, chart)
            entry = drawn["over_length"][0]
            lines = [t for t in figure["data"] if not t["meta"].get("failure")]
            assert bool(lines) == (chart.name in entry["layouts"])
            if lines:
                assert entry["layouts"][chart.name] == packing.rounded(figure["layout"])
            shared = {t["name"]: set(rows_of(t)) for t in entry["data"]}
            for line in lines:
                assert set(line["rows"]) <= shared[line["name"]]


def test_rows_that_follow_each_other_are_packed_and_others_are_not():
    assert packing.packed([4, 5, 6]) == [4, -3]
    assert packing.packed([4, 6, 7]) == [4, 6, 7]
    assert packing.packed([4, 7, 10]) == [4, -3, 3]
    assert packing.packed([9, 6, 3]) == [9, 6, 3]
    assert packing.packed([7, 7, 7]) == [7, 7, 7]
    assert packing.packed([4, 5]) == [4, 5]
    assert packing.packed([]) == []


def test_a_column_of_few_values_names_each_once_and_keeps_types_apart():
    values = ["a", None, "a", 1, 1.0, True, "a", "a", "a", "a", "a", "a", "a", "a", "a", "a"]
    values *= 2
    found = packing.repeated(values)
    assert isinstance(found, dict)
    restored = [found["distinct"][place] for place in found["at"]]
    assert [(type(v), v) for v in restored] == [(type(v), v) for v in values]
    assert packing.repeated([1, 2, 3, 4, 5]) == [1, 2, 3, 4, 5]


def test_what_surrounds_a_measurement_is_flat_short_and_not_empty():
    nested = {"after": {"power_w": 134.9151, "throttled": [], "why": ["hot", "slow"], "x": None}}
    assert packing.flat([[("", nested)]]) == {"after.power_w": [134.9], "after.why": ["hot, slow"]}
    rows = [[("", {"x": 1})], [("gate.", {"error": float("nan"), "on": True}), ("", {"x": 1.0})]]
    found = packing.flat(rows)
    assert found == {"x": [1, 1.0], "gate.error": [None, "nan"], "gate.on": [None, True]}
    assert [type(value) for value in found["x"]] == [int, float]


def test_quantiles_stand_beside_the_median_and_the_times_own_is_not_repeated():
    samples = (1.0, 0.9, 2.0, 1.01, 0.95, 1.1, 0.99)
    found = packing.beside_medians([samples, samples, (), (3.0,)], [1.0, 1.5, None, 3.0])
    assert [row and row[0] for row in found] == [0, 1.0, None, 0]
    for row, taken in ((found[0], samples), (found[3], (3.0,))):
        middle = statistics.median(taken)
        expected = np.quantile(taken, QUANTILES) / middle - 1
        assert row[1:] == pytest.approx(np.delete(expected, 3) * 1e4, abs=0.5)


def test_embedded_quantiles_are_those_of_the_results(report):
    column = packing.beside_medians(
        [row.result.samples_s for row in report.rows], [row.time_s for row in report.rows]
    )
    assert sum(found is not None for found in column) > 100
    for row, found in zip(report.rows, column, strict=True):
        quantiles = row.result.quantiles_s
        assert (found is None) == (quantiles is None)
        if found is not None:
            shares = [round((value / quantiles[3] - 1) * 1e4) for value in quantiles]
            assert found == [
                0 if quantiles[3] == row.time_s else packing.numbers([quantiles[3]])[0],
                *shares[:3],
                *shares[4:],
            ]


def test_time_per_token_is_read_otherwise_where_one_token_is_made(report):
    (chart,) = [c for c in page.payload(report)["charts"] if c[0] == "per_token"]
    assert "in proportion" in chart[3]
    assert "does not depend on L" in chart[5]


def test_the_first_chart_is_there_as_a_picture_in_the_pages_colours(report, html):
    still = html[html.index('<svg xmlns="http://www.w3.org/2000/svg" class="still"') :]
    still = still[: still.index("</svg>")]
    lines = [
        trace
        for trace in figures.over_length(report, report.slices[0], figures.CHARTS[0])["data"]
        if not trace["meta"].get("failure")
    ]
    assert still.count('fill="none" stroke-width="2"') == len(lines)
    assert "var(--ink)" in still
    assert "#ffffff" not in still, "the page's own background, also in the dark"
    assert ' id="' not in still


def test_selections_beyond_the_most_have_no_static_tables_and_it_says_so(report, monkeypatch):
    assert len(report.slices) > 3
    monkeypatch.setattr(page, "STATIC", 2)
    parsed = outline(page.render(report))
    tables = [a for tag, a in parsed.tags if a.get("class", "").startswith("tables")]
    answers = [a for tag, a in parsed.tags if (a.get("class") or "").split(" ")[0] == "answer"]
    assert len(tables) == 2
    assert len(answers) == len(report.slices)
    assert "of the first 2 of" in " ".join(parsed.text)


def test_static_tables_hold_the_results_without_script(report, html):
    text = " ".join(outline(html).text)
    for part in report.slices:
        for series in part.series:
            for row in series.at_state(series.usual_state):
                shown = page.units.seconds(row.time_s) if row.ok else row.outcome.value
                assert shown in text
    assert "exceeded 5 s" in text
    assert "driver" in text


def test_hostile_records_are_shown_as_text(hostile_run):
    hostile = page.render(rows.make(loading.load([hostile_run])))
    parsed = outline(hostile)
    tags = {tag for tag, _ in parsed.tags}
    assert not tags & {"img", "b"}
    assert sum(tag == "script" for tag, _ in parsed.tags) == 4
    assert "<b>bold</b>" in " ".join(parsed.text), "it is there, as text"
    assert "{{ 7 * 7 }}" in json.dumps(embedded(hostile))
    assert not [name for _, a in parsed.tags for name in a if name.startswith("on")]


def test_the_file_is_written_whole_or_not_at_all(gpu_run, tmp_path, monkeypatch):
    output = tmp_path / "deep" / "report.html"
    assert reports.build([gpu_run], output) == output
    before = output.read_bytes()
    assert len(before) < 1_200_000

    def torn(self, text, **options):
        with self.open("w") as file:
            file.write(text[:100])
        raise OSError(errno.ENOSPC, "disk full", str(self))

    monkeypatch.setattr("pathlib.Path.write_text", torn)
    with pytest.raises(OSError, match="disk full") as failed:
        reports.build([gpu_run], output)
    assert failed.value.filename == str(output)
    assert output.read_bytes() == before
    assert [path.name for path in output.parent.iterdir()] == ["report.html"]


def test_equal_runs_give_equal_files(gpu_run, tmp_path):
    files = [reports.build([gpu_run], tmp_path / name).read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


def test_a_broken_run_is_refused_and_nothing_written(tmp_path):
    output = tmp_path / "report.html"
    with pytest.raises(RunFolderError):
        reports.build([tmp_path / "no-run"], output)
    assert not output.exists()


def test_a_run_without_results_is_a_page(tmp_path, write_run):
    output = reports.build([write_run(tmp_path / "empty", [])], tmp_path / "r.html")
    assert "These runs hold no case yet." in output.read_text()


def test_what_a_person_should_know_of_a_run_stands_under_the_answer(tmp_path, write_run):
    busy = {"cpu": {"load_average": [7.0, 1.0, 1.0], "usable_cores": 2}}
    cpu = {"kind": "cpu", "name": "a processor", "memory_bytes": 2**34}
    left = "a sweep was left out: <b>why</b>"
    run = write_run(tmp_path / "run", [], device=cpu, environment=busy, notes=[left])
    report = rows.make(loading.load([run]))
    html = page.render(report)
    assert "Note on quick: a sweep was left out: &lt;b&gt;why&lt;/b&gt;; the processor was" in html
    said = as_text(report)
    assert f"Note on quick: {left}." in said
    assert "(load 7.0 on 2" in said
    calm = rows.make(loading.load([write_run(tmp_path / "calm", [], device=cpu)]))
    assert "Note on" not in page.render(calm) + as_text(calm)


def test_numbers_that_json_cannot_hold_become_null():
    values = [float("nan"), 1.23456789e-5, float("-inf"), 3, None, "x", True, [0.5]]
    assert packing.numbers(values) == [None, 1.234568e-5, None, 3, None, "x", True, [0.5]]


def test_exponents_are_raised_and_nothing_else_is_markup():
    assert page.powers("as L^1.97, <b> L^2") == "as L<sup>1.97</sup>, &lt;b&gt; L^2"


@given(st.binary(max_size=99), st.binary(max_size=99))
def test_two_parts_are_compressed_as_one(first, second):
    packed = base64.b64decode(packing.ended(packing.begun(first), second))
    assert gzip.decompress(packed) == first + second


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=9), st.integers(2, 9))
def test_numbers_are_rounded_as_by_writing_them(values, digits):
    for value, short in zip(values, packing.significant(values, digits), strict=True):
        written = float(f"{value:.{digits}g}")
        # Halfway between two decimals the nearer one is not told.
        assert short == written or abs(abs(short - value) - abs(written - value)) <= math.ulp(value)
        assert short == float(f"{short:.{digits}g}")


def test_a_page_is_the_same_with_one_process_and_with_two(report, monkeypatch):
    asked: list[int] = []
    pages: list[str] = []
    for answer in (False, True):
        monkeypatch.setattr(beside, "worthwhile", lambda n, _, a=answer: asked.append(n) or a)
        pages.append(page.render(report))
    assert asked == [len(report.rows)] * 2
    assert pages[0] == pages[1]
