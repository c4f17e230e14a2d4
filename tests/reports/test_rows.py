"""Rows hold the records' numbers, and group as a reader expects."""

from mambench.harness.spec import Outcome
from mambench.reports import rows


def test_every_case_is_one_row(report, gpu_report):
    assert [row.index for row in report.rows] == list(range(len(report.rows)))
    assert len({(row.device, row.case_id) for row in report.rows}) == len(report.rows)
    assert len(gpu_report.rows) == 6 * 3 * 9 + 5 * 3 + 3 * 7
    assert sum(len(part.rows) for part in report.slices) == len(report.rows)


def test_numbers_are_the_results(report):
    for row in report.rows:
        result = row.result
        assert row.time_s == result.time_s
        assert row.peak_memory_bytes == result.peak_memory_bytes
        if row.ok:
            assert row.tokens_per_s == result.case.problem.tokens / row.time_s
            assert row.time_low_s <= row.time_s <= row.time_high_s
        else:
            assert row.time_s is None
            assert row.reason


def test_a_slice_is_one_job(report):
    for part in report.slices:
        for row in part.rows:
            problem = row.result.case.problem
            width = problem.d_model if problem.level == "block" else problem.d_inner
            have = (
                problem.level,
                row.result.case.pass_,
                row.result.case.dtype,
                problem.batch,
                width,
            )
            assert have == part.key[1:]


def test_the_most_informative_slice_is_first(gpu_report):
    assert gpu_report.slices[0].key[1:4] == ("op", "forward", "bf16")


def test_labels_tell_families_and_attention_variants_apart(gpu_report):
    labels = {series.label for series in gpu_report.slices[0].series}
    assert labels == {
        "flash_attention · fa4",
        "selective_scan",
        "ssd",
        "associative_scan",
        "naive_recurrence · s6",
        "naive_recurrence · ssd",
    }


def test_attention_comes_first_then_the_fastest(gpu_report):
    labels = [series.label for series in gpu_report.slices[0].series]
    assert labels[:3] == ["flash_attention · fa4", "ssd", "selective_scan"]


def test_attention_has_no_state_and_is_at_every_state(gpu_report):
    attention = gpu_report.slices[0].series[0]
    assert attention.usual_state is None
    assert len(attention.at_state(64)) == len(attention.at_state(None)) == 9


def test_states_and_lengths_to_choose_from(gpu_report):
    part = gpu_report.slices[0]
    assert part.states == (16, 128)  # the others were measured at one length
    assert part.state_lengths == (4096,)
    scan = next(s for s in part.series if s.label == "selective_scan")
    assert scan.usual_state == 16
    assert [row.d_state for row in scan.at_length(4096)] == [16, 32, 64, 256]


def test_environment_has_a_column_for_each_run(report):
    entries = dict(rows.environment(report.analysis.runs))
    assert sorted(entries["device.name"]) == ["Fixture CPU", "Fixture GPU 80GB"]
    assert "80.0 GiB" in entries["device.memory_bytes"]
    assert entries["gpu.driver"].count(rows.units.MISSING) == 1


def test_failed_rows_are_there(gpu_report):
    found = {row.outcome for row in gpu_report.rows}
    assert found == {Outcome.OK, Outcome.OOM, Outcome.TIMEOUT}
