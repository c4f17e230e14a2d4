"""Every error Mambench raises for a person to read.

    MambenchError                exit code 1
    +-- UsageError               2  the command line asks for something that does not exist
    |   +-- SuiteError           2  a suite or budget file is invalid (names file, line and field)
    |   +-- PluginError          2  a plugin cannot be loaded or its names collide
    +-- RunFolderError           3  a run folder is broken, foreign or from another schema version
    +-- DeviceBusyError          4  another run holds this GPU
    +-- MeasurementError         5  the harness itself could not measure (not: a case that failed);
                                    and any other file that could not be read or written

A case that fails is a record, not an exception: see `harness.spec.Outcome`.
Exit code 0: every case ended `ok`, `unsupported`, `unavailable` or `skipped`. Exit code 1: at least
one case ended otherwise, or a check of `selftest` failed. 130: interrupted by Ctrl-C, the run can
be resumed.
"""

import difflib
from collections.abc import Iterable


class MambenchError(Exception):
    """Base of all errors shown without a traceback: what failed, got, expected, next."""

    exit_code = 1


class UsageError(MambenchError):
    """The command line or an axis asks for something that does not exist."""

    exit_code = 2


class SuiteError(UsageError):
    """A suite or a budget file is invalid."""


class PluginError(UsageError):
    """A plugin cannot be loaded, or two implementations have one name."""


class RunFolderError(MambenchError):
    """A run folder is broken, foreign or from another schema version; nothing in it was changed."""

    exit_code = 3


class DeviceBusyError(MambenchError):
    """Another run holds this device."""

    exit_code = 4


class MeasurementError(MambenchError):
    """The harness itself could not measure."""

    exit_code = 5


def unknown_name(kind: str, got: str, allowed: Iterable[str]) -> str:
    """Return one sentence that names what was got, the nearest valid name and all valid names."""
    names = sorted(allowed)
    near = difflib.get_close_matches(got, names, n=1, cutoff=0.5)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"unknown {kind} '{got}'.{hint} Valid: {', '.join(names)}."
