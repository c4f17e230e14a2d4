"""Traffic, energy, kernels, ceilings and machines: from observations to rows, figures and files."""

import json
import sys
from dataclasses import replace

import pandas as pd
import pytest

from mambench import reports
from mambench.harness.analysis import loading
from mambench.harness.curves import CrossoverKind
from mambench.harness.errors import RunFolderError, UsageError
from mambench.reports import figures, index, machines, page, roofline, rows, static, summary, units


@pytest.fixture(scope="module")
def full(full_run):
    return rows.make(loading.load([full_run]))


@pytest.fixture(scope="module")
def both(full_run, other_run):
    return rows.make(loading.load([full_run, other_run]))


def test_every_measurement_has_its_chart_and_none_without(full, gpu_report):
    def named(report):
        return {
            chart.name
            for chart in figures.CHARTS
            for trace in figures.over_length(report, report.slices[0], chart)["data"]
            if not trace["meta"].get("failure")
        }

    everything = {chart.name for chart in figures.CHARTS}
    assert named(full) == everything - {"launch"}, "no call time was invented"
    assert named(gpu_report) == {"time", "throughput", "per_token", "memory"}


def test_details_of_different_measurements_do_not_replace_each_other(full, kernels):
    row = next(row for row in full.rows if row.ok)
    found = page.extras(row)
    assert found["kernels"] == kernels
    assert found["moved"][0]["dram_read_bytes"] == 7
    assert found["ceiling"] == "copy"
    assert len(found["trace"]) == 5


def test_crossovers_in_energy_and_traffic_are_found_and_said(full):
    said = summary.summarise_slice(full.slices[0])
    ssd = next(s for s in said.series if s.series.key.implementation == "ssd")
    assert ssd.others["energy_j"].kind is CrossoverKind.AT
    assert ssd.others["energy_j"].seqlen == pytest.approx(4000, rel=0.01)
    assert ssd.others["energy_j"].bracket == (2048, 4096)
    assert "Energy: ssd takes less from" in said.evidence
    assert set(ssd.others) == set(summary.CROSSED) - {"dram_bytes"}, "equal traffic never crosses"


def test_a_metric_that_was_not_recorded_is_not_mentioned(gpu_report):
    said = summary.summarise_slice(gpu_report.slices[0])
    assert all(set(s.others) <= {"peak_memory_bytes"} for s in said.series)
    assert "energy" not in said.evidence


def test_the_roofline_has_measured_and_stated_roofs_and_the_rows_rates(full):
    drawn = roofline.figure(full, full.slices[0])
    roofs = {t["name"].split(":")[0]: t for t in drawn["data"] if "roof" in t["meta"]}
    assert set(roofs) == {"measured", "datasheet"}
    assert max(roofs["measured"]["y"]) <= 7.0e14
    x, y = roofs["measured"]["x"][0], roofs["measured"]["y"][0]
    assert y == pytest.approx(min(7.0e14, 3.0e12 * x), rel=1e-5)
    assert "measured" in drawn["layout"]["xaxis"]["title"]["text"]
    lines = [t for t in figures.resolve(drawn, full.rows)["data"] if "roof" not in t["meta"]]
    assert lines
    for trace in lines:
        for i, index_ in enumerate(trace["customdata"]):
            row = full.rows[index_]
            assert trace["y"][i] == pytest.approx(row.result.model_flop / row.time_s)
            assert trace["x"][i] == pytest.approx(row.value("model_flop") / row.value("dram_bytes"))


def test_without_counters_the_roofline_says_that_bytes_are_modelled(gpu_report):
    drawn = roofline.figure(gpu_report, gpu_report.slices[0])
    assert "modelled" in drawn["layout"]["xaxis"]["title"]["text"]
    assert not [t for t in drawn["data"] if "roof" in t["meta"]], "nothing is known of this device"


