"""Run a module of this package in a new interpreter.

`python -P _start.py harness.module [argument ...]` works in a checkout, where the package is not on
`sys.path`, and in an installation alike. `--code ROOT` before the module takes what is measured,
the packages `implementations` and `kernels`, from another checkout: one harness can so measure two
versions of them.
"""

import importlib.util
import runpy
import sys
from pathlib import Path
from types import ModuleType

MEASURED = ("implementations", "kernels")


def load_package(folder: Path, code: Path | None = None) -> None:
    """Make `mambench` importable from its folder without putting the checkout's root on sys.path.

    The root holds folders named `kernels`, `harness` and `reports`, which would hide other
    packages of those names.

    Args:
        folder: of the package.
        code: the root of the checkout that the measured packages come from; this one if None.
    """
    if "mambench" in sys.modules:
        return
    _load("mambench", folder)
    # A package that is loaded already is found before any path is searched.
    for name in MEASURED if code else ():
        assert code is not None
        setattr(sys.modules["mambench"], name, _load(f"mambench.{name}", code / name))


def _load(name: str, folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[name] = package
    spec.loader.exec_module(package)
    return package


if __name__ == "__main__":
    code = None
    if sys.argv[1] == "--code":
        code = Path(sys.argv[2])
        del sys.argv[1:3]
    load_package(Path(__file__).resolve().parent, code)
    module = f"mambench.{sys.argv[1]}"
    del sys.argv[1]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
