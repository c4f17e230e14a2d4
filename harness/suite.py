"""Reads a suite: the question a run answers, as a YAML file of sweeps over axes.

The reader works on PyYAML's nodes and fills dataclasses, because a node knows its line and a
loaded dictionary does not, and because benchmarking boxes run the checkout with nothing installed
(so no pydantic). Every error names file, line, field, what was got and what is allowed.

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
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TypeVar, cast

import yaml

from mambench.harness import axes
from mambench.harness.errors import SuiteError, UsageError, unknown_name
from mambench.harness.spec import DeviceKind, DType, Family, Level, Pass, Settings

T = TypeVar("T")
E = TypeVar("E", bound=StrEnum)
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
        raise SuiteError(f"{path}: cannot be read: {error}") from error
    return parse(text, path)


def parse(text: str, path: Path) -> Suite:
    """Validate a suite's text; `path` names it in errors and gives the suite its name."""
    try:
        node = cast("yaml.Node | None", yaml.compose(text, Loader=yaml.SafeLoader))  # pyright: ignore[reportUnknownMemberType]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f":{mark.line + 1}" if mark else ""
        raise SuiteError(f"{path}{where}: not YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise SuiteError(f"{path}: not YAML: {error}") from error
    if node is None:
        raise SuiteError(f"{path}: empty; expected a mapping with title and sweeps.")
    return _suite(_Reader(path, node, ""))


_SUITE_FIELDS = ("title", "question", "settings", "measure", "sweeps")
_SWEEP_FIELDS = ("implementations", "families", "level", "passes", "dtype", "axes")
_SETTINGS_TYPES = {
    name: type_
    for name, type_ in typing.get_type_hints(Settings).items()
    if name not in ("measurements", "seed", "memory_limit_bytes")
}


class _Reader:
    """A YAML node with its file and field, so that an error can say where it is."""

    def __init__(self, path: Path, node: yaml.Node, where: str) -> None:
        self.path, self.node, self.where = path, node, where

    def fail(self, message: str) -> SuiteError:
        line = self.node.start_mark.line + 1
        return SuiteError(f"{self.path}:{line}: {self.where or 'the file'}: {message}")

    def mapping(self) -> dict[str, "_Reader"]:
        """Return a mapping's values by key; a repeated key is an error."""
        if not isinstance(self.node, yaml.MappingNode):
            raise self.fail(f"expected a mapping, got {self._kind()}.")
        found: dict[str, _Reader] = {}
        for key_node, value_node in self.node.value:
            key = str(key_node.value)
            reader = _Reader(self.path, value_node, f"{self.where}.{key}" if self.where else key)
            if key in found:
                raise _Reader(self.path, key_node, reader.where).fail("is given twice.")
            found[key] = reader
        return found

    def fields(self, allowed: Sequence[str], required: Sequence[str]) -> dict[str, "_Reader"]:
        """Return a mapping whose keys are checked."""
        found = self.mapping()
        for key, reader in found.items():
            if key not in allowed:
                raise reader.fail(unknown_name("field", key, allowed))
        for key in required:
            if key not in found:
                raise self.fail(f"lacks the field '{key}'.")
        return found

    def items(self) -> list["_Reader"]:
        """Return a list's items; a single value counts as a list of one."""
        if not isinstance(self.node, yaml.SequenceNode):
            return [self]
        return [
            _Reader(self.path, node, f"{self.where}[{index}]")
            for index, node in enumerate(self.node.value)
        ]

    def value(self) -> object:
        """Return a scalar as YAML's core types."""
        if not isinstance(self.node, yaml.ScalarNode):
            raise self.fail(f"expected a single value, got {self._kind()}.")
        loader = yaml.SafeLoader("")
        return loader.construct_object(self.node, deep=True)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]

    def text(self) -> str:
        """Return a non-empty string."""
        value = self.value()
        if not isinstance(value, str) or not value.strip():
            raise self.fail(f"expected text, got {value!r}.")
        return value.strip()

    def enum(self, kind: str, members: type[E]) -> E:
        """Return a member of a closed set."""
        value = str(self.value())
        if value not in list(members):
            raise self.fail(unknown_name(kind, value, members))
        return members(value)

    def has_keys_of(self, *enums: type[StrEnum]) -> bool:
        """Whether this is a mapping (whose keys then must be members of one of the sets)."""
        if not isinstance(self.node, yaml.MappingNode):
            return False
        keys = set(self.mapping())
        if not keys:
            raise self.fail("is an empty mapping.")
        if not any(keys <= set(members) for members in enums):
            allowed = [" or ".join(members) for members in enums]
            bad = next((key for key in keys if not any(key in set(m) for m in enums)), None)
            if bad is None:
                raise self.fail(f"mixes devices and families; nest them ({'; '.join(allowed)}).")
            raise self.fail(unknown_name("key", bad, [name for m in enums for name in m]))
        return True

    def _kind(self) -> str:
        return {"MappingNode": "a mapping", "SequenceNode": "a list"}.get(
            type(self.node).__name__, f"'{self.node.value}'"
        )


def _suite(reader: _Reader) -> Suite:
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


def _sweep(reader: _Reader) -> Sweep:
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


def _list(reader: _Reader, parse_item: Callable[[_Reader], T]) -> tuple[T, ...]:
    values = tuple(dict.fromkeys(parse_item(item) for item in reader.items()))
    if not values:
        raise reader.fail("is an empty list.")
    return values


def _per_device(
    reader: _Reader, parse_item: Callable[[_Reader], T]
) -> Mapping[DeviceKind, tuple[T, ...]]:
    if not reader.has_keys_of(DeviceKind):
        values = _list(reader, parse_item)
        return dict.fromkeys(DeviceKind, values)
    return {
        DeviceKind(device): _list(value, parse_item) for device, value in reader.mapping().items()
    }


def _axes(reader: _Reader, level: Level) -> Mapping[str, AxisValues]:
    found = reader.fields(tuple(axes.AXES), required=("seqlen",))
    foreign = {Level.OP: ("d_model",), Level.BLOCK: ("d_inner", "gated")}[level]
    for name in foreign:
        if name in found:
            raise found[name].fail(f"does not apply to level {level} ({axes.AXES[name]}).")
    return {name: _axis(name, value) for name, value in found.items()}


def _axis(name: str, reader: _Reader) -> AxisValues:
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


def _settings(reader: _Reader) -> Mapping[str, object]:
    found = reader.fields(tuple(_SETTINGS_TYPES), required=())
    return {name: _setting(name, value) for name, value in found.items()}


def _setting(name: str, reader: _Reader) -> object:
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
