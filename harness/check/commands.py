"""Runs the commands `check`, `compare` and `calibrate`; the command line only passes options on."""

import os
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mambench.harness import machine_cache, reproduce
from mambench.harness.check import accept, explain, imports, noise, side_plan, sides
from mambench.harness.check import budgets as promises
from mambench.harness.check.conclusion import DEFAULT_FAIL_ON, CheckReport
from mambench.harness.check.judge import Evidence, Stages, assess
from mambench.harness.check.measure import AGAIN, BASE, HEAD, Arm, Check, Measured, Progress, Terms
from mambench.harness.check.rounds import Rounds, pairs
from mambench.harness.check.rule import Rule
from mambench.harness.check.sides import Side, Wanted
from mambench.harness.errors import (
    DeviceBusyError,
    MeasurementError,
    RunFolderError,
    UsageError,
)
from mambench.harness.plan import Plan
from mambench.harness.spec import Device
from mambench.harness.store import MANIFEST, RunFolder, new_run
from mambench.harness.text import duration
from mambench.harness.verdict import TIMES, Assessment, Point, Verdict, with_points

_NOTHING = Assessment(points=())


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a check was asked for."""

    asked: Mapping[str, Any]  # the options of a plan, see `side_plan.KEYS`
    wanted: Wanted
    output: Path | None = None
    baseline: Path | None = None
    store: Path | None = None
    rounds: int | None = None
    confirm_rounds: int | None = None
    time_budget_s: float | None = None
    promise_frac: float = 0.05
    fail_on: Sequence[str] = DEFAULT_FAIL_ON
    accepted: Sequence[accept.Accepted] = field(default=())
    budgets: Sequence[promises.Budget] = field(default=())
    wait: bool = False
    program: Sequence[str] = ("mambench",)

    @property
    def rule(self) -> Rule:
        """The rule with as many rounds as were asked for."""
        rule = Rule()
        return replace(
            rule,
            rounds=self.rounds or rule.rounds,
            confirm_rounds=self.confirm_rounds or rule.confirm_rounds,
        )


def check(request: Request, progress: Progress) -> tuple[CheckReport, Path]:
    """Compare two sides, or one with a stored run; returns the report and the folder.

    What keeps a check from measuring is the report's `problem`, except a user's mistake, which
    raises UsageError.
    """
    path = request.output or new_run(Path("runs"), "check")[0]
    try:
        return _checked(request, path, progress), path
    except UsageError:
        raise
    except (MeasurementError, RunFolderError, DeviceBusyError) as error:
        return _nothing(request, str(error)), path


def _nothing(request: Request, problem: str) -> CheckReport:
    return CheckReport(
        title=_title(request),
        assessment=replace(_NOTHING, promise_frac=request.promise_frac),
        facts=_sides(request),
        fail_on=request.fail_on,
        problem=problem,
    )


def _title(request: Request) -> str:
    return f"Performance of {request.wanted.head} against {_against(request)}"


def _against(request: Request) -> str:
    return str(request.baseline) if request.baseline else request.wanted.base


def _sides(request: Request) -> dict[str, str]:
    return {"base": _against(request), "head": request.wanted.head}


def _checked(request: Request, path: Path, progress: Progress) -> CheckReport:
    with ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mambench-")))
        wanted = request.wanted
        if request.baseline is not None:  # nothing of the base is built
            wanted = replace(wanted, base=wanted.head)
        base, head = stack.enter_context(sides.prepared(wanted, temporary, progress.on_note))
        both = (base, head) if request.baseline is None else (head,)
        with ThreadPoolExecutor() as beside:  # each is asked in a process of its own
            planned = {s.name: beside.submit(side_plan.ask, s, request.asked) for s in both}
        plan = planned[head.name].result()
        if left := side_plan.unjudged(plan):
            progress.on_note(f"measured, and judged by budgets only: {', '.join(left)}")
        if request.baseline is not None:
            return _against_stored(request, path, head, plan, progress)
        libraries = imports.differences(base, head, base.plugins, head.plugins)
        notes = [f"changed: {library}" for library in libraries]
        try:
            base_plan = planned[base.name].result()
        except UsageError as error:
            base_plan = replace(plan, cases=())
            notes.append(str(error))
        arms = [
            Arm(name=BASE, side=base, plan=base_plan),
            Arm(name=HEAD, side=head, plan=plan),
        ]
        known = noise.load(plan.device, plan.settings, request.store)
        stored = None
        if known is not None and known.knows(
            [p.case for p in plan.runnable], side_plan.times(plan)
        ):
            stored = known.pairs
        else:
            arms.append(Arm(name=AGAIN, side=base, plan=base_plan))
            why = noise.unknown(plan.device, plan.settings, request.store)
            notes.append(
                f"{why}: the base is measured twice a round (`calibrate` makes checks faster)"
            )
        terms = _terms(request, stored=stored)
        job = Check(arms, path, terms, progress)
        measured = job.run(wait=request.wait)
        evidence = measured.evidence
        assessment = replace(_promised(measured, request, path), notes=tuple(notes))
        facts = {
            "base": base.label,
            "head": head.label,
            **_facts(plan, evidence.stages, request.rule, measured),
        }
        aa = stored or pairs(
            evidence.base, evidence.again or evidence.base, evidence.stages.screening
        )
        rate = noise.alarm_rate(aa, list(evidence.head.cases.values()), request.rule)
        assessment = _annotated(assessment, evidence)
        told = _explained(
            assessment, evidence, plan, request, base_ref=wanted.base, libraries=libraries
        )
        return CheckReport(
            title=_title(request),
            assessment=accept.apply(told, request.accepted),
            facts=facts,
            fail_on=request.fail_on,
            alarm_rate=rate,
            wall_s=measured.wall_s,
        )


def _promised(measured: Measured, request: Request, path: Path) -> Assessment:
    """Return the assessment with what the budgets say of the head that was measured."""
    if not request.budgets:
        return measured.assessment
    points = promises.judge_runs(request.budgets, [path / HEAD])
    return replace(measured.assessment, points=(*measured.assessment.points, *points))


def _terms(request: Request, **more: Any) -> Terms:
    return Terms(
        rule=request.rule,
        promise_frac=request.promise_frac,
        time_budget_s=request.time_budget_s,
        seed=request.asked.get("seed") or 0,
        **more,
    )


def _facts(plan: Plan, stages: Stages, rule: Rule, measured: Measured) -> dict[str, str]:
    confirmed = len(stages.confirmations)
    loads = [f"{load:.1f}" for load in measured.loads]
    rounds = f"{len(stages.screening)} of {rule.rounds}"
    again = f", confirmed in {confirmed} x {rule.confirm_rounds} fresh rounds" if confirmed else ""
    return {
        "suite": f"{plan.suite}, {len(plan.runnable)} cases",
        "device": f"{plan.device.name} ({plan.device.torch_name})",
        "rounds": f"{rounds} fresh processes a side{again}",
        "took": duration(measured.wall_s),
        **({"load": f"{' before, '.join(loads)} after; {os.cpu_count()} cores"} if loads else {}),
    }


def _annotated(assessment: Assessment, evidence: Evidence) -> Assessment:
    """Say which cases run under another tuning configuration, whatever their verdicts are."""
    base, head = evidence.base, evidence.head
    cases = [case for case in head.cases.values() if case.case_id in base.cases]
    changed = {c.label: found for c in cases if (found := explain.tuning(c, base, head))}
    if not changed:
        return assessment
    name, lines = next(iter(changed.items()))
    more = f", and of {len(changed) - 1} other cases" if len(changed) > 1 else ""
    note = f"the tuning configuration changed: {name}: {'; '.join(lines[:3])}{more}"
    return replace(assessment, notes=(*assessment.notes, note))


def _explained(
    assessment: Assessment,
    evidence: Evidence,
    plan: Plan,
    request: Request,
    *,
    base_ref: str,
    libraries: Sequence[str] = (),
) -> Assessment:
    """Say beside each point that got worse what else changed, and how to see it again."""

    def tell(point: Point) -> Point:
        if point.case is None or point.verdict not in (Verdict.REGRESSED, Verdict.FAILED):
            return point
        found = explain.differences(point.case, evidence.base, evidence.head)
        if point.change_frac is None:  # what was not measured differs in everything
            found = ()
        notes = (*found, *libraries)
        if point.verdict is Verdict.REGRESSED:
            notes = notes or (explain.NOTHING,)
        return replace(point, notes=notes, command=command(point, plan, request, base_ref))

    return with_points(assessment, tell)


def command(point: Point, plan: Plan, request: Request, base_ref: str) -> str:
    """Return the command that checks one case alone."""
    assert point.case is not None
    plan = replace(plan, plugins=request.wanted.plugins)
    words = shlex.split(reproduce.command(point.case, plan, program=request.program))
    where = words.index("run")
    against = ["--base", base_ref]
    if request.baseline is not None:
        against = ["--baseline", str(request.baseline)]
    wanted = request.wanted
    options = [*against, "--head", wanted.head]
    for flag, value in (("--build", wanted.build), ("--build-base", wanted.build_base)):
        options += [flag, value] if value else []
    options += [word for part in wanted.path for word in ("--path", part)]
    return shlex.join([*words[:where], "check", *options, *words[where + 1 :]])


# --- a stored baseline ---------------------------------------------------------------------------


def _against_stored(
    request: Request, path: Path, head: Side, plan: Plan, progress: Progress
) -> CheckReport:
    assert request.baseline is not None
    folder = open_baseline(request.baseline)
    refuse_other_machine(folder, plan.device)
    stored = _numbered(folder, repeated=True)
    timed = {o.round for o in folder.observations() if o.measurement == "time"}
    if len(timed) < request.rule.min_rounds:
        raise RunFolderError(
            f"the baseline {folder.path} has {len(timed)} rounds, and fewer than "
            f"{request.rule.min_rounds} say nothing of how rounds differ: take a folder that "
            f"`check` or `calibrate` has made."
        )
    known = noise.load(plan.device, plan.settings, request.store)
    terms = _terms(request, stored=known.pairs if known else None, baseline=stored)
    job = Check([Arm(name=HEAD, side=head, plan=plan)], path, terms, progress)
    measured = job.run(wait=request.wait)
    note = (
        "judged against a stored run: what differs between two sessions on one machine cannot be "
        "told from a change of the code; `--base REF` measures both in one job"
    )
    changed = explain.environments(folder.manifest, RunFolder.open(path / HEAD).manifest)
    notes = (note, *(f"changed: {c}" for c in changed))
    assessment = replace(_promised(measured, request, path), notes=notes)
    told = _explained(assessment, measured.evidence, plan, request, base_ref="", libraries=changed)
    facts = {
        "base": f"{request.baseline}, made {folder.manifest['created_at']}",
        "head": head.label,
        **_facts(plan, measured.evidence.stages, request.rule, measured),
    }
    return CheckReport(
        title=_title(request),
        assessment=accept.apply(told, request.accepted),
        facts=facts,
        fail_on=request.fail_on,
        unknown_alarms="two sessions differ by more than A/A rounds of one job do",
        wall_s=measured.wall_s,
    )


def open_baseline(path: Path, what: str = "baseline") -> RunFolder:
    """Open a run, or that in an earlier check or calibration; raises RunFolderError otherwise."""
    if not (path / MANIFEST).is_file():
        inside = [path / name for name in (HEAD, BASE) if (path / name / MANIFEST).is_file()]
        path = inside[0] if inside else path
    if not path.exists():
        raise RunFolderError(f"there is no {what} {path}: nothing to compare with.")
    return RunFolder.open(path)


def refuse_other_machine(folder: RunFolder, device: Device) -> None:
    """Raise RunFolderError if a run was made on another machine."""
    there, here = noise.of_manifest(folder.manifest), machine_cache.fingerprint(device)
    if there != here:
        raise RunFolderError(
            f"the baseline {folder.path} was made on another machine "
            f"({folder.manifest['device']['name']}, fingerprint {there}; this one is "
            f"{device.name}, {here}): times of two machines cannot be judged."
        )


def _numbered(folder: RunFolder, *, repeated: bool = False) -> Rounds:
    """Return a stored run's rounds, numbered from 1 as those of a check are."""
    observations = folder.observations()
    timed = {o.round for o in observations if o.measurement == "time"}
    shift = 1 if 0 in timed else 0
    numbered = (replace(o, round=o.round + shift) for o in observations)
    return Rounds.of(numbered, repeated=repeated)


