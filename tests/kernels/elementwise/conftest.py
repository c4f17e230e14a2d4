"""Make the shared script available to the tests of this folder."""

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cases():
    path = Path(__file__).with_name("elementwise_cases.py")
    spec = importlib.util.spec_from_file_location("elementwise_cases", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["elementwise_cases"] = module
    spec.loader.exec_module(module)
    return module
