"""What runs the kernels' tests quickly gives the bits of Triton's own interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_it_gives_the_bits_of_the_interpreter_and_a_fault_in_it_is_noticed():
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("interpreter_cases.py"))],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "unequal": [],
        "noticed": ["arithmetic", "products", "added"],
    }
