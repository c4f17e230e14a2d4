"""What a check prints and writes, and its exit codes."""

import json
import os
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from check_rounds import ALL, CASES, case, evidence, observation, side

from mambench.harness.check import report as formats
from mambench.harness.check.conclusion import CheckReport
from mambench.harness.check.judge import assess
from mambench.harness.check.rule import Rule
from mambench.harness.spec import Outcome
from mambench.harness.verdict import Assessment, Kind, Point, Verdict


def a_point(verdict: Verdict, number: int = 0, **more: object) -> Point:
    values = {"change_frac": 0.07, "smallest_seen_frac": 0.03, "low_frac": 0.05, "high_frac": 0.09}
    if verdict in (Verdict.MISSING, Verdict.NEW, Verdict.FAILED):
        values = {}
    point = Point(
        kind=Kind.CASE,
        name=f"{CASES[number % len(CASES)].label} {number}",
        metric="time_s",
        verdict=verdict,
        case=CASES[number % len(CASES)],
        base=1e-3,
        head=1.07e-3,
        **values,
    )
    return replace(point, **more)


def report(*points: Point, **more: object) -> CheckReport:
    same = a_point(Verdict.SAME, 11)
    values: dict[str, object] = {
        "title": "Performance of head against base",
        "assessment": Assessment(points=(same, *points)),
        "facts": {"base": "main (abc)", "head": "worktree"},
        "wall_s": 12.5,
    }
    return CheckReport(**{**values, **more})


BLIND = Assessment(points=(a_point(Verdict.SAME, smallest_seen_frac=0.2),))
PENDING = Assessment(points=(a_point(Verdict.SAME),), suspects=frozenset({"abc"}))
EXITS = {
    "all the same": (report(), 0),
    "improved": (report(a_point(Verdict.IMPROVED)), 0),
    "new": (report(a_point(Verdict.NEW)), 0),
    "inconclusive": (report(a_point(Verdict.INCONCLUSIVE)), 0),
    "regressed": (report(a_point(Verdict.REGRESSED)), 1),
    "regressed and failed": (report(a_point(Verdict.REGRESSED), a_point(Verdict.FAILED)), 1),
    "failed": (report(a_point(Verdict.FAILED)), 4),
    "missing": (report(a_point(Verdict.MISSING)), 4),
    "unstable": (report(a_point(Verdict.UNSTABLE)), 3),
    "unstable call time": (report(a_point(Verdict.UNSTABLE, metric="call_time_s")), 0),
    "accepted": (report(a_point(Verdict.REGRESSED, accepted="meant")), 0),
    "blind": (report(assessment=BLIND), 3),
    "suspects not measured again": (report(assessment=PENDING), 3),
    "nothing compared": (report(assessment=Assessment(points=(a_point(Verdict.NEW),))), 4),
    "nothing at all": (report(assessment=Assessment(points=())), 4),
    "a problem": (report(problem="another machine"), 4),
    "not judged": (report(a_point(Verdict.REGRESSED), judged=False), 0),
    "nothing is to fail": (report(a_point(Verdict.REGRESSED), fail_on=()), 0),
    "nothing is to fail, and nothing compared": (
        report(assessment=Assessment(points=()), fail_on=()),
        4,
    ),
    "only missing is to fail": (report(a_point(Verdict.REGRESSED), fail_on=("missing",)), 0),
    "new is to fail": (report(a_point(Verdict.NEW), fail_on=("new",)), 4),
}


@pytest.mark.parametrize("name", EXITS)
def test_exit_codes(name: str):
    made, expected = EXITS[name]
    assert made.exit_code == expected, made.conclusion


@pytest.mark.parametrize("name", EXITS)
def test_every_format_says_how_it_ended(name: str):
    made, code = EXITS[name]
    assert made.conclusion in formats.text(made)
    assert made.conclusion.split("*")[0] in formats.markdown(made)
    told = json.loads(json.dumps(formats.as_json(made), allow_nan=False))
    assert (told["exit_code"], told["conclusion"]) == (code, made.conclusion)
    suite = ElementTree.fromstring(formats.junit(made)).find("testsuite")
    assert suite is not None
    bad = suite.findall("testcase/failure") + suite.findall("testcase/error")
    assert bool(bad) == (code != 0)
    assert int(suite.get("failures", "")) + int(suite.get("errors", "")) == len(bad)
    assert int(suite.get("tests", "")) == len(suite.findall("testcase"))
    assert formats.markdown(made)[3] == {0: "✅", 3: "⚠️"[0]}.get(code, "❌")
    last = list(formats.annotations(made))[-1]
    assert last.startswith("::error" if code else "::notice")


def test_junit_has_a_case_per_point_with_the_reason_and_the_command():
    bad = a_point(
        Verdict.REGRESSED, notes=("SM clock: 1980 -> 1410 MHz",), command="check <one> & more"
    )
    suite = ElementTree.fromstring(formats.junit(report(bad))).find("testsuite")
    assert suite is not None
    node = suite.find("testcase[failure]")
    assert node is not None
    assert node.get("name") == bad.name
    failure = node.find("failure")
    assert failure is not None
    assert "1410 MHz" in (failure.text or "")
    assert "check <one> & more" in (failure.text or "")


