"""Make `mambench` importable from the checkout, as run_bench.py does, without its root on sys.path."""

import runpy
from pathlib import Path

_package = Path(__file__).resolve().parent.parent / "mambench"
runpy.run_path(str(_package / "_start.py"))["load_package"](_package)
