"""One observation: what one measurement of one case found. Imports neither torch nor triton."""

import json
from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, cast

from mambench.harness.errors import RunFolderError
from mambench.harness.spec import SCHEMA_VERSION, Case, Outcome, digest

REQUIRED = (
    "schema",
    "case_id",
    "observation_id",
    "implementation",
    "variant",
    "problem",
    "measurement",
    "round",
    "outcome",
    "reason",
)


@dataclass(frozen=True, kw_only=True)
class Observation:
    """A line of results.jsonl. Quantities are SI, the unit in the key; a missing one is None."""

    case: Case
    measurement: str  # "time", "call_time", "memory"
    round: int = 0
    outcome: Outcome
    reason: str | None = None  # None only for `ok`
    observation_id: str
    started_at: str  # ISO 8601, UTC
    duration_s: float  # wall time the harness spent on it
    method: str | None = (
        None  # how the measurement was taken: "cuda-graph", "events", "perf_counter" ...
    )
    values: Mapping[str, float | int | None] = field(
        default_factory=dict[str, float | int | None]
    )  # keys: tags of spec.METRICS
    samples_s: tuple[float, ...] | None = None  # raw, in the order taken; outliers are not dropped
    details: Mapping[str, Any] = field(
        default_factory=dict[str, Any]
    )  # gate, telemetry, convergence, traceback

    def to_line(self) -> str:
        """Return the JSON line, without its newline."""
        record = asdict(self)
        del record["case"]
        record |= self.case.to_dict() | {"schema": SCHEMA_VERSION, "case_id": self.case.case_id}
        return json.dumps(record, separators=(",", ":"), default=str)

    @classmethod
    def from_line(cls, line: str, cases: "Cases | None" = None) -> "Observation":
        """Parse a line; raises RunFolderError with what is wrong with it.

        Args:
            line: of results.jsonl.
            cases: those of lines before, to which this one's is added: a case of many lines is made
                and numbered once.
        """
        try:
            loaded: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise RunFolderError(f"not JSON: {error}") from error
        if not isinstance(loaded, dict):
            raise RunFolderError("not a JSON object")
        record = cast("dict[str, Any]", loaded)
        if record.get("schema") != SCHEMA_VERSION:
            raise RunFolderError(
                f"schema version {record.get('schema')!r}, this version reads {SCHEMA_VERSION}"
            )
        missing = [key for key in REQUIRED if key not in record]
        if missing:
            raise RunFolderError(f"lacks {', '.join(missing)}")
        try:
            samples = record.get("samples_s")
            return cls(
                case=_case(record, {} if cases is None else cases),
                measurement=record["measurement"],
                round=record["round"],
                outcome=_OUTCOMES.get(record["outcome"]) or Outcome(record["outcome"]),
                reason=record["reason"],
                observation_id=record["observation_id"],
                started_at=record["started_at"],
                duration_s=record["duration_s"],
                method=record.get("method"),
                values=record.get("values") or {},
                samples_s=None if samples is None else tuple(samples),
                details=record.get("details") or {},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise RunFolderError(f"invalid field: {error!r}") from error


Cases = dict[Hashable, Case]
_OUTCOMES = {outcome.value: outcome for outcome in Outcome}


def _case(record: Mapping[str, Any], cases: Cases) -> Case:
    key = written(record)
    found = cases.get(key)
    if found is None:
        found = cases[key] = Case.from_dict(record)
    return found


def written(record: Mapping[str, Any]) -> Hashable:
    """Return what tells a record's case from others as `Case.to_dict` writes it: soon made."""
    problem: Mapping[str, Any] = record["problem"]
    own = (record[name] for name in ("implementation", "variant", "pass", "dtype"))
    return (*own, *problem, *problem.values())


def now() -> str:
    """Return the time as records have it: ISO 8601, UTC, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def observation_id(
    case: Case,
    *,
    measurement: str,
    round: int,
    code_version: str,
    device: str,
    settings: Mapping[str, Any],
) -> str:
    """Return the identity by which resume and merge recognise an observation."""
    return digest(
        [case.case_id, measurement, round, code_version, device, dict(sorted(settings.items()))]
    )