def test_the_same_cases_stand_side_by_side(both):
    shared = machines.shared(both)
    assert len(shared) == len({row.case_id for row in both.rows})
    compared = [found for case in shared if (found := case.speedup(1))]
    assert len(compared) > 100
    assert all(
        found.ratio == pytest.approx(2, rel=1e-9) and found.significant for found in compared
    )
    here, there = machines.describe(both, "bf16")
    assert (here.origin, here.bytes_per_s) == ("datasheet", 3.35e12)
    assert (there.origin, there.bytes_per_s) == ("datasheet", 4.8e12)
    (said,) = machines.sentences(both, shared)
    assert f"NVIDIA H200 against Fixture GPU 80GB: 2.00{units.TIMES} faster" in said
    assert f"memory bandwidth is 1.43{units.TIMES}" in said
    assert "with the same variant" in said
    assert "code differs" not in said


def test_measured_limits_are_preferred_where_every_machine_has_them(full_run, tmp_path, write_run):
    device = {"kind": "cuda", "name": "NVIDIA H200", "compute_capability": [9, 0]}
    ceilings = {"ceilings": {"copy": {"value": 4.2e12, "datasheet": 4.8e12}}}
    other = write_run(tmp_path / "ceilings", [], device=device, ceilings=ceilings)
    found = machines.describe(rows.make(loading.load([full_run, other])), "bf16")
    assert [machine.origin for machine in found] == ["measured"] * 2
    assert {machine.bytes_per_s for machine in found} == {3.0e12, 4.2e12}


@pytest.fixture(scope="module")
def three(gpu_observations, write_run, tmp_path_factory):
    """A run on two GPUs and a CPU, whose implementations take other variants there."""

    def elsewhere(name, scale, **device):
        asked = [
            replace(
                o,
                case=replace(o.case, variant="numba") if device["kind"] == "cpu" else o.case,
                values=o.values | ({"time_s": t * scale} if (t := o.values.get("time_s")) else {}),
                samples_s=o.samples_s and tuple(s * scale for s in o.samples_s),
            )
            for o in gpu_observations()
            if device["kind"] == "cuda" or (o.case.problem.seqlen or 0) <= 1024
        ]
        return write_run(
            tmp_path_factory.mktemp("three") / name, asked, device={"name": name} | device
        )

    gpu = {"kind": "cuda", "compute_capability": [9, 0]}
    folders = (
        elsewhere("NVIDIA H100", 1.0, **gpu),
        elsewhere("NVIDIA H200", 0.75, **gpu),
        elsewhere("A processor", 300.0, kind="cpu"),
    )
    return rows.make(loading.load(folders))


def test_a_cpu_stands_beside_gpus_though_its_variants_are_others(three):
    found = machines.shared(three)
    places = {source.label: place for place, source in enumerate(three.sources)}
    on_all = [case for case in found if None not in case.rows]
    assert len(on_all) > 20
    assert all(case.differs and case.first.series.variant not in case.label for case in on_all)
    for case in found:
        assert len({(r.seqlen, r.d_state, r.slice[1:]) for r in case.rows if r}) == 1
    first = three.sources[0].label
    scale = {"NVIDIA H100": 1.0, "NVIDIA H200": 0.75, "A processor": 300.0}
    for name, place in places.items():
        values = [one.ratio for case in found if (one := case.speedup(place))]
        assert values == pytest.approx([scale[first] / scale[name]] * len(values))
    text = " ".join(machines.sentences(three, found))
    assert "each with a variant of its own" in text
    assert page.render(three).count("</small>") > len(on_all)


def test_where_a_machine_has_several_variants_each_stands_beside_its_own(three):
    first = next(row for row in three.rows if row.series.family == "ssd" and row.seqlen == 512)
    case = first.result.case
    twice = [
        row
        for row in three.rows
        if row.result.case.problem == case.problem
        and row.result.case.pass_ is case.pass_
        and row.series.implementation == case.implementation
        and row.slice.dtype == first.slice.dtype
    ]
    assert len(twice) == 3
    again = replace(twice[0], series=twice[0].series._replace(variant="other"))
    split = list(machines._side_by_side([*twice, again]))
    for members in split:
        assert len({row.slice.source for row in members}) == len(members)
        assert len({row.series.variant for row in members}) == 1
    assert sum(map(len, split)) == len(twice) + 1


