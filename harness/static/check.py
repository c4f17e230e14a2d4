"""Judges kernels without a GPU: what their binaries take, head against base. Imports no torch.

Both sides' kernels are compiled as they are launched (`harness.static.record`), by one Triton.
Nothing here is noisy, so nothing is estimated: what is worse by more than its
tolerance has regressed.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import mambench
from mambench.harness import machine_cache
from mambench.harness.check import accept, imports, sides
from mambench.harness.check.conclusion import CheckReport
from mambench.harness.check.sides import Side, Wanted
from mambench.harness.errors import MeasurementError, UsageError
from mambench.harness.static.child import launched
from mambench.harness.verdict import Assessment, Kind, Point, Tolerance, Verdict

INVENTORY = "kernels/inventory.py"
CODE = "machine_code"  # the metric of a point that says only whether anything changed
FAIL_ON = (Verdict.REGRESSED, Verdict.FAILED, Verdict.MISSING)
LIMIT_S = 1800.0
REGISTER_UNIT = 8  # a thread's registers are allocated in units of this many

# Registers are judged as they are allocated. One more global access or barrier is never an accident
# of scheduling; a handful of other instructions is.
TOLERANCES: Mapping[str, Tolerance] = {
    "registers": Tolerance(frac=0.0, amount=0.0),
    "stack_bytes": Tolerance(frac=0.0, amount=0.0),
    "spill_accesses": Tolerance(frac=0.0, amount=0.0),
    "shared_bytes": Tolerance(frac=0.0, amount=128.0),
    "global_loads": Tolerance(frac=0.0, amount=0.0),
    "global_stores": Tolerance(frac=0.0, amount=0.0),
    "barriers": Tolerance(frac=0.0, amount=0.0),
    "shared_accesses": Tolerance(frac=0.05, amount=2.0),
    "instructions": Tolerance(frac=0.03, amount=8.0),
}
_OPCODES_SHOWN = 6
ALIKE = "the same source, configuration and compiler"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a static check was asked for."""

    wanted: Wanted
    inventory: Path | None = None  # relative to a side's root; None: Mambench's own
    baseline: Path | None = None  # a `static.json`, instead of the base's sources
    cache: Path | None = None  # None: the user's cache
    architectures: tuple[int, ...] = ()  # (): all that an entry names
    entries: str | None = None  # only entries whose name holds this
    changed: bool = False  # compile only what the sides launch differently
    accepted: Sequence[accept.Accepted] = field(default=())
    fail_on: Sequence[str] = FAIL_ON
    program: Sequence[str] = ("mambench",)


def check(request: Request, note: Callable[[str], None]) -> tuple[CheckReport, dict[str, Any]]:
    """Compile and compare; returns the report and the head's figures, to be kept as a baseline.

    Raises UsageError for a mistake of the user; what else fails is the report's `problem`.
    """
    wanted = request.wanted
    if request.baseline is not None:
        wanted = Wanted(repository=wanted.repository, base=wanted.head, head=wanted.head)
    head: dict[str, Any] = {}
    try:
        with tempfile.TemporaryDirectory(prefix="mambench-static-") as name:
            folder = Path(name)
            with sides.prepared(wanted, folder, note) as (base_side, head_side):
                files = [_required(head_side, request)]
                if request.baseline is not None:
                    base, label = _asked(read(request.baseline), request), str(request.baseline)
                else:
                    own = _inventory(base_side, request)
                    named = [str(_inventory(side, request)) for side in (base_side, head_side)]
                    imports.differences(base_side, head_side, named[:1], named[1:])
                    files += [own] if own.is_file() else []
                    alike = _launched(head_side, request, folder)
                    base = _figures(base_side, files, request, folder, alike)
                    label = base_side.label
                alike = [launched(kernel) for kernel in base["kernels"]] if request.changed else []
                head = _figures(head_side, files[:1], request, folder, alike)
                head |= {"code": head_side.version}
                facts = {"base": label, "head": head_side.label}
    except (MeasurementError, OSError) as error:
        return _nothing(request, str(error)), head
    if base["triton"] != head["triton"]:
        problem = (
            f"the baseline was compiled by Triton {base['triton']}, this is {head['triton']}: "
            f"compile it again with the same version"
        )
        return _nothing(request, problem), head
    return _report(base, head, facts, request), {} if request.changed else head


def read(path: Path) -> dict[str, Any]:
    """Read a stored `static.json`; raises UsageError if it is not one."""
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    document = cast("dict[str, Any]", found) if isinstance(found, dict) else {}
    if "kernels" not in document:
        raise UsageError(f"{path} holds no kernels: expected a static.json of an earlier check.")
    if document.get("schema") != 1:
        raise MeasurementError(
            f"{path} has schema {document.get('schema')}, this Mambench reads 1: make it anew"
        )
    return document


