"""Make `mambench` importable from the checkout, as run_bench.py does, without its root on sys.path.

Each process of the tests has a temporary folder of its own: device locks live there, so that tests
neither wait for one another nor for a run that someone has started on this machine.
"""

import atexit
import gc
import os
import runpy
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

# An installation has a plugin of ours, for whose sake pytest would take apart and write anew the
# assertions of the whole package: seconds in each process, and not the code that users run.
for _finder in sys.meta_path:
    getattr(_finder, "_must_rewrite", set()).discard("mambench")

_package = Path(__file__).resolve().parent.parent / "mambench"
runpy.run_path(str(_package / "_start.py"))["load_package"](_package)

_temporary = tempfile.mkdtemp(prefix="mambench-tests-")
atexit.register(shutil.rmtree, _temporary, ignore_errors=True)
os.environ["TMPDIR"] = _temporary
tempfile.tempdir = None  # read TMPDIR again


def pytest_collection_finish() -> None:
    """Keep what all tests share out of garbage collections: those we measure begin with one."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Let torch compute with one thread: tensors are small here, and other tests run beside."""
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "set_num_threads"):
        torch.set_num_threads(1)
