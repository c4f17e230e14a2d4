"""Tables about the measuring itself show what the records hold, and refuse what is none."""

import json
import math
from pathlib import Path

import pytest

import mambench
from mambench.harness.analysis.results import Analysis, Result
from mambench.harness.analysis.runs import Source
from mambench.harness.errors import RunFolderError, UsageError
from mambench.harness.spec import Case, DeviceKind, DType, Family, Outcome, Pass, Problem
from mambench.reports import markdown, readme, tables
from mambench.reports.units import TIMES


def result(name, time_s=1e-3, *, seqlen=1024, outcome=Outcome.OK, **fields):
    implementation, _, variant = name.partition(":")
    problem = Problem(family=Family.S6, batch=1, seqlen=seqlen, d_inner=2048, d_state=16, ngroups=1)
    case = Case(
        implementation=implementation,
        variant=variant,
        problem=problem,
        pass_=Pass.FORWARD,
        dtype=DType.BF16,
    )
    values = {"source": "a", "run_id": "r", "time_s": time_s} | fields
    return Result(case=case, outcome=outcome, **values)


def analysis(*results):
    source = Source(key="a", label="a GPU", kind=DeviceKind.CUDA, device_name="a GPU", runs=())
    return Analysis(sources=(source,), results=results)


L2 = {"before": "clean lines of another buffer", "after": "dirty lines written back"}
MIB = 2**20


def counted(name, read, written, **details):
    moved = {"dram_read_bytes": read, "dram_write_bytes": written, "dram_bytes": read + written}
    values = {**moved, "traffic_ratio": (read + written) / (2 * MIB)}
    found = {"time": {}, "traffic": {"l2": L2, **details}}
    return result(name, compulsory_bytes=2 * MIB, values=values, found=found)


def barred(name):
    found = {"time": {}, "traffic": {"missing": "no permission"}}
    return result(name, compulsory_bytes=MIB, missing={"dram_bytes": "no permission"}, found=found)


def test_traffic_is_shown_beside_the_model_and_a_missing_count_says_why():
    text = tables.traffic(
        analysis(
            counted("stores:x", 130 * MIB, 128 * MIB),
            counted("fused:x", 2 * MIB, MIB),
            barred("barred:x"),
            result("unasked:x", found={"time": {}}, missing={"dram_bytes": "not measured"}),
        )
    )
    first, _, *rows = text.splitlines()
    assert "B=1 L=1,024 D=2,048 bf16" in first
    assert f"L2 before: {L2['before']}; caches are not emptied between kernels" in first
    assert f"after: {L2['after']}." in first
    states = "128 MiB"  # 1024 tokens x 2048 channels x 16 states x 4 bytes: what `stores` writes
    assert rows[2:] == [
        f"| forward | s6 fused:x | 2.00 MiB | {states} | 2.00 MiB | 1.00 MiB | 1.50{TIMES} |",
        f"| forward | s6 stores:x | 2.00 MiB | {states} | 130 MiB | 128 MiB | 129{TIMES} |",
        f"| forward | s6 barred:x | 1.00 MiB | {states} | no permission | \u2013 | \u2013 |",
    ]


def test_what_was_counted_as_one_range_is_marked():
    whole = counted("steps:x", MIB, MIB, proof={"known_bytes": 5})
    text = tables.traffic(analysis(whole, counted("fused:x", MIB, MIB)))
    assert "s6 steps:x \u2020 |" in text
    assert "s6 fused:x |" in text
    assert text.splitlines()[-1].startswith("\u2020 All launches counted as one range")
    assert "\u2020" not in tables.traffic(analysis(counted("fused:x", MIB, MIB)))


def test_traffic_at_several_lengths_says_which_and_another_l2_is_not_hidden():
    text = tables.traffic(
        analysis(
            counted("fused:x", MIB, MIB, l2={**L2, "before": "unknown"}),
            counted("other:x", MIB, MIB),
            result("long:x", seqlen=2048, found={"traffic": {}}),
        )
    )
    assert "not the same, or not known" in text.splitlines()[0]
    assert "| s6 long:x | B=1 L=2,048 D=2,048 bf16 |" in text


def test_a_run_without_counters_says_so():
    assert tables.traffic(analysis(result("fused:x"))) == "No case was asked for its traffic."


def test_two_runs_agree_as_far_as_their_times_do():
    first = analysis(*(result("scan:x", 1e-3, seqlen=2**n) for n in range(4)))
    second = analysis(
        result("scan:x", 1.00e-3, seqlen=1),
        result("scan:x", 1.01e-3, seqlen=2),
        result("scan:x", 0.97e-3, seqlen=4),
        result("scan:x", None, seqlen=8, outcome=Outcome.OOM),
    )
    text = tables.repeat(first, second)
    mean = math.exp((math.log(1.01) + math.log(0.97)) / 3)
    assert f"3 cases, each measured in both runs: geometric mean of the ratios {mean:.4f}" in text
    assert "; 2 of them (66.7%) within 2%; from 0.970 to 1.010." in text
    assert f"| s6 scan:x | 3 | {mean:.4f} | 0.970 |" in text


def test_runs_that_share_nothing_are_refused():
    with pytest.raises(RunFolderError, match="share no case"):
        tables.repeat(analysis(result("scan:x")), analysis(result("other:x")))


def test_a_selftest_is_shown_check_by_check(tmp_path):
    check = {
        "part": "L2",
        "what": "cold | hot",
        "expected": "at least 1",
        "got": None,
        "verdict": "skipped",
        "reason": "no GPU",
    }
    made = {
        "counts": {"passed": 0, "failed": 0, "skipped": 1},
        "checks": [check],
        "device": {"name": "a CPU"},
        "ran_at": "2026-01-02T03:04:05",
        "code": "abc",
        "wall_s": 1.0,
    }
    (tmp_path / "selftest.json").write_text(json.dumps(made))
    text = tables.selftest(tmp_path / "selftest.json")
    assert "a CPU, 2026-01-02, code abc: 0 passed, 0 failed, 1 skipped" in text
    assert r"| skipped | L2 | cold \| hot | at least 1 | no GPU |" in text


@pytest.mark.parametrize("text", ["", "[]", '{"checks": []}'])
def test_another_file_is_no_selftest(tmp_path, text):
    (tmp_path / "selftest.json").write_text(text)
    with pytest.raises(RunFolderError, match="not the result of a selftest"):
        tables.selftest(tmp_path / "selftest.json")


def test_a_misspelt_table_is_answered_with_the_names_there_are(tmp_path):
    document = tmp_path / "a.md"
    document.write_text("<!-- figures:begin h100-quick table=trafic -->\n<!-- figures:end -->\n")
    published = Path(mambench.__file__).resolve().parents[1] / "published"
    with pytest.raises(UsageError, match="traffic"):
        readme.render(document, published)


@pytest.mark.parametrize("output", ["-o /a", "--output=/a/b", "-o '/a b/c'", '-o "/a b"'])
def test_a_command_in_a_document_names_no_folder_of_the_machine_that_ran_it(output: str):
    said = markdown._repeatable(f"python run_bench.py run -s peers {output} --seed 1")
    assert said == "python run_bench.py run -s peers --seed 1"
