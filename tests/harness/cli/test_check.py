"""The commands as they are typed: mistakes, files, formats, exit codes."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mambench.harness.check import commands as checking
from mambench.harness.check.commands import Request
from mambench.harness.check.conclusion import CheckReport
from mambench.harness.cli import check as cli_check
from mambench.harness.errors import UsageError
from mambench.harness.spec import Case, DType, Family, Pass, Problem
from mambench.harness.verdict import Assessment, Kind, Point, Verdict

CASE = Case(
    implementation="a",
    variant="torch",
    problem=Problem(family=Family.ATTENTION, batch=1, seqlen=64, d_inner=64, headdim=32),
    pass_=Pass.FORWARD,
    dtype=DType.FP32,
)
SLOWER = Point(
    kind=Kind.CASE,
    name=CASE.label,
    metric="time_s",
    verdict=Verdict.REGRESSED,
    case=CASE,
    change_frac=0.2,
    smallest_seen_frac=0.03,
)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Request]:
    """Stand in an empty repository, and find a regression whatever is asked for."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.chdir(tmp_path)
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)
    seen: list[Request] = []

    def check(request: Request, progress: Any) -> tuple[CheckReport, Path]:
        seen.append(request)
        report = CheckReport(
            title="planted",
            assessment=Assessment(points=(SLOWER,), promise_frac=request.promise_frac),
            facts={},
            fail_on=request.fail_on,
        )
        return report, request.output or tmp_path / "out"

    monkeypatch.setattr(checking, "check", check)
    return seen


def call(*options: str) -> Result:
    return CliRunner().invoke(cli_check.check, [*options])


def test_a_regression_exits_with_1_and_leaves_its_files(asked: list[Request], tmp_path: Path):
    done = call("--base", "main", "--rounds", "7", "--promise", "12", "-s", "quick")
    assert done.exit_code == 1
    assert "REGRESSED" in done.stdout
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "check.json",
        "junit.xml",
        "summary.md",
    }
    request = asked[0]
    assert (request.rule.rounds, request.promise_frac) == (7, 0.12)
    assert (request.wanted.base, request.wanted.head) == ("main", "worktree")
    assert request.wanted.repository == tmp_path.resolve()


def test_what_cannot_begin_leaves_no_folder_unless_asked_for(
    asked: list[Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "runs" / "x"

    def check(request: Request, progress: Any) -> tuple[CheckReport, Path]:
        report = CheckReport(title="", assessment=Assessment(points=()), facts={}, problem="none")
        return report, request.output or folder

    monkeypatch.setattr(checking, "check", check)
    done = call("--baseline", "nosuch")
    assert (done.exit_code, "Not judged: none" in done.stdout) == (4, True)
    assert not folder.parent.exists()
    assert call("--baseline", "nosuch", "-o", str(tmp_path / "asked")).exit_code == 4
    assert (tmp_path / "asked" / "junit.xml").is_file()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "either --base REF or --baseline"),
        (("--base", "a", "--baseline", "b"), "either --base REF or --baseline"),
        (("--base", "a", "--fail-on", "regresed"), "Did you mean 'regressed'"),
        (("--base", "a", "--accept", "nothing.yaml"), "cannot be read"),
        (("--base", "a", "--budgets", "nothing.yaml"), "cannot be read"),
        (("--base", "a", "--static", "--budgets", "b.yaml"), "--static measures nothing"),
    ],
)
def test_a_mistake_is_a_usage_error(asked: list[Request], options: tuple[str, ...], said: str):
    done = call(*options)
    assert isinstance(done.exception, UsageError)
    assert said in str(done.exception)
    assert not asked


def test_outside_of_a_repository_is_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert isinstance(call("--base", "main").exception, UsageError)


def test_fail_on_chooses_what_fails(asked: list[Request]):
    assert call("--base", "main", "--fail-on", "none").exit_code == 0
    assert call("--base", "main", "--fail-on", "missing, failed").exit_code == 0
    assert call("--base", "main", "--fail-on", "missing,regressed").exit_code == 1


def test_json_is_all_that_goes_to_standard_output(asked: list[Request]):
    done = call("--base", "main", "--format", "json", "-q")
    assert json.loads(done.stdout)["counts"]["regressed"] == 1


def test_github_gets_annotations_and_a_summary_only_in_its_actions(
    asked: list[Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    summary = tmp_path / "summary"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    assert "::error" not in call("--base", "main").stdout
    assert not summary.exists()
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    assert "::error title=REGRESSED::" in call("--base", "main").stdout
    assert "**Regressed" in summary.read_text()
