"""What the commands print, as text: plain columns that can be read and searched."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from mambench.harness import registry
from mambench.harness.cli.options import CALIBRATION
from mambench.harness.doctor import Check
from mambench.harness.plan import Plan, PlannedCase
from mambench.harness.profilers import catalog
from mambench.harness.profilers.base import Profiler
from mambench.harness.records import Observation
from mambench.harness.reproduce import sizes
from mambench.harness.spec import METRICS, Device, Metric
from mambench.harness.suite import Suite
from mambench.harness.text import binary_bytes, duration, si_time, table
from mambench.harness.workers import precompile
from mambench.implementations.base import Implementation


def listing(
    implementations: Mapping[str, Implementation],
    suites: Sequence[Suite],
    profilers: Mapping[str, Profiler],
    device: Device,
) -> str:
    """Return `list`'s output."""
    lines = [f"Implementations on {device.torch_name} ({device.name})"]
    for item in implementations.values():
        lines += ["", f"  {item.name}  [{', '.join(item.families)}]  {item.summary}"]
        rows = [
            ("    ", variant.name, f"unavailable: {variant.unavailable}")
            if variant.unavailable
            else ("    ", variant.name, "available")
            for variant in registry.ask(item, "variants", device)
        ]
        if decoding := registry.ask(item, "decode_variants", device):
            able = ", ".join(variant.name for variant in decoding if not variant.unavailable)
            rows.append(("    ", "decode", able or f"unavailable: {decoding[0].unavailable}"))
        lines.append(table(rows))
    questions = {suite.name: suite.question or suite.title for suite in suites}
    questions[CALIBRATION] = "What can this machine do at most? As the command ceilings."
    width = max(map(len, questions))
    lines += ["", "Suites", ""]
    lines += [f"  {name:<{width}}  {question}" for name, question in sorted(questions.items())]
    lines += ["", "Measurements, for --measure and a suite's `measure`"]
    for profiler in profilers.values():
        default = "; measured unless told" if profiler.name in catalog.DEFAULT[device.kind] else ""
        reason = profiler.missing(device)
        state = f"unavailable: {reason}" if reason else f"available{default}"
        lines += ["", f"  {profiler.name}  {profiler.summary}  [{state}]"]
        lines.append(table([_metric_row(metric) for metric in profiler.metrics]))
    modelled = [_metric_row(metric) for metric in METRICS if metric.modelled]
    return "\n".join([*lines, "", "Modelled, from shapes alone", "", table(modelled)])


def _metric_row(metric: Metric) -> tuple[str, ...]:
    return ("    ", metric.tag, metric.unit, metric.description)


def checks(found: Sequence[Check]) -> str:
    """Return `doctor`'s output: a line per capability, and what to do about what is missing."""
    marks = {True: "ok", False: "NO", None: "--"}
    width = max(len(check.name) for check in found)
    lines: list[str] = []
    for check in found:
        lines.append(f"{marks[check.ok]}  {check.name:<{width}}  {check.found}")
        lines.append(f"    {'':<{width}}  for: {check.enables}")
        variants_missing = check.ok and check.fix and "\n" in f"{check.fix}\n"
        if check.fix and (not check.ok or (variants_missing and check.name not in _ALWAYS)):
            lines += [f"    {'':<{width}}  to enable: {line}" for line in check.fix.splitlines()]
    return "\n".join(lines)


_ALWAYS = (
    "load",
    "torch",
    "numba",
    "counters",
    "ceilings",
)  # their fix says nothing once they are there


def plan(made: Plan) -> str:
    """Return `plan`'s output: the cases in the order they would run, and the totals."""
    rows = [_plan_row(number, planned) for number, planned in enumerate(made.cases, start=1)]
    header = ("#", "case_id", "case", "time", "memory", "")
    runnable = made.runnable
    peak = max((planned.memory_bytes for planned in runnable), default=0)
    lines = [
        f"Suite {made.suite} on {made.device.torch_name} ({made.device.name})",
        "",
        table(rows, header=header, right="r  rr"),
        "",
        f"{len(made.cases)} cases, {len(runnable)} to run: about {duration(made.estimate_s)}, "
        f"at most {binary_bytes(peak)} by the memory model (compilation aside)",
        _measure_line(made),
        *_compile_lines(made),
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in made.notes)])


