"""Finds profilers: built in, by entry point (`mambench.profilers`), by `--plugin`. No torch."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

from mambench.harness import registry
from mambench.harness.errors import PluginError, UsageError, unknown_name
from mambench.harness.profilers.base import Profiler, is_profiler
from mambench.harness.spec import Device, DeviceKind

ENTRY_POINT_GROUP = "mambench.profilers"
ALL = "all"  # on the command line and in suites: everything this device can give

BUILT_IN: Mapping[str, str] = {
    "time": "mambench.harness.profilers.timers:Time",
    "cold_time": "mambench.harness.profilers.timers:ColdTime",
    "call_time": "mambench.harness.profilers.timers:CallTime",
    "host_time": "mambench.harness.profilers.timers:HostTime",
    "memory": "mambench.harness.profilers.memory:Memory",
    "launches": "mambench.harness.profilers.launches:Launches",
    "energy": "mambench.harness.profilers.energy:Energy",
    "traffic": "mambench.harness.profilers.traffic:Traffic",
    "sol": "mambench.harness.profilers.speed_of_light:SpeedOfLight",
}
DEFAULT: Mapping[DeviceKind, tuple[str, ...]] = {
    DeviceKind.CPU: ("time", "memory"),
    DeviceKind.CUDA: ("time", "call_time", "memory"),
}


def load(plugins: Sequence[str] = ()) -> dict[str, Profiler]:
    """Return every profiler by name: built-ins, entry points, then plugins.

    Args:
        plugins: importable modules or files; every public, complete subclass of CaseProfiler or
            BatchProfiler that one defines is taken. A plugin need not define any.

    Raises PluginError if one cannot be loaded, is incomplete, or its name or a metric's tag is
    taken.
    """
    found: dict[str, Profiler] = {}
    origins: dict[str, str] = {}
    tags: dict[str, str] = {}
    for origin, cls in _classes(plugins):
        profiler = _instantiate(cls, origin)
        name = profiler.name
        if name in found:
            raise PluginError(
                f"two profilers are named '{name}': {origins[name]} and {origin}. Rename one."
            )
        for metric in profiler.metrics:
            if tags.setdefault(metric.tag, name) != name:
                raise PluginError(
                    f"{origin}: metric '{metric.tag}' is already measured by '{tags[metric.tag]}'."
                )
        found[name], origins[name] = profiler, origin
    return found


def choose(names: Iterable[str], found: Mapping[str, Profiler], device: Device) -> tuple[str, ...]:
    """Return the names asked for, once each; `all` is everything the device can give.

    Raises UsageError with the nearest name for one that is unknown.
    """
    chosen: list[str] = []
    for name in names:
        if name == ALL:
            chosen += [n for n, profiler in found.items() if profiler.missing(device) is None]
        elif name in found:
            chosen.append(name)
        else:
            raise UsageError(unknown_name("measurement", name, [*found, ALL]))
    return tuple(dict.fromkeys(chosen))


def _classes(plugins: Sequence[str]) -> Iterator[tuple[str, type[Any]]]:
    for target in BUILT_IN.values():
        yield target, registry.attribute(target, target)
    for point in entry_points(group=ENTRY_POINT_GROUP):
        yield point.value, registry.attribute(point.value, f"entry point '{point.name}'")
    for plugin in dict.fromkeys(plugins):
        for cls in registry.defined_in(plugin, is_profiler):
            yield f"plugin {plugin}", cls


def _instantiate(cls: type[Any], origin: str) -> Profiler:
    if not is_profiler(cls):
        raise PluginError(
            f"{origin} is not a complete subclass of CaseProfiler or BatchProfiler: {cls!r}."
        )
    lacking = [field for field in ("name", "summary", "metrics") if not hasattr(cls, field)]
    if lacking:
        raise PluginError(f"{origin}: class {cls.__name__} lacks {', '.join(lacking)}.")
    if not cls.name.isidentifier() or cls.name == ALL:
        raise PluginError(
            f"{origin}: '{cls.name}' is not a usable name; use letters, digits and _."
        )
    return cls()
