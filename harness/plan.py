"""A plan: the cases of a suite on one device, each with its estimate or the reason it will not run."""

from dataclasses import dataclass, field
from typing import Any

from mambench.harness.spec import Case, Device, Outcome, Settings, digest


@dataclass(frozen=True, kw_only=True)
class PlannedCase:
    """A case, and either an estimate of what it takes or the outcome it already has."""

    case: Case
    outcome: Outcome | None = None  # UNSUPPORTED, UNAVAILABLE or SKIPPED when known beforehand
    reason: str | None = None
    estimate_s: float = 0.0  # wall time of the whole case
    memory_bytes: int = 0  # modelled peak


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything `runner.run` needs; made by `make_plan`, kept in the manifest for resume."""

    suite: str
    device: Device
    settings: Settings
    cases: tuple[PlannedCase, ...]
    plugins: tuple[str, ...] = ()  # modules or files that workers load too
    notes: tuple[str, ...] = field(default=())  # shown to the person, kept in the manifest

    @property
    def plan_hash(self) -> str:
        """Identity of the questions asked, whatever the device."""
        return digest(sorted(planned.case.case_id for planned in self.cases))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        raise NotImplementedError
