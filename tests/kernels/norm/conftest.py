"""Make the shared script available to the tests of this folder."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cases(load_script):
    return load_script(Path(__file__).with_name("norm_cases.py"))
