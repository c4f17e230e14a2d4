"""Reads pytest-benchmark's JSON as a run, as far as its benchmarks are cases of Mambench."""

import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from mambench.harness.errors import UsageError
from mambench.harness.plan import PlannedCase
from mambench.harness.records import Observation, observation_id
from mambench.harness.spec import SCHEMA_VERSION, Case, DeviceKind, Outcome, digest
from mambench.harness.store import RunFolder, new_run

METHOD = "pytest-benchmark"


def read(path: Path, output: Path | None = None) -> tuple[Path, int, int]:
    """Make a run folder of a file; returns it, how many cases it has, and how many were left out.

    Left out are benchmarks that are not cases of Mambench: they say nothing of what was computed.
    Raises UsageError for a file that is not pytest-benchmark's, or has none of our cases.
    """
    document = _document(path)
    benchmarks = cast("list[Any]", document["benchmarks"])
    found = [(case, b) for b in benchmarks if (case := _case(b)) is not None]
    if not found:
        raise UsageError(f"{path}: none of its {len(benchmarks)} benchmarks is a case of Mambench.")
    folder, run_id, _ = new_run(Path("runs"), METHOD)
    commit: Mapping[str, Any] = document.get("commit_info") or {}
    info: Mapping[str, Any] = document.get("machine_info") or {}
    created = str(document.get("datetime") or "")
    device = _device(found[0][1])
    manifest = {
        "schema": SCHEMA_VERSION,
        "run_id": run_id,
        "created_at": created,
        "command": [METHOD, str(path)],
        "suite": METHOD,
        "plan": [PlannedCase(case=case).to_dict() for case, _ in found],
        "plan_hash": digest([case.case_id for case, _ in found]),
        "settings": {},
        "device": device,
        "environment": {"python": info.get("python_version"), "cpu": _cpu(info)},
        "code": {"commit": commit.get("id"), "dirty": bool(commit.get("dirty"))},
        "plugins": [],
        "notes": [f"imported from {path.name}"],
    }
    with RunFolder.create(output or folder, manifest) as run:
        for case, benchmark in found:
            run.append(
                _observation(case, benchmark, created, str(commit.get("id")), device["name"])
            )
    return run.path, len(found), len(benchmarks) - len(found)


def _document(path: Path) -> dict[str, Any]:
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    document = cast("dict[str, Any]", found) if isinstance(found, dict) else {}
    if not isinstance(document.get("benchmarks"), list):
        raise UsageError(f"{path} is not a file of pytest-benchmark: it has no benchmarks.")
    return document


def _case(benchmark: Any) -> Case | None:
    try:
        return Case.from_dict(benchmark["extra_info"]["mambench"]["case"])
    except (KeyError, TypeError, ValueError):
        return None


def _cpu(info: Mapping[str, Any]) -> dict[str, Any]:
    cpu: Mapping[str, Any] = info.get("cpu") or {}
    return {
        "model": cpu.get("model") or cpu.get("brand_raw"),
        "logical_cores": cpu.get("logical_cores") or cpu.get("count"),
    }


def _device(benchmark: Mapping[str, Any]) -> dict[str, str]:
    said: Any = benchmark["extra_info"]["mambench"].get("device")
    found = cast("dict[str, Any]", said) if isinstance(said, dict) else {}
    if found.get("kind") not in list(DeviceKind):
        raise UsageError("a case of Mambench must say its device: kind (cpu or cuda) and name.")
    kind = str(found["kind"])
    return {"kind": kind, "name": str(found.get("name") or "unknown"), "torch_name": kind}


def _observation(
    case: Case, benchmark: Mapping[str, Any], created: str, code: str, device: str
) -> Observation:
    stats: Mapping[str, Any] = benchmark.get("stats") or {}
    samples = [float(value) for value in stats.get("data") or ()]
    time_s = statistics.median(samples) if samples else float(stats.get("median") or math.nan)
    ok = math.isfinite(time_s) and time_s > 0
    return Observation(
        case=case,
        measurement="time",
        outcome=Outcome.OK if ok else Outcome.ERROR,
        reason=None if ok else "the benchmark has no time",
        observation_id=observation_id(
            case, measurement="time", round=0, code_version=code, device=device, settings={}
        ),
        started_at=created,
        duration_s=float(stats.get("total") or 0.0),
        method=METHOD,
        values={"time_s": time_s} if ok else {},
        samples_s=tuple(samples) or None,
    )
