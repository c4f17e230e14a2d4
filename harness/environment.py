"""`env`: everything that explains a difference between two runs, side by side. No torch.

Compared are the environments that two manifests hold, their code and their settings, flattened to
dotted keys. A key for which only one of them has a value is *missing* on the other side, which is
not the same as having another value.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, cast

from mambench.harness import machine
from mambench.harness.spec import Device
from mambench.harness.text import table

# What changes from moment to moment is listed and never counted as a difference of machines.
MOMENTARY = (
    *("cpu.load_average", "memory.available_bytes", "gpu.temperature_c"),
    *("gpu.clocks_hz.sm.current", "gpu.clocks_hz.memory.current", "gpu.pcie.generation"),
)
_GROUPS = ("code", "gpu", "libraries", "variables", "cpu", "memory", "system", "settings")
OTHER = "other"
WIDTH = 48  # of a value in a comparison


class State(StrEnum):
    """How the two sides of a key compare."""

    SAME = "same"
    DIFFERENT = "different"
    MISSING = "missing"  # one side does not have it
    MOMENTARY = "momentary"  # different, as it is from one minute to the next


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One key and its value on both sides; a side without it is None."""

    group: str
    key: str  # dotted, within the group
    left: str | None
    right: str | None
    state: State


def of_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a manifest that can explain a difference between two runs."""
    device: Mapping[str, Any] = manifest["device"]
    return {
        **manifest["environment"],
        "code": manifest["code"],
        "settings": manifest["settings"],
        "device": device.get("name"),
    }


def here(device: Device) -> dict[str, Any]:
    """Return what a run that began now would record of this machine and this code."""
    found = machine.environment(device)
    return {**found, "code": machine.code_version(), "settings": {}, "device": device.name}


def compare(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[Entry]:
    """Return every key of two environments, grouped, the groups that explain most first."""
    flat_left, flat_right = _flat(left), _flat(right)
    keys = dict.fromkeys([*flat_left, *flat_right])
    entries = [_entry(key, flat_left, flat_right) for key in keys]
    order = {group: number for number, group in enumerate((*_GROUPS, OTHER))}
    return sorted(entries, key=lambda entry: order[entry.group])


def comparison(entries: Sequence[Entry], names: tuple[str, str], *, colour: bool = False) -> str:
    """Return the differences as text, and how much is the same."""
    shown = [entry for entry in entries if entry.state is not State.SAME]
    lines = [f"A  {names[0]}", f"B  {names[1]}"]
    for group in (*_GROUPS, OTHER):
        members = [entry for entry in shown if entry.group == group]
        if members:
            lines += ["", group, _coloured_rows(members, colour)]
    counts = {state: sum(entry.state is state for entry in entries) for state in State}
    summary = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    return "\n".join([*lines, "", summary or "nothing is recorded on either side"])


def listing(environment: Mapping[str, Any], name: str) -> str:
    """Return one environment as text, grouped; what is missing stands with its reason."""
    flat = _flat(environment)
    reasons = _reasons(environment)
    lines = [name]
    for group in (*_GROUPS, OTHER):
        rows = [
            ("  " + _short(key, group), _told(value, reasons.get(key)))
            for key, value in flat.items()
            if _group(key) == group
        ]
        if rows:
            lines += ["", group, table(rows)]
    return "\n".join(lines)


def to_json(entries: Sequence[Entry], names: tuple[str, str]) -> str:
    """Return a comparison for programs."""
    values = [vars(entry) | {"state": entry.state.value} for entry in entries]
    return json.dumps({"a": names[0], "b": names[1], "entries": values}, indent=2)


def _entry(key: str, left: Mapping[str, Any], right: Mapping[str, Any]) -> Entry:
    a, b = left.get(key), right.get(key)
    if a == b:  # also where one has recorded that there is none, and the other nothing
        state = State.SAME
    elif a is None or b is None:
        state = State.MISSING
    else:
        state = State.MOMENTARY if key in MOMENTARY else State.DIFFERENT
    group = _group(key)
    return Entry(
        group=group,
        key=_short(key, group),
        left=_text(a),
        right=_text(b),
        state=state,
    )


def _coloured_rows(entries: Sequence[Entry], colour: bool) -> str:
    rows = [
        (f"  {entry.key}", _cell(entry.left), _cell(entry.right), entry.state) for entry in entries
    ]
    lines = table(rows).splitlines()
    if colour:
        codes = {State.DIFFERENT: "33", State.MISSING: "35", State.MOMENTARY: "2"}
        lines = [
            f"\x1b[{codes[entry.state]}m{line}\x1b[0m"
            for entry, line in zip(entries, lines, strict=True)
        ]
    return "\n".join(lines)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values under dotted keys, the reasons for missing ones aside."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key == "missing":
            continue
        if isinstance(value, Mapping):
            found |= _flat(cast("Mapping[str, Any]", value), f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _reasons(environment: Mapping[str, Any]) -> dict[str, str]:
    """Return why values are missing, by dotted key."""
    gpu: Mapping[str, Any] = environment.get("gpu") or {}
    of_host: Mapping[str, str] = environment.get("missing") or {}
    of_gpu: Mapping[str, str] = gpu.get("missing") or {}
    return {**of_host, **{f"gpu.{key}": why for key, why in of_gpu.items()}}


def _group(key: str) -> str:
    first = key.split(".")[0]
    return first if first in _GROUPS else OTHER


def _short(key: str, group: str) -> str:
    return key.removeprefix(f"{group}.") if group != OTHER else key


def _text(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, list):
        return ", ".join(_text(item) or "none" for item in cast("list[Any]", value)) or "(empty)"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _cell(text: str | None) -> str:
    """Return a value for a table's column, the end of a long one cut off."""
    if text is None:
        return "(missing)"
    return text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"


def _told(value: Any, reason: str | None) -> str:
    return _text(value) or ("none" if reason is None else f"none: {reason}")