def _measure_line(made: Plan) -> str:
    parts = [f"{name} {duration(seconds)}" for name, seconds in made.measure_s.items()]
    start = f", to start {duration(made.start_s)}" if made.start_s else ""
    return f"of which to measure: {', '.join(parts)}{start}"


def _compile_lines(made: Plan) -> list[str]:
    compile_s = precompile.seconds([planned.case for planned in made.runnable], made.device)
    if not compile_s:
        return []
    return [f"to compile ahead, where nothing is cached yet: about {duration(compile_s)}"]


def _plan_row(number: int, planned: PlannedCase) -> tuple[str, ...]:
    case = planned.case
    if planned.outcome is not None:
        return (
            str(number),
            case.case_id,
            case.label,
            "",
            "",
            f"{planned.outcome}: {planned.reason}",
        )
    memory = binary_bytes(planned.memory_bytes)
    return (str(number), case.case_id, case.label, duration(planned.estimate_s), memory, "")


def case(
    folder: Path,
    number: int,
    planned: PlannedCase,
    observations: Sequence[Observation],
    command: str,
) -> str:
    """Return `show`'s output: one case's sizes, observations, checks and command."""
    asked = planned.case
    rows = [
        ("case", f"{number}, {asked.case_id}"),
        ("run", str(folder)),
        ("implementation", f"{asked.implementation}, variant {asked.variant}"),
        ("question", f"{asked.problem.family}, level {asked.problem.level}, {asked.pass_}"),
        ("dtype", asked.dtype.value),
        ("sizes", ", ".join(f"{name} {value}" for name, value in sizes(asked).items())),
    ]
    lines = [table(rows)]
    if planned.outcome is not None:
        lines += ["", f"{planned.outcome}: {planned.reason}"]
    elif not observations:
        lines += ["", "not run yet"]
    for observation in observations:
        lines += ["", _observation(observation)]
    return "\n".join([*lines, "", "reproduce with:", f"  {command}"])


def _observation(observation: Observation) -> str:
    title = f"{observation.measurement}, round {observation.round}: {observation.outcome}"
    rows = [("  at", observation.started_at), ("  took", duration(observation.duration_s))]
    if observation.reason is not None:
        rows.insert(0, ("  reason", observation.reason))
    if observation.method is not None:
        rows.append(("  method", observation.method))
    units = {metric.tag: metric.unit for metric in METRICS}
    for tag, value in observation.values.items():
        rows.append((f"  {tag}", "none" if value is None else _quantity(value, units.get(tag, ""))))
    if observation.samples_s:
        low, high = min(observation.samples_s), max(observation.samples_s)
        spread = f"{len(observation.samples_s)}, {si_time(low)} to {si_time(high)}"
        rows.append(("  samples", spread))
    rows += [(f"  {name}", value) for name, value in _flat(observation.details)]
    return f"{title}\n{table(rows)}"


def _flat(details: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield nested details one a line, as `gate.errors.y`."""
    for name, value in details.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(cast("Mapping[str, Any]", value), f"{prefix}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            for number, entry in enumerate(cast("list[Mapping[str, Any]]", value), start=1):
                yield (
                    f"{prefix}{name}.{number}",
                    ", ".join(
                        f"{key} {inner:.6g}" if isinstance(inner, float) else f"{key} {inner}"
                        for key, inner in entry.items()
                    ),
                )
        else:
            text = f"{value:.6g}" if isinstance(value, float) else f"{value}"
            yield f"{prefix}{name}", text.replace("\n", "\n      ")


def _quantity(value: float, unit: str) -> str:
    if unit == "s":
        return si_time(value)
    if unit == "bytes":
        return f"{binary_bytes(value)} ({value:,.0f} bytes)"
    return f"{value:,.6g} {unit}".removesuffix(" 1")
