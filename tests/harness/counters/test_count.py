"""Counting under a stand-in for Nsight Compute, with each way to fail planted."""

import itertools
import json
import os
import stat
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mambench.harness.counters import batch as counters_batch
from mambench.harness.counters import count as counters
from mambench.harness.counters import ncu
from mambench.harness.counters.count import Counted, Request
from mambench.harness.spec import Case, Device, DeviceKind, DType, Family, Outcome, Pass, Problem
from mambench.implementations.cost import case_cost

GPU = Device(
    kind=DeviceKind.CUDA, name="planted GPU", compute_capability=(9, 0), memory_bytes=1 << 36
)
REQUEST = Request(device=GPU, time_limit_s=30.0)


def case(seqlen: int) -> Case:
    problem = Problem(family=Family.ATTENTION, batch=1, seqlen=seqlen, d_inner=64, headdim=32)
    return Case(
        implementation="a", variant="b", problem=problem, pass_=Pass.FORWARD, dtype=DType.BF16
    )


CASES = [case(128), case(256), case(512)]
FIRST, SECOND, THIRD = (c.case_id for c in CASES)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put the stand-in on PATH; the function that is returned chooses its faults."""
    source = Path(__file__).parent.parent.parent / "faults" / "fake_ncu.py"
    program = tmp_path / "ncu"
    program.write_text(f"#!{sys.executable}\n{source.read_text()}")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def choose(**chosen: object) -> None:
        monkeypatch.setenv("FAKE_NCU", json.dumps(chosen))

    choose()
    return choose


def count(cases: list[Case], request: Request, **options: Any) -> dict[str, Counted]:
    return {c.case_id: found for c, found in counters.count_cases(cases, request, **options)}


def outcomes(found: dict[str, Counted]) -> list[Outcome]:
    return [found[c.case_id].outcome for c in CASES]


def test_bytes_are_summed_over_kernels_and_what_is_left_in_l2_is_charged(fake):
    heard: list[str] = []
    found = count(CASES, REQUEST, on_begin=lambda c: heard.append(c.case_id))
    assert outcomes(found) == [Outcome.OK] * 3
    assert heard == [FIRST, SECOND, THIRD]
    values = found[FIRST].values
    assert values["dram_read_bytes"] == 3500  # what the drain reads is its own
    assert values["dram_write_bytes"] == 1250  # what it writes back is the case's
    assert values["dram_bytes"] == 4750
    compulsory = case_cost(CASES[0]).compulsory_bytes
    assert values["traffic_ratio"] == pytest.approx(4750 / compulsory)
    assert "compulsory_bytes" not in values
    details = found[FIRST].details
    assert details["left_dirty_in_l2_bytes"] == 250
    assert details["launches"] == 2
    assert details["passes"] == 1
    assert details["kernels"] == [
        {
            "name": "scan<16>(float *, int)",
            "launches": 2,
            "dram_read_bytes": 3500,
            "dram_write_bytes": 1000,
            "profiled_time_s": pytest.approx(3e-6),
        }
    ]
    assert details["l2"]["l2_bytes"] == 1000


def test_units_are_honoured(fake):
    fake(unit="Kbyte")
    assert count(CASES[:1], REQUEST)[FIRST].values["dram_read_bytes"] == 3500


def test_an_unknown_unit_is_refused_and_named(fake):
    fake(unit="furlong")
    found = count(CASES, REQUEST)
    assert outcomes(found) == [Outcome.UNAVAILABLE] * 3
    assert "furlong" in (found[FIRST].reason or "")


def test_missing_permission_says_how_to_get_it(fake):
    fake(permission=True)
    found = count(CASES, REQUEST)
    assert outcomes(found) == [Outcome.UNAVAILABLE] * 3
    assert "ERR_NVGPUCTRPERM" in (found[THIRD].reason or "")
    assert "NVreg_RestrictProfilingToAdminUsers=0" in (found[THIRD].reason or "")
    assert found[THIRD].values == {}


def test_a_case_that_kills_the_child_is_its_own_outcome(fake):
    fake(faults={SECOND: "crash"})
    found = count(CASES, REQUEST)
    assert outcomes(found) == [Outcome.OK, Outcome.CRASHED, Outcome.OK]
    assert "phase 'count'" in (found[SECOND].reason or "")


def test_what_a_crash_loses_is_counted_again(fake):
    fake(faults={SECOND: "crash"}, lose=True)
    found = count(CASES, REQUEST)
    assert outcomes(found) == [Outcome.OK, Outcome.CRASHED, Outcome.OK]
    assert found[FIRST].values["dram_bytes"] == 4750


def test_a_case_that_hangs_is_cut_off(fake):
    fake(faults={FIRST: "hang"})
    found = count(CASES, replace(REQUEST, time_limit_s=0.3))
    assert outcomes(found) == [Outcome.TIMEOUT, Outcome.OK, Outcome.OK]
    assert "time_limit_s = 0.3" in (found[FIRST].reason or "")


def test_what_was_counted_when_the_time_is_over_is_kept(fake):
    fake(faults={SECOND: "hang"})
    found = count(CASES, replace(REQUEST, total_limit_s=4.0))
    assert outcomes(found) == [Outcome.OK, Outcome.SKIPPED, Outcome.SKIPPED]
    assert found[FIRST].values["dram_read_bytes"] == 3500
    assert "time for counting was over" in (found[SECOND].reason or "")
    assert "time for counting was over" in (found[THIRD].reason or "")


def test_what_was_counted_when_a_person_interrupts_is_kept(fake):
    fake(faults={SECOND: "hang"})

    def interrupt(case: Case) -> None:
        if case.case_id == SECOND:
            raise KeyboardInterrupt

    counted = counters.count_cases(CASES, REQUEST, on_begin=interrupt)
    found = {c.case_id: each for c, each in itertools.islice(counted, 2)}
    with pytest.raises(KeyboardInterrupt):
        next(counted)
    assert found[FIRST].values["dram_read_bytes"] == 3500
    assert found[SECOND].outcome is Outcome.SKIPPED  # counted when the run is resumed


def test_what_is_compiled_is_found_again_by_the_next_child(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    cache = pytest.importorskip("torch._inductor.runtime.cache_dir_utils")
    assert counters_batch._inductor_cache() == cache.default_cache_dir()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/chosen")
    assert counters_batch._inductor_cache() == "/chosen"


def test_a_case_that_raises_keeps_its_reason(fake):
    fake(faults={FIRST: "raise", SECOND: "raise", THIRD: "raise"})
    found = count(CASES, REQUEST)
    assert outcomes(found) == [Outcome.ERROR] * 3
    assert found[THIRD].reason == "ValueError: planted"


def test_a_case_without_kernels_is_no_zero(fake):
    fake(faults={SECOND: "unseen"})
    found = count(CASES, REQUEST)
    assert outcomes(found) == [Outcome.OK, Outcome.ERROR, Outcome.OK]
    assert "no kernel" in (found[SECOND].reason or "")
    assert found[SECOND].values == {}


def test_a_counter_without_a_value_is_no_zero(fake):
    fake(faults={SECOND: "no_value"})
    found = count(CASES, REQUEST)
    assert outcomes(found) == [Outcome.OK, Outcome.UNAVAILABLE, Outcome.OK]
    assert found[SECOND].values == {}


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [("silent", "without a word"), ("start", "install the Nsight Compute that fits the driver")],
)
def test_an_ncu_that_does_not_start_says_so(fake, chosen, reason):
    fake(**{chosen: True})
    found = count(CASES, REQUEST)
    assert outcomes(found) == [Outcome.UNAVAILABLE] * 3
    assert reason in (found[FIRST].reason or "")


def test_several_passes_are_in_the_record(fake):
    fake(passes=3)
    assert count(CASES[:1], REQUEST)[FIRST].details["passes"] == 3


def long_first(case: Case) -> int:
    return 80_000 if case.case_id == FIRST else 3


@pytest.mark.parametrize("chosen", [{}, {"nameless": True}, {"again": True}])
def test_a_case_of_many_launches_is_counted_as_one_range(fake, chosen):
    fake(**chosen)
    cases = CASES[:1] if "nameless" in chosen else CASES
    found = count(cases, REQUEST, launches=long_first)
    assert [found[c.case_id].outcome for c in cases] == [Outcome.OK] * len(cases)
    assert list(found)[-1] == FIRST  # after those that are counted launch by launch
    assert found[FIRST].values["dram_bytes"] == 4750  # as the launches one by one
    assert found[FIRST].method == "ncu-app-range"
    details = found[FIRST].details
    assert (details["launches"], details["passes"]) == (None, 1)
    assert [kernel["name"] for kernel in details["kernels"]] == [counters_batch.ALL_LAUNCHES]
    assert details["proof"]["known_bytes"] == details["proof"]["dram_write_bytes"] == 100_000
    if SECOND in found:
        assert found[SECOND].method == "ncu-kernel-replay"
        assert found[SECOND].details["launches"] == 2


@pytest.mark.parametrize("factor", [0.95, 1.05])
def test_ranges_that_count_known_bytes_wrongly_are_not_believed(fake, factor):
    fake(known=factor)
    found = count(CASES, REQUEST, launches=long_first)
    assert outcomes(found) == [Outcome.UNAVAILABLE, Outcome.OK, Outcome.OK]
    assert "of a copy of 100,000 bytes" in (found[FIRST].reason or "")
    assert found[FIRST].values == {}


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        ({"ranges": True}, "Range replay is not supported here"),
        ({"faults": {"known": "crash"}}, "died in phase 'count'"),
        ({"faults": {"known": "raise"}}, "ValueError: planted"),
        ({"faults": {"known": "unseen"}}, "no kernel in the case's range"),
    ],
)
def test_where_ranges_cannot_be_counted_it_says_why_and_the_others_are(fake, chosen, reason):
    fake(**chosen)
    found = count(CASES, REQUEST, launches=long_first)
    assert outcomes(found) == [Outcome.UNAVAILABLE, Outcome.OK, Outcome.OK]
    assert reason in (found[FIRST].reason or "")


def test_where_ranges_cannot_be_counted_what_has_few_launches_is_counted_one_by_one(fake):
    fake(ranges=True)
    found = count(CASES, REQUEST, launches=lambda c: 80_000 if c.case_id == FIRST else 1_000)
    assert outcomes(found) == [Outcome.UNAVAILABLE, Outcome.OK, Outcome.OK]
    assert found[SECOND].method == "ncu-kernel-replay"
    assert found[SECOND].details["launches"] == 2


def test_ranges_are_divided_among_children_by_their_launches():
    launches = {"a": 80_000, "b": 80_000, "c": 240_000, "d": 1_000, "e": 150_000, "f": 40_000}
    assert counters._grouped(list(launches), launches) == [
        ["a", "b"],
        ["c"],
        ["d", "e", "f"],
    ]
    assert counters._grouped([], {}) == []


@pytest.mark.parametrize("lose", [True, False])
def test_a_crash_within_a_range_loses_no_other_case(fake, lose):
    fake(faults={SECOND: "crash"}, lose=lose)
    found = count(CASES, REQUEST, launches=lambda case: 80_000)
    assert outcomes(found) == [Outcome.OK, Outcome.CRASHED, Outcome.OK]


def test_too_many_launches_are_skipped_before_anything_starts(fake):
    found = count(CASES[:2], REQUEST, launches=lambda c: 10**6 if c.case_id == FIRST else 3)
    assert [found[name].outcome for name in (FIRST, SECOND)] == [Outcome.SKIPPED, Outcome.OK]
    assert "1,000,000 launches" in (found[FIRST].reason or "")


def test_without_ncu_or_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = count(CASES, REQUEST)
    assert outcomes(found) == [Outcome.UNAVAILABLE] * 3
    assert "not on PATH" in (found[FIRST].reason or "")
    cpu = replace(REQUEST, device=Device(kind=DeviceKind.CPU, name="cpu", memory_bytes=1))
    assert "on a GPU only" in (count(CASES[:1], cpu)[FIRST].reason or "")


def test_copies_are_counted_by_their_size(fake):
    found = counters.count_copies([4096, 8192], REQUEST)
    assert {size: c.values["dram_bytes"] for size, c in found.items()} == {4096: 4750, 8192: 4750}


def test_what_will_be_skipped_costs_nothing():
    assert counters.estimate_s(10**6) == 0
    assert 0 < counters.estimate_s(5) < counters.estimate_s(150)
    assert counters.estimate_s(1_000) < counters.estimate_s(150)  # as one range


def test_what_was_written_can_be_kept(fake, tmp_path: Path):
    found = counters.count_probes(
        [{"id": "r", "read_bytes": 4096}, {"id": "w", "write_bytes": 4096}],
        replace(REQUEST, keep=tmp_path / "kept"),
    )
    assert [found[name].outcome for name in ("r", "w")] == [Outcome.OK] * 2
    kept = {path.name for path in (tmp_path / "kept").iterdir()}
    assert kept == {"2-ncu.log", "2-output.txt", "2-report.jsonl", "2-request.json"}


def test_the_command_leaves_clocks_and_caches_alone():
    command = ncu.command("ncu", Path("log"), ["abc"], ["program"])
    pairs = list(itertools.pairwise(command))
    assert ("--clock-control", "none") in pairs
    assert ("--cache-control", "none") in pairs
    included = [value for option, value in pairs if option == "--nvtx-include"]
    names = [f"mambench-{name}-{part}" for name in ("prime", "abc") for part in ("run", "drain")]
    assert included == names
    # A slash would mean the ranges of one thread, and autograd has threads of its own.
    assert not any(sign in name for name in included for sign in "/@,[]*+")


def test_more_cases_than_a_command_line_holds_take_several_children(fake):
    assert outcomes(count(CASES, replace(REQUEST, per_child=2))) == [Outcome.OK] * 3


def test_a_field_may_span_lines_and_messages_may_stand_between_rows():
    header = '"ID","Process ID","Range","Kernel Name","Metric Name","Metric Unit","Metric Value"'
    ranges = '"0:<default domain>:other\n1:<default domain>:mambench-abc-run:none"'
    text = "\n".join(
        [
            "==PROF== Connected",
            header,
            f'"0","1",{ranges},"k","dram__bytes_read.sum","byte","1,024"',
            "==WARNING== something",
            f'"0","1",{ranges},"k","dram__bytes_write.sum","Kbyte","0.5"',
        ]
    )
    (kernel,) = ncu.parse(text)["abc"]["run"]
    assert (kernel.read_bytes, kernel.write_bytes, kernel.time_s) == (1024, 500, None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('"ID","Kernel Name"\n"0","k"', "lacks the columns Metric Name"),
        (
            '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
            '"0","stray","dram__bytes_read.sum","byte","1"',
            "no range for the kernel stray",
        ),
    ],
)
def test_a_table_of_another_form_is_refused(text: str, says: str):
    with pytest.raises(ncu.FormatError, match=says):
        ncu.parse(text)
