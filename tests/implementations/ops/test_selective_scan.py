import dataclasses

import pytest
import torch

from mambench.harness.spec import Case, Device, DeviceKind, DType, Family, Pass, Problem
from mambench.implementations.ops import selective_scan as module
from mambench.implementations.ops.selective_scan import SelectiveScan

CPU = Device(kind=DeviceKind.CPU, name="a processor", memory_bytes=1 << 34)
HOPPER = Device(
    kind=DeviceKind.CUDA, name="a Hopper", compute_capability=(9, 0), memory_bytes=1 << 36
)
TURING = dataclasses.replace(HOPPER, name="a Turing", compute_capability=(7, 5))


def case(variant="numba", *, pass_=Pass.FORWARD, dtype=DType.FP32, **sizes) -> Case:
    sizes = {"batch": 1, "seqlen": 256, "d_inner": 64, "d_state": 16, "ngroups": 1} | sizes
    return Case(
        implementation="selective_scan",
        variant=variant,
        problem=Problem(family=Family.S6, **sizes),
        pass_=pass_,
        dtype=dtype,
    )


def test_one_variant_per_device():
    assert [v.name for v in SelectiveScan().variants(CPU)] == ["numba"]
    assert "triton" in [v.name for v in SelectiveScan().variants(HOPPER)]


def test_missing_libraries_are_named(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    for device, library in ((CPU, "numba"), (HOPPER, "triton")):
        by_name = {v.name: v for v in SelectiveScan().variants(device)}
        assert by_name[library].unavailable == f"{library} is not installed: pip install {library}"


def test_old_gpus_are_refused():
    by_name = {v.name: v for v in SelectiveScan().variants(TURING)}
    assert by_name["triton"].unavailable == "needs compute capability 8.0, a Turing has 7.5"


@pytest.mark.parametrize(
    ("question", "device", "part"),
    [
        (case(), CPU, None),
        (case(d_state=257), CPU, "at most 256, got 257"),
        (case(dtype=DType.FP64), CPU, None),
        (case("triton", dtype=DType.FP64), HOPPER, "fp32, fp16 or bf16"),
        (case("triton", dtype=DType.BF16), HOPPER, None),
    ],
)
def test_unsupported(question, device, part):
    reason = SelectiveScan().unsupported(question, device)
    assert reason is None if part is None else part in reason


def test_op_computes():
    op = SelectiveScan().op(Family.S6, "numba")
    ones = torch.ones(1, 1, 3)
    # h: 1, then e^-1 + 1, then e^-2 + e^-1 + 1
    out, last = op(
        ones, ones, torch.full((1, 1), -1.0), ones[:, None], ones[:, None], return_last_state=True
    )
    e = torch.exp(torch.tensor(-1.0))
    want = torch.stack([torch.ones(()), 1 + e, 1 + e + e * e])
    torch.testing.assert_close(out[0, 0], want)
    torch.testing.assert_close(last[0, 0, 0], want[-1])


def test_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="expected numba, triton"):
        SelectiveScan().op(Family.S6, "cuda")


@pytest.mark.parametrize("variant", ["numba", "triton"])
def test_workspace_grows_with_the_backward(variant):
    implementation = SelectiveScan()
    forward = implementation.workspace_bytes(case(variant, seqlen=8192))
    training = implementation.workspace_bytes(case(variant, seqlen=8192, pass_=Pass.TRAINING))
    assert 0 <= forward < training


def test_narrow_inputs_cost_copies_on_the_cpu():
    implementation = SelectiveScan()
    wide = implementation.workspace_bytes(case(seqlen=8192))
    narrow = implementation.workspace_bytes(case(seqlen=8192, dtype=DType.BF16))
    assert narrow == wide + 3 * 4 * 64 * 8192


def test_precompile_leaves_nothing_to_compile():
    from mambench.kernels.s6 import numba_kernels

    SelectiveScan().precompile(case(dtype=DType.BF16))
    compiled = len(numba_kernels.forward.signatures)
    op = SelectiveScan().op(Family.S6, "numba")
    x = torch.ones(1, 2, 3)
    op(x, x, -torch.ones(2, 4), torch.ones(1, 1, 4, 3), torch.ones(1, 1, 4, 3), z=x)
    assert compiled == len(numba_kernels.forward.signatures) >= 1
