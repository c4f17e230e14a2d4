#!/usr/bin/env python3
"""The command line of Mambench: wiring only. Run `run_bench.py --help`, or `mambench` if installed.

Everything heavy is imported inside the command that needs it, so that `--help` answers at once.
"""

import errno
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

NOT_INSTALLED = (
    "error: {} is not installed for this Python ({}): "
    "`source .venv/bin/activate` after `make bench`, or `pip install -e .`"
)

try:
    import click
except ModuleNotFoundError as error:  # the first that a Python without Mambench lacks
    print(NOT_INSTALLED.format(error.name, sys.executable), file=sys.stderr)
    sys.exit(2)

HERE = Path(__file__).resolve().parent
if (HERE / "pyproject.toml").is_file():  # a checkout, not an installation
    # Python puts a script's folder on sys.path; ours would hide other packages called kernels,
    # harness or reports from everything that a benchmark imports.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
    sys.path.insert(0, str(HERE / "mambench"))
    from _start import load_package

    load_package(Path(sys.path.pop(0)))

from mambench import __version__
from mambench.harness.cli import check as cli_check
from mambench.harness.cli import history as cli_history
from mambench.harness.cli import machine as cli_machine
from mambench.harness.cli import options
from mambench.harness.errors import DeviceBusyError, MambenchError, MeasurementError, UsageError

if TYPE_CHECKING:
    from mambench.harness.runner import RunSummary

# What a disk or a person's choice of a file does, and not a fault of ours.
OUTSIDE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
}
REPORT_FORMATS = ("text", "markdown", "csv", "json", "pytest-benchmark")
EPILOG = """\b
Exit codes:
  0    every case ended ok, unsupported, unavailable or skipped
  1    a case, or a check of selftest, failed
  2    a mistake on the command line, in a suite or a plugin
  3    a run folder is broken, or cannot be written
  4    another run holds the device
  5    the harness could not measure, or not read or write another file
  130  interrupted; go on with run --resume

\b
Examples:
  run_bench.py run                                    the quick suite on this machine
  run_bench.py run -s scan-vs-attention --time-budget 10m
  run_bench.py plan -s state-size -i ssd -i 'flash_attention:*' --filter 'seqlen>=4096'
  run_bench.py run -s custom -i selective_scan -a seqlen=2^9..2^14 -a d_state=16,64
"""


