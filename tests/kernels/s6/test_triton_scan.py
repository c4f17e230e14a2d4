"""The Triton selective scan without a GPU: in the interpreter, and as compiled for GPUs."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from mambench.kernels.s6 import triton_config, triton_scan

HERE = Path(__file__).parent
CASES = ("segments", "columns", "float16", "bare", "no-softplus", "wide", "started", "started-once")


@pytest.fixture(scope="module")
def interpreted(interpret) -> dict[str, dict[str, str]]:
    return interpret(HERE / "interpret_scan.py", *CASES, "forgotten")


@pytest.mark.parametrize("case", CASES)
def test_interpreted(interpreted, case):
    assert interpreted[case] == {}


def test_interpreter_notices_a_wrong_kernel(interpreted):
    assert {"out", "last", "du", "ddelta"} <= set(interpreted["forgotten"])


ENTRY = "s6 triton bf16 N=16"


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_forward_compiles_without_spills(binaries, capability):
    found = binaries(ENTRY, capability, "segment_end", "scan_forward")
    assert {name: binary.stack_bytes for name, binary in found.items()} == {
        "segment_end": 0,
        "scan_forward": 0,
    }


def test_backward_compiles_without_spills(binaries):
    assert binaries(ENTRY, 90, "scan_backward")["scan_backward"].stack_bytes == 0


def call(draw, *, d_state=16, dtype=torch.bfloat16, seqlen=8192, d_inner=2048):
    """Run a scan and its backward, without a gate."""
    fp32 = torch.float32
    out = triton_scan.selective_scan(
        *(draw(1, d_inner, seqlen, dtype=dtype, grad=True) for _ in range(2)),
        draw(d_inner, d_state, dtype=fp32, grad=True),
        *(draw(1, 1, d_state, seqlen, dtype=dtype, grad=True) for _ in range(2)),
        D=draw(d_inner, dtype=fp32, grad=True),
        delta_softplus=True,
    )
    draw.backward(out)


def test_spills_are_noticed(compile_call, monkeypatch):
    larger = replace(triton_config._BACKWARD[16], outer=4, block=32)
    monkeypatch.setitem(triton_config._BACKWARD, 16, larger)
    found = compile_call(call, 90, "scan_backward")["scan_backward"]
    assert found.stack_bytes > 0
    assert found.spill_accesses > 0


def test_arguments_that_are_one_compile(compile_call):
    one = functools.partial(call, d_state=1, dtype=torch.float32, seqlen=1, d_inner=1)
    assert {"scan_forward", "scan_backward"} <= set(compile_call(one, 90))
