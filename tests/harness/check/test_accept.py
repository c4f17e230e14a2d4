"""Accepted regressions: what they cover, and until when."""

from datetime import date
from pathlib import Path

import pytest
from check_rounds import CASES

from mambench.harness.check import accept
from mambench.harness.errors import UsageError
from mambench.harness.verdict import Assessment, Kind, Point, Verdict

TODAY = date(2026, 6, 1)
ENTRY = "- case: '{case}'\n  reason: safer\n  expires: {expires}\n"


def regressed(metric: str = "time_s", verdict: Verdict = Verdict.REGRESSED) -> Point:
    return Point(kind=Kind.CASE, name=CASES[0].label, metric=metric, verdict=verdict, case=CASES[0])


def applied(tmp_path: Path, text: str, *points: Point) -> Assessment:
    path = tmp_path / "accepted.yaml"
    path.write_text(text)
    return accept.apply(Assessment(points=points), accept.read(path), TODAY)


def test_a_live_entry_accepts_and_says_why(tmp_path: Path):
    found = applied(tmp_path, ENTRY.format(case="a:torch *L=256*", expires=TODAY), regressed())
    assert found.points[0].accepted == "safer (until 2026-06-01)"
    assert found.counts()[Verdict.REGRESSED] == 0
    assert not found.notes


def test_an_expired_entry_does_not_count_and_is_said(tmp_path: Path):
    found = applied(tmp_path, ENTRY.format(case="*", expires="2026-05-31"), regressed())
    assert found.points[0].accepted is None
    assert found.counts()[Verdict.REGRESSED] == 1
    assert "expired on 2026-05-31" in found.notes[0]


@pytest.mark.parametrize("point", [regressed("peak_memory_bytes"), regressed(verdict=Verdict.SAME)])
def test_an_entry_covers_its_metric_and_only_regressions(tmp_path: Path, point: Point):
    text = ENTRY.format(case="*", expires=TODAY) + "  metric: time_s\n"
    found = applied(tmp_path, text, point)
    assert found.points[0].accepted is None
    assert "covers no regression: remove it" in found.notes[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- case: '*'\n  expires: 2026-01-01\n", "entry 1: lacks reason"),
        ("- case: '*'\n  reason: x\n", "lacks expires"),
        ("- case: '*'\n  reason: x\n  expires: soon\n", "must be a date"),
        ("- case: '*'\n  reason: x\n  expires: 2026-01-01\n  extra: 1\n", "unknown field 'extra'"),
        ("case: x\n", "expected a list"),
        ("- x\n", "expected a mapping"),
        ("- [\n", "is not YAML"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, said: str):
    with pytest.raises(UsageError, match=said):
        applied(tmp_path, text)


@pytest.mark.parametrize(
    ("point", "name"),
    [
        (regressed("peak_memory_bytes"), f"{CASES[0].label} [peak_memory_bytes]"),
        (
            Point(kind=Kind.EXPONENT, name="a", metric="time_s", verdict=Verdict.REGRESSED),
            "scaling of a",
        ),
        (
            Point(kind=Kind.FAMILY, name="a:torch b", metric="time_s", verdict=Verdict.REGRESSED),
            "family a:*",
        ),
    ],
)
def test_a_name_is_written_as_in_the_report(tmp_path: Path, point: Point, name: str):
    found = applied(tmp_path, ENTRY.format(case=name, expires=TODAY), point, regressed())
    assert [p.accepted is not None for p in found.points] == [True, False]
    assert not found.notes


def test_an_empty_file_accepts_nothing(tmp_path: Path):
    assert applied(tmp_path, "", regressed()).points[0].accepted is None