def _asked(stored: dict[str, Any], request: Request) -> dict[str, Any]:
    """Leave out of a stored file the kernels that this check was not asked for."""
    kept = [
        kernel
        for kernel in stored["kernels"]
        if (not request.architectures or kernel["architecture"] in request.architectures)
        and (request.entries or "") in kernel["entry"]
    ]
    return {**stored, "kernels": kept}


def _inventory(side: Side, request: Request) -> Path:
    return side.root / (request.inventory or INVENTORY)


def _required(side: Side, request: Request) -> Path:
    path = _inventory(side, request)
    if not path.is_file():
        raise UsageError(
            f"there is no {request.inventory or INVENTORY} in {side.root}: it says which kernels "
            f"to compile; name yours with --inventory FILE."
        )
    return path


def _launched(side: Side, request: Request, folder: Path) -> list[Any]:
    """Return what a side launches, [] where all of it is to be compiled anyway."""
    if not request.changed:
        return []
    return _asked_of(side, [_required(side, request)], request, folder, "--list")


def _figures(
    side: Side,
    inventories: Sequence[Path],
    request: Request,
    folder: Path,
    alike: Sequence[Any] = (),
) -> dict[str, Any]:
    """Compile a side's inventory, less what is launched alike if only changes are asked for."""
    if not request.changed:
        return _asked_of(side, inventories, request, folder)
    known = folder / f"alike-{side.name}.json"
    known.write_text(json.dumps(list(alike)))
    return _asked_of(side, inventories, request, folder, "--alike", str(known))


