"""The commands `doctor`, `selftest`, `ceilings` and `env`: what this machine is, and can do.

Imports only click at module level.
"""

import json
import sys
from pathlib import Path

import click

from mambench.harness.cli import options
from mambench.harness.errors import UsageError

_wait_option = click.option("--wait", is_flag=True, help="Wait for the device if a run holds it.")


@click.command(short_help="What this machine can measure, and how to enable the rest.")
@options.plugin_option
def doctor(plugins: tuple[str, ...]) -> None:
    """What this machine can measure, and how to enable what it cannot."""
    from mambench.harness import doctor, registry
    from mambench.harness.cli import views as cli_views

    click.echo(cli_views.checks(doctor.examine(registry.load(plugins))))


@click.command(short_help="Prove here that times, bytes, energy and intervals are right.")
@options.device_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option(
    "-o", "--output", type=Path, metavar="FILE", help="Write the result as JSON here too."
)
@_wait_option
@click.pass_context
def selftest(
    context: click.Context, device: str | None, as_json: bool, output: Path | None, wait: bool
) -> None:
    """Prove on this machine that times, bytes, energy and intervals are right; under 2 minutes.

    Exits with 1 if a check fails. The result is kept in the user's cache and goes into the manifest
    of later runs on this machine.
    """
    from mambench.harness import lock, machine, machine_cache
    from mambench.harness.selftest import run as selftest

    where = machine.detect(device)
    with lock.device_lock(machine.lock_key(where), holder="selftest", wait=wait, on_wait=_say):
        result = selftest.run(where, on_part=lambda part: _say(f"checking {part}"))
    document = result.to_dict()
    click.echo(json.dumps(document, indent=2) if as_json else result.text())
    if (problem := machine_cache.keep("selftest", where, document)) is not None:
        _say(f"note: the result is not kept: {problem}")
    if output is not None:
        output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    context.exit(0 if result.passed else 1)


@click.command(short_help="Measure what this machine can do at most.")
@options.device_option
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: all cores]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@_wait_option
def ceilings(device: str | None, threads: int | None, as_json: bool, wait: bool) -> None:
    """Calibrate: measure what this machine can do at most, beside its datasheet.

    Copy bandwidth, matrix rates, exponentials and launch cost. They are kept in the user's cache,
    and `sol` measures how near to them a case comes.
    """
    from mambench.harness import lock, machine
    from mambench.harness.instruments import ceilings
    from mambench.harness.spec import Settings
    from mambench.harness.workers import limits

    where = machine.detect(device)
    count = limits.thread_count(Settings(threads=threads))
    with lock.device_lock(machine.lock_key(where), holder="ceilings", wait=wait, on_wait=_say):
        found = ceilings.measure(where, count)
    click.echo(json.dumps(found.to_dict(), indent=2) if as_json else found.text())
    if (problem := ceilings.save(found, where)) is not None:
        _say(f"note: the result is not kept: {problem}")


@click.command(short_help="What differs between the machines of two runs.")
@click.argument("run_dirs", nargs=-1, type=Path, metavar="[RUN_A [RUN_B]]")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@click.pass_context
def env(context: click.Context, run_dirs: tuple[Path, ...], as_json: bool) -> None:
    """What differs between the machines, software and code of two runs.

    Without a run: what would be recorded here and now; with one: what it has recorded.
    """
    from mambench.harness import environment, machine
    from mambench.harness.store import RunFolder

    if len(run_dirs) > 2:
        raise UsageError(f"env compares two runs, got {len(run_dirs)}.")
    found = [environment.of_manifest(RunFolder.open(path).manifest) for path in run_dirs]
    if len(run_dirs) == 2:
        names = (str(run_dirs[0]), str(run_dirs[1]))
        entries = environment.compare(*found)
        colour = sys.stdout.isatty() and context.color is not False
        text = environment.comparison(entries, names, colour=colour)
        click.echo(environment.to_json(entries, names) if as_json else text)
        return
    name = str(run_dirs[0]) if run_dirs else "this machine"
    here = found[0] if found else environment.here(machine.detect())
    click.echo(json.dumps(here, indent=2) if as_json else environment.listing(here, name))


def _say(text: str) -> None:
    click.echo(text, err=True)
