"""Sentences and small tables say what the rows hold."""

from collections.abc import Callable
from dataclasses import replace

from mambench.harness.analysis.intervals import median_interval
from mambench.harness.analysis.results import Analysis, Result
from mambench.harness.analysis.runs import Source, make_run
from mambench.harness.curves import Crossover, CrossoverKind
from mambench.harness.spec import Case, DType, Family, Level, Outcome, Pass, Problem
from mambench.reports import names, rows, summary

LENGTHS = (512, 1024, 2048, 4096, 8192)
RUN = make_run({"run_id": "r", "device": {"kind": "cuda", "name": "Fixture"}})


def results(
    name: str, family: Family, time: Callable[[int], float | None], level: Level = Level.OP
) -> list[Result]:
    found = []
    for seqlen in LENGTHS:
        problem = Problem(
            family=family,
            level=level,
            batch=1,
            seqlen=seqlen,
            d_inner=64,
            d_model=32 if level is Level.BLOCK else None,
            d_state=None if family is Family.ATTENTION else 16,
        )
        case = Case(
            implementation=name, variant="v", problem=problem, pass_=Pass.FORWARD, dtype=DType.BF16
        )
        value = time(seqlen)
        samples = () if value is None else tuple(value * (1 + 0.001 * i) for i in range(-5, 6))
        result = Result(
            source=RUN.source,
            run_id="r",
            case=case,
            outcome=Outcome.OK if value else Outcome.OOM,
            reason=None if value else "too large",
            time_s=value,
            samples_s=samples,
            interval=median_interval(samples),
            peak_memory_bytes=1000 if value else None,
            weight_count=12345 if level is Level.BLOCK else None,
        )
        found.append(result)
    return found


def summarise(*groups: list[Result]) -> summary.SliceSummary:
    source = Source(
        key=RUN.source, label="Fixture", kind="cuda", device_name="Fixture", runs=(RUN,)
    )
    every = tuple(result for group in groups for result in group)
    made = rows.make(Analysis(sources=(source,), results=every))
    return summary.summarise_slice(made.slices[0])


def linear(seqlen: int) -> float:
    return 1e-8 * seqlen


def quadratic(seqlen: int) -> float:
    return 1e-8 * seqlen**2 / 3000


def test_an_overtaking_is_said_with_its_length():
    said = summarise(results("ssd", Family.SSD, linear), results("fa", Family.ATTENTION, quadratic))
    assert said.crossing == "ssd overtakes fa · v at L\u00a0≈\u00a03,000."
    assert "interpolated between 2,048 and 4,096" in said.evidence
    assert "At L = 8,192 ssd (d_state 16) is 2.73\u00d7 faster" in said.evidence
    assert said.headline == "Fastest: fa · v from L = 512 to 2,048; ssd from L = 4,096 to 8,192."


def test_none_in_range_is_said_both_ways():
    attention = results("fa", Family.ATTENTION, lambda n: 1e-9 * n)
    slower = summarise(results("ssd", Family.SSD, linear), attention)
    assert slower.crossing == "fa · v is faster than ssd from L = 512 to 8,192."
    assert slower.evidence.startswith("Crossover: none in the range")
    assert "10.0\u00d7 slower" in slower.evidence
    faster = summarise(results("ssd", Family.SSD, lambda n: 1e-10 * n), attention)
    assert faster.crossing == "ssd is faster than fa · v from L = 512 to 8,192."


def test_without_attention_nothing_is_claimed():
    said = summarise(results("ssd", Family.SSD, linear))
    assert said.crossing.startswith("Only ssd was asked for")
    assert "No attention was measured" in said.headline
    assert said.reference is None


def test_attention_that_failed_everywhere_is_no_reference():
    said = summarise(
        results("ssd", Family.SSD, linear), results("fa", Family.ATTENTION, lambda n: None)
    )
    assert said.reference is None
    assert said.crossing.startswith("ssd is the fastest at every measured length")
    assert "No attention was measured" in said.headline


def test_the_reference_is_the_attention_that_reaches_furthest_and_fastest():
    def short(n: int) -> float | None:
        return 1e-12 if n < 4096 else None

    said = summarise(
        results("short", Family.ATTENTION, short),
        results("slow", Family.ATTENTION, lambda n: 2 * quadratic(n)),
        results("good", Family.ATTENTION, quadratic),
        results("ssd", Family.SSD, linear),
    )
    assert said.reference is not None
    assert said.reference.label == "good · v"


def test_the_fastest_of_a_length_and_its_ties():
    said = summarise(
        results("a", Family.S6, linear),
        results("b", Family.S6, lambda n: linear(n) * 1.0005),
        results("c", Family.S6, lambda n: linear(n) * 2),
    )
    entry = said.lengths[0]
    assert entry.fastest is not None
    assert entry.fastest.label == "a"
    assert [row.label for row in entry.tied] == ["b"]
    assert said.headline.endswith("At L = 512, 1,024, 2,048, 4,096, 8,192 intervals overlap.")


