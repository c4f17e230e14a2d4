import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mambench.harness import machine  # noqa: E402
from mambench.harness.profilers import memory  # noqa: E402
from mambench.harness.spec import Pass  # noqa: E402

_PATH = Path(__file__).parents[2] / "faults" / "planning.py"
_SPEC = importlib.util.spec_from_file_location("planning", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
planning = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(planning)


class Meter:
    method = "fake"

    def settle(self) -> None:
        """Nothing to settle."""

    def reset_peak(self) -> None:
        """Nothing to reset."""

    def level(self) -> int:
        return 1000

    def peak(self) -> int:
        return 5096

    def peak_reserved(self) -> int:
        return 8192


def context(pass_: Pass, forward: Callable[[], object]) -> Any:
    x = torch.randn(256, requires_grad=pass_.needs_grad)
    workload = SimpleNamespace(inputs={"x": x}, forward=forward)
    return SimpleNamespace(
        case=planning.case("good", pass_=pass_),
        device=machine.cpu(),
        tuned_malloc=True,
        workload=lambda: workload,
        execute=lambda: lambda: (torch.zeros(128),),
        release=lambda inputs=True: None,
    )


def measured(monkeypatch: pytest.MonkeyPatch, pass_: Pass, forward: Callable[[], object]) -> Any:
    monkeypatch.setattr(memory, "_meter", lambda device, tuned: Meter())
    return memory.Memory().measure(context(pass_, forward))


def test_tensors_are_told_apart_by_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    leaf = torch.randn(64, requires_grad=True)
    found = measured(monkeypatch, Pass.TRAINING, lambda: leaf.exp())
    assert found.values == {
        "peak_memory_bytes": 4096,
        "extra_memory_bytes": 4096,
        "peak_reserved_bytes": 8192,
        "input_bytes": 1024,
        "output_bytes": 512,
        "saved_bytes": 256,
    }
    assert [row["kind"] for row in found.details["largest"]] == ["input", "output", "saved"]
    assert found.details["largest"][0]["share"] == 0.25


def test_a_pass_without_gradients_saves_nothing_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = measured(monkeypatch, Pass.FORWARD, lambda: pytest.fail("no second forward"))
    assert found.values["saved_bytes"] is None
    assert "no gradients" in found.details["missing_values"]["saved_bytes"]


def test_a_second_forward_that_does_not_fit_costs_only_its_own_figure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forward() -> object:
        raise RuntimeError("CUDA out of memory. Tried to allocate 9 GiB")

    found = measured(monkeypatch, Pass.TRAINING, forward)
    assert found.values["peak_memory_bytes"] == 4096
    assert found.values["saved_bytes"] is None
    assert "did not suffice" in found.details["missing_values"]["saved_bytes"]


def test_another_error_of_it_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward() -> object:
        raise RuntimeError("an illegal address")

    with pytest.raises(RuntimeError, match="illegal address"):
        measured(monkeypatch, Pass.TRAINING, forward)
