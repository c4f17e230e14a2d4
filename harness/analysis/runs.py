"""Runs as reports show them, and the sources that pool those whose results may be pooled."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from mambench.harness.spec import DeviceKind, digest

# Entries of a manifest's environment that keep results apart when they differ, as dotted prefixes.
_IDENTITY = ("python", "libraries.", "torch_cuda", "gpu.uuid", "gpu.driver", "variables.")


@dataclass(frozen=True, kw_only=True)
class Run:
    """The part of a run folder's manifest that reports show."""

    run_id: str
    path: Path | None
    source: str  # key of the Source that it belongs to
    created_at: str
    suite: str
    command: str
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    code: Mapping[str, Any]
    device: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()
    ceilings: Mapping[str, Any] = field(default_factory=dict[str, Any])  # measured, by name

    @property
    def code_version(self) -> str:
        """Commit or version, with a mark where the working tree differed from it."""
        return code_version(self.code)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Runs that are pooled: of one device, one software stack and one code version."""

    key: str
    label: str
    kind: DeviceKind
    device_name: str
    runs: tuple[Run, ...]


def make_run(
    manifest: Mapping[str, Any], path: Path | None = None, *, notes: Sequence[str] = ()
) -> Run:
    """Take from a manifest what reports show; absent entries are empty."""
    command = manifest.get("command") or ""
    code = mapping(manifest.get("code"))
    environment = mapping(manifest.get("environment"))
    device = mapping(manifest.get("device"))
    return Run(
        run_id=str(manifest.get("run_id") or (path.name if path else "run")),
        path=path,
        source=_source_key(device, environment, code),
        created_at=str(manifest.get("created_at") or ""),
        suite=str(manifest.get("suite") or ""),
        command=command if isinstance(command, str) else shlex.join(str(c) for c in command),
        settings=mapping(manifest.get("settings")),
        environment=environment,
        code=code,
        device=device,
        notes=(*(str(note) for note in manifest.get("notes") or ()), *notes),
        plugins=tuple(str(plugin) for plugin in manifest.get("plugins") or ()),
        ceilings=mapping(mapping(manifest.get("ceilings")).get("ceilings")),
    )


def sources_of(by_source: Mapping[str, Sequence[Run]]) -> tuple[Source, ...]:
    """Return the sources of runs by their keys, each named so that no other is named alike."""
    sources: list[Source] = []
    for key, runs in by_source.items():
        name = str(runs[-1].device.get("name") or "unknown device")
        kind = DeviceKind(runs[-1].device.get("kind") or DeviceKind.CPU)
        sources.append(Source(key=key, label=name, kind=kind, device_name=name, runs=tuple(runs)))
    return _distinct_labels(sources)


def code_version(code: Mapping[str, Any]) -> str:
    """Return the commit (ten digits) that a manifest's `code` names, else the package's version.

    Uncommitted changes show as `+` and the start of their digest.
    """
    text = str(code.get("commit") or code.get("version") or "unknown")[:10]
    if not code.get("dirty"):
        return text
    return f"{text}+{str(code.get('diff_digest') or 'changes')[:7]}"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested manifest entries as dotted keys and texts, for tables of environments."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(mapping(value), f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            flat[f"{prefix}{key}"] = ", ".join(str(v) for v in cast("Sequence[Any]", value))
        else:
            flat[f"{prefix}{key}"] = "" if value is None else str(value)
    return flat


def _source_key(
    device: Mapping[str, Any], environment: Mapping[str, Any], code: Mapping[str, Any]
) -> str:
    """Identity of what must be equal for two runs' results to stand in one curve."""
    versions = {
        key: value for key, value in flatten(environment).items() if key.startswith(_IDENTITY)
    }
    name = [device.get(key) for key in ("kind", "name", "compute_capability")]
    return digest([name, versions, code_version(code)])


def _distinct_labels(sources: Sequence[Source]) -> tuple[Source, ...]:
    """Where devices have one name add the code version, and if need be the newest run."""
    labelled = list(sources)
    for attribute in ("code_version", "run_id"):
        names = [source.label for source in labelled]
        labelled = [
            replace(s, label=f"{s.label} · {getattr(s.runs[-1], attribute)}")
            if names.count(s.label) > 1
            else s
            for s in labelled
        ]
    return tuple(labelled)


def mapping(value: Any) -> Mapping[str, Any]:
    """Return what JSON has at a place where an object belongs, an empty one if it has another."""
    # What was read from JSON is a dict, and to ask for an abstract class is dear.
    known = type(value) is dict or isinstance(value, Mapping)
    return cast("Mapping[str, Any]", value) if known else {}