@click.group(
    cls=options.NearestGroup,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """Mamba or attention? Sweep implementations over sizes on this machine, and report."""
    if os.environ.get("NO_COLOR"):
        context.color = False


@cli.command("list", short_help="What can run here, and why not the rest; suites, measurements.")
@options.device_option
@options.plugin_option
def list_(device: str | None, plugins: tuple[str, ...]) -> None:
    """Implementations with their variants and availability, suites, measurements."""
    from mambench.harness import machine, registry, suite
    from mambench.harness.cli import views as cli_views
    from mambench.harness.profilers import catalog

    where = machine.detect(device)
    suites = [suite.find(name) for name in suite.names()]
    implementations, profilers = registry.load(plugins), catalog.load(plugins)
    click.echo(cli_views.listing(implementations, suites, profilers, where))


cli.add_command(cli_machine.doctor)
cli.add_command(cli_machine.selftest)
cli.add_command(cli_machine.ceilings)
cli.add_command(cli_machine.env)


@cli.command(short_help="The cases of a run with estimates; runs nothing.")
@options.question_options
@options.settings_options
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def plan(as_json: bool, **asked: Any) -> None:
    """The cases of a run with estimates of time and memory; runs nothing."""
    from mambench.harness.cli import begin
    from mambench.harness.cli import views as cli_views

    made = begin.plan_of(asked, time_budget_s=asked["time_budget"])
    if as_json:
        import json

        click.echo(json.dumps(made.to_dict(), indent=2))
    else:
        click.echo(cli_views.plan(made))


@cli.command(short_help="Run a suite's cases, and write the report.")
@options.question_options
@options.settings_options
@click.option("--resume", type=Path, metavar="RUN_DIR", help="Go on with this run's own plan.")
@click.option("--retry-failed", is_flag=True, help="With --resume: run failed cases again.")
@click.option(
    "-o", "--output", type=Path, metavar="DIR", help="The run's folder.  [default: runs/<time>-...]"
)
@click.option("--no-report", is_flag=True, help="Measure only.")
@click.option("--wait", is_flag=True, help="Wait for the GPU if another run holds it.")
@click.option(
    "-q", "--quiet", is_flag=True, help="Show failures, notes and the report's path only."
)
@click.pass_context
def run(
    context: click.Context,
    resume: Path | None,
    retry_failed: bool,
    output: Path | None,
    no_report: bool,
    wait: bool,
    quiet: bool,
    **asked: Any,
) -> None:
    """Run a suite's cases, each guarded and checked before it is timed, and write the report."""
    from mambench.harness import progress, runner
    from mambench.harness.cli import begin

    if resume is None and retry_failed:
        raise UsageError("--retry-failed goes with --resume RUN_DIR.")
    if asked["suite"] == options.CALIBRATION:  # its programs are no cases: nothing is compared
        where = {name: asked[name] for name in ("device", "threads")}
        context.invoke(cli_machine.ceilings, as_json=False, wait=wait, **where)
        return
    made, folder = begin.resumed(resume, output, asked) if resume else begin.created(output, asked)
    finished = {case_id for case_id, _, _ in folder.finished()}
    left = {p.case.case_id: p.estimate_s for p in made.runnable if p.case.case_id not in finished}
    kinds = {p.case.case_id: p.case.kind for p in made.runnable}
    with (
        folder,
        progress.make_listener(left, kinds, quiet=quiet, environment=os.environ) as listener,
    ):
        for note in made.notes:
            listener.on_note(note)
        try:
            summary = runner.run(
                made,
                folder,
                listener=listener,
                time_budget_s=asked["time_budget"],
                retry_failed=retry_failed,
                wait=wait,
            )
        except DeviceBusyError:
            if resume is None:
                begin.remove_empty(folder)
            raise
    _conclude(context, folder.path, summary, report=not no_report)


@cli.command(short_help="Write one offline HTML report of runs, or another format.")
@click.argument("run_dirs", nargs=-1, type=Path, metavar="[RUN_DIR...]")
@click.option(
    "-o",
    "--output",
    type=Path,
    metavar="FILE",
    help="The HTML file.  [default: report.html in the first RUN_DIR]",
)
@click.option(
    "-f",
    "--format",
    "form",
    type=options.Name("format", lambda: ("html", *REPORT_FORMATS, "parquet")),
    default="html",
    metavar="FORMAT",
    help="html, or text, markdown, csv, json, pytest-benchmark on standard output, or parquet "
    "(results.parquet in the first RUN_DIR).  [default: html]",
)
@click.option(
    *("--figures", "figures"),
    type=Path,
    metavar="DIR",
    help="Write every chart as SVG and PNG into this folder instead.",
)
@click.option("--svg-only", is_flag=True, help="With --figures: no PNG, which needs resvg-py.")
@click.option(
    "--index",
    type=Path,
    metavar="DIR",
    help="Write a page over all runs below this folder instead.  [default: index.html in it]",
)
def report(
    run_dirs: tuple[Path, ...],
    output: Path | None,
    form: str,
    figures: Path | None,
    svg_only: bool,
    index: Path | None,
) -> None:
    """Write one offline HTML report of one or several runs, or print it in another format."""
    from mambench import reports

    if index is not None:
        if run_dirs or figures:
            raise UsageError("--index DIR takes all runs below DIR: name nothing else.")
        _name_path("index", reports.index_page(index, output))
        return
    if not run_dirs:
        raise UsageError("name the folder of a run, or --index DIR for all below DIR.")
    if figures is not None:
        written = reports.write_figures(list(run_dirs), figures, png=not svg_only)
        _name_path(f"{len(written)} figures", figures)
        return
    if form == "parquet":
        path = output or run_dirs[0] / "results.parquet"
        _name_path("report", reports.write_parquet(list(run_dirs), path))
        return
    if form == "html":
        _name_path("report", reports.build(list(run_dirs), output or run_dirs[0] / "report.html"))
        return
    text = reports.render(list(run_dirs), form)
    if output is None:
        click.echo(text, nl=False)
    else:
        output.write_text(text, encoding="utf-8")
        _name_path("report", output)


@cli.command(short_help="One case of a run, and the command that repeats it.")
@click.argument("case")
@click.option(
    "-r",
    "--run",
    "run_dir",
    type=Path,
    metavar="RUN_DIR",
    help="The run the case is in.  [default: the newest in runs/]",
)
def show(case: str, run_dir: Path | None) -> None:
    """One case of a run: results, checks, and the command that reproduces it.

    CASE is its number in the run's plan, or the beginning of its case_id.
    """
    from mambench.harness import reproduce
    from mambench.harness.cli import begin
    from mambench.harness.cli import views as cli_views
    from mambench.harness.plan import Plan
    from mambench.harness.store import RunFolder

    folder = RunFolder.open(run_dir or begin.newest_run())
    made = Plan.from_dict(folder.manifest)
    number, planned = reproduce.find_case(made, case)
    found = [o for o in folder.observations() if o.case.case_id == planned.case.case_id]
    command = reproduce.command(planned.case, made, program=begin.program())
    click.echo(cli_views.case(folder.path, number, planned, found, command))


cli.add_command(cli_check.check)
cli.add_command(cli_check.compare)
cli.add_command(cli_check.calibrate)
cli.add_command(cli_history.import_run)
cli.add_command(cli_history.make(lambda: importlib.import_module("mambench.reports.history")))


@cli.command(short_help="Print the script that completes commands in a shell.")
@click.argument("shell", type=options.Name("shell", lambda: ("bash", "zsh", "fish")))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that completes commands in SHELL: bash, zsh or fish."""
    from click.shell_completion import get_completion_class

    program = Path(sys.argv[0]).name
    made = get_completion_class(shell)
    assert made is not None
    variable = f"_{program}_COMPLETE".replace("-", "_").replace(".", "_").upper()
    click.echo(made(context.find_root().command, {}, program, variable).source())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake ends in one line on stderr, never a traceback."""
    try:
        code = cli.main(args=arguments, standalone_mode=False)
    except click.ClickException as error:
        _show(error)
        code = error.exit_code
    except MambenchError as error:
        click.echo(f"error: {error}", err=True)
        code = error.exit_code
    except OSError as error:
        if error.errno not in OUTSIDE:
            raise  # ours to mend
        place = "cannot write" if error.filename is None else error.filename
        click.echo(f"error: {place}: {error.strerror}.", err=True)
        code = MeasurementError.exit_code
    except ModuleNotFoundError as error:
        if (error.name or "mambench").partition(".")[0] == "mambench":
            raise  # ours to mend
        click.echo(NOT_INSTALLED.format(error.name, sys.executable), err=True)
        code = 2
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


def _show(error: click.ClickException) -> None:
    """Say a mistake that click found as our own are said; no command at all is answered by help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return
    message = error.format_message()
    message += "" if message.endswith((".", "?", ")")) else "."
    if isinstance(error, click.UsageError) and error.ctx is not None:
        message += f" See `{error.ctx.command_path} --help`."
    click.echo(f"error: {message}", err=True)


def _conclude(context: click.Context, path: Path, summary: "RunSummary", *, report: bool) -> None:
    """Say how the run ended, write the report, and set the exit code."""
    from mambench.harness.text import duration

    counts = ", ".join(f"{count} {outcome}" for outcome, count in summary.counts.items() if count)
    click.echo(f"{counts or 'no case'} in {duration(summary.wall_s)}")
    _name_path("results", path)
    if summary.interrupted:  # the runner has said how to go on
        context.exit(130)
    if report:
        from mambench.reports import build

        _name_path("report", build([path], path / "report.html"))
    context.exit(1 if summary.failed else 0)


def _name_path(what: str, path: Path) -> None:
    """Print an absolute path, as a link where the terminal makes one."""
    path = path.resolve()
    text = str(path)
    if sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        text = f"\x1b]8;;{path.as_uri()}\x1b\\{text}\x1b]8;;\x1b\\"
    click.echo(f"{what}: {text}")


if __name__ == "__main__":
    main()
