"""The commands `check`, `compare` and `calibrate`. Imports only click at module level."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mambench.harness.cli import gate as cli_gate
from mambench.harness.cli import options
from mambench.harness.errors import UsageError

if TYPE_CHECKING:
    from mambench.harness.check.budgets import Budget
    from mambench.harness.check.commands import Request
    from mambench.harness.check.conclusion import CheckReport

FORMATS = ("text", "markdown", "json", "github")


def _verdicts() -> tuple[str, ...]:
    from mambench.harness.check.conclusion import FAILURES, NONE

    return (*map(str, FAILURES), NONE)


_side_options = options.all_of(
    click.option(
        "--build",
        metavar="COMMAND",
        help="Run at the root of each side before measuring, e.g. 'pip install --upgrade -t "
        ".bench .'.",
    ),
    click.option("--build-base", metavar="COMMAND", help="Instead of --build for the base."),
    click.option(
        *("--path", "path"),
        multiple=True,
        metavar="FOLDER",
        help="Import from this folder of each side, e.g. .bench.  [default: src and the root] "
        "Repeatable.",
    ),
    click.option(
        "--store",
        type=Path,
        metavar="DIR",
        help="Where this machine's noise is kept.  [default: the user's cache]",
    ),
    click.option("--wait", is_flag=True, help="Wait for the device if another run holds it."),
    click.option(
        "-o", "--output", type=Path, metavar="DIR", help="The folder.  [default: runs/<time>-...]"
    ),
    click.option("-q", "--quiet", is_flag=True, help="Show notes and the result only."),
)


@click.command(short_help="Did anything get slower or bigger than at another commit?")
@click.option(
    "--base", metavar="REF", help="The commit to compare with, or a folder (./PATH) that holds it."
)
@click.option("--baseline", type=Path, metavar="RUN_DIR", help="Compare with a stored run instead.")
@click.option(
    "--head",
    metavar="REF",
    default="worktree",
    help="The commit or folder to judge; worktree: the files as they are.  [default: worktree]",
)
@_side_options
@options.question_options
@options.settings_options
@click.option("--rounds", type=click.IntRange(min=3), metavar="N", help="[default: 5]")
@click.option(
    "--confirm-rounds",
    type=click.IntRange(min=3),
    metavar="N",
    help="Fresh rounds of each of the two confirmations.  [default: 8]",
)
@click.option(
    "--promise",
    type=click.FloatRange(min=0.1),
    default=5.0,
    metavar="PERCENT",
    help="Fail with 3 if a slowdown this large could have gone unseen.  [default: 5]",
)
@click.option(
    "--fail-on",
    metavar="VERDICT,...",
    help="What makes the check fail: regressed, failed, missing, unstable, inconclusive, new, "
    "blind (see --promise), or none.  [default: regressed,failed,missing,unstable,blind]",
)
@click.option("--accept", "accept_file", type=Path, metavar="FILE", help="Accepted regressions.")
@click.option(
    *("-f", "--format", "form"),
    type=options.Name("format", lambda: FORMATS),
    metavar="FORMAT",
    help="text, markdown, json or github on standard output; files of all go to the output "
    "folder.  [default: github in GitHub Actions, else text]",
)
@cli_gate.gate_options
@click.pass_context
def check(context: click.Context, **asked: Any) -> None:
    """Did anything get slower or bigger, or move more bytes? Compare two commits on this machine.

    Exit codes: 0 passed, 1 regressed, 2 a mistake in the command, 3 could not have seen the
    promised slowdown, 4 could not measure.
    """
    from mambench.harness.check import commands as checking
    from mambench.harness.check import progress as check_progress

    if asked["runs"]:
        report = cli_gate.judge_stored(asked, _fail_on)
        if asked["output"]:
            _write(report, asked["output"])
        _show(report, asked["form"])
        context.exit(report.exit_code)
    if (asked["base"] is None) == (asked["baseline"] is None):
        raise UsageError("name what to compare with: either --base REF or --baseline RUN_DIR.")
    promised = cli_gate.read_budgets(asked)  # a mistake in them is told before anything is measured
    if asked["static"]:
        report, folder = cli_gate.static_check(asked, _fail_on)
    else:
        cli_gate.refuse_without_static(asked)
        request = _request(asked, promised)
        with check_progress.make(quiet=asked["quiet"], environment=os.environ) as progress:
            report, folder = checking.check(request, progress)
    # What could not even begin leaves no folder, unless one was asked for.
    if kept := report.problem is None or asked["output"] is not None or folder.exists():
        _write(report, folder)
    _show(report, asked["form"])
    if kept:
        click.echo(f"results: {folder.resolve()}", err=True)
    context.exit(report.exit_code)


@click.command()
@click.argument("first", type=Path, metavar="RUN_A")
@click.argument("second", type=Path, metavar="RUN_B")
@click.option(
    *("-f", "--format", "form"),
    type=options.Name("format", lambda: FORMATS[:3]),
    default="text",
    metavar="FORMAT",
    help="text, markdown or json.  [default: text]",
)
def compare(first: Path, second: Path, form: str) -> None:
    """Show two runs side by side, without judging."""
    from mambench.harness.check import commands as checking

    _show(checking.compare(first, second), form, everything=True)


@click.command(short_help="Measure this machine's own noise, and keep it for `check`.")
@click.option(
    "--head", metavar="REF", default="worktree", help="The code to run.  [default: worktree]"
)
@_side_options
@options.question_options
@options.settings_options
@click.option("--rounds", type=click.IntRange(min=8), metavar="N", help="[default: 10]")
def calibrate(**asked: Any) -> None:
    """Measure this machine's own noise with the same code twice, and keep it for `check`."""
    from mambench.harness.check import commands as checking
    from mambench.harness.check import progress as check_progress

    request = _request({**asked, "base": asked["head"]})
    with check_progress.make(quiet=asked["quiet"], environment=os.environ) as progress:
        text, file = checking.calibrate(request, progress)
    click.echo(text)
    click.echo(f"kept: {file}")


