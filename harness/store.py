"""Run folders: a manifest written once and a file of observations that only grows.

A run killed at any moment loses at most the line it was writing. Reading never changes a folder;
opening it for append removes a torn last line, and nothing else. Imports neither torch nor triton.
"""

import fcntl
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self, cast

from mambench.harness.errors import RunFolderError
from mambench.harness.host_state import busy
from mambench.harness.records import Cases, Observation
from mambench.harness.spec import SCHEMA_VERSION, Outcome

MANIFEST = "manifest.json"
RESULTS = "results.jsonl"
MANIFEST_KEYS: Mapping[str, type] = {
    "schema": int,
    "run_id": str,
    "created_at": str,
    "command": list,
    "suite": str,
    "plan": list,
    "plan_hash": str,
    "settings": dict,
    "device": dict,
    "environment": dict,
    "code": dict,
    "plugins": list,
    "notes": list,
}

Key = tuple[str, str, int]  # case_id, measurement, round


def new_run(runs: Path, suite: str, *, now: datetime | None = None) -> tuple[Path, str, str]:
    """Return the folder, the run_id and created_at (ISO 8601, UTC) of a run that is to begin."""
    now = (now or datetime.now(UTC)).astimezone(UTC)
    run_id = secrets.token_hex(4)
    folder = runs / f"{now:%Y%m%dT%H%M%SZ}-{suite}-{run_id}"
    return folder, run_id, now.isoformat(timespec="seconds")


class RunFolder:
    """A run on disk: `create` a new one, `open` an existing one."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self.manifest: Mapping[str, Any] = manifest
        self.warnings: list[str] = [
            f"continued at {entry['at']} with code version {entry['code']}"
            + (f" on the GPU {entry['gpu']}" if entry["gpu"] else "")
            for entry in manifest.get("resumed", ())
        ]
        if problem := busy(manifest.get("device", {}), manifest.get("environment", {})):
            self.warnings.append(problem)
        self.lines: list[bytes] = []  # of `unparsed`: each observation's, without its newline
        self._observations: list[Observation] = []
        self._index: dict[Key, Observation] | None = None
        self._descriptor: int | None = None

    @classmethod
    def create(cls, path: Path, manifest: Mapping[str, Any]) -> Self:
        """Make a new folder for appending; raises RunFolderError if one is there already."""
        problem = _manifest_problem(manifest)
        if problem:
            raise RunFolderError(f"{path / MANIFEST} cannot be written: it {problem}.")
        try:
            path.mkdir(parents=True, exist_ok=True)
            if any(path.iterdir()):
                raise RunFolderError(
                    f"{path} exists and is not empty: name another folder, or continue its run "
                    f"with --resume."
                )
            # The manifest comes last: a folder that has one is a complete, empty run.
            (path / RESULTS).touch(exist_ok=False)
            try:
                _write_atomically(path / MANIFEST, json.dumps(manifest, indent=2) + "\n")
            except OSError:
                (path / RESULTS).unlink()  # the same command is to be repeated, once there is room
                raise
        except OSError as error:
            raise RunFolderError(f"{path} cannot be written: {error.strerror}.") from error
        folder = cls(path, manifest)
        folder._open_for_append()
        return folder

    @classmethod
    def open(cls, path: Path, *, for_append: bool = False) -> Self:
        """Read a folder; raises RunFolderError, naming file and line, for anything but a sound run.

        A last line without its newline was torn by a kill: it is dropped with an entry in
        `warnings`, and removed from the file only if `for_append`.
        """
        manifest = _read_manifest(path)
        folder = cls(path, manifest)
        if for_append:
            folder._open_for_append()
        try:
            sound_bytes = folder._read_lines()
            folder._observations = folder.parsed(range(len(folder.lines)))
            if for_append:
                folder._repair(sound_bytes)
        except BaseException:
            folder.close()
            raise
        folder.lines = []
        return folder

    def continued(self, code: str | None, gpu: str | None) -> None:
        """Note in the manifest that a run goes on now, with other code or on another GPU.

        Args:
            code: the code's version.
            gpu: the UUID; None on a CPU.
        """
        entry = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "code": code, "gpu": gpu}
        entries = [*self.manifest.get("resumed", ()), entry]
        self.manifest = {**self.manifest, "resumed": entries}
        try:
            _write_atomically(self.path / MANIFEST, json.dumps(self.manifest, indent=2) + "\n")
        except OSError as error:
            raise RunFolderError(f"{self.path} cannot be written: {error.strerror}.") from error

    @classmethod
    def unparsed(cls, path: Path) -> Self:
        """Read a folder as `open` does, but leave its lines for `parsed`."""
        folder = cls(path, _read_manifest(path))
        folder._read_lines()
        return folder

    def parsed(self, indices: Iterable[int]) -> list[Observation]:
        """Return the observations of some lines of a folder that was read by `unparsed`.

        Raises RunFolderError, naming file and line, for the first that is not one.
        """
        path, cases = self.path / RESULTS, Cases()
        return [_parse(path, index + 1, self.lines[index], cases) for index in indices]

    def observations(self) -> list[Observation]:
        """Return all observations in the order they were made; later ones win over earlier ones."""
        return list(self._observations)

    def newest(self) -> Mapping[Key, Observation]:
        """Return the newest observation of every case, measurement and round."""
        return MappingProxyType(self._newest)

    @property
    def _newest(self) -> dict[Key, Observation]:
        """Made when first asked for: reports do not, and it takes as long as reading the file."""
        if self._index is None:
            self._index = {_key(o): o for o in self._observations}
        return self._index

    def finished(self) -> set[Key]:
        """Return what need not be measured again: all but what was skipped."""
        return {key for key, o in self._newest.items() if o.outcome is not Outcome.SKIPPED}

    def append(self, observation: Observation) -> None:
        """Write one line and wait until the disk has it; raises RunFolderError if it cannot."""
        if self._descriptor is None:
            raise RunFolderError(f"{self.path} was opened for reading only.")
        try:
            _write_all(self._descriptor, observation.to_line().encode() + b"\n")
            os.fsync(self._descriptor)
        except OSError as error:
            raise RunFolderError(
                f"{self.path / RESULTS} cannot be written: {error.strerror}. What was measured "
                f"before is there: go on with run --resume {self.path}."
            ) from error
        self._newest[_key(observation)] = observation
        self._observations.append(observation)

    def close(self) -> None:
        """Release the file; the folder can still be read."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open_for_append(self) -> None:
        path = self.path / RESULTS
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        except OSError as error:
            raise RunFolderError(f"{path} cannot be opened: {error.strerror}.") from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise RunFolderError(
                f"{path} is being written by another process: wait for that run to end."
            ) from None

    def _read_lines(self) -> int:
        """Read the lines and return the length in bytes of the part that holds them."""
        path = self.path / RESULTS
        try:
            content = path.read_bytes()
        except OSError as error:
            raise RunFolderError(f"{path} cannot be read: {error.strerror}.") from error
        lines = content.split(b"\n")
        torn = lines.pop()  # empty if the file ends with a newline
        self.lines = lines
        if torn:
            self.warnings.append(
                f"{path}, line {len(lines) + 1}: dropped a torn last line ({len(torn)} bytes); "
                f"its case will be measured again on resume."
            )
        return len(content) - len(torn)

    def _repair(self, sound_bytes: int) -> None:
        assert self._descriptor is not None
        if os.fstat(self._descriptor).st_size > sound_bytes:
            os.ftruncate(self._descriptor, sound_bytes)
            os.fsync(self._descriptor)


