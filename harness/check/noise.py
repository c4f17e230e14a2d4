"""A machine's own noise: A/A rounds of its cases, kept by machine. Imports no torch.

`calibrate` measures them. Where a machine is not known, a check measures the base twice a round.
What changes the noise is kept apart: how a case is sampled, on how many threads, by which libraries
and which driver (`conditions`), and in which way it was timed (`rounds.AA.methods`).
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mambench.harness import machine, machine_cache
from mambench.harness.check.rounds import AA
from mambench.harness.check.rule import Rule
from mambench.harness.errors import RunFolderError
from mambench.harness.spec import Case, Device, DeviceKind, Settings, digest
from mambench.harness.workers.limits import thread_count

VERSION = 2
KEPT_PAIRS = 30  # the newest; older ones may be of a driver or a neighbour that is gone
KEPT_CONDITIONS = 20
ENOUGH_PAIRS = 8  # a case with fewer is not known
ALARM_PAIRS = 4  # of which the rate of false alarms can be said, if roughly
SIMULATED_RUNS = 400
PLANTED = (0.05, 0.1)  # slowdowns of one case, of which it is said how many would be found
_SAMPLING = ("target_s", "min_samples", "max_samples", "relative_error")
_NO_MATTER = ("pandas", "nvidia-ml-py", "psutil", "einops")  # libraries that nothing timed runs


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What is stored of one machine under the conditions that were asked for."""

    fingerprint: str
    created_at: str
    device: str
    pairs: AA

    def knows(self, cases: Sequence[Case], metrics: Iterable[str] = ("time_s",)) -> bool:
        """Whether every case has enough A/A rounds of each metric."""
        wanted = [(case, metric) for metric in metrics for case in cases]
        return all(len(self.pairs.rows(c, metric)) >= ENOUGH_PAIRS for c, metric in wanted)


def conditions(device: Device, settings: Settings) -> dict[str, Any]:
    """Return what else than machine and case makes noise what it is, as flat plain JSON values."""
    found = machine.environment(device)
    gpu: dict[str, Any] = found["gpu"] or {}
    libraries: dict[str, str | None] = found["libraries"]
    sampling = settings.to_dict()
    return {
        **{name: sampling[name] for name in _SAMPLING},
        "threads": thread_count(settings),
        "python": found["python"].rpartition(".")[0],
        "torch_cuda": found["torch_cuda"],
        **{name: v for name, v in libraries.items() if v is not None and name not in _NO_MATTER},
        "driver": gpu.get("driver"),
        "power_limit_w": gpu.get("power_limit_w"),
    }


def path(device: Device, store: Path | None) -> Path:
    """Return where a machine's noise is kept."""
    if store is None:
        return machine_cache.path("noise", device)
    return store / f"noise-{machine_cache.fingerprint(device)}.json"


def load(device: Device, settings: Settings, store: Path | None) -> Calibration | None:
    """Return what is known of this machine under these conditions, None if nothing is.

    Raises RunFolderError for a file that is there and cannot be used: silently measuring without
    it would judge by other limits than were asked for.
    """
    wanted = digest(conditions(device, settings))
    for entry in _read(path(device, store)):
        if digest(entry["conditions"]) == wanted:
            return Calibration(
                fingerprint=machine_cache.fingerprint(device),
                created_at=entry["created_at"],
                device=device.name,
                pairs=AA(pairs=entry["pairs"], methods=entry["methods"]),
            )
    return None


def unknown(device: Device, settings: Settings, store: Path | None) -> str:
    """Return what a person is told where `load` found nothing, or not every case: one clause."""
    entries = _read(path(device, store))
    if not entries:
        return "this machine's noise is not known"
    now = conditions(device, settings)
    changed = [_changed(entry["conditions"], now) for entry in entries]
    nearest = min(changed, key=len)
    if not nearest:
        return "this machine's noise is not known for all cases"
    return f"this machine's noise is known under other conditions only ({', '.join(nearest[:3])})"


def _changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    return [f"{name}: {then.get(name)} -> {now.get(name)}" for name in names]


