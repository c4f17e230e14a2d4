"""What a token adds to memory: slopes between lengths, by part."""

import pytest

from mambench.harness.analysis.results import Analysis, Result
from mambench.harness.analysis.runs import Source
from mambench.harness.spec import Case, DeviceKind, DType, Family, Outcome, Pass, Problem
from mambench.reports import growth


def result(name, seqlen, *, peak, out=0, inputs=0, extra=None, batch=1, **fields):
    implementation, _, variant = name.partition(":")
    problem = Problem(
        family=Family.S6, batch=batch, seqlen=seqlen, d_inner=64, d_state=16, ngroups=1
    )
    pass_ = Pass.FORWARD if seqlen else Pass.DECODE
    case = Case(
        implementation=implementation,
        variant=variant,
        problem=problem,
        pass_=pass_,
        dtype=DType.BF16,
    )
    values = {"source": "a", "run_id": "r", "outcome": Outcome.OK, "peak_memory_bytes": peak}
    held = {"input_bytes": inputs, "output_bytes": out}
    return Result(case=case, values=held, extra_memory_bytes=extra, **values | fields)


def table(*results, **options):
    source = Source(key="a", label="a GPU", kind=DeviceKind.CUDA, device_name="a GPU", runs=())
    return growth.table(Analysis(sources=(source,), results=results), **options)


KIB = 1024
LARGEST = {"memory": {"largest": [{"name": "u", "share": 0.4}, {"name": "tiny", "share": 0.001}]}}


def test_a_token_adds_what_lies_between_the_shortest_and_the_longest():
    text = table(
        result("scan:x", 100, peak=900 * KIB, out=100 * KIB, inputs=200 * KIB, extra=700 * KIB),
        result(
            "scan:x",
            300,
            peak=2900 * KIB,
            out=300 * KIB,
            inputs=600 * KIB,
            extra=2300 * KIB,
            found=LARGEST,
        ),
        result("scan:x", 200, peak=10**9),  # in between: not asked
        result("fused:x", 100, peak=300 * KIB, out=100 * KIB, inputs=200 * KIB, extra=100 * KIB),
        result("fused:x", 300, peak=900 * KIB, out=300 * KIB, inputs=600 * KIB, extra=300 * KIB),
        result("once:x", 100, peak=1),
    )
    rows = text.splitlines()[4:]
    assert rows == [
        "| forward | s6 fused:x B=1 N=16 | 100 to 300 | 3.00 KiB | 2.00 KiB | 1.00 KiB | \u2013 "
        "| 0 B | \u2013 |",
        "| forward | s6 scan:x B=1 N=16 | 100 to 300 | 10.0 KiB | 2.00 KiB | 1.00 KiB | \u2013 "
        "| 7.00 KiB | u 40% |",
    ]


def test_what_has_no_length_does_not_grow_and_a_failure_counts_nowhere():
    text = table(
        result("step:x", None, peak=5 * KIB),
        result("fails:x", 100, peak=KIB),
        result("fails:x", 200, peak=2 * KIB, outcome=Outcome.OOM),
    )
    (row,) = text.splitlines()[4:]
    assert row.startswith("| decode | s6 step:x B=1 N=16 | any | 0 B | 0 B |")


def test_batches_are_apart_and_can_be_chosen():
    runs = [
        result("scan:x", length, peak=batch * length * KIB, batch=batch)
        for batch in (1, 8)
        for length in (100, 200)
    ]
    assert [line.split("|")[4].strip() for line in table(*runs).splitlines()[4:]] == [
        "1.00 KiB",
        "8.00 KiB",
    ]
    assert len(table(*runs, batch=8).splitlines()) == 5


def test_without_two_lengths_it_says_so():
    assert table(result("scan:x", 100, peak=1)) == "No memory was measured at two lengths."


@pytest.mark.parametrize("part", ["inputs", "beside results"])
def test_what_was_not_measured_is_no_zero(part):
    first, last = (result("scan:x", n, peak=1, extra=None) for n in (1, 2))
    first.values.clear()
    assert growth.slope((first, last), growth.PARTS[part]) is None
