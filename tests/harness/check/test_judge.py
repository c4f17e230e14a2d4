"""Verdicts from observations: each kind, and everything that must not pass silently."""

import math
from dataclasses import replace

import pytest
from check_rounds import ALL, CASES, LENGTHS, evidence, observation, side

from mambench.harness.check.conclusion import CheckReport
from mambench.harness.check.judge import Stages, assess
from mambench.harness.check.rounds import AA
from mambench.harness.check.rule import Rule
from mambench.harness.records import Observation
from mambench.harness.spec import Case, Outcome
from mambench.harness.verdict import Assessment, Kind, Point, Verdict

RULE = Rule()


def point(found: Assessment, name: str, metric: str = "time_s", kind: Kind = Kind.CASE) -> Point:
    matched = [p for p in found.points if name in p.name and p.metric == metric and p.kind is kind]
    assert len(matched) == 1, [p.name for p in found.points]
    return matched[0]


def verdicts(found: Assessment, metric: str = "time_s") -> set[Verdict]:
    return {p.verdict for p in found.points if p.metric == metric}


def slower(frac: float, which: Case):
    return lambda c: 1 + frac if c == which else 1.0


def test_equal_code_is_the_same_everywhere():
    found = assess(evidence(side(ALL), side(ALL, seed=1), confirmed=0), RULE)
    assert verdicts(found) == {Verdict.SAME}
    assert not found.suspects
    assert not found.blind
    assert found.smallest_seen_frac == pytest.approx(0.035, abs=0.01)


def test_a_slower_case_is_named_and_no_other():
    head = side(ALL, seed=1, factor=slower(0.08, CASES[5]))
    found = assess(evidence(side(ALL), head), RULE)
    regressed = [p for p in found.points if p.verdict is Verdict.REGRESSED]
    assert [p.case for p in regressed if p.kind is Kind.CASE] == [CASES[5]]
    one = point(found, CASES[5].label)
    assert one.change_frac == pytest.approx(0.08, abs=0.01)
    assert one.low_frac is not None
    assert one.high_frac is not None
    assert one.low_frac < one.change_frac < one.high_frac
    assert one.base == pytest.approx(1e-6 * CASES[5].problem.tokens, rel=0.01)
    # Its family's mean moved by 2 %, and says so too.
    assert {p.name for p in regressed if p.kind is Kind.FAMILY} <= {"b forward fp32"}


def test_a_slower_case_is_first_suspected_and_asked_for_again():
    head = side(ALL, seed=1, factor=slower(0.08, CASES[5]))
    found = assess(evidence(side(ALL), head, confirmed=0), RULE)
    assert CASES[5].case_id in found.suspects
    assert point(found, CASES[5].label).verdict is Verdict.INCONCLUSIVE
    assert Verdict.REGRESSED not in verdicts(found)


def test_a_slowdown_that_fresh_rounds_do_not_show_is_no_regression():
    first = [o for o in side(ALL, seed=1, factor=slower(0.08, CASES[5])) if o.round < 6]
    fresh = [o for o in side(ALL, seed=2) if o.round >= 6]
    found = assess(evidence(side(ALL), first + fresh), RULE)
    assert Verdict.REGRESSED not in verdicts(found)
    assert not found.suspects


def test_a_faster_case_is_improved():
    head = side(ALL, seed=1, factor=slower(-0.1, CASES[5]))
    found = assess(evidence(side(ALL), head, confirmed=0), RULE)
    assert point(found, CASES[5].label).verdict is Verdict.IMPROVED
    assert Verdict.REGRESSED not in verdicts(found)


@pytest.mark.parametrize("frac", [0.01, -0.01])
def test_one_per_cent_is_never_a_regression(frac: float):
    head = side(ALL, seed=1, factor=lambda _: 1 + frac)
    found = assess(evidence(side(ALL), head), RULE)
    assert verdicts(found) <= {Verdict.SAME, Verdict.INCONCLUSIVE, Verdict.IMPROVED}


