"""Make the shared script available to the tests of this folder."""

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cases():
    path = Path(__file__).with_name("norm_cases.py")
    spec = importlib.util.spec_from_file_location("norm_cases", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["norm_cases"] = module
    spec.loader.exec_module(module)
    return module
