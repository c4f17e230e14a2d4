import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mambench.harness.spec import Case, Device, DeviceKind, DType, Family, Pass, Problem
from mambench.implementations import hopper
from mambench.implementations.ops.ssd import Ssd

ROOT = Path(__file__).resolve().parents[3]
CPU = Device(kind=DeviceKind.CPU, name="cpu", memory_bytes=1 << 34)
HOPPER = Device(kind=DeviceKind.CUDA, name="gpu", compute_capability=(9, 0), memory_bytes=80 << 30)
VOLTA = Device(kind=DeviceKind.CUDA, name="gpu", compute_capability=(7, 0), memory_bytes=16 << 30)


def case(variant="triton", *, dtype=DType.BF16, pass_=Pass.TRAINING, **sizes):
    given = {"batch": 1, "seqlen": 4096, "d_inner": 2048, "headdim": 64, "d_state": 128, **sizes}
    problem = Problem(family=Family.SSD, ngroups=1, **given)
    return Case(implementation="ssd", variant=variant, problem=problem, pass_=pass_, dtype=dtype)


def test_variants_name_the_preferred_one_first():
    assert [v.name for v in Ssd().variants(CPU)] == ["torch"]
    variants = Ssd().variants(HOPPER)
    assert [v.name for v in variants] == ["hopper", "triton", "torch"]
    assert all(v.unavailable is None for v in variants[1:])
    others = Ssd().variants(dataclasses.replace(HOPPER, compute_capability=(8, 0)))
    assert [v.name for v in others] == ["triton", "torch", "hopper"]
    assert others[2].unavailable == "needs compute capability 9.0; gpu has 8.0"


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ("3.6.2", None),
        ("3.60.0", "Triton is version 3.60.0, hopper needs 3.6: pip install"),
        (None, "Triton is not installed, hopper needs 3.6: pip install"),
    ],
)
def test_hopper_needs_the_triton_it_was_written_for(monkeypatch, found, reason):
    monkeypatch.setattr(hopper, "_version", lambda name: found)
    unavailable = Ssd().variants(HOPPER)[0].unavailable
    assert unavailable is None if reason is None else unavailable.startswith(reason)


def test_an_old_gpu_is_told_why_and_may_use_torch():
    triton, torch_variant, _ = Ssd().variants(VOLTA)
    assert "8.0" in triton.unavailable
    assert torch_variant.unavailable is None


def test_without_triton_the_variant_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    by_name = {v.name: v for v in Ssd().variants(HOPPER)}
    assert "pip install" in by_name["triton"].unavailable


@pytest.mark.parametrize(
    ("limited", "reason"),
    [
        (case(headdim=256), "headdim is at most 128"),
        (case(d_state=512), "d_state at most 256"),
        (case(dtype=DType.FP64), "fp32, fp16 and bf16"),
    ],
)
def test_limits_of_the_triton_kernels_are_named(limited, reason):
    assert reason in Ssd().unsupported(limited, HOPPER)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"headdim": 256}, "headdim 256"),
        ({"headdim": 4}, "headdim 4"),
        ({"d_state": 256}, "d_state 256"),
        ({"d_state": 20}, "d_state 20"),
        ({"dtype": DType.FP32}, "takes bf16 and fp16"),
    ],
)
def test_what_is_beyond_hopper_is_named_and_left_to_triton(changes, reason):
    assert reason in Ssd().unsupported(case("hopper", **changes), HOPPER)
    if changes.get("headdim") != 256:
        assert Ssd().unsupported(case("triton", **changes), HOPPER) is None


def test_hopper_takes_what_its_launcher_takes():
    pytest.importorskip("triton.experimental.gluon")
    from mambench.kernels.ssd.hopper_ssd import supported

    for headdim in (4, 8, 60, 64, 128, 136):
        for d_state in (8, 20, 128, 256):
            sizes = {"headdim": headdim, "d_state": d_state}
            answer = Ssd().unsupported(case("hopper", **sizes), HOPPER)
            assert answer == supported(**sizes, dtype=torch.bfloat16)


def test_what_the_kernels_take_is_supported():
    assert Ssd().unsupported(case(headdim=128, d_state=256), HOPPER) is None
    assert Ssd().unsupported(case("torch", d_state=512, dtype=DType.FP64), CPU) is None


def test_the_torch_operation_has_the_interface_of_its_family():
    op = Ssd().op(Family.SSD, "torch")
    x, B = torch.randn(2, 9, 4, 8), torch.randn(2, 9, 2, 4)
    out, final = op(x, torch.rand(2, 9, 4), -torch.rand(4), B, B, 256, return_final_states=True)
    assert out.shape == x.shape
    assert final.shape == (2, 4, 8, 4)
    assert final.dtype is torch.float32


@pytest.mark.parametrize("variant", ["hopper", "triton", "torch"])
def test_workspace_grows_with_the_pass_and_the_length(variant):
    def workspace(**changes):
        return Ssd().workspace_bytes(case(variant, **changes))

    assert 0 < workspace(pass_=Pass.FORWARD) < workspace(pass_=Pass.BACKWARD)
    assert workspace(seqlen=8192) > 1.25 * workspace()


def test_planning_imports_neither_torch_nor_triton():
    code = f"""
import runpy, sys
from pathlib import Path
package = Path({str(ROOT)!r}) / "mambench"
runpy.run_path(str(package / "_start.py"))["load_package"](package)
from mambench.harness.spec import Case, Device, DeviceKind, DType, Family, Pass, Problem
from mambench.implementations.ops.ssd import Ssd
device = Device(kind=DeviceKind.CUDA, name="g", compute_capability=(9, 0), memory_bytes=1)
problem = Problem(
    family=Family.SSD, batch=1, seqlen=64, d_inner=128, headdim=64, d_state=16, ngroups=1
)
for variant in Ssd().variants(device):
    case = Case(implementation="ssd", variant=variant.name, problem=problem,
                pass_=Pass.TRAINING, dtype=DType.BF16)
    Ssd().unsupported(case, device), Ssd().workspace_bytes(case)
assert not {{"torch", "triton"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_variants_agree_on_the_gpu():
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, device="cuda", generator=generator)

    arguments = (
        normal(1, 300, 4, 64), normal(1, 300, 4), -normal(4).abs(), normal(1, 300, 1, 64),
        normal(1, 300, 1, 64), 256,
    )  # fmt: skip
    got, want = (
        Ssd().op(Family.SSD, variant)(*arguments, dt_softplus=True)
        for variant in ("triton", "torch")
    )
    assert (got - want).norm() < 1e-5 * want.norm()
