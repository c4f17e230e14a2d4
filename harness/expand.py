"""From a suite's sweeps to cases: which implementations and variants, at which sizes.

An axis that does not apply to a family is not swept for it (attention has no d_state, and an SSM's
decode no sequence length), and a size the suite does not name has the default below. A name without
`:variant` stands for the first variant that is available on the device and supports the case.
"""

import fnmatch
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mambench.harness import registry
from mambench.harness.axes import AxisValue
from mambench.harness.errors import UsageError, unknown_name
from mambench.harness.spec import Case, Device, DType, Family, Level, Outcome, Pass, Problem
from mambench.harness.suite import Suite, Sweep
from mambench.implementations.base import Implementation, Variant

# Mamba's expansion: its mixer is twice as wide as the residual stream, attention's as wide.
EXPANSION = {Family.S6: 2, Family.SSD: 2, Family.ATTENTION: 1}

APPLICABLE: Mapping[tuple[Level, Family], tuple[str, ...]] = {
    (Level.OP, Family.S6): ("batch", "seqlen", "d_inner", "d_state", "ngroups", "gated"),
    (Level.OP, Family.SSD): (
        *("batch", "seqlen", "d_inner", "d_state", "headdim", "ngroups", "gated"),
    ),
    (Level.OP, Family.ATTENTION): ("batch", "seqlen", "d_inner", "headdim"),
    (Level.BLOCK, Family.S6): ("batch", "seqlen", "d_model", "d_state", "ngroups"),
    (Level.BLOCK, Family.SSD): ("batch", "seqlen", "d_model", "d_state", "headdim", "ngroups"),
    (Level.BLOCK, Family.ATTENTION): ("batch", "seqlen", "d_model", "headdim"),
}

# The published models' sizes: Mamba has 16 states per channel, Mamba-2 128 and heads of 64;
# attention is given the head width that its fastest kernels are made for.
DEFAULTS: Mapping[str, Mapping[Family, AxisValue]] = {
    "batch": dict.fromkeys(Family, 1),
    "d_inner": dict.fromkeys(Family, 2048),
    "d_model": dict.fromkeys(Family, 1024),
    "d_state": {Family.S6: 16, Family.SSD: 128},
    "headdim": {Family.SSD: 64, Family.ATTENTION: 128},
    "ngroups": dict.fromkeys(Family, 1),
    "gated": dict.fromkeys(Family, False),
}


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A case, and the outcome it already has if it cannot run."""

    case: Case
    outcome: Outcome | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """The distinct cases of a suite, in its order, and what a person should know."""

    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Pick:
    """An implementation, and a variant's name or glob (None: the best)."""

    name: str
    variant: str | None


def expand(
    suite: Suite,
    device: Device,
    found: Mapping[str, Implementation],
    *,
    implementations: Sequence[str] | None,
    overrides: Mapping[str, Sequence[AxisValue]],
) -> Expansion:
    """Return the suite's cases on a device.

    Args:
        suite: the sweeps.
        device: decides per-device values and which variants are available.
        found: implementations by name.
        implementations: as in `plan.make_plan`.
        overrides: values that replace the suite's, by axis, `dtype` or `pass`.

    Raises UsageError for an unknown name, and for sizes that do not fit each other unless they are
    the overrides' and fit another sweep.
    """
    chosen = _chosen(suite, found, implementations)
    candidates: dict[str, Candidate] = {}
    swept: set[str] = set()
    misfits: list[UsageError] = []
    for sweep, picks in zip(suite.sweeps, chosen, strict=True):
        try:
            questions = list(_questions(sweep, picks, device, found, overrides))
        except UsageError as error:
            if not overrides:
                raise
            misfits.append(error)
            continue
        for question, pick in questions:
            swept.update(APPLICABLE[question.problem.level, question.problem.family])
            for candidate in _resolve(question, found[pick.name], pick.variant, device):
                candidates.setdefault(candidate.case.case_id, candidate)
    if misfits and not candidates:
        raise misfits[0]
    idle = [name for name in overrides if name not in swept and name not in ("dtype", "pass")]
    notes = [f"axis {name} does not apply to any case of this run" for name in idle if candidates]
    notes += [f"a sweep was left out: {error}" for error in misfits]
    return Expansion(candidates=tuple(candidates.values()), notes=tuple(notes))


def parse_pick(text: str, names: Iterable[str]) -> list[Pick]:
    """Return what `name`, `name:variant` or a glob of either stands for."""
    pattern, colon, variant = text.partition(":")
    if colon and not variant:
        raise UsageError(
            f"'{text}' names no variant: write {pattern}:NAME, or {pattern}:* for all."
        )
    return [Pick(name, variant or None) for name in registry.match(pattern, names)]


def _chosen(
    suite: Suite, found: Mapping[str, Implementation], wanted: Sequence[str] | None
) -> list[list[Pick]]:
    """Return each sweep's implementations, once what the person asked for is applied."""
    offered = [_unique(_sweep_picks(suite, sweep, found)) for sweep in suite.sweeps]
    if not wanted:
        return offered
    picked = _unique(pick for text in wanted for pick in parse_pick(text, found))
    in_suite = {pick.name for picks in offered for pick in picks}
    return [[pick for own in picked for pick in _narrow(own, picks, in_suite)] for picks in offered]


