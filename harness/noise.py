"""A machine's own noise: A/A rounds of its cases, kept by machine. Imports no torch.

`calibrate` measures them. Where a machine is not known, a check measures the base twice a round.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mambench.harness import machine_cache
from mambench.harness.errors import RunFolderError
from mambench.harness.rounds import AA
from mambench.harness.rule import Rule
from mambench.harness.spec import Case, Device, DeviceKind, digest

VERSION = 1
KEPT_PAIRS = 30  # the newest; older ones may be of a driver or a neighbour that is gone
ENOUGH_PAIRS = 8  # a case with fewer is not known
ALARM_PAIRS = 4  # of which the rate of false alarms can be said, if roughly
SIMULATED_RUNS = 400


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What is stored of one machine."""

    fingerprint: str
    created_at: str
    device: str
    pairs: AA

    def knows(self, cases: Sequence[Case]) -> bool:
        """Whether every case has enough A/A rounds."""
        return all(
            len(self.pairs.pairs.get(case.case_id, {}).get("time_s", ())) >= ENOUGH_PAIRS
            for case in cases
        )


def path(device: Device, store: Path | None) -> Path:
    """Return where a machine's noise is kept."""
    if store is None:
        return machine_cache.path("noise", device)
    return store / f"noise-{machine_cache.fingerprint(device)}.json"


def load(device: Device, store: Path | None) -> Calibration | None:
    """Return what is known of this machine, None if nothing is.

    Raises RunFolderError for a file that is there and cannot be used: silently measuring without
    it would judge by other limits than were asked for.
    """
    file = path(device, store)
    if not file.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(file.read_text())
        if found["version"] != VERSION:
            raise RunFolderError(
                f"{file} has version {found['version']!r}, this one reads {VERSION}: "
                f"calibrate again."
            )
        return Calibration(
            fingerprint=found["fingerprint"],
            created_at=found["created_at"],
            device=found["device"],
            pairs=AA(pairs=found["pairs"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"{file} cannot be read ({error!r}): calibrate again.") from error


def keep(found: AA, device: Device, store: Path | None) -> Path:
    """Add A/A rounds to what is known of this machine; returns the file."""
    before = load(device, store)
    pairs = _merged(before.pairs.pairs if before else {}, found.pairs)
    file = path(device, store)
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(
        {
            "version": VERSION,
            "fingerprint": machine_cache.fingerprint(device),
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": device.name,
            "pairs": pairs,
        }
    )
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(text + "\n")
    temporary.replace(file)
    return file


def _merged(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    merged: dict[str, Any] = {case_id: dict(metrics) for case_id, metrics in before.items()}
    for case_id, metrics in after.items():
        known = merged.setdefault(case_id, {})
        for metric, rows in metrics.items():
            known[metric] = [*known.get(metric, ()), *rows][-KEPT_PAIRS:]
    return merged


def alarm_rate(found: AA, cases: Sequence[Case], rule: Rule) -> dict[str, Any] | None:
    """Return how often checks of equal code would raise an alarm, by this machine's own rounds.

    None with too few rounds to say.
    """
    import numpy as np

    from mambench.harness import simulate

    rows = [found.pairs.get(c.case_id, {}).get("time_s", ()) for c in cases]
    rows = [row for row in rows if len(row) >= ALARM_PAIRS]
    if not rows:
        return None
    width = min(map(len, rows))
    logs = np.array([[value for pair in row[-width:] for value in pair] for row in rows])
    alarms = simulate.resampled_alarms(logs, rule, runs=SIMULATED_RUNS)
    return {
        "cases": len(rows),
        "aa_rounds": width,
        "simulated_checks": SIMULATED_RUNS,
        "alarms": alarms,
        "rate": alarms / SIMULATED_RUNS,
        "bound_95": simulate.rate_bound(alarms, SIMULATED_RUNS),
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