def test_markdown_stays_below_64_kb_and_keeps_the_worst():
    many = [
        a_point(Verdict.REGRESSED, n, notes=("x" * 300, "é" * 300), command="y" * 200)
        for n in range(400)
    ]
    worst = a_point(Verdict.REGRESSED, 1, change_frac=0.9)
    text = formats.markdown(report(*many, worst))
    assert len(text.encode()) < 64 * 1024
    assert "+90.0%" in text
    assert "further points are in the JSON" in text
    assert text.count("<details>") == text.count("</details>")


def test_markdown_of_a_table_keeps_its_columns():
    odd = a_point(Verdict.REGRESSED, reason="a | b\nc <script>")
    rows = [r for r in formats.markdown(report(odd)).splitlines() if r.startswith("|")]
    assert {r.replace("\\|", "").count("|") for r in rows} == {8}
    assert "<script>" not in formats.markdown(report(odd))


def test_an_accepted_regression_looks_like_one_everywhere():
    meant = a_point(Verdict.REGRESSED, 1, accepted="safer", change_frac=0.9)
    not_meant = a_point(Verdict.REGRESSED, 2)
    made = report(meant, not_meant)
    assert [p.accepted for p in made.ordered()[:2]] == [None, "safer"]
    assert "REGRESSED (ACCEPTED)" in formats.text(made)
    assert "| ☑️ regressed (accepted) |" in formats.markdown(made)
    assert formats.markdown(made).count("🔴") == 1


def test_unstable_call_times_are_counted_and_hide_nothing():
    host = [a_point(Verdict.UNSTABLE, n, metric="call_time_s", reason="busy") for n in range(3)]
    made = report(*host, a_point(Verdict.UNSTABLE, 4))
    assert made.conclusion.endswith(
        "0 regressed, 1 unstable, 1 same; 3 call times too unstable to judge."
    )
    assert "call_time_s" not in formats.text(made)
    assert "call_time_s" in formats.text(made, everything=True)
    assert len(list(formats.annotations(made))) == 2
    text = formats.markdown(made)
    assert text.count("call\\_time\\_s") == 3
    assert text.count("<details>") == 1
    assert made.ordered()[-1].tolerated


def test_a_blind_run_says_what_to_do_and_what_it_could_promise():
    text = formats.text(EXITS["blind"][0])
    assert "5.0% was promised" in text
    assert "--rounds" in text
    assert "--promise 20." in text
    wild = Assessment(points=(a_point(Verdict.UNSTABLE, smallest_seen_frac=0.9),))
    assert "--promise" not in report(assessment=wild).seen  # that is unstable all the same
    for name, said in (("unstable", "too unstable"), ("suspects not measured again", "for want")):
        assert said in EXITS[name][0].conclusion


@pytest.mark.parametrize(
    ("metric", "said"),
    [("time_s", "2 s"), ("tokens_per_s", "2 tokens/s"), ("peak_memory_bytes", "2 B"),
     ("kernel_count", "2"), ("barriers", "2")],
)  # fmt: skip
def test_quantities_have_their_units(metric: str, said: str):
    assert formats.quantity(2.0, metric) == said


def test_where_nothing_was_compared_it_says_what_there_was():
    failed = report(assessment=Assessment(points=(a_point(Verdict.FAILED),)))
    assert failed.conclusion.endswith("measured on both sides: 1 failed.")
    assert report(assessment=Assessment(points=())).conclusion.endswith("on both sides.")


def test_budgets_that_judge_nothing_say_so():
    alone = a_point(Verdict.MISSING, kind=Kind.BUDGET)
    made = report(assessment=Assessment(points=(alone,)))
    assert (made.exit_code, "No budget found a case" in made.conclusion) == (4, True)


def test_what_is_not_judged_has_no_verdict_in_json_either():
    told = formats.as_json(EXITS["not judged"][0])
    assert (told["judged"], told["counts"]) == (False, {})
    assert {point["verdict"] for point in told["points"]} == {None}


def test_annotations_are_single_lines():
    bad = a_point(Verdict.REGRESSED, reason="100%\nslower", notes=("a: b, c",))
    lines = list(formats.annotations(report(bad)))
    assert len(lines) == 2
    assert lines[0].startswith("::error title=REGRESSED::")
    assert "100%25%0Aslower" in lines[0]


def test_what_a_run_could_have_seen_is_always_said():
    found = assess(evidence(side(ALL), side(ALL, seed=1), confirmed=0), Rule())
    rate = {"aa_rounds": 10, "cases": 12, "simulated_checks": 400, "alarms": 0, "bound_95": 0.007}
    rate["found"] = {"0.05": 0.96}
    text = formats.text(report(assessment=found, alarm_rate=rate))
    assert "In nine of ten cases a slowdown of" in text
    assert "0 of 400 checks of equal code" in text
    assert "false-alarm rate is not known" in formats.markdown(report(assessment=found))


def test_a_failed_case_keeps_its_reason_everywhere():
    bad = observation(case("z"), {}, outcome=Outcome.OOM, reason="out of memory", round=0)
    found = assess(evidence(side(ALL), [*side(ALL, seed=1), bad], confirmed=0), Rule())
    made = report(assessment=found)
    assert made.exit_code == 4
    for text in (formats.text(made), formats.markdown(made), formats.junit(made)):
        assert "out of memory" in text


@pytest.mark.skipif("NO_COLOR" in os.environ, reason="colour is switched off here")
def test_colour_is_for_terminals():
    from mambench.harness.cli import check as cli_check

    made = report(a_point(Verdict.REGRESSED))
    assert "\x1b[" not in formats.text(made)
    assert "\x1b[" in cli_check.coloured(formats.text(made))