def _read(file: Path) -> list[dict[str, Any]]:
    """Return the entries of a file, the newest last; none if it is not there."""
    if not file.is_file():
        return []
    try:
        found: dict[str, Any] = json.loads(file.read_text())
        if found["version"] != VERSION:
            raise RunFolderError(
                f"{file} has version {found['version']!r}, this one reads {VERSION}: remove it "
                f"and calibrate again."
            )
        entries: list[dict[str, Any]] = found["entries"]
        for entry in entries:
            _ = entry["conditions"], entry["created_at"], entry["pairs"], entry["methods"]
        return entries
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunFolderError(
            f"{file} cannot be read ({error!r}): remove it and calibrate again."
        ) from error


def keep(found: AA, device: Device, settings: Settings, store: Path | None) -> Path:
    """Add A/A rounds to what is known of this machine; returns the file."""
    file, now = path(device, store), conditions(device, settings)
    entries = _read(file)
    same = [entry for entry in entries if digest(entry["conditions"]) == digest(now)]
    others = [entry for entry in entries if entry not in same]
    before = AA(pairs=same[0]["pairs"], methods=same[0]["methods"]) if same else AA()
    merged = _merged(before, found)
    entry = {
        "conditions": now,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "pairs": merged.pairs,
        "methods": merged.methods,
    }
    text = json.dumps(
        {
            "version": VERSION,
            "fingerprint": machine_cache.fingerprint(device),
            "device": device.name,
            "entries": [*others, entry][-KEPT_CONDITIONS:],
        }
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(text + "\n")
    temporary.replace(file)
    return file


def _merged(before: AA, after: AA) -> AA:
    """Return both; rounds that were timed in another way than the new ones are dropped."""
    pairs: dict[str, Any] = {case_id: dict(metrics) for case_id, metrics in before.pairs.items()}
    methods: dict[str, Any] = {case_id: dict(ways) for case_id, ways in before.methods.items()}
    for case_id, metrics in after.pairs.items():
        known, ways = pairs.setdefault(case_id, {}), methods.setdefault(case_id, {})
        for metric, rows in metrics.items():
            way = after.methods.get(case_id, {}).get(metric)
            same = ways.get(metric) == way
            known[metric] = [*(known.get(metric, ()) if same else ()), *rows][-KEPT_PAIRS:]
            if way is not None:
                ways[metric] = way
    return AA(pairs=pairs, methods=methods)


def alarm_rate(found: AA, cases: Sequence[Case], rule: Rule) -> dict[str, Any] | None:
    """Return how often checks would raise a false alarm and find a slowdown, by a machine's rounds.

    None with too few rounds to say.
    """
    import numpy as np

    from mambench.harness.check import simulate

    rows = [found.pairs.get(c.case_id, {}).get("time_s", ()) for c in cases]
    rows = [row for row in rows if len(row) >= ALARM_PAIRS]
    if not rows:
        return None
    width = min(map(len, rows))
    logs = np.array([[value for pair in row[-width:] for value in pair] for row in rows])
    told = simulate.resampled(logs, rule, runs=SIMULATED_RUNS, planted=PLANTED)
    return {
        "cases": len(rows),
        "aa_rounds": width,
        "simulated_checks": SIMULATED_RUNS,
        "alarms": told.alarms,
        "rate": told.alarms / SIMULATED_RUNS,
        "bound_95": simulate.rate_bound(told.alarms, SIMULATED_RUNS),
        "found": {f"{change:g}": share for change, share in told.found.items()},
    }


def of_manifest(manifest: Mapping[str, Any]) -> str:
    """Return the fingerprint of the machine that a stored run was made on."""
    environment, device = manifest["environment"], manifest["device"]
    cpu: dict[str, Any] = environment.get("cpu") or {}
    known: list[Any] = [cpu.get("model"), cpu.get("logical_cores")]
    if device["kind"] == DeviceKind.CUDA:
        gpu: dict[str, Any] = environment.get("gpu") or {}
        known.append(gpu.get("uuid") or device["name"])
    return digest(known)
