"""Make the shared scripts available to the tests of this folder."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def cases(load_script):
    return load_script(HERE / "update_cases.py")


@pytest.fixture(scope="session")
def resources(load_script):
    return load_script(HERE / "update_resources.py")
