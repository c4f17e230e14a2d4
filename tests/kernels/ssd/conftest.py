"""Make the shared scripts available to the tests of this folder."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def beside(name):
    """Load a script of this folder as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def cases():
    return beside("ssd_cases")


@pytest.fixture(scope="session")
def hopper_judged():
    """Judge cases of the Hopper SSD on the CPU in a process of its own; errors by name."""

    def judged(jobs):
        script = Path(__file__).with_name("hopper_cases.py")
        command = [sys.executable, script, json.dumps(list(jobs.values()))]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
        assert done.returncode == 0, done.stderr[-2000:]
        return dict(zip(jobs, json.loads(done.stdout), strict=True))

    return judged


@pytest.fixture(scope="session")
def resources():
    return beside("ssd_resources")


@pytest.fixture(scope="session")
def machine_code():
    return beside("machine_code")


@pytest.fixture
def poisoned():
    """Fill uninitialised memory with NaN, so that what is never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
