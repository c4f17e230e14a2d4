"""Reads a suite: the question a run answers, as a YAML file of sweeps over axes.

Every error names file, line, field, what was got and what is allowed.

    title: Mamba or attention at my length
    question: At which sequence length does a scan overtake attention?
    settings: {target_s: 0.3}            # optional; fields of harness.spec.Settings
    measure: {cpu: [time], cuda: [time, call_time, memory]}  # optional; profilers by name
    sweeps:
      - implementations: [selective_scan, ssd, "flash_attention:*"]   # names, globs, name:variant
        families: [s6, ssd, attention]   # optional; default: all that the implementations have
        level: op                        # optional; op or block
        passes: [forward]
        dtype: {cpu: fp32, cuda: bf16}
        axes:
          seqlen: {cpu: "2^8..2^12", cuda: "2^9..2^17"}
          d_state: {s6: 16, ssd: 128}

Any value may be a mapping whose keys are devices (cpu, cuda) or, under `axes`, families (s6, ssd,
attention), and these may be nested. The file's name without `.yaml` is the suite's name.
"""

import math
import typing
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from mambench.harness import axes
from mambench.harness.errors import SuiteError, UsageError, unknown_name
from mambench.harness.spec import DeviceKind, DType, Family, Level, Pass, Settings
from mambench.harness.yaml_nodes import Reader, parse_yaml

T = TypeVar("T")
K = TypeVar("K", bound=StrEnum)


@dataclass(frozen=True)
class AxisValues:
    """An axis' values, the same everywhere or different by device and family."""

    everywhere: tuple[axes.AxisValue, ...] = ()
    by_device: Mapping[DeviceKind, "AxisValues"] | None = None
    by_family: Mapping[Family, "AxisValues"] | None = None

    def resolve(self, device: DeviceKind, family: Family) -> tuple[axes.AxisValue, ...]:
        """Return the values for a device and family, or () where the axis names none for them."""
        if self.by_device is None and self.by_family is None:
            return self.everywhere
        part = (self.by_device or {}).get(device) or (self.by_family or {}).get(family)
        return part.resolve(device, family) if part else ()


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Implementations times axes: one part of a suite's question."""

    implementations: tuple[str, ...]  # names or globs, each optionally with `:variant`
    families: tuple[Family, ...] = ()  # (): all that the implementations have
    level: Level = Level.OP
    passes: Mapping[DeviceKind, tuple[Pass, ...]]
    dtypes: Mapping[DeviceKind, tuple[DType, ...]]  # lacks a device: the sweep is not run there
    axes: Mapping[str, AxisValues]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A question and the sweeps that answer it."""

    name: str
    title: str
    question: str = ""
    settings: Mapping[str, object]  # overrides of harness.spec.Settings
    sweeps: tuple[Sweep, ...]
    measure: Mapping[DeviceKind, tuple[str, ...]] = field(
        default_factory=dict[DeviceKind, tuple[str, ...]]
    )  # profilers by name, judged when the plan is made; a device it lacks has the default


def folder() -> Path:
    """Return the folder of the suites that come with Mambench, in a checkout or an installation."""
    here = Path(__file__).resolve().parent.parent
    return here / "suites"


def names() -> list[str]:
    """Return the names of the suites that come with Mambench."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def find(name: str) -> Suite:
    """Read a suite by name, or by path if it ends in .yaml or .yml.

    Raises UsageError for an unknown name and SuiteError for an invalid file.
    """
    if name.endswith((".yaml", ".yml")):
        return read(Path(name))
    if name not in names():
        raise UsageError(
            unknown_name("suite", name, names()) + " A path ending in .yaml works too."
        )
    return read(folder() / f"{name}.yaml")


def read(path: Path) -> Suite:
    """Read and validate a suite file; raises SuiteError naming file, line and field."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problem = error.strerror if isinstance(error, OSError) else error
        raise SuiteError(f"{path}: cannot be read: {problem}") from error
    return parse(text, path)


def parse(text: str, path: Path) -> Suite:
    """Validate a suite's text; `path` names it in errors and gives the suite its name."""
    return _suite(parse_yaml(text, path, expected="a mapping with title and sweeps"))


_SUITE_FIELDS = ("title", "question", "settings", "measure", "sweeps")
_SWEEP_FIELDS = ("implementations", "families", "level", "passes", "dtype", "axes")
_SETTINGS_TYPES = {
    name: type_
    for name, type_ in typing.get_type_hints(Settings).items()
    if name not in ("measurements", "seed", "memory_limit_bytes")
}


