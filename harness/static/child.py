"""Compiles the inventory of one side and writes what its binaries take; a process of its own.

`harness.static.check` starts it, with the side's code. Compiled kernels' figures are kept in a
cache by everything that decides the machine code; the binaries themselves are not kept.
"""

# Triton has no types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import argparse
import hashlib
import importlib.util
import json
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mambench.harness.static.binary import Binary
from mambench.harness.static.record import Launch, record

VERSION = 1  # of what is kept of a kernel


def main(arguments: Sequence[str]) -> None:
    """Compile an inventory; the result is a JSON file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--inventory", type=Path, action="append", required=True)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--path", action="append", default=[])
    parser.add_argument("--architecture", type=int, action="append", default=[])
    parser.add_argument("--entries")
    # What the other side launches alike, as `launched` has it: needs no binary to be the same.
    parser.add_argument("--alike", type=Path)
    parser.add_argument("--list", action="store_true")  # what is launched, and compile nothing
    asked = parser.parse_args(arguments)
    sys.path[:0] = asked.path
    _forget_positions()
    named: dict[str, Any] = {}
    for path in asked.inventory:  # the first that has an entry of a name
        named = {entry.name: entry for entry in load(path)} | named
    entries = [entry for name, entry in named.items() if not asked.entries or asked.entries in name]
    alike: Any = json.loads(asked.alike.read_text()) if asked.alike else []
    with tempfile.TemporaryDirectory(prefix="mambench-triton-") as folder:
        if asked.list:
            result = [launched(kernel) for kernel in _asked(entries, asked.architecture)]
        else:
            result = compiled(entries, asked.architecture, asked.cache, Path(folder), alike)
    asked.output.write_text(json.dumps(result, indent=1) + "\n")


def launched(kernel: dict[str, Any]) -> list[Any]:
    """Return what a kernel is called in a check, and the digest of all that makes its binary."""
    return [kernel[name] for name in ("entry", "kernel", "number", "architecture", "key")]


def load(path: Path) -> Iterable[Any]:
    """Return the ENTRIES of an inventory file."""
    name = f"mambench_inventory_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.ENTRIES


def _forget_positions() -> None:
    """Keep a function's line number out of its hash, and lines and paths out of binaries.

    Code that has only moved in its file is not changed code.
    """
    from triton import knobs
    from triton.runtime import jit

    knobs.compilation.disable_line_info = True
    make: Any = jit.JITCallable.__init__

    def init(self: Any, *arguments: Any, **named: Any) -> None:
        make(self, *arguments, **named)
        self.starting_line_number = 0

    jit.JITCallable.__init__ = init  # pyright: ignore[reportAttributeAccessIssue]


def compiled(
    entries: Iterable[Any],
    architectures: Sequence[int],
    cache: Path | None,
    folder: Path,
    alike: Sequence[list[Any]] = (),
) -> dict[str, Any]:
    """Return every kernel of the entries with its figures, or with why there are none.

    What the other side launches `alike` is left out, unless the cache has it.
    """
    import triton
    from triton import knobs

    knobs.cache.dir = str(folder)
    kernels, waiting, found = _asked(entries, architectures), {}, {}
    for kernel in kernels:
        launch: Launch | None = kernel.pop("launch", None)
        if launch is None or kernel["key"] in found or kernel["key"] in waiting:
            continue
        kept = _kept(cache, kernel["key"])
        if kept is not None:
            found[kernel["key"]] = kept
        elif launched(kernel) not in alike:
            waiting[kernel["key"]] = launch
    cached = len(found)
    for key, result in _compile_all(waiting):
        found[key] = result
        if cache is not None and "error" not in result:
            _keep(cache, key, result)
    return {
        "schema": VERSION,
        "triton": triton.__version__,
        "compiled": len(waiting),
        "cached": cached,
        "kernels": [kernel | found.get(kernel["key"], {}) for kernel in kernels],
    }


def _asked(entries: Iterable[Any], architectures: Sequence[int]) -> list[dict[str, Any]]:
    """Return what each entry launches on each architecture; equal launches of an entry once."""
    import triton

    asked: list[dict[str, Any]] = []
    for entry in entries:
        for architecture in entry.architectures:
            if architectures and architecture not in architectures:
                continue
            where = {"entry": entry.name, "architecture": architecture}
            try:
                launches = record(entry.call, architecture)
            except Exception:  # the entry's own code, on one architecture
                said = traceback.format_exc(limit=-3).strip()
                asked.append({**where, "kernel": "", "number": 1, "key": "", "error": said})
                continue
            seen: dict[str, int] = {}
            keys: set[str] = set()
            for launch in launches:
                key = key_of(launch, triton.__version__)
                if key in keys:
                    continue
                keys.add(key)
                seen[launch.name] = seen.get(launch.name, 0) + 1
                named = {"kernel": launch.name, "number": seen[launch.name], "key": key}
                more = {"source": launch.kernel.cache_key, "configuration": launch.configuration}
                asked.append({**where, **named, **more, "launch": launch})
    return asked


def key_of(launch: Launch, version: str) -> str:
    """Return a digest of everything that decides a launch's machine code."""
    options = sorted((name, str(value)) for name, value in launch.options.__dict__.items())
    parts = (VERSION, version, launch.architecture, launch.source.hash(), options)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


_tasks: dict[str, Launch] = {}


def _compile_all(tasks: dict[str, Launch]) -> Iterable[tuple[str, dict[str, Any]]]:
    """Compile on all cores, in processes forked from this one: launches cannot be sent.

    Yields each as soon as it is done, so that who is ended early keeps what was compiled by then.
    """
    if not tasks:
        return
    _tasks.clear()
    _tasks.update(tasks)
    workers = min(len(tasks), len(os.sched_getaffinity(0)))
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        yield from pool.imap_unordered(_compile_one, list(tasks))


def _compile_one(key: str) -> tuple[str, dict[str, Any]]:
    try:
        return key, Binary.of(_tasks[key].compile()).to_dict()
    except Exception as error:  # a compiler's: of any type
        return key, {"error": f"{type(error).__name__}: {error}"[:2000]}


def _kept(cache: Path | None, key: str) -> dict[str, Any] | None:
    if cache is None:
        return None
    try:
        found = json.loads((cache / f"{key}.json").read_text())
        return Binary(**found).to_dict()
    except (OSError, ValueError, TypeError):
        return None


def _keep(cache: Path, key: str, result: dict[str, Any]) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    temporary = cache / f".{key}.{os.getpid()}"
    temporary.write_text(json.dumps(result) + "\n")
    temporary.replace(cache / f"{key}.json")


if __name__ == "__main__":
    main(sys.argv[1:])
