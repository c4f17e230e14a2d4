"""A plan: the cases of a suite on one device, each with its estimate or the reason it will not run.

Order: by sequence length, and within one length the cheapest first, so that a run cut short still
compares everything up to some length. A time budget is spent in the same order: the cases that do
not fit into it are left out, and once an implementation's curve has lost a length to the budget it
gets no longer one either. So slow implementations end early and fast ones go on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mambench.harness import axes as axis_notation
from mambench.harness import estimate, expand, registry
from mambench.harness.errors import UsageError
from mambench.harness.filters import compile_filter
from mambench.harness.profilers import catalog
from mambench.harness.profilers.base import DECIDING, BatchProfiler, Profiler, Work
from mambench.harness.spec import (
    METRICS,
    Case,
    Device,
    DeviceKind,
    Metric,
    Outcome,
    Settings,
    digest,
)
from mambench.harness.suite import Suite


@dataclass(frozen=True, kw_only=True)
class PlannedCase:
    """A case, and either an estimate of what it takes or the outcome it already has."""

    case: Case
    outcome: Outcome | None = None  # UNSUPPORTED, UNAVAILABLE or SKIPPED when known beforehand
    reason: str | None = None
    estimate_s: float = 0.0  # wall time of the whole case
    measure_s: Mapping[str, float] = field(default_factory=dict[str, float])  # of it, by profiler
    memory_bytes: int = 0  # modelled peak

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "case": self.case.to_dict(),
            "outcome": self.outcome and self.outcome.value,
            "reason": self.reason,
            "estimate_s": self.estimate_s,
            "measure_s": dict(self.measure_s),
            "memory_bytes": self.memory_bytes,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PlannedCase":
        """Rebuild a planned case from `to_dict`'s values."""
        return cls(
            case=Case.from_dict(values["case"]),
            outcome=Outcome(values["outcome"]) if values["outcome"] else None,
            reason=values["reason"],
            estimate_s=values["estimate_s"],
            measure_s=values.get("measure_s") or {},
            memory_bytes=values["memory_bytes"],
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything `runner.run` needs; made by `make_plan`, kept in the manifest for resume."""

    suite: str
    device: Device
    settings: Settings
    cases: tuple[PlannedCase, ...]
    plugins: tuple[str, ...] = ()  # modules or files that workers load too
    notes: tuple[str, ...] = field(default=())  # shown to the person, kept in the manifest
    start_s: float = 0.0  # what batch profilers pay once, however many cases there are
    metrics: tuple[Metric, ...] = ()  # of plugins' profilers; the others are in spec.METRICS

    @property
    def plan_hash(self) -> str:
        """Identity of the questions asked, whatever the device."""
        return digest(sorted(planned.case.case_id for planned in self.cases))

    @property
    def runnable(self) -> tuple[PlannedCase, ...]:
        """The cases that will be run."""
        return tuple(planned for planned in self.cases if planned.outcome is None)

    @property
    def estimate_s(self) -> float:
        """Estimated wall time of all runnable cases."""
        return self.start_s + sum(planned.estimate_s for planned in self.runnable)

    @property
    def measure_s(self) -> Mapping[str, float]:
        """Estimated wall time of each measurement over all runnable cases."""
        total = dict.fromkeys(self.settings.measurements, 0.0)
        for planned in self.runnable:
            for name, seconds in planned.measure_s.items():
                total[name] += seconds
        return total

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; a run's manifest holds them among its own."""
        device = self.device
        return {
            "suite": self.suite,
            "device": {
                "kind": device.kind.value,
                "index": device.index,
                "name": device.name,
                "compute_capability": device.compute_capability,
                "memory_bytes": device.memory_bytes,
            },
            "settings": self.settings.to_dict(),
            "plan": [planned.to_dict() for planned in self.cases],
            "plan_hash": self.plan_hash,
            "plugins": list(self.plugins),
            "notes": list(self.notes),
            "start_s": self.start_s,
            "metrics": [asdict(metric) for metric in self.metrics],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Plan":
        """Rebuild a plan from `to_dict`'s values or from a manifest that holds them."""
        device = values["device"]
        capability = device["compute_capability"]
        return cls(
            suite=values["suite"],
            device=Device(
                kind=DeviceKind(device["kind"]),
                index=device["index"],
                name=device["name"],
                compute_capability=(capability[0], capability[1]) if capability else None,
                memory_bytes=device["memory_bytes"],
            ),
            settings=Settings.from_dict(values["settings"]),
            cases=tuple(PlannedCase.from_dict(planned) for planned in values["plan"]),
            plugins=tuple(values["plugins"]),
            notes=tuple(values["notes"]),
            start_s=values.get("start_s", 0.0),
            metrics=tuple(Metric(**metric) for metric in values.get("metrics", ())),
        )


def make_plan(
    suite: Suite,
    device: Device,
    *,
    implementations: Sequence[str] | None = None,
    axes: Mapping[str, Sequence[axis_notation.AxisValue]] | None = None,
    filters: Sequence[str] | None = None,
    settings: Settings | Mapping[str, Any] | None = None,
    measure: Sequence[str] = (),
    plugins: Sequence[str] = (),
    time_budget_s: float | None = None,
) -> Plan:
    """Expand a suite on a device: resolve variants, estimate, order, and apply the time budget.

    Args:
        suite: the question.
        device: what it is asked of.
        implementations: names or globs, each optionally with `:variant` (a name or glob). Picks
            from the suite's; one that no sweep of the suite names joins every sweep.
        axes: values that replace the suite's, by axis; `dtype` and `pass` are allowed too.
        filters: see `harness.filters`; all must hold.
        settings: overrides of the suite's settings, or a complete Settings.
        measure: profilers by name, `all` for what the device can give; (): the suite's.
        plugins: modules or files with further implementations and profilers.
        time_budget_s: leave out cases until the estimates fit into it.

    Raises UsageError (or PluginError) if a name is unknown or no case is left.
    """
    plugins = tuple(registry.normalise(plugin) for plugin in plugins)
    found = registry.load(plugins)
    known = expand.expand(
        suite, device, found, implementations=implementations, overrides=axes or {}
    )
    keep = [compile_filter(text) for text in filters or ()]
    wanted = [
        candidate for candidate in known.candidates if all(test(candidate.case) for test in keep)
    ]
    if not wanted:
        raise UsageError(_nothing_left(suite, device, bool(known.candidates), filters))
    known_profilers = catalog.load(plugins)
    settings = _settings(suite, device, settings, measure, known_profilers)
    chosen = {name: known_profilers[name] for name in settings.measurements}
    cases = [_planned(candidate, found, device, settings, chosen) for candidate in wanted]
    cases.sort(key=lambda planned: (planned.case.problem.seqlen or 0, planned.estimate_s))
    notes = list(known.notes)
    if time_budget_s is not None:
        cases, note = within_budget(cases, time_budget_s)
        notes += [note] if note else []
    return Plan(
        suite=suite.name,
        device=device,
        settings=settings,
        cases=tuple(cases),
        plugins=plugins,
        notes=(*notes, *_missing_notes(chosen, device)),
        start_s=sum(
            profiler.start_estimate_s(device, settings)
            for profiler in chosen.values()
            if isinstance(profiler, BatchProfiler) and profiler.missing(device) is None
        ),
        metrics=tuple(
            metric
            for profiler in chosen.values()
            for metric in profiler.metrics
            if metric not in METRICS
        ),
    )


def _settings(
    suite: Suite,
    device: Device,
    given: Settings | Mapping[str, Any] | None,
    measure: Sequence[str],
    known: Mapping[str, Profiler],
) -> Settings:
    if isinstance(given, Settings):
        settings, names = given, measure or given.measurements
    else:
        settings = replace(Settings(), **{**suite.settings, **(given or {})})
        names = measure or suite.measure.get(device.kind) or catalog.DEFAULT[device.kind]
    chosen = catalog.choose(names, known, device)
    if any(isinstance(known[name], BatchProfiler) for name in chosen):
        chosen = tuple(dict.fromkeys((DECIDING, *chosen)))  # only what is proven right is batched
    return replace(settings, measurements=chosen)


def _missing_notes(chosen: Mapping[str, Profiler], device: Device) -> list[str]:
    reasons = {name: profiler.missing(device) for name, profiler in chosen.items()}
    return [f"{name} will be missing: {reason}" for name, reason in reasons.items() if reason]


def within_budget(
    cases: Sequence[PlannedCase], budget_s: float
) -> tuple[list[PlannedCase], str | None]:
    """Spend a budget in the order of the cases; returns them, the rest skipped, and a note.

    A curve (one implementation, variant, family, pass and dtype, all sizes but the length) that has
    lost a length to the budget gets no longer one.
    """
    left_s, ended, kept = budget_s, set[str](), list[PlannedCase]()
    for planned in cases:
        curve = _curve(planned.case)
        if planned.outcome is not None:
            kept.append(planned)
        elif curve in ended or planned.estimate_s > left_s:
            ended.add(curve)
            kept.append(
                replace(planned, outcome=Outcome.SKIPPED, reason=_budget_reason(planned, budget_s))
            )
        else:
            left_s -= planned.estimate_s
            kept.append(planned)
    skipped = sum(old is not new for old, new in zip(cases, kept, strict=True))
    return (
        kept,
        f"the time budget of {budget_s:g} s leaves out {skipped} cases" if skipped else None,
    )


def _budget_reason(planned: PlannedCase, budget_s: float) -> str:
    return (
        f"time budget of {budget_s:g} s (estimated {planned.estimate_s:.1f} s); raise --time-budget"
    )


def _curve(case: Case) -> str:
    values = case.to_dict()
    return digest({**values, "problem": {**values["problem"], "seqlen": None}})


def _planned(
    candidate: expand.Candidate,
    found: Mapping[str, Any],
    device: Device,
    settings: Settings,
    chosen: Mapping[str, Profiler],
) -> PlannedCase:
    if candidate.outcome is not None:
        return PlannedCase(case=candidate.case, outcome=candidate.outcome, reason=candidate.reason)
    implementation = found[candidate.case.implementation]
    estimated = estimate.estimate(candidate.case, implementation, device)
    work = Work(
        case=candidate.case,
        device=device,
        settings=settings,
        execution_s=estimated.execution_s,
        launches=estimated.launches,
    )
    measure_s = {
        name: round(profiler.estimate_s(work), 3)
        for name, profiler in chosen.items()
        if profiler.missing(device) is None
    }
    refused = estimate.refusal(estimated.memory_bytes, device)
    return PlannedCase(
        case=candidate.case,
        outcome=refused[0] if refused else None,
        reason=refused[1] if refused else None,
        estimate_s=round(estimated.set_up_s + sum(measure_s.values()), 3),
        measure_s=measure_s,
        memory_bytes=estimated.memory_bytes,
    )


def _nothing_left(
    suite: Suite, device: Device, any_before: bool, filters: Sequence[str] | None
) -> str:
    if any_before:
        return f"no case of suite '{suite.name}' passes the filter {' and '.join(filters or ())}."
    return f"suite '{suite.name}' has no case on {device.kind} for the implementations asked for."
