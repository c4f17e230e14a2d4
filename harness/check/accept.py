"""Accepted regressions: a committed file that says which slowdowns are meant, why and until when.

    - case: "ssd:* training *L=4096*"     # a glob over the name in the report
      metric: time_s                      # optional; all metrics if absent
      reason: numerically safer decay, see the pull request
      expires: 2027-01-31

An expired entry accepts nothing, and the check says so.
"""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, cast

import yaml

from mambench.harness.check.report import what
from mambench.harness.errors import UsageError
from mambench.harness.verdict import Assessment, Point, Verdict

_REQUIRED = ("case", "reason", "expires")
_ALLOWED = (*_REQUIRED, "metric")


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """One entry."""

    pattern: str
    reason: str
    expires: date
    metric: str | None = None

    def covers(self, point: Point) -> bool:
        """Whether it is about this point."""
        if self.metric is not None and self.metric != point.metric:
            return False
        if self.pattern == what(point):  # copied from the report, where [metric] is no set
            return True
        return any(fnmatch.fnmatchcase(name, self.pattern) for name in (point.name, what(point)))


def read(path: Path) -> tuple[Accepted, ...]:
    """Return a file's entries; raises UsageError that names the entry and what is wrong with it."""
    try:
        found: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not YAML: {error}") from error
    if found is None:
        return ()
    if not isinstance(found, list):
        raise UsageError(f"{path}: expected a list of entries, got {type(found).__name__}.")
    entries = cast("list[Any]", found)
    return tuple(_entry(item, f"{path}, entry {i}") for i, item in enumerate(entries, start=1))


def _entry(item: Any, where: str) -> Accepted:
    if not isinstance(item, dict):
        raise UsageError(f"{where}: expected a mapping with {', '.join(_REQUIRED)}.")
    values = cast("dict[str, Any]", item)
    for name in values:
        if name not in _ALLOWED:
            raise UsageError(f"{where}: unknown field '{name}'. Valid: {', '.join(_ALLOWED)}.")
    lacking = [name for name in _REQUIRED if not values.get(name)]
    if lacking:
        raise UsageError(f"{where}: lacks {', '.join(lacking)}.")
    expires = values["expires"]
    if isinstance(expires, datetime) or not isinstance(expires, date):
        raise UsageError(f"{where}: expires must be a date such as 2027-01-31, got {expires!r}.")
    return Accepted(
        pattern=str(values["case"]),
        reason=str(values["reason"]),
        expires=expires,
        metric=values.get("metric"),
    )


def apply(
    assessment: Assessment, accepted: Sequence[Accepted], today: date | None = None
) -> Assessment:
    """Mark the regressions that are meant; says which entries are expired or covered nothing."""
    today = today or datetime.now(UTC).date()
    live = [entry for entry in accepted if entry.expires >= today]
    notes = [
        f"the acceptance of '{e.pattern}' expired on {e.expires}: it no longer counts"
        for e in accepted
        if e.expires < today
    ]
    used: set[int] = set()
    points: list[Point] = []
    for point in assessment.points:
        entry = next((e for e in live if e.covers(point)), None)
        if point.verdict is Verdict.REGRESSED and entry is not None:
            used.add(id(entry))
            point = replace(point, accepted=f"{entry.reason} (until {entry.expires})")
        points.append(point)
    notes += [
        f"the acceptance of '{e.pattern}' covers no regression: remove it"
        for e in live
        if id(e) not in used
    ]
    return replace(assessment, points=tuple(points), notes=(*assessment.notes, *notes))
