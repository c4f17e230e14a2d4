"""Which kernel of selective_scan a plan takes, decided from the device and metadata alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mambench.harness.spec import Case, Device, DeviceKind, DType, Family, Pass, Problem
from mambench.implementations import hopper
from mambench.implementations.ops import selective_scan
from mambench.implementations.ops.selective_scan import SelectiveScan

ROOT = Path(__file__).parents[3]


def gpu(capability: tuple[int, int]) -> Device:
    return Device(
        kind=DeviceKind.CUDA, name="GPU", compute_capability=capability, memory_bytes=1 << 34
    )


def case(variant: str, dtype: DType = DType.BF16, pass_: Pass = Pass.FORWARD) -> Case:
    problem = Problem(family=Family.S6, batch=1, seqlen=1024, d_inner=64, d_state=16, ngroups=1)
    return Case(
        implementation="selective_scan", variant=variant, problem=problem, pass_=pass_, dtype=dtype
    )


@pytest.fixture
def triton_is(monkeypatch: pytest.MonkeyPatch):
    """Pretend that a version of Triton is installed, or none (None)."""

    def pretend(found: str | None) -> None:
        monkeypatch.setattr(hopper, "_version", {"triton": found}.get)
        monkeypatch.setattr(selective_scan, "_missing", lambda module: None)

    return pretend


def test_hopper_comes_first_on_hopper(triton_is) -> None:
    triton_is("3.6.0")
    variants = SelectiveScan().variants(gpu((9, 0)))
    assert [(v.name, v.unavailable) for v in variants] == [("hopper", None), ("triton", None)]


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_other_gpus_run_the_portable_kernel(triton_is, capability) -> None:
    triton_is("3.6.0")
    first, second = SelectiveScan().variants(gpu(capability))
    assert (first.name, first.unavailable) == ("triton", None)
    assert second.name == "hopper"
    assert "needs compute capability 9.0" in str(second.unavailable)


@pytest.mark.parametrize("found", ["3.5.1", "3.7.0", "3.60.0", "4.3.6"])
def test_another_triton_is_named_with_the_install_command(triton_is, found) -> None:
    triton_is(found)
    hopper, portable = SelectiveScan().variants(gpu((9, 0)))
    assert found in str(hopper.unavailable)
    assert "pip install 'triton==3.6.*'" in str(hopper.unavailable)
    assert portable.unavailable is None


def test_no_triton_at_all(triton_is) -> None:
    triton_is(None)
    hopper, _ = SelectiveScan().variants(gpu((9, 0)))
    assert "not installed" in str(hopper.unavailable)


def test_planning_imports_neither_torch_nor_triton() -> None:
    program = f"""
import json, runpy, sys
from pathlib import Path
package = Path({str(ROOT / "mambench")!r})
runpy.run_path(str(package / "_start.py"))["load_package"](package)
from mambench.harness.spec import Device, DeviceKind
from mambench.implementations.ops.selective_scan import SelectiveScan
device = Device(kind=DeviceKind.CUDA, name="GPU", compute_capability=(9, 0), memory_bytes=1)
names = [v.name for v in SelectiveScan().variants(device)]
print(json.dumps([names, "torch" in sys.modules, "triton" in sys.modules]))
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert json.loads(ran.stdout) == [["hopper", "triton"], False, False]


def test_float64_is_declined() -> None:
    reason = SelectiveScan().unsupported(case("hopper", DType.FP64), gpu((9, 0)))
    assert "hopper" in str(reason)
    assert SelectiveScan().unsupported(case("hopper"), gpu((9, 0))) is None


def test_only_a_gradient_needs_kept_states() -> None:
    scan = SelectiveScan()
    last_state = 4 * 64 * 16
    assert scan.workspace_bytes(case("hopper")) == last_state
    both = case("hopper", pass_=Pass.TRAINING)
    assert scan.workspace_bytes(both) > 16 * last_state
