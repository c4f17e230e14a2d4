"""Finds implementations: built in, by entry point (`mambench.implementations`), by `--plugin`.

Names are resolved lazily and without torch: an implementation's module imports it only when its
operation is asked for.
"""

import fnmatch
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from mambench.harness.errors import PluginError, UsageError, unknown_name
from mambench.harness.profilers.base import is_profiler
from mambench.harness.spec import Family, digest
from mambench.implementations.base import Implementation

ENTRY_POINT_GROUP = "mambench.implementations"

BUILT_IN: Mapping[str, str] = {
    "naive_recurrence": "mambench.implementations.ops.naive_recurrence:NaiveRecurrence",
    "associative_scan": "mambench.implementations.ops.associative_scan:AssociativeScan",
    "selective_scan": "mambench.implementations.ops.selective_scan:SelectiveScan",
    "ssd": "mambench.implementations.ops.ssd:Ssd",
    "flash_attention": "mambench.implementations.ops.flash_attention:FlashAttention",
    "mamba_ssm_scan": "mambench.implementations.peers.mamba_ssm:MambaSsmScan",
    "mamba_ssm_ssd": "mambench.implementations.peers.mamba_ssm:MambaSsmSsd",
    "fla_simple_gla": "mambench.implementations.peers.fla:FlaSimpleGla",
    "flashinfer_update": "mambench.implementations.peers.flashinfer:FlashinferUpdate",
}


def load(plugins: Sequence[str] = ()) -> dict[str, Implementation]:
    """Return every implementation by name: built-ins, entry points, then plugins.

    Args:
        plugins: importable modules (`package.module`) or files (`path/to/file.py`); every public
            subclass of Implementation that a plugin defines is taken.

    Raises PluginError if one cannot be loaded, is incomplete, or its name is taken already.
    """
    found: dict[str, Implementation] = {}
    origins: dict[str, str] = {}
    for origin, cls in _classes(plugins):
        implementation = _instantiate(cls, origin)
        name = implementation.name
        if name in found:
            raise PluginError(
                f"two implementations are named '{name}': {origins[name]} and {origin}. "
                f"Rename one of them."
            )
        found[name] = implementation
        origins[name] = origin
    return found


def get(name: str, plugins: Sequence[str] = ()) -> Implementation:
    """Return one implementation; raises UsageError with the nearest name if there is none."""
    if name in BUILT_IN and not plugins:
        return _instantiate(attribute(BUILT_IN[name], BUILT_IN[name]), BUILT_IN[name])
    found = load(plugins)
    if name not in found:
        raise UsageError(unknown_name("implementation", name, found))
    return found[name]


def ask(implementation: Implementation, method: str, *arguments: Any) -> Any:
    """Call a method that planning needs; raises PluginError, saying where, if it raises."""
    try:
        return getattr(implementation, method)(*arguments)
    except Exception as error:  # it may be a person's plugin: one line for them, not a traceback
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise PluginError(
            f"implementation '{implementation.name}': {method} raised {_brief(error)} "
            f"({frame.filename}:{frame.lineno})."
        ) from error


def match(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names that a glob matches, in their order; raises UsageError if there are none."""
    names = list(names)
    matched = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    if not matched:
        raise UsageError(unknown_name("implementation", pattern, names))
    return matched


def normalise(plugin: str) -> str:
    """Return a plugin as a worker can load it from anywhere: a file's path made absolute."""
    return str(Path(plugin).expanduser().resolve()) if _is_file(plugin) else plugin


def _is_file(plugin: str) -> bool:
    return plugin.endswith(".py") or "/" in plugin


def _classes(plugins: Sequence[str]) -> Iterator[tuple[str, type[Any]]]:
    for target in BUILT_IN.values():
        yield target, attribute(target, target)
    for point in entry_points(group=ENTRY_POINT_GROUP):
        yield point.value, attribute(point.value, f"entry point '{point.name}'")
    for plugin in dict.fromkeys(plugins):
        classes = defined_in(plugin, _is_implementation)
        if not classes and not defined_in(plugin, is_profiler):
            raise PluginError(
                f"plugin '{plugin}' defines neither an implementation (a public subclass of "
                f"mambench.implementations.base.Implementation with name, families and summary) "
                f"nor a profiler (mambench.harness.profilers.base.CaseProfiler or BatchProfiler)."
            )
        for cls in classes:
            yield f"plugin {plugin}", cls


def defined_in(plugin: str, accepts: Callable[[object], bool]) -> list[type[Any]]:
    """Return the public classes of a kind that a plugin defines; raises PluginError.

    A plugin may import what another plugin defines; a class counts once, where it is defined.
    """
    module = _import_plugin(plugin)
    return [
        value
        for name, value in vars(module).items()
        if accepts(value) and value.__module__ == module.__name__ and name[0] != "_"
    ]


def _is_implementation(value: object) -> bool:
    return (
        isinstance(value, type)
        and issubclass(value, Implementation)
        and not inspect.isabstract(value)
    )


def attribute(target: str, origin: str) -> type[Any]:
    """Return what `module:name` stands for; raises PluginError, naming where that was said."""
    module_name, _, attribute = target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a foreign module raises must reach the person as one line
        raise PluginError(f"{origin}: importing {module_name} failed: {_brief(error)}") from error
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        raise PluginError(f"{origin}: {module_name} has no '{attribute}'.") from error


def _import_plugin(plugin: str) -> ModuleType:
    try:
        if _is_file(plugin):
            return _import_file(Path(plugin))
        return importlib.import_module(plugin)
    except PluginError:
        raise
    except (Exception, SystemExit) as error:  # see above; a script may also end itself
        hint = ""
        if isinstance(error, ModuleNotFoundError):
            hint = "; install it, or name its folder in PYTHONPATH"
        said = f"plugin '{plugin}' cannot be imported: {_brief(error)}{hint}"
        raise PluginError(said) from error


def beside(path: Path) -> list[str]:
    """Return the folders in which a plugin's file finds its package though it is not installed.

    As a script does: its own folder, and src/ in it; not those that are on sys.path already. They
    come last, so that nothing which lies there hides what is installed.
    """
    folder = path.expanduser().resolve().parent
    found = [str(each) for each in (folder / "src", folder) if each.is_dir()]
    return [each for each in found if each not in sys.path]


def _import_file(path: Path) -> ModuleType:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise PluginError(f"plugin '{path}' is not a file.")
    # Named by its path, so that two plugins called alike do not replace each other.
    name = f"mambench_plugin_{path.stem}_{digest(str(path))}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise PluginError(f"plugin '{path}' is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.path.extend(beside(path))
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _instantiate(cls: type[Any], origin: str) -> Implementation:
    if not _is_implementation(cls):
        raise PluginError(f"{origin} is not a complete subclass of Implementation: {cls!r}.")
    lacking = [field for field in ("name", "families", "summary") if not hasattr(cls, field)]
    if lacking:
        raise PluginError(f"{origin}: class {cls.__name__} lacks {', '.join(lacking)}.")
    name, families = cls.name, cls.families
    if not name or set(name) & set(":*?[],= "):
        raise PluginError(
            f"{origin}: '{name}' is not a usable name; use letters, digits, _ - and dot."
        )
    if not families or not all(isinstance(family, Family) for family in families):
        raise PluginError(
            f"{origin}: families must be a tuple of Family members, got {families!r}."
        )
    return cls()


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