def test_a_failed_case_is_in_its_cell_and_never_the_fastest():
    said = summarise(results("a", Family.S6, lambda n: None), results("b", Family.S6, linear))
    assert all(entry.fastest and entry.fastest.label == "b" for entry in said.lengths)
    assert {c.outcome for e in said.lengths for c in e.cells if c} == {Outcome.OK, Outcome.OOM}


def test_no_one_is_the_fastest_where_a_rival_was_not_measured():
    everywhere = results("a", Family.S6, linear)
    rival = results("b", Family.SSD, lambda n: 1.5 * linear(n))[1:-1]
    hopeless = results("c", Family.S6, lambda n: 9 * linear(n))[2:]
    said = summarise(everywhere, rival, hopeless)
    ends = (said.lengths[0], said.lengths[-1])
    assert [entry.fastest for entry in ends] == [None, None]
    assert [entry.unasked for entry in said.lengths] == [("b",), (), (), (), ("b",)]
    assert {entry.fastest.label for entry in said.lengths if entry.fastest} == {"a"}
    assert said.crossing == (
        "a is the fastest at every such length, 1,024 to 4,096. "
        "Left out: L = 512, 8,192, where not all rivals were measured."
    )


def test_attention_is_a_rival_even_where_it_comes_late():
    attention = results("fa", Family.ATTENTION, lambda n: 9 * linear(n))[2:]
    said = summarise(results("ssd", Family.SSD, linear), attention)
    assert said.lengths[0].fastest is None
    assert said.lengths[2].fastest.label == "ssd"


def test_where_no_length_was_asked_of_all_no_one_wins():
    early = results("a", Family.S6, linear)
    both = results("b", Family.SSD, linear)
    said = summarise(early[:2], both[2:], results("c", Family.S6, lambda n: 9 * linear(n)))
    assert said.crossing == "No length was asked of all rivals, so that none is the fastest."


def test_the_reason_is_how_both_times_grow(gpu_report):
    said = summary.summarise_slice(gpu_report.slices[0])
    grows = {s.series.label: s.exponent.value for s in said.series}
    for label in (said.reference.label, said.crossing.split(" overtakes ")[0]):
        assert f"{grows[label]:.2f}" in said.evidence.split("Why: ")[1]


def test_equal_memory_is_neither_lower_nor_a_crossover():
    said = summarise(results("ssd", Family.SSD, linear), results("fa", Family.ATTENTION, quadratic))
    assert "its peak memory the same" in said.evidence
    assert "takes less" not in said.evidence


def test_blocks_say_their_weights():
    said = summarise(
        results("ssd", Family.SSD, linear, Level.BLOCK),
        results("fa", Family.ATTENTION, quadratic, Level.BLOCK),
    )
    assert said.weights == (
        "fa · v: one transformer layer, 12.3 k weights; ssd: 2 Mamba blocks, 12.3 k weights."
    )


def test_failures_are_grouped(gpu_report):
    found = summary.failures(gpu_report)
    naive = [f for f in found if f.label == "naive_recurrence · s6"]
    assert [f.seqlens for f in naive] == [(32768, 65536, 131072)] * 3
    total = sum(row.outcome is not Outcome.OK for row in gpu_report.rows)
    assert sum(len(f.case_ids) for f in found) == total


def test_cells_of_crossovers():
    at = Crossover(kind=CrossoverKind.AT, range=(512, 8192), seqlen=1847.0, interval=(1790, 1920))
    assert summary.crossing_text(at) == "L\u00a0≈\u00a01,850"
    assert summary.crossing_note(at) == "95 % interval 1,790 to 1,920"
    open_ended = replace(at, interval=(1790, float("inf")))
    assert summary.crossing_note(open_ended) == "its interval leaves the measured range"
    none = Crossover(kind=CrossoverKind.INCUMBENT_FASTER, range=(512, 8192))
    assert (summary.crossing_text(none), summary.crossing_note(none)) == (
        "none in range",
        "L = 512 to 8,192",
    )


def test_there_is_no_winner_where_only_one_of_several_was_asked():
    alone = results("a", Family.S6, linear)
    said = summarise(alone, results("b", Family.S6, lambda n: 2 * linear(n))[1:])
    assert said.lengths[0].fastest is None
    assert all(entry.fastest and entry.fastest.label == "a" for entry in said.lengths[1:])
    assert summarise(alone).lengths[0].fastest is not None


def test_names_are_explained_once_for_what_was_measured(gpu_report):
    said = names.explain(gpu_report.slices)
    assert "flash_attention: causal attention (fa4 is FlashAttention 4)" in said
    assert "FlashAttention 2" not in said
    assert said.count("ssd, naive_recurrence: Mamba-2") == 1
    assert "training: forward and backward" in said
    assert "decode" not in said


def test_names_of_one_architecture_are_said_beside_the_answer(gpu_report):
    said = names.brief(gpu_report.slices)
    assert set(said.rstrip(".").split("; ")) == {
        "selective_scan, associative_scan: Mamba-1",
        "ssd: Mamba-2",  # what computes both, the recurrence step by step, is left out
        "fa4: FlashAttention 4",
    }
    assert names.brief(()) == ""