def _sweep_picks(suite: Suite, sweep: Sweep, found: Mapping[str, Implementation]) -> Iterator[Pick]:
    for text in sweep.implementations:
        try:
            yield from parse_pick(text, found)
        except UsageError as error:
            raise UsageError(f"suite '{suite.name}': {error}") from error


def _narrow(wanted: Pick, offered: Sequence[Pick], in_suite: set[str]) -> list[Pick]:
    if wanted.name not in in_suite:
        return [wanted]
    same = [pick for pick in offered if pick.name == wanted.name]
    return [wanted] if same and wanted.variant else same


def _questions(
    sweep: Sweep,
    picks: Sequence[Pick],
    device: Device,
    found: Mapping[str, Implementation],
    overrides: Mapping[str, Sequence[AxisValue]],
) -> Iterator[tuple[Case, Pick]]:
    """Yield each case of a sweep with its variant still open."""
    dtypes = [DType(value) for value in overrides.get("dtype", ())] or sweep.dtypes.get(device.kind)
    passes = [Pass(value) for value in overrides.get("pass", ())] or sweep.passes.get(device.kind)
    if device.kind not in sweep.dtypes or device.kind not in sweep.passes:
        return  # the sweep is not meant for this device
    for pick in picks:
        for family in found[pick.name].families:
            if sweep.families and family not in sweep.families:
                continue
            problems = list(_problems(sweep, family, device, overrides))
            for problem, pass_, dtype in itertools.product(problems, passes or (), dtypes or ()):
                case = Case(
                    implementation=pick.name,
                    variant="",
                    problem=_asked(problem, pass_),
                    pass_=pass_,
                    dtype=dtype,
                )
                yield case, pick


def _asked(problem: Problem, pass_: Pass) -> Problem:
    """Drop the length of a state update: what it costs does not depend on what came before."""
    if pass_ is Pass.DECODE and problem.family is not Family.ATTENTION:
        return replace(problem, seqlen=None)
    return problem


def _problems(
    sweep: Sweep, family: Family, device: Device, overrides: Mapping[str, Sequence[AxisValue]]
) -> Iterator[Problem]:
    names = APPLICABLE[sweep.level, family]
    values: list[Sequence[AxisValue]] = []
    for name in names:
        own = sweep.axes[name].resolve(device.kind, family) if name in sweep.axes else ()
        if name == "seqlen" and not own:
            return  # the suite asks no length of this family on this device
        values.append(overrides.get(name) or own or (DEFAULTS[name][family],))
    for combination in itertools.product(*values):
        yield _problem(sweep.level, family, dict(zip(names, combination, strict=True)))


def _problem(level: Level, family: Family, sizes: dict[str, Any]) -> Problem:
    if level is Level.BLOCK:
        sizes["d_inner"] = sizes["d_model"] * EXPANSION[family]
    width, headdim, groups = sizes["d_inner"], sizes.get("headdim"), sizes.get("ngroups")
    if headdim is not None and width % headdim:
        raise UsageError(
            f"family {family}: headdim {headdim} does not divide d_inner {width}; "
            f"choose others with --axis headdim=... or --axis d_inner=..."
        )
    shared = width if headdim is None else width // headdim
    if groups is not None and shared % groups:
        what = "d_inner" if headdim is None else "the number of heads"
        raise UsageError(f"family {family}: ngroups {groups} does not divide {what}, {shared}.")
    return Problem(family=family, level=level, **sizes)


def _resolve(
    question: Case, implementation: Implementation, pattern: str | None, device: Device
) -> list[Candidate]:
    """Name the variants that a question is asked of."""
    refused = _refused(question)
    asked = "decode_variants" if question.pass_ is Pass.DECODE else "variants"
    variants: tuple[Variant, ...] = registry.ask(implementation, asked, device)
    if refused is not None or (not variants and question.pass_ is Pass.DECODE):
        reason = refused or f"{implementation.name} computes whole sequences, not one token"
        case = replace(question, variant="none")
        return [Candidate(case=case, outcome=Outcome.UNSUPPORTED, reason=reason)]
    if not variants:
        variants = (Variant(name="none", unavailable=f"has no variant for {device.kind}"),)
    judged = [_judge(question, implementation, variant, device) for variant in variants]
    if pattern is None:
        runnable = [candidate for candidate in judged if candidate.outcome is None]
        declined = [found for found in judged if found.outcome is Outcome.UNSUPPORTED]
        return (runnable or declined or judged)[:1]
    matched = [found for found in judged if fnmatch.fnmatchcase(found.case.variant, pattern)]
    if not matched:
        kind = f"variant of {implementation.name}"
        raise UsageError(unknown_name(kind, pattern, [variant.name for variant in variants]))
    return matched


def _refused(question: Case) -> str | None:
    if question.problem.level is Level.BLOCK and question.pass_.leaves_state:
        return f"the pass {question.pass_} is measured at level op"
    return None


def _judge(
    question: Case, implementation: Implementation, variant: Variant, device: Device
) -> Candidate:
    case = replace(question, variant=variant.name)
    if variant.unavailable is not None:
        return Candidate(case=case, outcome=Outcome.UNAVAILABLE, reason=variant.unavailable)
    declined: str | None = registry.ask(implementation, "unsupported", case, device)
    if declined is not None:
        return Candidate(case=case, outcome=Outcome.UNSUPPORTED, reason=declined)
    return Candidate(case=case)


def _unique(picks: Iterable[Pick]) -> list[Pick]:
    return list(dict.fromkeys(picks))
