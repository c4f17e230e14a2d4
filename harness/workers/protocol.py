"""What the runner and its worker processes say to each other. Imports neither torch nor triton.

The runner sends `Work` or `Precompile`; the worker answers with any number of `Phase` and `Finding`
messages and one `Done`. All of them travel pickled through a socket pair of the two processes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mambench.harness.spec import Case, Device, Outcome, Settings

# Phases in which modules are loaded, inputs drawn and kernels compiled. They have a limit of their
# own; the gate and the measurements share the other.
START, BUILD, COMPILE = "start", "build", "compile"
SETTING_UP = frozenset({START, BUILD, COMPILE})


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """What a worker needs to know once, when it starts."""

    device: Device
    settings: Settings
    threads: int
    plugins: tuple[str, ...] = ()
    tuned_malloc: bool = False  # return freed memory at once: for memory, never for time
    traced: bool = False  # profilers attach here: nothing is timed, and objects are to be found
    shares_device: bool = False  # with other workers: keep no memory between cases
    sys_path: tuple[str, ...] = ()  # the runner's, so that plugins named as modules are found


@dataclass(frozen=True, kw_only=True)
class Work:
    """Measure one case."""

    case: Case
    measurements: tuple[str, ...]
    gate: bool  # prove the answer right first; False where that was done already
    warm: bool = True  # run once before measuring; False spares a slow case an execution
    limit_s: float  # for the gate and the measurements together


@dataclass(frozen=True, kw_only=True)
class Precompile:
    """Compile ahead what these cases of one implementation need, where it declares `precompile`."""

    cases: tuple[Case, ...]
    share: int = 0  # the part of it that is this worker's, of
    shares: int = 1


@dataclass(frozen=True, kw_only=True)
class Phase:
    """The worker begins another part of the work."""

    name: str


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one measurement of the case found; the runner makes an observation of it."""

    measurement: str
    started_at: str
    duration_s: float
    method: str | None
    values: Mapping[str, float | int | None]
    samples_s: tuple[float, ...] | None
    details: Mapping[str, Any]
    outcome: Outcome = Outcome.OK  # other than ok: this measurement failed, and the others go on
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Done:
    """The work has ended. What it did not find, if anything, ended with this outcome."""

    outcome: Outcome = Outcome.OK
    reason: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])
    replace: bool = False  # the process may be damaged; take a new one