def test_a_family_that_gets_slower_everywhere_by_little_is_seen():
    head = side(ALL, seed=1, factor=lambda c: 1.022 if c.implementation == "b" else 1.0)
    found = assess(evidence(side(ALL), head), RULE)
    family = point(found, "b forward fp32", kind=Kind.FAMILY)
    assert family.verdict is Verdict.REGRESSED
    assert family.change_frac == pytest.approx(0.022, abs=0.004)
    assert point(found, "a forward fp32", kind=Kind.FAMILY).verdict is not Verdict.REGRESSED
    assert all(p.verdict is not Verdict.REGRESSED for p in found.points if p.kind is Kind.CASE)


def tilted(frac: float):
    """Tilt one curve around its middle: `frac` between its ends."""

    def factor(c: Case) -> float:
        if c.implementation != "b" or c.problem.seqlen is None:
            return 1.0
        position = LENGTHS.index(c.problem.seqlen) / (len(LENGTHS) - 1) - 0.5
        return math.exp(position * math.log1p(frac))

    return factor


def test_an_exponent_that_moves_fails_though_no_case_does():
    head = side(ALL, seed=1, factor=tilted(0.045))
    found = assess(evidence(side(ALL), head), RULE)
    curve = point(found, "b:torch", kind=Kind.EXPONENT)
    assert curve.verdict is Verdict.REGRESSED
    assert curve.change_frac == pytest.approx(0.045, abs=0.012)
    assert all(p.verdict is not Verdict.REGRESSED for p in found.points if p.kind is Kind.CASE)


def test_an_exponent_that_moves_because_short_lengths_got_faster_is_no_regression():
    def factor(c: Case) -> float:
        return 0.85 if c.implementation == "b" and c.problem.seqlen == LENGTHS[0] else 1.0

    found = assess(evidence(side(ALL), side(ALL, seed=1, factor=factor)), RULE)
    assert point(found, "b:torch", kind=Kind.EXPONENT).verdict is not Verdict.REGRESSED


def test_noise_is_unstable_or_inconclusive_and_the_run_is_blind():
    found = assess(evidence(side(ALL, noise=0.3), side(ALL, seed=1, noise=0.3), confirmed=0), RULE)
    assert verdicts(found) <= {Verdict.UNSTABLE, Verdict.INCONCLUSIVE}
    assert found.blind


def test_a_case_that_only_one_side_has():
    base, head = side(ALL, cases=CASES[1:]), side(ALL, cases=CASES[:-1], seed=1)
    found = assess(evidence(base, head, confirmed=0), RULE)
    assert point(found, CASES[0].label).verdict is Verdict.NEW
    missing = point(found, CASES[-1].label)
    assert missing.verdict is Verdict.MISSING
    assert missing.reason == "the candidate has no such case"


@pytest.mark.parametrize("round", [0, 3])
def test_a_case_that_fails_in_any_round_has_failed(round: int):
    bad = observation(
        CASES[0], {}, round=round, outcome=Outcome.CRASHED, reason="killed", measurement="time"
    )
    head = [o for o in side(ALL, seed=1) if o.case != CASES[0] or o.round != round]
    found = assess(evidence(side(ALL), [*head, bad], confirmed=0), RULE)
    failed = point(found, CASES[0].label)
    assert failed.verdict is Verdict.FAILED
    assert failed.reason == "crashed: killed"


def test_a_round_that_the_base_lost_is_told():
    bad = observation(CASES[0], {}, round=3, outcome=Outcome.TIMEOUT, reason="late")
    base = [o for o in side(ALL) if o.case != CASES[0] or o.round != 3]
    found = assess(evidence([*base, bad], side(ALL, seed=1), confirmed=0), RULE)
    assert point(found, CASES[0].label).verdict is Verdict.UNSTABLE
    assert point(found, CASES[0].label).rounds == 4


def test_a_case_that_the_base_got_wrong_is_new():
    bad = observation(CASES[0], {}, round=0, outcome=Outcome.WRONG, reason="y is off")
    base = [o for o in side(ALL) if o.case != CASES[0]]
    found = assess(evidence([*base, bad], side(ALL, seed=1), confirmed=0), RULE)
    new = point(found, CASES[0].label)
    assert (new.verdict, new.reason) == (Verdict.NEW, "the base ended as wrong: y is off")


