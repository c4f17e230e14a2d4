"""Make the shared scripts available to the tests of this folder."""

import importlib.util
import sys
from pathlib import Path

import pytest


def beside(name):
    """Load a script of this folder as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def cases():
    return beside("update_cases")


@pytest.fixture(scope="session")
def resources():
    return beside("update_resources")