def _request(asked: dict[str, Any], promised: "Sequence[Budget]" = ()) -> "Request":
    from mambench.harness.check import accept, sides
    from mambench.harness.check import commands as checking

    base = asked["base"] or sides.WORKTREE
    wanted = sides.Wanted(
        repository=sides.find_repository(Path.cwd(), base, asked["head"]),
        base=base,
        head=asked["head"],
        build=asked["build"],
        build_base=asked["build_base"],
        path=asked["path"],
        plugins=asked["plugins"],
    )
    accept_file = asked.get("accept_file")
    suite = asked["suite"]
    if suite is not None and Path(suite).is_file():
        suite = str(Path(suite).resolve())
    return checking.Request(
        asked={**asked, "suite": suite},
        wanted=wanted,
        output=asked["output"],
        baseline=asked.get("baseline"),
        store=asked["store"],
        rounds=asked["rounds"],
        confirm_rounds=asked.get("confirm_rounds"),
        time_budget_s=asked["time_budget"],
        promise_frac=asked.get("promise", 5.0) / 100,
        fail_on=_fail_on(asked.get("fail_on")),
        accepted=accept.read(accept_file) if accept_file else (),
        budgets=promised,
        wait=asked["wait"],
        program=checking.program(),
    )


def _fail_on(text: str | None) -> Sequence[str]:
    from mambench.harness.check.conclusion import DEFAULT_FAIL_ON, NONE
    from mambench.harness.errors import unknown_name

    if text is None:
        return DEFAULT_FAIL_ON
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in _verdicts():
            raise UsageError(unknown_name("verdict", name, _verdicts()))
    return () if NONE in names else tuple(names)


def _write(report: "CheckReport", folder: Path) -> None:
    """Write the report in every format beside the measurements."""
    from mambench.harness.check import report as formats

    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "check.json": json.dumps(formats.as_json(report), indent=1) + "\n",
        "summary.md": formats.markdown(report),
        "junit.xml": formats.junit(report),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    # Read here, at the edge: the variables are GitHub's.
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if summary and os.environ.get("GITHUB_ACTIONS"):
        with open(summary, "a", encoding="utf-8") as file:
            file.write(texts["summary.md"] + "\n")


def _show(report: "CheckReport", form: str | None, *, everything: bool = False) -> None:
    from mambench.harness.check import report as formats

    in_actions = bool(os.environ.get("GITHUB_ACTIONS"))
    form = form or ("github" if in_actions else "text")
    if form == "json":
        click.echo(json.dumps(formats.as_json(report), indent=1))
    elif form == "markdown":
        click.echo(formats.markdown(report), nl=False)
    else:
        click.echo(coloured(formats.text(report, everything=everything)))
        if form == "github":
            for line in formats.annotations(report):
                click.echo(line)


_COLOURS = {
    "REGRESSED": "red",
    "FAILED": "red",
    "MISSING": "red",
    "UNSTABLE": "yellow",
    "IMPROVED": "green",
}


def coloured(text: str) -> str:
    """Colour the verdicts at the beginning of lines; click drops it where there is no terminal."""
    lines: list[str] = []
    for line in text.splitlines():
        word, _, _ = line.partition(" ")
        colour = _COLOURS.get(word)
        lines.append(line.replace(word, click.style(word, fg=colour), 1) if colour else line)
    return "\n".join(lines)