def _suite(reader: Reader) -> Suite:
    found = reader.fields(_SUITE_FIELDS, required=("title", "sweeps"))
    sweeps = tuple(_sweep(item) for item in found["sweeps"].items())
    if not sweeps:
        raise found["sweeps"].fail("has no sweep.")
    return Suite(
        name=reader.path.stem,
        title=found["title"].text(),
        question=found["question"].text() if "question" in found else "",
        settings=_settings(found["settings"]) if "settings" in found else {},
        measure=_per_device(found["measure"], lambda item: item.text())
        if "measure" in found
        else {},
        sweeps=sweeps,
    )


def _sweep(reader: Reader) -> Sweep:
    found = reader.fields(_SWEEP_FIELDS, ("implementations", "passes", "dtype", "axes"))
    level = found["level"].enum("level", Level) if "level" in found else Level.OP
    return Sweep(
        implementations=_list(found["implementations"], lambda item: item.text()),
        families=_list(found["families"], lambda item: item.enum("family", Family))
        if "families" in found
        else (),
        level=level,
        passes=_per_device(found["passes"], lambda item: item.enum("pass", Pass)),
        dtypes=_per_device(found["dtype"], lambda item: item.enum("dtype", DType)),
        axes=_axes(found["axes"], level),
    )


def _list(reader: Reader, parse_item: Callable[[Reader], T]) -> tuple[T, ...]:
    values = tuple(dict.fromkeys(parse_item(item) for item in reader.items()))
    if not values:
        raise reader.fail("is an empty list.")
    return values


def _per_device(
    reader: Reader, parse_item: Callable[[Reader], T]
) -> Mapping[DeviceKind, tuple[T, ...]]:
    if not reader.has_keys_of(DeviceKind):
        values = _list(reader, parse_item)
        return dict.fromkeys(DeviceKind, values)
    return {
        DeviceKind(device): _list(value, parse_item) for device, value in reader.mapping().items()
    }


def _axes(reader: Reader, level: Level) -> Mapping[str, AxisValues]:
    found = reader.fields(tuple(axes.AXES), required=("seqlen",))
    foreign = {Level.OP: ("d_model",), Level.BLOCK: ("d_inner", "gated")}[level]
    for name in foreign:
        if name in found:
            raise found[name].fail(f"does not apply to level {level} ({axes.AXES[name]}).")
    return {name: _axis(name, value) for name, value in found.items()}


def _axis(name: str, reader: Reader) -> AxisValues:
    if reader.has_keys_of(DeviceKind, Family):
        parts = {key: _axis(name, value) for key, value in reader.mapping().items()}
        if set(parts) <= set(DeviceKind):
            return AxisValues(by_device={DeviceKind(key): value for key, value in parts.items()})
        return AxisValues(by_family={Family(key): value for key, value in parts.items()})
    values: list[axes.AxisValue] = []
    for item in reader.items():
        try:
            values += axes.parse_values(name, item.value())
        except axes.AxisError as error:
            raise item.fail(str(error)) from error
    if not values:
        raise reader.fail("is an empty list.")
    return AxisValues(tuple(dict.fromkeys(values)))


def _settings(reader: Reader) -> Mapping[str, object]:
    found = reader.fields(tuple(_SETTINGS_TYPES), required=())
    return {name: _setting(name, value) for name, value in found.items()}


def _setting(name: str, reader: Reader) -> object:
    try:
        return _check_setting(name, reader.value())
    except UsageError as error:
        raise reader.fail(str(error)) from error


def parse_setting(name: str, text: str) -> object:
    """Return a setting's value from the command line's text; raises UsageError."""
    if name not in _SETTINGS_TYPES:
        raise UsageError(unknown_name("setting", name, _SETTINGS_TYPES))
    value: object = text
    with suppress(ValueError):
        value = float(text)
    with suppress(ValueError):
        value = int(text)
    return _check_setting(name, value)


def _check_setting(name: str, value: object) -> object:
    whole = _SETTINGS_TYPES[name] in (int, int | None)
    accepted = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, accepted) or not 0 < value < math.inf:
        kind = "whole number" if whole else "number"
        raise UsageError(f"setting {name}: expected a {kind} above 0, got {value!r}.")
    return value


def setting_names() -> Iterable[str]:
    """Return the settings a suite may give."""
    return tuple(_SETTINGS_TYPES)
