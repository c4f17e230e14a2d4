"""Give the tests of this folder the literal scan, and the Hopper backward's tests what they share.

Both are plain modules beside them.
"""

import contextlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch


def beside(name: str) -> ModuleType:
    """Import a script of this folder, once."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


with contextlib.suppress(ImportError):  # without Gluon, and then its tests are skipped
    beside("backward_cases")


@pytest.fixture(scope="session")
def literal() -> ModuleType:
    return beside("literal")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty returns with NaN, so that an element left unwritten shows."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def poison(*args: object, original=original, **kwargs: object) -> torch.Tensor:
            tensor = original(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.dtype.is_floating_point else tensor

        monkeypatch.setattr(torch, name, poison)