# --- compare and calibrate -----------------------------------------------------------------------


def compare(first: Path, second: Path) -> CheckReport:
    """Show two runs side by side; raises RunFolderError for what is no run."""
    old, new = (open_baseline(path, "run") for path in (first, second))
    base, head = _numbered(old), _numbered(new)
    timed = [o for side in (base, head) for found in side.found.values() for o in found]
    numbers = sorted({o.round for o in timed if o.measurement in TIMES.values()})
    evidence = Evidence(base=base, head=head, stages=Stages(screening=tuple(numbers)))
    notes = [f"changed: {line}" for line in explain.environments(old.manifest, new.manifest)]
    there, here = noise.of_manifest(old.manifest), noise.of_manifest(new.manifest)
    if there != here:
        notes.insert(0, f"these are two machines (fingerprints {there} and {here})")
    assessment = replace(assess(evidence, replace(Rule(), confirmations=0)), notes=tuple(notes))
    names = [f"{f.manifest['suite']}, {f.manifest['created_at']}, {f.path}" for f in (old, new)]
    return CheckReport(
        title="Two runs",
        assessment=assessment,
        facts={"base": names[0], "head": names[1]},
        judged=False,
    )


def calibrate(request: Request, progress: Progress) -> tuple[str, Path]:
    """Measure this machine's A/A noise and keep it; returns what was found and the file."""
    path = request.output or new_run(Path("runs"), "calibrate")[0]
    rule = replace(request.rule, rounds=max(request.rounds or 10, noise.ENOUGH_PAIRS))
    with ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mambench-")))
        wanted = replace(request.wanted, base=request.wanted.head)
        side, _ = stack.enter_context(sides.prepared(wanted, temporary, progress.on_note))
        plan = side_plan.ask(side, request.asked)
        arms = [Arm(name=name, side=side, plan=plan) for name in (BASE, AGAIN)]
        terms = replace(_terms(request), rule=replace(rule, confirmations=0))
        job = Check(arms, path, terms, progress)
        measured = job.run(wait=request.wait)
    evidence = measured.evidence
    assert evidence.again is not None
    found = pairs(evidence.base, evidence.again, evidence.stages.screening)
    if not found.pairs:
        raise MeasurementError("no case could be measured: see the run's records in " + str(path))
    file = noise.keep(found, plan.device, plan.settings, request.store)
    known = noise.load(plan.device, plan.settings, request.store)
    assert known is not None
    return _noise_text(known, evidence, request.rule), file


def _noise_text(known: noise.Calibration, evidence: Evidence, rule: Rule) -> str:
    cases = list(evidence.base.cases.values())
    told = assess(replace(evidence, stored=known.pairs), rule).points
    rows = [p for p in told if p.case is not None and p.metric == "time_s"]
    rows.sort(key=lambda p: -(p.noise_frac or 0.0))
    from mambench.harness.check.report import percent
    from mambench.harness.text import table

    header = ("case", "one round", "could see")
    lines = [
        table(
            [
                (
                    p.name,
                    percent(p.noise_frac, sign=False),
                    percent(p.smallest_seen_frac, sign=False),
                )
                for p in rows
            ],
            header=header,
            right=" rr",
        )
    ]
    rate = noise.alarm_rate(known.pairs, cases, rule)
    report = CheckReport(title="", assessment=_NOTHING, facts={}, alarm_rate=rate)
    return "\n".join([*lines, "", report.alarms])


def program() -> list[str]:
    """Return the words that start this program, for commands shown to the person."""
    name = sys.argv[0]
    return ["python", name] if name.endswith(".py") else [Path(name).name]
