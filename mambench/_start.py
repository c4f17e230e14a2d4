"""Run a module of this package in a new interpreter.

`python -P _start.py harness.module [argument ...]` works in a checkout, where the package is not on
`sys.path`, and in an installation alike.
"""

import importlib.util
import runpy
import sys
from pathlib import Path


def load_package(folder: Path) -> None:
    """Make `mambench` importable from its folder without putting the checkout's root on sys.path.

    The root holds folders named `kernels`, `harness` and `reports`, which would hide other
    packages of those names.
    """
    if "mambench" in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(
        "mambench", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["mambench"] = package
    spec.loader.exec_module(package)


if __name__ == "__main__":
    load_package(Path(__file__).resolve().parent)
    module = f"mambench.{sys.argv[1]}"
    del sys.argv[1]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
