"""What `check` does besides timing two sides: `--static` and `--budgets`. Imports only click."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mambench.harness.cli import options
from mambench.harness.errors import UsageError

if TYPE_CHECKING:
    from mambench.harness.check.budgets import Budget
    from mambench.harness.check.conclusion import CheckReport

OWN = ("static", "inventory", "static_cache", "architectures", "entries", "changed")

gate_options = options.all_of(
    click.option(
        "--static",
        is_flag=True,
        help="Compile the kernels of both sides without a GPU and judge registers, spills, shared "
        "memory and instructions. --baseline then names a static.json.",
    ),
    click.option(
        "--inventory",
        type=Path,
        metavar="FILE",
        help="With --static: what to compile, in each side.  [default: kernels/inventory.py]",
    ),
    click.option(
        "--static-cache",
        type=Path,
        metavar="DIR",
        help="With --static: where figures of compiled kernels are kept.  [default: the user's "
        "cache]",
    ),
    click.option(
        "--arch",
        "architectures",
        type=int,
        multiple=True,
        metavar="SM",
        help="With --static: only this architecture, e.g. 90. Repeatable.",
    ),
    click.option(
        "--entries", metavar="TEXT", help="With --static: only entries whose name holds this."
    ),
    click.option(
        "--changed",
        is_flag=True,
        help="With --static: compile only what the two commits launch differently. Leaves no "
        "static.json, for want of the others' figures.",
    ),
    click.option(
        "--budgets",
        type=Path,
        metavar="FILE",
        help="Judge the head, or stored runs (--run), by absolute and relative limits too.",
    ),
    click.option(
        "--run",
        "runs",
        type=Path,
        multiple=True,
        metavar="RUN_DIR",
        help="With --budgets: judge this run, or a check's folder, and measure nothing. "
        "Repeatable.",
    ),
)


def static_check(
    asked: dict[str, Any], fail_on: Callable[[str | None], Any]
) -> "tuple[CheckReport, Path]":
    """Run `check --static`; returns the report and the folder, where static.json is."""
    from mambench.harness.check import accept, sides
    from mambench.harness.check import commands as checking
    from mambench.harness.static import check as static_check
    from mambench.harness.store import new_run

    if asked["changed"] and asked["baseline"] is not None:
        raise UsageError("--changed compares what two commits launch: it goes with --base.")
    given = asked["fail_on"]
    request = static_check.Request(
        wanted=sides.Wanted(
            repository=sides.find_repository(Path.cwd()),
            base=asked["base"] or sides.WORKTREE,
            head=asked["head"],
            build=asked["build"],
            build_base=asked["build_base"],
            path=asked["path"],
        ),
        inventory=asked["inventory"],
        baseline=asked["baseline"] and asked["baseline"].resolve(),
        cache=asked["static_cache"],
        architectures=asked["architectures"],
        entries=asked["entries"],
        changed=asked["changed"],
        program=checking.program(),
        accepted=accept.read(asked["accept_file"]) if asked["accept_file"] else (),
        fail_on=static_check.FAIL_ON if given is None else fail_on(given),
    )
    folder = asked["output"] or new_run(Path("runs"), "static")[0]
    report, figures = static_check.check(request, lambda text: click.echo(text, err=True))
    folder.mkdir(parents=True, exist_ok=True)
    if figures:
        (folder / "static.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return report, folder


def judge_stored(asked: dict[str, Any], fail_on: Callable[[str | None], Any]) -> "CheckReport":
    """Run `check --budgets FILE --run RUN_DIR`: judge what is measured already."""
    from mambench.harness.check import accept, budgets
    from mambench.harness.check.conclusion import BLIND, DEFAULT_FAIL_ON, CheckReport
    from mambench.harness.verdict import Assessment

    if asked["base"] or asked["baseline"] or asked["static"]:
        raise UsageError("--run judges what is measured already: leave out --base and the like.")
    if asked["budgets"] is None:
        raise UsageError("--run goes with --budgets FILE; two runs are shown by `compare`.")
    folders = [head_of(path) for path in asked["runs"]]
    points = budgets.judge_runs(budgets.read(asked["budgets"]), folders)
    accepted = accept.read(asked["accept_file"]) if asked["accept_file"] else ()
    given = asked["fail_on"]
    default = [verdict for verdict in DEFAULT_FAIL_ON if verdict != BLIND]
    return CheckReport(
        title=f"Budgets of {asked['budgets'].name}",
        assessment=accept.apply(Assessment(points=points), accepted),
        facts={"runs": ", ".join(map(str, asked["runs"]))},
        fail_on=default if given is None else fail_on(given),
        closing=(),
    )


def read_budgets(asked: dict[str, Any]) -> "Sequence[Budget]":
    """Read the file of `--budgets`, () without one; raises UsageError where none can be judged."""
    from mambench.harness.check import budgets

    if asked["budgets"] is None:
        return ()
    if asked["static"]:
        raise UsageError("--budgets judges what was measured, and --static measures nothing.")
    return budgets.read(asked["budgets"])


def head_of(path: Path) -> Path:
    """Return the run in a check's folder, or the folder itself."""
    inside = path / "head"
    return inside if (inside / "manifest.json").is_file() else path


def refuse_without_static(asked: dict[str, Any]) -> None:
    """Raise UsageError for an option that goes with --static only."""
    for name in OWN[1:]:
        if asked[name]:
            flag = {"architectures": "arch"}.get(name, name.replace("_", "-"))
            raise UsageError(f"--{flag} goes with --static.")