@pytest.mark.parametrize("value", [math.nan, None, 0.0, -1.0, math.inf])
@pytest.mark.parametrize("broken", ["base", "head"])
def test_what_is_no_time_is_a_failure(value: float | None, broken: str):
    def spoilt(found: list[Observation]) -> list[Observation]:
        return [
            replace(o, values={"time_s": value}) if (o.case, o.round) == (CASES[0], 2) else o
            for o in found
        ]

    base, head = side(ALL), side(ALL, seed=1)
    sides = (spoilt(base), head) if broken == "base" else (base, spoilt(head))
    found = assess(evidence(*sides, confirmed=0), RULE)
    failed = point(found, CASES[0].label)
    assert failed.verdict is Verdict.FAILED
    assert "no number in round 2" in (failed.reason or "")
    assert point(found, CASES[1].label).verdict is Verdict.SAME


@pytest.mark.parametrize("kept", [1, 3])
def test_unequal_counts_are_unstable_and_fail_the_check(kept: int):
    base = [o for o in side(ALL) if o.case != CASES[0] or o.round <= kept]
    found = assess(evidence(base, side(ALL, seed=1), confirmed=0), RULE)
    uneven = point(found, CASES[0].label)
    assert (uneven.rounds, uneven.verdict) == (kept, Verdict.UNSTABLE)
    assert f"{kept} rounds of the base and 5 of the candidate" in (uneven.reason or "")
    assert CheckReport(title="", assessment=found, facts={}).exit_code == 3


def test_a_slowdown_is_one_though_the_base_lost_a_round():
    base = [o for o in side(ALL) if o.case != CASES[5] or o.round != 2]
    found = assess(evidence(base, side(ALL, seed=1, factor=slower(0.2, CASES[5]))), RULE)
    assert point(found, CASES[5].label).verdict is Verdict.REGRESSED


def test_rounds_without_any_noise_are_judged():
    same, head = side(ALL, noise=0.0), side(ALL, noise=0.0, factor=slower(0.08, CASES[5]))
    assert verdicts(assess(evidence(same, same, confirmed=0), RULE)) == {Verdict.SAME}
    found = assess(evidence(same, head), RULE)
    regressed = {p.case for p in found.points if p.verdict is Verdict.REGRESSED and p.case}
    assert regressed == {CASES[5]}


def test_noise_of_another_way_to_time_is_not_used():
    pairs = {c.case_id: {"time_s": [[0.0, 0.5], [0.5, 0.0]] * 5} for c in CASES}
    smallest = {}
    for way in ("events", "perf_counter"):
        ways = {c.case_id: {"time_s": way} for c in CASES}
        more = {"stored": AA(pairs=pairs, methods=ways), "confirmed": 0}
        found = assess(evidence(side(ALL), side(ALL, seed=1), **more), RULE)
        smallest[way] = found.smallest_seen_frac
    assert smallest["events"] == pytest.approx(0.035, abs=0.015)
    assert smallest["perf_counter"] is None or smallest["perf_counter"] > 0.3


def test_too_few_rounds_are_inconclusive_and_blind():
    base, head = ([o for o in side(ALL, seed=n) if o.round <= 2] for n in (0, 1))
    found = assess(evidence(base, head, confirmed=0), RULE)
    assert verdicts(found) == {Verdict.INCONCLUSIVE}
    assert found.blind
    assert "2 comparable rounds" in (point(found, CASES[0].label).reason or "")


def test_times_of_two_methods_are_not_compared():
    head = [replace(o, method="events") if o.case == CASES[0] else o for o in side(ALL, seed=1)]
    found = assess(evidence(side(ALL), head, confirmed=0), RULE)
    other = point(found, CASES[0].label)
    assert other.verdict is Verdict.INCONCLUSIVE
    assert "perf_counter and events" in (other.reason or "")


def memory(found: list[Observation], sizes: list[int], asked: Case = CASES[0]) -> list[Observation]:
    kept = [o for o in found if o.case != asked or o.measurement != "memory"]
    return kept + [
        observation(asked, {"peak_memory_bytes": size}, measurement="memory", round=number)
        for number, size in enumerate(sizes)
    ]


MIB = 2**20