def _asked_of(
    side: Side, inventories: Sequence[Path], request: Request, folder: Path, *options: str
) -> Any:
    """Ask a side, in a process of its own, see `harness.static.child`."""
    output = folder / f"{side.name}.json"
    output.unlink(missing_ok=True)
    cache = request.cache or machine_cache.folder() / "static"
    start = Path(mambench.__file__).with_name("_start.py")
    command = [
        *(sys.executable, "-P", str(start), *side.code.arguments, "harness.static.child"),
        *(str(output), "--cache", str(cache.resolve())),
        *(word for path in inventories for word in ("--inventory", str(path))),
        *(word for path in side.code.path for word in ("--path", path)),
        *(word for number in request.architectures for word in ("--architecture", str(number))),
        *(("--entries", request.entries) if request.entries else ()),
        *options,
    ]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    try:
        done = subprocess.run(
            command,
            cwd=side.root,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise MeasurementError(f"compiling the {side.name} took over {LIMIT_S:.0f} s") from error
    if done.returncode or not output.is_file():
        said = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise MeasurementError(f"compiling the {side.name} failed: {said[0]}")
    return json.loads(output.read_text())


def _nothing(request: Request, problem: str) -> CheckReport:
    return CheckReport(
        title=_title(request),
        assessment=Assessment(points=()),
        facts={"head": request.wanted.head},
        fail_on=request.fail_on,
        problem=problem,
        closing=(),
    )


def _title(request: Request) -> str:
    against = request.baseline or request.wanted.base
    return f"Kernels of {request.wanted.head} against {against}, compiled without a GPU"


def _report(
    base: Mapping[str, Any], head: Mapping[str, Any], facts: Mapping[str, str], request: Request
) -> CheckReport:
    commands = {name_of(kernel): command(kernel, request) for kernel in head["kernels"]}
    points = tuple(
        replace(p, command=commands.get(p.name))
        if p.verdict in (Verdict.REGRESSED, Verdict.FAILED)
        else p
        for p in judge(base["kernels"], head["kernels"])
    )
    same = sum(p.metric == CODE and p.verdict is Verdict.SAME and not p.notes for p in points)
    counts = (
        f"Compiled {head['compiled']} kernels of the head and {base.get('compiled', 0)} of the "
        f"base; {head['cached']} and {base.get('cached', 0)} came from the cache."
    )
    if alike := sum(_uncompiled(kernel) for kernel in head["kernels"]):
        counts += f" {alike} are launched alike on both sides and were not compiled."
    return CheckReport(
        title=_title(request),
        assessment=accept.apply(Assessment(points=points), request.accepted),
        facts={**facts, "Triton": str(head["triton"]), "kernels": str(len(head["kernels"]))},
        fail_on=request.fail_on,
        closing=(counts, f"{same} kernels have the same machine code on both sides."),
    )


def command(kernel: Mapping[str, Any], request: Request) -> str:
    """Return the command that judges the kernels of one entry and architecture alone."""
    wanted = request.wanted
    against = ["--baseline", str(request.baseline)] if request.baseline else ["--base", wanted.base]
    words = [*request.program, "check", "--static", *against, "--head", wanted.head]
    words += ["--inventory", str(request.inventory)] if request.inventory else []
    for flag, value in (("--build", wanted.build), ("--build-base", wanted.build_base)):
        words += [flag, value] if value else []
    words += [word for part in wanted.path for word in ("--path", part)]
    return shlex.join([*words, "--entries", kernel["entry"], "--arch", str(kernel["architecture"])])


# --- judging -------------------------------------------------------------------------------------


def judge(base: Iterable[Mapping[str, Any]], head: Iterable[Mapping[str, Any]]) -> Iterable[Point]:
    """Yield points: of each kernel what has changed, or one that says that nothing has."""
    before = {name_of(kernel): kernel for kernel in base}
    after = {name_of(kernel): kernel for kernel in head}
    for name in dict.fromkeys([*after, *before]):
        old, new = before.get(name), after.get(name)
        if new is None:
            yield _said(name, Verdict.MISSING, "the base launches this kernel, the head does not")
        elif "error" in new:
            yield _said(name, Verdict.FAILED, new["error"])
        elif old is None or "error" in old:
            why = "the base has no such kernel" if old is None else "the base does not compile it"
            yield _said(name, Verdict.NEW, why)
        elif _uncompiled(old) or _uncompiled(new):
            yield _without_binary(name, old, new)
        else:
            yield from _changes(name, old, new)


def _without_binary(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Point:
    """Judge a kernel that a side did not compile: the same only if all that makes it is equal."""
    if old["key"] != new["key"]:
        return _said(name, Verdict.FAILED, "it was launched differently and not compiled")
    return replace(_said(name, Verdict.SAME, ALIKE), change_frac=0.0)


def _uncompiled(kernel: Mapping[str, Any]) -> bool:
    return "digest" not in kernel and "error" not in kernel


def name_of(kernel: Mapping[str, Any]) -> str:
    """Return what a kernel is called in reports: entry, function, its number, architecture."""
    number = f" #{kernel['number']}" if kernel["number"] > 1 else ""
    function = f" / {kernel['kernel']}{number}" if kernel["kernel"] else ""
    return f"{kernel['entry']}{function} sm_{kernel['architecture']}"


def _said(name: str, verdict: Verdict, reason: str) -> Point:
    return Point(kind=Kind.CASE, name=name, metric=CODE, verdict=verdict, reason=reason)


def _changes(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterable[Point]:
    notes = _notes(old, new)
    judged = [
        _point(name, metric, float(old[metric]), float(new[metric]), notes)
        for metric in TOLERANCES
        if old[metric] != new[metric]
    ]
    worse = [p for p in judged if p.verdict is not Verdict.SAME]
    yield from worse
    if not worse:
        yield Point(
            kind=Kind.CASE,
            name=name,
            metric=CODE,
            verdict=Verdict.SAME,
            change_frac=0.0,
            notes=notes if old["digest"] != new["digest"] else (),
        )


def _point(name: str, metric: str, old: float, new: float, notes: tuple[str, ...]) -> Point:
    tolerance = TOLERANCES[metric]
    unit = REGISTER_UNIT if metric == "registers" else 1
    before, after = -(-old // unit) * unit, -(-new // unit) * unit
    verdict = Verdict.SAME
    if after > tolerance.limit(before):
        verdict = Verdict.REGRESSED
    elif before > tolerance.limit(after):
        verdict = Verdict.IMPROVED
    return Point(
        kind=Kind.CASE,
        name=name,
        metric=metric,
        verdict=verdict,
        reason=f"{old:,.0f} -> {new:,.0f}",
        # From nothing there is no fraction; every such change is shown as of one.
        change_frac=(new - old) / max(old, 1.0),
        base=old,
        head=new,
        notes=notes,
    )


def _notes(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, ...]:
    """Say what differs beside the figures: source, configuration, instructions."""
    before, after = old["configuration"], new["configuration"]
    tuned = [
        f"{name} {before.get(name, 'absent')} -> {after.get(name, 'absent')}"
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    ]
    counts = {
        name: new["opcodes"].get(name, 0) - old["opcodes"].get(name, 0)
        for name in {*old["opcodes"], *new["opcodes"]}
    }
    largest = sorted(((abs(n), name) for name, n in counts.items() if n), reverse=True)
    moved = [f"{name} {counts[name]:+d}" for _, name in largest[:_OPCODES_SHOWN]]
    notes: list[str] = []
    if tuned:
        notes.append(f"configuration: {', '.join(tuned)}")
    if old["source"] != new["source"]:
        notes.append("the kernel's source, or that of a function it calls")
    if moved:
        notes.append(f"instructions: {', '.join(moved)}")
    elif old["digest"] != new["digest"]:
        notes.append("the machine code, with the same instructions in other order or operands")
    return tuple(notes)