def _key(observation: Observation) -> Key:
    return observation.case.case_id, observation.measurement, observation.round


def _parse(path: Path, number: int, line: bytes, cases: Cases) -> Observation:
    try:
        return Observation.from_line(line.decode(), cases)
    except UnicodeDecodeError as error:
        raise RunFolderError(f"{path}, line {number}: not UTF-8 text: {error.reason}.") from error
    except RunFolderError as error:
        raise RunFolderError(f"{path}, line {number}: {error}") from error


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise RunFolderError(f"{folder} is not a folder: name the folder of a run.")
    if not path.is_file():
        raise RunFolderError(f"{folder} is not a run: it has no {MANIFEST}.")
    try:
        manifest: Any = json.loads(path.read_bytes())
    except OSError as error:
        raise RunFolderError(f"{path} cannot be read: {error.strerror}.") from error
    except json.JSONDecodeError as error:
        raise RunFolderError(f"{path}, line {error.lineno}: not JSON: {error.msg}.") from error
    except UnicodeDecodeError as error:
        raise RunFolderError(f"{path}: not UTF-8 text: {error.reason}.") from error
    problem = _manifest_problem(manifest)
    if problem:
        raise RunFolderError(f"{path}: {problem}.")
    return manifest


def _manifest_problem(manifest: Any) -> str | None:
    """Return what is wrong with a manifest, as the end of a sentence, or None."""
    if not isinstance(manifest, Mapping):
        return "is not a JSON object"
    manifest = cast(Mapping[str, Any], manifest)
    if "schema" in manifest and manifest["schema"] != SCHEMA_VERSION:
        return (
            f"has schema version {manifest['schema']!r}, this version of Mambench reads "
            f"{SCHEMA_VERSION}; use the version that made the run"
        )
    missing = [key for key in MANIFEST_KEYS if key not in manifest]
    if missing:
        return f"lacks {', '.join(missing)}"
    for key, kind in MANIFEST_KEYS.items():
        if not isinstance(manifest[key], kind):
            return f"has a {type(manifest[key]).__name__} as '{key}', expected {kind.__name__}"
    return None


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