def test_more_memory_is_measured_again_and_then_regressed():
    base, head = memory(side(ALL), [64 * MIB] * 3), memory(side(ALL, seed=1), [80 * MIB] * 3)
    found = assess(evidence(base, head), RULE)
    assert point(found, CASES[0].label, "peak_memory_bytes").verdict is Verdict.REGRESSED
    once = assess(evidence(memory(base, [64 * MIB]), memory(head, [80 * MIB])), RULE)
    assert once.suspects == {CASES[0].case_id}
    assert point(once, CASES[0].label, "peak_memory_bytes").verdict is Verdict.INCONCLUSIVE


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([64 * MIB, 80 * MIB, 80 * MIB], Verdict.SAME),  # once as before: no regression
        ([65 * MIB] * 3, Verdict.SAME),
        ([40 * MIB] * 3, Verdict.IMPROVED),
    ],
)
def test_memory_within_its_tolerance(sizes: list[int], expected: Verdict):
    base, head = memory(side(ALL), [64 * MIB] * 3), memory(side(ALL, seed=1), sizes)
    found = assess(evidence(base, head), RULE)
    assert point(found, CASES[0].label, "peak_memory_bytes").verdict is expected


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([64 * MIB, 90 * MIB, 64 * MIB], Verdict.UNSTABLE),
        ([MIB, 2 * MIB, MIB], Verdict.SAME),  # a quarter more, and within the tolerated amount
    ],
)
def test_rounds_of_the_same_code_that_differ(sizes: list[int], expected: Verdict):
    base, head = memory(side(ALL), sizes), memory(side(ALL, seed=1), sizes)
    found = point(assess(evidence(base, head), RULE), CASES[0].label, "peak_memory_bytes")
    assert found.verdict is expected
    assert (found.reason is not None) == (expected is Verdict.UNSTABLE)


def test_more_memory_than_a_stored_run_is_confirmed_by_the_candidate_alone():
    base, head = memory(side(ALL), [64 * MIB]), memory(side(ALL, seed=1), [80 * MIB] * 3)
    made = evidence(base, head)
    asked = (CASES[0].label, "peak_memory_bytes")
    assert point(assess(made, RULE), *asked).verdict is Verdict.INCONCLUSIVE
    made = replace(made, base=replace(made.base, repeated=True))
    assert point(assess(made, RULE), *asked).verdict is Verdict.REGRESSED


def test_one_more_kernel_is_a_regression():
    def launches(found: list[Observation], count: int) -> list[Observation]:
        return found + [
            observation(CASES[0], {"kernel_count": count}, measurement="launches", round=r)
            for r in range(3)
        ]

    found = assess(evidence(launches(side(ALL), 5), launches(side(ALL, seed=1), 6)), RULE)
    assert point(found, CASES[0].label, "kernel_count").verdict is Verdict.REGRESSED


def test_a_case_without_a_length_has_no_curve_and_a_time():
    asked = [replace(c, problem=replace(c.problem, seqlen=None)) for c in CASES[:1]]
    timed = [
        [observation(asked[0], {"time_s": 1e-3 * x}, round=r) for r, x in enumerate(xs)]
        for xs in ([1, 1.01, 1, 0.99, 1.005, 1], [1, 1, 1.01, 1, 0.99, 1])
    ]
    found = assess(evidence(side(ALL) + timed[0], side(ALL, seed=1) + timed[1], confirmed=0), RULE)
    assert point(found, asked[0].label).change_frac is not None
    assert {p.name for p in found.points if p.kind is Kind.EXPONENT} == {
        f"{name}:torch attention/op forward B=1 D=64 fp32 over L" for name in "abc"
    }


def test_the_change_that_is_shown_lies_within_its_interval():
    head = [
        replace(o, values={"time_s": o.values["time_s"] * (1.1 if o.round <= 5 else 1.9)})
        if "time_s" in o.values
        else o
        for o in side(range(1, 10), seed=1)
    ]
    found = evidence(side(range(1, 10)), head, confirmed=0)
    found = assess(replace(found, stages=Stages(screening=tuple(range(1, 10)))), Rule())
    timed = [p for p in found.points if p.kind is Kind.CASE and p.metric == "time_s"]
    assert all(0.05 < p.change_frac < 0.15 for p in timed)
    assert all(p.low_frac <= p.change_frac <= p.high_frac for p in timed)