def test_a_ratio_whose_intervals_touch_is_not_significant(full):
    first = next(row for row in full.rows if row.ok)
    near = replace(first, time_s=first.time_high_s, time_low_s=first.time_s)
    found = machines.ratio(near, first)
    assert found.low < 1
    assert not machines.ratio(replace(first, time_low_s=None), first).significant


def test_figures_are_written_for_every_chart_with_points(full_run, full, tmp_path, monkeypatch):
    pytest.importorskip("resvg_py")
    names = ("time-op-forward-bf16-1-2048", "energy-op-forward-bf16-1-2048")
    pictures = static.charts(full)
    written = static.write([full_run], tmp_path, png=False)
    assert [path.name for path in written] == [f"{name}.svg" for name in pictures]
    assert all(path.read_bytes().startswith(b"<svg") for path in written)
    # To draw all of them as PNG takes ten seconds.
    monkeypatch.setattr(static, "charts", lambda report: {name: pictures[name] for name in names})
    drawn = static.write([full_run], tmp_path)[2:]
    assert [path.name for path in drawn] == [f"{name}.png" for name in names]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_without_the_rasteriser_svg_is_there_and_the_error_says_what_to_do(
    full_run, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(UsageError, match=r"mambench\[png\]"):
        static.write([full_run], tmp_path)
    assert list(tmp_path.glob("*.svg"))
    assert not list(tmp_path.glob("*.png"))


def test_parquet_holds_the_records(full_run, full, tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    table = pd.read_parquet(reports.write_parquet([full_run], tmp_path / "deep" / "r.parquet"))
    assert list(table["case_id"]) == [row.case_id for row in full.rows]
    assert table["energy_j"].notna().sum() == sum(row.ok for row in full.rows)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"mambench\[parquet\]"):
        reports.write_parquet([full_run], tmp_path / "r.parquet")


def test_the_index_lists_runs_newest_first_and_broken_ones_with_their_reason(
    tmp_path, write_run, gpu_observations, hostile_run
):
    some = gpu_observations()[:8]
    write_run(tmp_path / "old", some, suite="<i>old</i>", created_at="2026-01-01T00:00:00+00:00")
    write_run(tmp_path / "new run", some, suite="newer", created_at="2026-02-01T00:00:00+00:00")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("{")
    check = {"conclusion": "Regressed: 1 <b>regressed</b>.", "points": [{"verdict": "same"}]}
    (tmp_path / "old" / "check.json").write_text(json.dumps(check))
    text = reports.index_page(tmp_path).read_text()
    assert text.index("newer") < text.index("&lt;i&gt;old")
    assert "<b>regressed</b>" not in text
    assert "1 &lt;b&gt;regressed" in text
    assert 'href="new%20run/report.html"' in text
    assert (tmp_path / "new run" / "report.html").exists()
    assert "broken could not be read" in text
    with pytest.raises(RunFolderError):
        index.build(tmp_path / "nowhere")


def test_a_verdict_beside_the_records_is_shown_as_text(tmp_path, write_run, gpu_observations):
    folder = write_run(tmp_path / "judged", gpu_observations()[:8])
    point = {"verdict": "regressed", "name": "<u>ssd</u>", "metric": "time_s", "change_frac": 0.07}
    same = point | {"verdict": "same"}
    text = json.dumps({"conclusion": "Regressed: 1 regressed.", "points": [point, same]})
    (folder / "check.json").write_text(text)
    html = page.render(rows.make(loading.load([folder])))
    assert "&lt;u&gt;ssd" in html
    assert "+7.0" in html
    assert " 1 points are the same" in html
    (folder / "check.json").write_text("not a verdict")
    assert "Verdict of a check" not in page.render(rows.make(loading.load([folder])))
