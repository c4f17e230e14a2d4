"""What the kernels compile to, from the inventory that `check --static` judges too, and scripts."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mambench.harness.static import binary
from mambench.harness.static.record import record

Binaries = Callable[..., dict[str, "Compiled"]]


@pytest.fixture(scope="session")
def load_script() -> Callable[[Path], ModuleType]:
    """Return a function that loads a script as a module named by its file."""

    def load(path: Path) -> ModuleType:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def interpret() -> Callable[..., Any]:
    """Return a function that runs a script in Triton's interpreter: what it printed, of JSON."""
    quick = str(Path(__file__).with_name("quick_interpreter.py"))

    def run(script: Path, *words: str) -> Any:
        done = subprocess.run(
            [sys.executable, quick, str(script), *words],
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, check=False, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture(scope="session")
def binaries() -> Binaries:
    """Return a function of an entry's name, an architecture and kernels' names: {name: binary}.

    Of a kernel that is launched in several forms, the one with the largest stack.
    """
    from mambench.kernels.inventory import ENTRIES

    calls = {entry.name: entry.call for entry in ENTRIES}

    @functools.cache
    def of(entry: str, architecture: int, *kernels: str) -> dict[str, Compiled]:
        return compiled(calls[entry], architecture, *kernels)

    return of


@pytest.fixture(scope="session")
def compile_call() -> Binaries:
    """Return the same of a call that is not in the inventory; nothing is remembered."""
    return compiled


class Compiled:
    """A kernel's `Binary`, disassembled when more than its registers and stack is asked for."""

    def __init__(self, made: Any) -> None:
        self._made = made
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            usage = binary._USAGE.search(binary._dump(file.name, "-res-usage"))
        self.registers, self.stack_bytes = map(int, usage.groups())
        self.shared_bytes = made.metadata.shared

    def __getattr__(self, name: str) -> Any:
        read = binary.Binary.of(self._made)
        vars(self).update(vars(read))
        return vars(self)[name]


def compiled(call: Callable, architecture: int, *kernels: str) -> dict[str, Compiled]:
    found: dict[str, Compiled] = {}
    for launch in record(call, architecture):
        if kernels and launch.name not in kernels:
            continue
        made = Compiled(launch.compile())
        kept = found.get(launch.name)
        if kept is None or made.stack_bytes > kept.stack_bytes:
            found[launch.name] = made
    assert set(kernels) <= set(found)
    return found
